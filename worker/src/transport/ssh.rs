//! Commands by SSH: one connection, and one channel for each command.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use russh::client::{Handle, Msg};
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Disconnect, Sig};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Error;
use super::config::Route;
use super::login::{self, Ending, LoggedIn, Verifier};
use super::marks::{Endless, Marked, Marks};
use super::proxy::Proxy;
use super::running::Item;

/// How long the server may take to open a channel.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// How much longer than its limit a command may run at the site if it cannot be killed from here.
const AFTER_LIMIT: Duration = Duration::from_secs(2);

/// Most bytes of a command line: systems accept 128 KiB in one argument.
const COMMAND_MAX: usize = 120 << 10;

/// How long the server may take to close the channel of a killed command.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// An authenticated connection. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    host: String,
    handle: Handle<Verifier>,
    /// The jump hosts, the nearest first. Their connections carry this one.
    outer: Vec<Handle<Verifier>>,
    /// The program that connects to the first machine; it is killed with the connection.
    _proxy: Option<Proxy>,
    /// Why the connection has ended.
    ending: Ending,
    /// The marks around the outputs of every command.
    marks: Marks,
    /// The tasks that close channels without owners. Each ends with the connection at the latest.
    closing: TaskTracker,
    channels: watch::Sender<Channels>,
    runtime: tokio::runtime::Handle,
}

/// Counts of the channels of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Channels {
    /// Channels without an owner that are not closed yet; the server still counts them.
    n_closing: usize,
    /// Channels that have been closed.
    n_released: u64,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) async fn open(route: &Route) -> Result<Self, Error> {
        let LoggedIn { mut handles, ending, proxy } = login::log_in(route).await?;
        let handle = handles.pop().ok_or_else(|| Error::Config("no host is named".to_owned()))?;
        let inner = Inner {
            host: route.target().name.clone(),
            handle,
            outer: handles,
            _proxy: proxy,
            ending,
            marks: Marks::new(),
            closing: TaskTracker::new(),
            channels: watch::Sender::default(),
            runtime: tokio::runtime::Handle::current(),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The runtime of the connection's tasks.
    pub(super) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.0.runtime
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.handle.is_closed()
    }

    pub(super) async fn close(&self) {
        // An error means that it is closed.
        for handle in std::iter::once(&self.0.handle).chain(self.0.outer.iter().rev()) {
            let _ = handle.disconnect(Disconnect::ByApplication, "", "").await;
        }
    }

    pub(super) async fn ping(&self) -> Result<(), Error> {
        let sent = self.0.handle.send_ping().await;
        if sent.is_err() || self.is_closed() {
            return Err(self.broken());
        }
        Ok(())
    }

    /// The error of a closed connection.
    pub(super) fn broken(&self) -> Error {
        Error::Broken(self.0.ending.reason())
    }

    /// Opens a channel, which is closed even if the future is dropped. If the server refuses it, waits for abandoned
    /// channels to close and tries again.
    async fn channel(&self) -> Result<Open, Error> {
        let mut channels = self.0.channels.subscribe();
        let mut n_settled = 0;
        loop {
            let before = *channels.borrow_and_update();
            let opened = self.open_channel().await;
            if !matches!(opened, Err(Error::NoChannel(_))) {
                return opened;
            }
            let now = *channels.borrow_and_update();
            if now.n_released > n_settled {
                // OpenSSH releases a channel only after it has processed all data that it read with the close.
                n_settled = now.n_released;
                let limit = || Error::TimedOut { what: "a keepalive".to_owned(), limit: OPEN_LIMIT };
                timeout(OPEN_LIMIT, self.ping()).await.map_err(|_| limit())??;
            } else if before.n_closing.max(now.n_closing) == 0 {
                return opened;
            } else {
                // This cannot fail, since the connection owns the sender.
                let _ = channels.wait_for(|channels| channels.n_released > n_settled).await;
            }
        }
    }

    async fn open_channel(&self) -> Result<Open, Error> {
        let (opened_tx, opened) = oneshot::channel();
        let connection = self.clone();
        let answered = CancellationToken::new();
        let answer = answered.clone().drop_guard();
        let open = async move {
            let channel = connection.0.handle.channel_open_session().await;
            let _ = opened_tx.send(channel.map(|channel| Open { channel: Some(channel), connection }));
            drop(answer);
        };
        // If the future is dropped before the answer, the server may still count the channel.
        let _opening = Opening { connection: self.clone(), answered };
        self.0.closing.spawn_on(open, &self.0.runtime);
        match timeout(OPEN_LIMIT, opened).await {
            Ok(Ok(Ok(channel))) => Ok(channel),
            Ok(Ok(Err(russh::Error::ChannelOpenFailure(reason)))) => Err(Error::NoChannel(format!("{reason:?}"))),
            Ok(Ok(Err(_)) | Err(_)) => Err(self.broken()),
            Err(_) => Err(Error::TimedOut { what: "opening a channel".to_owned(), limit: OPEN_LIMIT }),
        }
    }

    /// Closes an abandoned channel in the background.
    fn close_later(&self, close: impl Future<Output = ()> + Send + 'static) {
        self.0.channels.send_modify(|channels| channels.n_closing += 1);
        let connection = self.clone();
        let close = async move {
            close.await;
            connection.0.channels.send_modify(|channels| {
                channels.n_closing -= 1;
                channels.n_released += 1;
            });
        };
        self.0.closing.spawn_on(close, &self.0.runtime);
    }

    fn refused(&self, reason: &str) -> Error {
        Error::Refused { host: self.0.host.clone(), reason: reason.to_owned() }
    }

    /// Starts a command.
    pub(super) async fn start(&self, command: &str, limit: Option<Duration>) -> Result<Command, Error> {
        let command_line = command_line(command, &self.0.marks, limit);
        if command_line.len() > COMMAND_MAX {
            return Err(Error::Config("the command is too long; feed a long one to `sh -s`".to_owned()));
        }
        let (read, write) = self.channel().await?.take().split();
        let input = Input(Some(write));
        let outputs = Outputs {
            read: Some(read),
            connection: self.clone(),
            stdout: self.0.marks.stdout(),
            stderr: self.0.marks.stderr(),
            exit: None,
            signal: None,
            last: VecDeque::new(),
            has_ended: false,
        };
        let command = Command { input, outputs };
        match command.input.half().exec(true, command_line).await {
            Ok(()) => Ok(command),
            Err(_) => Err(self.broken()),
        }
    }
}

/// A channel that is being opened.
struct Opening {
    connection: Connection,
    answered: CancellationToken,
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.answered.is_cancelled() {
            let answered = self.answered.clone();
            self.connection.close_later(async move { answered.cancelled().await });
        }
    }
}

/// A channel that is closed on drop, unlike the library's.
struct Open {
    /// `None` once it is taken.
    channel: Option<russh::Channel<Msg>>,
    connection: Connection,
}

impl Open {
    fn take(mut self) -> russh::Channel<Msg> {
        self.channel.take().expect("it is taken only here")
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take() {
            self.connection.close_later(async move { _ = channel.close().await });
        }
    }
}

/// A command on its channel.
#[derive(Debug)]
pub(super) struct Command {
    input: Input,
    outputs: Outputs,
}

/// The write half of a channel; `None` once the command is dropped.
#[derive(Debug)]
pub(super) struct Input(Option<ChannelWriteHalf<Msg>>);

#[derive(Debug)]
pub(super) struct Outputs {
    /// `None` once the command is dropped.
    read: Option<ChannelReadHalf>,
    connection: Connection,
    stdout: Marked,
    stderr: Marked,
    exit: Option<i32>,
    signal: Option<String>,
    /// Items that are still to be returned after the channel is closed.
    last: VecDeque<Item>,
    has_ended: bool,
}

impl Command {
    pub(super) fn halves(&mut self) -> (&Input, &mut Outputs) {
        (&self.input, &mut self.outputs)
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        let Some(write) = self.input.0.take().filter(|_| !self.outputs.has_ended) else { return };
        let Some(mut read) = self.outputs.read.take() else { return };
        // The server counts the command until it has ended, even if the channel is closed, and it reports the end only on
        // a channel that is still open.
        self.outputs.connection.close_later(async move {
            let _ = write.signal(Sig::KILL).await;
            let _ = write.eof().await;
            if timeout(CLOSE_LIMIT, closed(&mut read)).await.is_err() {
                let _ = write.close().await;
            }
        });
    }
}

impl Input {
    fn half(&self) -> &ChannelWriteHalf<Msg> {
        self.0.as_ref().expect("only the drop takes it")
    }

    pub(super) async fn write(&self, piece: Bytes) -> Result<(), Error> {
        // An error means that the connection has ended; the outputs report the reason.
        let _ = self.half().data_bytes(piece).await;
        Ok(())
    }

    pub(super) async fn end(&self) -> Result<(), Error> {
        let _ = self.half().eof().await;
        Ok(())
    }
}

impl Outputs {
    pub(super) async fn next(&mut self) -> Result<Item, Error> {
        loop {
            if let Some(item) = self.last.pop_front() {
                return Ok(item);
            }
            let read = self.read.as_mut().expect("only the drop takes it");
            match read.wait().await {
                Some(ChannelMsg::Data { data }) => {
                    if let Some(data) = self.stdout.push(data).map_err(|Endless| self.endless())? {
                        return Ok(Item::Stdout(data));
                    }
                }
                Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                    if let Some(data) = self.stderr.push(data).map_err(|Endless| self.endless())? {
                        return Ok(Item::Stderr(data));
                    }
                }
                Some(ChannelMsg::ExitStatus { exit_status }) => self.exit = Some(exit_status.cast_signed()),
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => self.signal = Some(signal_text(&signal_name)),
                Some(ChannelMsg::Failure) => return Err(self.connection.refused("it runs no commands")),
                Some(ChannelMsg::Close) => self.end()?,
                Some(_) => {}
                None => return Err(self.connection.broken()),
            }
        }
    }

    /// Handles the close of the channel.
    fn end(&mut self) -> Result<(), Error> {
        self.has_ended = true;
        self.connection.0.channels.send_modify(|channels| channels.n_released += 1);
        if !self.stdout.has_begun() {
            // The login shell ended without running the command. It may have printed the reason.
            let why = String::from_utf8_lossy(&self.stdout.rest()).trim().to_owned();
            return Err(self.connection.refused(&format!("it runs no commands {why}")));
        }
        let (exit, signal) = match self.stdout.exit() {
            // The login shell may exit with another code after the command.
            Some(exit) => (Some(exit), None),
            None => (self.exit, self.signal.take()),
        };
        if exit.is_none() && signal.is_none() {
            return Err(Error::Broken("the channel was closed before the command ended".to_owned()));
        }
        if exit == Some(0) && !self.stdout.has_ended() {
            return Err(Error::Broken("the command ended, but its output is incomplete".to_owned()));
        }
        let rest = [Item::Stdout(self.stdout.rest()), Item::Stderr(self.stderr.rest())];
        self.last.extend(rest.into_iter().filter(|rest| match rest {
            Item::Stdout(rest) | Item::Stderr(rest) => !rest.is_empty(),
            Item::Ended { .. } => true,
        }));
        self.last.push_back(Item::Ended { exit, signal });
        Ok(())
    }

    fn endless(&self) -> Error {
        self.connection.refused("its login shell printed too much before the command")
    }
}

/// Waits until a channel is closed.
async fn closed(read: &mut ChannelReadHalf) {
    while let Some(message) = read.wait().await {
        if matches!(message, ChannelMsg::Close) {
            return;
        }
    }
}

fn signal_text(signal: &Sig) -> String {
    match signal {
        Sig::Custom(name) => name.clone(),
        Sig::ABRT
        | Sig::ALRM
        | Sig::FPE
        | Sig::HUP
        | Sig::ILL
        | Sig::INT
        | Sig::KILL
        | Sig::PIPE
        | Sig::QUIT
        | Sig::SEGV
        | Sig::TERM
        | Sig::USR1 => format!("{signal:?}"),
    }
}

/// The command line for the login shell. Every shell passes it on alike: one word in single quotes without line ends,
/// quotes, double backslashes or `!`.
fn command_line(command: &str, marks: &Marks, limit: Option<Duration>) -> String {
    let run = match limit {
        // A server that does not forward signals would keep the command running and count it.
        Some(limit) => format!(
            r#"command -v timeout >/dev/null && exec timeout -s KILL {} /bin/sh -c "$s" /bin/sh "$c"; exec /bin/sh -c "$s" /bin/sh "$c""#,
            (limit + AFTER_LIMIT).as_secs()
        ),
        None => r#"exec /bin/sh -c "$s" /bin/sh "$c""#.to_owned(),
    };
    let (script, command) = (escaped(&marks.script()), escaped(command));
    format!(r#"exec /bin/sh -c 's=$(printf "%b" "{script}"); c=$(printf "%b" "{command}"); {run}'"#)
}

/// Escapes a text for `printf %b`: all but plain characters become octal numbers.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b" _-./=:,@+".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("\\0{byte:03o}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::quote;
    use super::*;

    #[test]
    fn a_command_line_is_one_quoted_word_for_every_shell() {
        let line = command_line("echo 'it'\"s\" \\\\ $HOME !! `x` %s\nexit 3", &Marks::new(), None);
        let inner = line.strip_prefix("exec /bin/sh -c '").and_then(|rest| rest.strip_suffix('\'')).unwrap();
        assert!(!inner.contains(['\'', '\n', '!', '`']) && !inner.contains(r"\\"), "{line}");
        assert_eq!(quote(inner), format!("'{inner}'"));
    }

    #[test]
    fn the_shell_runs_the_command_unchanged() {
        let command = "printf '%s|' 'it'\\''s' \"a  b\" '\\n' '!x' 'ä'; printf '%s' \"$0\"\nexit 3";
        for limit in [None, Some(Duration::from_secs(5))] {
            let marks = Marks::new();
            let line = command_line(command, &marks, limit);
            let ran = std::process::Command::new("/bin/sh").arg("-c").arg(&line).output().unwrap();
            let written = marks.stdout().push(ran.stdout.into()).unwrap().unwrap();
            assert_eq!(String::from_utf8_lossy(&written), "it's|a  b|\\n|!x|ä|/bin/sh", "{line}");
            assert_eq!(ran.status.code(), Some(3));
        }
    }
}
