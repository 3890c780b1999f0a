//! Commands by SSH: one connection, a channel for each command.

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
use super::running::Event;

/// How long the server may take to open a channel.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// How much longer than its limit a command may run on the other side when nobody ends it from here.
const AFTER_LIMIT: Duration = Duration::from_secs(2);

/// Most bytes of a command in the form in which it is sent: systems take 128 KiB in one argument.
const COMMAND_MAX: usize = 120 << 10;

/// How long the server may take to close a channel whose command was killed.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A connection that has logged in. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    host: String,
    handle: Handle<Verifier>,
    /// Those of the machines on the way, the nearest first. Their connections carry this one.
    outer: Vec<Handle<Verifier>>,
    /// The program that leads to the first machine; it is killed with the connection.
    _proxy: Option<Proxy>,
    /// Why the connection has ended.
    ending: Ending,
    /// What comes before and after the outputs of every command.
    marks: Marks,
    /// What closes channels whose owners are gone. Each task ends with the connection at the latest.
    closing: TaskTracker,
    channels: watch::Sender<Channels>,
    runtime: tokio::runtime::Handle,
}

/// What has become of the channels of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Channels {
    /// Those that have no owner and are not closed yet: the server still counts them.
    n_closing: usize,
    /// Those that have been closed.
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

    /// Where what belongs to the connection runs.
    pub(super) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.0.runtime
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.handle.is_closed()
    }

    pub(super) async fn close(&self) {
        // An error says that it is closed.
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

    /// Why nothing goes any more.
    pub(super) fn broken(&self) -> Error {
        Error::Broken(self.0.ending.reason())
    }

    /// Opens a channel, which is closed even if nobody waits for it any more. A server that has no room for one may have it
    /// when those are closed that were given up before.
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
                // OpenSSH frees the place of a channel only when it has seen to everything that it has read with its close.
                n_settled = now.n_released;
                let limit = || Error::TimedOut { what: "a keepalive".to_owned(), limit: OPEN_LIMIT };
                timeout(OPEN_LIMIT, self.ping()).await.map_err(|_| limit())??;
            } else if before.n_closing.max(now.n_closing) == 0 {
                return opened;
            } else {
                // It never ends with an error, since the connection has the sender.
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
        // If this is dropped before the answer, the server may count the channel until it is closed.
        let _opening = Opening { connection: self.clone(), answered };
        self.0.closing.spawn_on(open, &self.0.runtime);
        match timeout(OPEN_LIMIT, opened).await {
            Ok(Ok(Ok(channel))) => Ok(channel),
            Ok(Ok(Err(russh::Error::ChannelOpenFailure(reason)))) => Err(Error::NoChannel(format!("{reason:?}"))),
            Ok(Ok(Err(_)) | Err(_)) => Err(self.broken()),
            Err(_) => Err(Error::TimedOut { what: "opening a channel".to_owned(), limit: OPEN_LIMIT }),
        }
    }

    /// Closes a channel of which nothing more is wanted.
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
        let events = Events {
            read: Some(read),
            connection: self.clone(),
            stdout: self.0.marks.stdout(),
            stderr: self.0.marks.stderr(),
            exit: None,
            signal: None,
            last: VecDeque::new(),
            has_ended: false,
        };
        let command = Command { input, events };
        match command.input.half().exec(true, command_line).await {
            Ok(()) => Ok(command),
            Err(_) => Err(self.broken()),
        }
    }
}

/// A channel that is being opened, until this is dropped.
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

/// A channel that is closed when this is dropped; the library's own is not.
struct Open {
    /// Until it is taken.
    channel: Option<russh::Channel<Msg>>,
    connection: Connection,
}

impl Open {
    fn take(mut self) -> russh::Channel<Msg> {
        self.channel.take().expect("it is taken at the end only")
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
    events: Events,
}

/// The half of a channel that we write to; there until the command is dropped.
#[derive(Debug)]
pub(super) struct Input(Option<ChannelWriteHalf<Msg>>);

#[derive(Debug)]
pub(super) struct Events {
    /// There until the command is dropped.
    read: Option<ChannelReadHalf>,
    connection: Connection,
    stdout: Marked,
    stderr: Marked,
    exit: Option<i32>,
    signal: Option<String>,
    /// What is still to be told when the channel is closed.
    last: VecDeque<Event>,
    has_ended: bool,
}

impl Command {
    pub(super) fn halves(&mut self) -> (&Input, &mut Events) {
        (&self.input, &mut self.events)
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        let Some(write) = self.input.0.take().filter(|_| !self.events.has_ended) else { return };
        let Some(mut read) = self.events.read.take() else { return };
        // The server keeps a place for the command until that has ended, whatever becomes of the channel. That it has ended is
        // heard only on a channel that we have not closed.
        self.events.connection.close_later(async move {
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
        self.0.as_ref().expect("it is taken by the drop only")
    }

    pub(super) async fn write(&self, piece: Bytes) -> Result<(), Error> {
        // An error says that the connection has ended, which the events tell better.
        let _ = self.half().data_bytes(piece).await;
        Ok(())
    }

    pub(super) async fn end(&self) -> Result<(), Error> {
        let _ = self.half().eof().await;
        Ok(())
    }
}

impl Events {
    pub(super) async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.last.pop_front() {
                return Ok(event);
            }
            let read = self.read.as_mut().expect("it is taken by the drop only");
            match read.wait().await {
                Some(ChannelMsg::Data { data }) => {
                    if let Some(data) = self.stdout.push(data).map_err(|Endless| self.endless())? {
                        return Ok(Event::Stdout(data));
                    }
                }
                Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                    if let Some(data) = self.stderr.push(data).map_err(|Endless| self.endless())? {
                        return Ok(Event::Stderr(data));
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

    /// Nothing more comes.
    fn end(&mut self) -> Result<(), Error> {
        self.has_ended = true;
        self.connection.0.channels.send_modify(|channels| channels.n_released += 1);
        if !self.stdout.has_begun() {
            // The login shell has ended without running anything. It may have told why.
            let why = String::from_utf8_lossy(&self.stdout.rest()).trim().to_owned();
            return Err(self.connection.refused(&format!("it runs no commands {why}")));
        }
        let (exit, signal) = match self.stdout.exit() {
            // What a login does after the command may have another exit.
            Some(exit) => (Some(exit), None),
            None => (self.exit, self.signal.take()),
        };
        if exit.is_none() && signal.is_none() {
            return Err(Error::Broken("the channel was closed before the command had ended".to_owned()));
        }
        if exit == Some(0) && !self.stdout.has_ended() {
            return Err(Error::Broken("the command has ended without the end of its output".to_owned()));
        }
        let rest = [Event::Stdout(self.stdout.rest()), Event::Stderr(self.stderr.rest())];
        self.last.extend(rest.into_iter().filter(|rest| match rest {
            Event::Stdout(rest) | Event::Stderr(rest) => !rest.is_empty(),
            Event::Ended { .. } => true,
        }));
        self.last.push_back(Event::Ended { exit, signal });
        Ok(())
    }

    fn endless(&self) -> Error {
        self.connection.refused("its login shell prints without end")
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

/// What the login shell is given. Every shell passes it on alike: one word in single quotes, with no line end, no quote,
/// no backslash pair and no `!` in it.
fn command_line(command: &str, marks: &Marks, limit: Option<Duration>) -> String {
    let run = match limit {
        // A server that does not pass our signals on would keep the command, and a place for it.
        Some(limit) => format!(
            r#"command -v timeout >/dev/null && exec timeout -s KILL {} /bin/sh -c "$s" /bin/sh "$c"; exec /bin/sh -c "$s" /bin/sh "$c""#,
            (limit + AFTER_LIMIT).as_secs()
        ),
        None => r#"exec /bin/sh -c "$s" /bin/sh "$c""#.to_owned(),
    };
    let (script, command) = (escaped(&marks.script()), escaped(command));
    format!(r#"exec /bin/sh -c 's=$(printf "%b" "{script}"); c=$(printf "%b" "{command}"); {run}'"#)
}

/// As `printf %b` reads it: everything but the plainest characters by its number.
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
    fn the_shell_runs_exactly_the_command() {
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
