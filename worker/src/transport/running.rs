//! A running command, local or by SSH: its input, its outputs and its end.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Sink, SinkExt};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep_until};

use super::output::OUTPUT_MAX;
use super::{Error, Output, local, ssh};

/// Bytes of the input read at a time.
const PIECE: usize = 64 << 10;

/// How long a command may stall, with no byte moving in either direction. Evaluated again after each move; the argument
/// is whether the command has received all its input.
pub(super) type Limit<'a> = &'a (dyn Fn(bool) -> Duration + Sync);

/// An item of a command's output.
#[derive(Debug)]
pub(super) enum Item {
    Stdout(Bytes),
    Stderr(Bytes),
    /// The last item.
    Ended {
        exit: Option<i32>,
        signal: Option<String>,
    },
}

/// A command. Dropping it before [`Item::Ended`] kills the command.
#[derive(Debug)]
pub(super) enum Running {
    Local(local::Command),
    Ssh(ssh::Command),
}

/// The standard input of a command.
pub(super) enum Input<'a> {
    Local(&'a mut local::Input),
    Ssh(&'a ssh::Input),
}

/// The outputs of a command.
pub(super) enum Outputs<'a> {
    Local(&'a mut local::Outputs),
    Ssh(&'a mut ssh::Outputs),
}

impl Input<'_> {
    /// Writes all bytes. A command that stops reading is no error here; its exit code decides.
    pub(super) async fn write(&mut self, piece: Bytes) -> Result<(), Error> {
        match self {
            Self::Local(input) => input.write(&piece).await,
            Self::Ssh(input) => input.write(piece).await,
        }
    }

    /// Closes the input.
    pub(super) async fn end(self) -> Result<(), Error> {
        match self {
            Self::Local(input) => {
                input.end();
                Ok(())
            }
            Self::Ssh(input) => input.end().await,
        }
    }
}

impl Outputs<'_> {
    /// Returns the next item. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Item, Error> {
        match self {
            Self::Local(outputs) => outputs.next().await,
            Self::Ssh(outputs) => outputs.next().await,
        }
    }
}

/// The time of the last byte in either direction.
struct Moved(Mutex<Instant>);

impl Moved {
    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn at(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no byte has moved for the limit; never without a limit.
    async fn silence(&self, limit: Option<Duration>) -> Duration {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let until = self.at() + limit;
            if until <= Instant::now() {
                return limit;
            }
            sleep_until(until).await;
        }
    }
}

/// The destination of a command's standard output.
enum Target<S> {
    Memory(Vec<u8>),
    Stream(S),
}

impl Running {
    pub(super) fn halves(&mut self) -> (Input<'_>, Outputs<'_>) {
        match self {
            Self::Local(command) => {
                let (input, outputs) = command.halves();
                (Input::Local(input), Outputs::Local(outputs))
            }
            Self::Ssh(command) => {
                let (input, outputs) = command.halves();
                (Input::Ssh(input), Outputs::Ssh(outputs))
            }
        }
    }

    /// Feeds `input` to the command and keeps its output in memory.
    pub(super) async fn exchange(
        self,
        input: impl AsyncRead + Send + Unpin,
        limit: Option<Limit<'_>>,
    ) -> Result<Output, Error> {
        self.run(input, Target::<Vec<Bytes>>::Memory(Vec::new()), &mut |_| (), limit).await
    }

    /// Streams the command's standard output, and shows its whole standard error whenever that grows.
    pub(super) async fn receive<E: Display>(
        self,
        output: &mut (impl Sink<Bytes, Error = E> + Send + Unpin),
        show: &mut (dyn FnMut(&[u8]) + Send),
        limit: Limit<'_>,
    ) -> Result<Output, Error> {
        self.run(tokio::io::empty(), Target::Stream(output), show, Some(limit)).await
    }

    async fn run<E: Display>(
        mut self,
        input: impl AsyncRead + Send + Unpin,
        mut target: Target<impl Sink<Bytes, Error = E> + Send + Unpin>,
        show: &mut (dyn FnMut(&[u8]) + Send),
        limit: Option<Limit<'_>>,
    ) -> Result<Output, Error> {
        let (stdin, mut outputs) = self.halves();
        let moved = Moved(Mutex::new(Instant::now()));
        let feeding = feed(stdin, input, &moved);
        tokio::pin!(feeding);
        let mut is_fed = false;
        let mut stderr = Vec::new();
        loop {
            let limit = limit.map(|limit| limit(is_fed));
            let item = tokio::select! {
                item = outputs.next() => item?,
                fed = &mut feeding, if !is_fed => {
                    fed?;
                    is_fed = true;
                    continue;
                }
                limit = moved.silence(limit) => {
                    return Err(Error::TimedOut { what: "a pause of the transfer".to_owned(), limit });
                }
            };
            moved.now();
            match item {
                Item::Stdout(piece) => match &mut target {
                    Target::Memory(stdout) => keep(stdout, &piece)?,
                    Target::Stream(output) => {
                        output.feed(piece).await.map_err(stream_error)?;
                        // The receiver may have been slow.
                        moved.now();
                    }
                },
                Item::Stderr(piece) => {
                    keep(&mut stderr, &piece)?;
                    show(&stderr);
                }
                Item::Ended { exit, signal } => {
                    let stdout = match target {
                        Target::Memory(stdout) => stdout,
                        Target::Stream(mut output) => {
                            output.flush().await.map_err(stream_error)?;
                            Vec::new()
                        }
                    };
                    return Ok(Output { exit, signal, stdout, stderr });
                }
            }
        }
    }
}

/// Appends to a kept output.
pub(super) fn keep(kept: &mut Vec<u8>, piece: &[u8]) -> Result<(), Error> {
    if kept.len() + piece.len() > OUTPUT_MAX {
        return Err(Error::TooMuchOutput);
    }
    kept.extend_from_slice(piece);
    Ok(())
}

fn stream_error(error: impl Display) -> Error {
    Error::file("the output of the command", error)
}

/// Feeds the input to the command. If the input cannot be read, the command is killed, so that it never takes a part for
/// the whole.
async fn feed(mut stdin: Input<'_>, mut input: impl AsyncRead + Send + Unpin, moved: &Moved) -> Result<(), Error> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE);
        let count =
            input.read_buf(&mut buffer).await.map_err(|error| Error::file("the input of the command", error))?;
        moved.now();
        if count == 0 {
            return stdin.end().await;
        }
        stdin.write(buffer.split().freeze()).await?;
        moved.now();
    }
}
