//! A command that runs, here or there: what it is fed, what it writes, and its end.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Sink, SinkExt};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep_until};

use super::{Error, OUTPUT_MAX, Output, local, ssh};

/// How much is read at a time from what a command is fed.
const PIECE: usize = 64 << 10;

/// For how long no byte may move, in either direction; asked again whenever one has moved, with whether the command has
/// got everything.
pub(super) type Limit<'a> = &'a (dyn Fn(bool) -> Duration + Sync);

/// What comes from a command.
#[derive(Debug)]
pub(super) enum Event {
    Stdout(Bytes),
    Stderr(Bytes),
    /// The last.
    Ended {
        exit: Option<i32>,
        signal: Option<String>,
    },
}

/// A command. It is killed when this is dropped before [`Event::Ended`].
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
pub(super) enum Events<'a> {
    Local(&'a mut local::Events),
    Ssh(&'a mut ssh::Events),
}

impl Input<'_> {
    /// Writes everything. A command that reads no more is no error: its end tells what it thinks of that.
    pub(super) async fn write(&mut self, piece: Bytes) -> Result<(), Error> {
        match self {
            Self::Local(input) => input.write(&piece).await,
            Self::Ssh(input) => input.write(piece).await,
        }
    }

    /// Nothing follows.
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

impl Events<'_> {
    /// The next event. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Event, Error> {
        match self {
            Self::Local(events) => events.next().await,
            Self::Ssh(events) => events.next().await,
        }
    }
}

/// When a byte has moved last, in either direction.
struct Moved(Mutex<Instant>);

impl Moved {
    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn at(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when nothing has moved for so long; never without a limit.
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

/// Where a command's standard output goes.
enum Target<S> {
    Memory(Vec<u8>),
    Stream(S),
}

impl Running {
    pub(super) fn halves(&mut self) -> (Input<'_>, Events<'_>) {
        match self {
            Self::Local(command) => {
                let (input, events) = command.halves();
                (Input::Local(input), Events::Local(events))
            }
            Self::Ssh(command) => {
                let (input, events) = command.halves();
                (Input::Ssh(input), Events::Ssh(events))
            }
        }
    }

    /// Feeds the command everything that `input` gives and keeps what it writes.
    pub(super) async fn exchange(
        self,
        input: impl AsyncRead + Send + Unpin,
        limit: Option<Limit<'_>>,
    ) -> Result<Output, Error> {
        self.run(input, Target::<Vec<Bytes>>::Memory(Vec::new()), &mut |_| (), limit).await
    }

    /// Gives the command's standard output away as it comes, and shows all of its standard error whenever that grows.
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
        let (stdin, mut events) = self.halves();
        let moved = Moved(Mutex::new(Instant::now()));
        let feeding = feed(stdin, input, &moved);
        tokio::pin!(feeding);
        let mut is_fed = false;
        let mut stderr = Vec::new();
        loop {
            let limit = limit.map(|limit| limit(is_fed));
            let event = tokio::select! {
                event = events.next() => event?,
                fed = &mut feeding, if !is_fed => {
                    fed?;
                    is_fed = true;
                    continue;
                }
                limit = moved.silence(limit) => {
                    return Err(Error::TimedOut { what: "a byte to move".to_owned(), limit });
                }
            };
            moved.now();
            match event {
                Event::Stdout(piece) => match &mut target {
                    Target::Memory(stdout) => keep(stdout, &piece)?,
                    Target::Stream(output) => {
                        output.feed(piece).await.map_err(stream_error)?;
                        // Whoever takes it may have taken long.
                        moved.now();
                    }
                },
                Event::Stderr(piece) => {
                    keep(&mut stderr, &piece)?;
                    show(&stderr);
                }
                Event::Ended { exit, signal } => {
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

/// Appends to what is kept of an output.
pub(super) fn keep(kept: &mut Vec<u8>, piece: &[u8]) -> Result<(), Error> {
    if kept.len() + piece.len() > OUTPUT_MAX {
        return Err(Error::TooMuchOutput);
    }
    kept.extend_from_slice(piece);
    Ok(())
}

fn stream_error(error: impl Display) -> Error {
    Error::file("what the command writes", error)
}

/// An input that cannot be read ends the command by force, so that it does not take a part for the whole.
async fn feed(mut stdin: Input<'_>, mut input: impl AsyncRead + Send + Unpin, moved: &Moved) -> Result<(), Error> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE);
        let count = input.read_buf(&mut buffer).await.map_err(|error| Error::file("what the command is fed", error))?;
        moved.now();
        if count == 0 {
            return stdin.end().await;
        }
        stdin.write(buffer.split().freeze()).await?;
        moved.now();
    }
}
