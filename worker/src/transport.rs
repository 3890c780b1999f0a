//! How commands and files get to a site: by SSH, or on the worker's own machine.
//!
//! A [`Session`] is an open way to one machine. Nothing here is tried twice: every error says whether the way is at fault
//! ([`Error::is_of_transport`]), and whoever calls opens another session, or does not. Paths that are not absolute begin
//! at the home folder of the user there, as they do for commands.
//!
//! By SSH, a command is given to the login shell in a form that every shell reads alike, and only `/bin/sh` interprets
//! it. What that shell prints before and after the command is dropped. A command whose future is dropped, or that outlives its limit,
//! is killed as far as the server lets us, and its channel is closed.

mod config;
mod download;
mod known_hosts;
mod local;
mod login;
mod marks;
mod part_file;
mod proxy;
mod running;
mod shell;
mod ssh;
mod uncached;
mod upload;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_common::digest::Digest;
use bytes::Bytes;
use futures_util::Sink;
use tokio::io::AsyncRead;
use tokio::runtime::Handle;
use tokio::task::JoinError;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use self::running::Limit;
pub use self::shell::Shell;

/// How long it may take to connect, all machines on the way included.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// For how long no byte may move while files or streams are sent. A file system that hangs for longer is as good as gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// How long a site may need to read a whole file for its SHA-256: a terabyte at 300 MB/s.
const DIGEST_LIMIT: Duration = Duration::from_secs(3600);

/// Most bytes that a command may write to one of its two outputs, where they are kept in memory.
const OUTPUT_MAX: usize = 16 << 20;

/// How many lines of a command's standard error go into an error: the first tell the cause, the last the outcome.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 2;

/// Most characters of each of these lines, but for the mark where its middle was.
const LINE_MAX: usize = 400;

/// What went wrong. The texts hold no keys, passphrases or inputs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file knows the key of the host. Somebody has to look at it.
    #[error("the host key of {host} is not known: {fingerprint}; {remedy}")]
    UnknownHostKey {
        /// As it stands in the file of known hosts.
        host: String,
        /// Its SHA-256, as OpenSSH writes it.
        fingerprint: String,
        /// What to do about it.
        remedy: String,
    },
    /// The host has shown another key than the one that is known: another machine may have answered.
    #[error("the host key of {host} is {fingerprint}, and not the one in {}, line {line}", .file.display())]
    HostKeyChanged {
        /// As it stands in the file of known hosts.
        host: String,
        /// Of the key that was shown.
        fingerprint: String,
        /// The file of known hosts.
        file: PathBuf,
        /// The line of the other key, from 1.
        line: usize,
    },
    /// The server rejected the credentials or does not offer what is needed. Later attempts may succeed: an account can be
    /// locked, or a server overloaded, for a while.
    #[error("{host} refuses: {reason}")]
    Refused {
        /// The machine.
        host: String,
        /// What was tried.
        reason: String,
    },
    /// No session could be opened.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// The machine.
        host: String,
        /// What the system or the server said.
        reason: String,
    },
    /// The server opens no more channels on this session (`MaxSessions`).
    #[error("the server opens no further channel: {0}")]
    NoChannel(String),
    /// The session or the shell has ended, or is out of step. What was asked may have been done or not.
    #[error("the connection is broken: {0}")]
    Broken(String),
    /// It has taken too long. What was asked may have been done or not.
    #[error("{what} has taken longer than {} s", .limit.as_secs())]
    TimedOut {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// The command has failed.
    #[error("the command has ended with {}{}", end_text(*.exit, .signal.as_deref()), stderr_text(.stderr))]
    Command {
        /// Its exit code, if it has one.
        exit: Option<i32>,
        /// The signal that has ended it, without `SIG`.
        signal: Option<String>,
        /// What it has written to its standard error, shortened.
        stderr: String,
    },
    /// A file cannot be read or written, here or there.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
        /// Its number for that, of a file of this machine.
        errno: Option<i32>,
    },
    /// The command has written more than is kept in memory (16 MiB for each output).
    #[error("the command has written more than {} MiB", OUTPUT_MAX >> 20)]
    TooMuchOutput,
    /// What is configured cannot be used.
    #[error("{0}")]
    Config(String),
}

impl Error {
    /// The way to the site is at fault, not what was asked: worth trying again over a new session.
    pub fn is_of_transport(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::NoChannel(_) | Self::Broken(_) | Self::TimedOut { .. } => true,
            Self::UnknownHostKey { .. }
            | Self::HostKeyChanged { .. }
            | Self::Refused { .. }
            | Self::Command { .. }
            | Self::File { .. }
            | Self::TooMuchOutput
            | Self::Config(_) => false,
        }
    }

    /// Nothing that was asked is at fault: the way is, or a server that has let us in and runs nothing for a while.
    pub fn may_pass(&self) -> bool {
        self.is_of_transport() || matches!(self, Self::Refused { .. })
    }

    fn file(path: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), reason: reason.to_string(), errno: None }
    }

    fn local_file(path: &Path, error: &std::io::Error) -> Self {
        Self::File { path: path.display().to_string(), reason: error.to_string(), errno: error.raw_os_error() }
    }
}

fn end_text(exit: Option<i32>, signal: Option<&str>) -> String {
    match (exit, signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "neither exit code nor signal".to_owned(),
    }
}

fn stderr_text(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}

/// What a command has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; none if a signal has ended it.
    pub exit: Option<i32>,
    /// The signal that has ended it, without `SIG`.
    pub signal: Option<String>,
    /// What it has written to its standard output.
    pub stdout: Vec<u8>,
    /// What it has written to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Why a command has failed, for people: the last line of its standard error, or its exit.
    pub(crate) fn complaint(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned());
        last.unwrap_or_else(|| end_text(self.exit, self.signal.as_deref()))
    }

    /// Everything that a command has said of its failure, in one line and shortened; or its exit. Where some lines speak of
    /// an error, the others are left out.
    pub(crate) fn complaints(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let errors: Vec<&str> = stderr.lines().filter(|line| line.to_lowercase().contains("error")).collect();
        let excerpt =
            excerpt(&if errors.is_empty() { stderr.into_owned() } else { errors.join("\n") }).replace('\n', "; ");
        if excerpt.is_empty() { end_text(self.exit, self.signal.as_deref()) } else { excerpt }
    }

    /// What a command says of a file, in the system's own words: what follows the last colon.
    fn reason(&self) -> Option<String> {
        let stderr = String::from_utf8_lossy(&self.stderr);
        stderr.trim_end().rsplit(": ").next().filter(|reason| !reason.is_empty()).map(str::to_owned)
    }

    /// The standard output of a command that has ended with exit code 0.
    ///
    /// # Errors
    /// [`Error::Command`] with what it has written to its standard error, shortened.
    pub fn ok(self) -> Result<Vec<u8>, Error> {
        if self.exit == Some(0) {
            return Ok(self.stdout);
        }
        let stderr = excerpt(&String::from_utf8_lossy(&self.stderr));
        Err(Error::Command { exit: self.exit, signal: self.signal, stderr })
    }
}

/// An open way to a site's machine. Clones are the same session.
#[derive(Clone, Debug)]
pub struct Session {
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    Local,
    Ssh(ssh::Connection),
}

/// Opens a session by SSH.
///
/// # Errors
/// Every variant but [`Error::Command`], [`Error::File`] and [`Error::TooMuchOutput`]; [`Error::TimedOut`] after 30 s.
pub async fn connect(section: &baton_common::config::Ssh) -> Result<Session, Error> {
    let connecting = Box::pin(async {
        let route = config::resolve(section).await?;
        ssh::Connection::open(&route).await
    });
    match timeout(CONNECT_LIMIT, connecting).await {
        Ok(connection) => Ok(Session { way: Way::Ssh(connection?) }),
        Err(_) => Err(Error::TimedOut { what: format!("connecting to {}", section.host), limit: CONNECT_LIMIT }),
    }
}

impl Session {
    /// The worker's own machine.
    pub fn local() -> Self {
        Self { way: Way::Local }
    }

    /// Runs a command with these bytes as its standard input. It may write 16 MiB to each of its outputs.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when it outlives the limit, [`Error::TooMuchOutput`], and those of the transport. That the
    /// command fails is no error here; see [`Output::ok`].
    ///
    /// # Cancel safety
    /// A command whose future is dropped is killed where the server can do that, and its channel is closed.
    pub async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output, Error> {
        let run = Box::pin(async { self.start(command, Some(limit)).await?.exchange(stdin, None).await });
        match timeout(limit, run).await {
            Ok(output) => output,
            Err(_) => Err(Error::TimedOut { what: "a command".to_owned(), limit }),
        }
    }

    /// Runs a command and feeds it everything that `input` gives.
    ///
    /// # Errors
    /// As [`Self::exec`]; [`Error::TimedOut`] when no byte has moved for 60 s.
    pub async fn send(&self, command: &str, input: impl AsyncRead + Send + Unpin) -> Result<Output, Error> {
        self.send_within(&|_| SILENCE_LIMIT, command, input).await
    }

    async fn send_within(
        &self,
        limit: Limit<'_>,
        command: &str,
        input: impl AsyncRead + Send + Unpin,
    ) -> Result<Output, Error> {
        Box::pin(async { self.start(command, None).await?.exchange(input, Some(limit)).await }).await
    }

    /// Runs a command and gives its standard output to `output` as it comes. What is given back has no standard output.
    ///
    /// # Errors
    /// As [`Self::exec`]; [`Error::TimedOut`] when no byte has moved for 60 s; [`Error::File`] when `output` takes no
    /// more.
    pub async fn receive<E: Display>(
        &self,
        command: &str,
        output: impl Sink<Bytes, Error = E> + Send + Unpin + 'static,
    ) -> Result<Output, Error> {
        self.receive_within(|_| SILENCE_LIMIT, command, output, |_| ()).await.0
    }

    /// The same, and gives `output` back. What comes by SSH goes from the task that decrypts it to one beside it, and not
    /// to the caller's thread, which may have much else to do.
    async fn receive_within<S, E>(
        &self,
        limit: impl Fn(bool) -> Duration + Send + Sync + 'static,
        command: &str,
        mut output: S,
        mut show: impl FnMut(&[u8]) + Send + 'static,
    ) -> (Result<Output, Error>, S)
    where
        S: Sink<Bytes, Error = E> + Send + Unpin + 'static,
        E: Display,
    {
        let running = match Box::pin(self.start(command, None)).await {
            Ok(running) => running,
            Err(error) => return (Err(error), output),
        };
        let runtime = match &self.way {
            Way::Local => Handle::current(),
            Way::Ssh(connection) => connection.runtime().clone(),
        };
        let receiving = runtime.spawn(async move {
            let received = running.receive(&mut output, &mut show, &limit).await;
            (received, output)
        });
        match AbortOnDropHandle::new(receiving).await.map_err(JoinError::try_into_panic) {
            Ok(received) => received,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ends, and everything with it.
            Err(Err(_)) => std::future::pending().await,
        }
    }

    /// Writes one file there: to `TO.part`, from where an earlier one was cut, and renamed to `to` when it is whole. In place
    /// of a name that would be too long so, its digest is used. Its parent folder must be there. `progress` is told how many
    /// bytes are there.
    ///
    /// It gives the SHA-256 of what is there now, and does not compare it: a `.part` may be that of another file.
    ///
    /// # Errors
    /// [`Error::File`], with what the server says, for a full disk among others; and those of the transport.
    pub async fn put(&self, from: &Path, to: &str, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<Digest, Error> {
        match &self.way {
            Way::Local => local::copy(from, &local::at_home(to), progress).await,
            Way::Ssh(_) => Box::pin(upload::put(self, from, to, progress)).await,
        }
    }

    /// Fetches one file, as [`Self::put`] writes one: by `TO.part` here. It gives the SHA-256 of what is here now.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn get(&self, from: &str, to: &Path, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<Digest, Error> {
        match &self.way {
            Way::Local => local::copy(&local::at_home(from), to, progress).await,
            Way::Ssh(_) => Box::pin(download::get(self, from, to, progress)).await,
        }
    }

    /// Fetches one file of so many bytes while its SHA-256 is made there. As soon as that is known, `is_known` says whether
    /// the file need not come. It gives the digest there, and that of what has come, which is less when it has become shorter.
    ///
    /// # Errors
    /// As [`Self::get`], and those of `is_known`.
    pub async fn get_unless<E: From<Error>>(
        &self,
        from: &str,
        size: u64,
        to: &Path,
        progress: &(dyn Fn(u64) + Send + Sync),
        is_known: impl AsyncFnOnce(Digest) -> Result<bool, E>,
    ) -> Result<(Digest, Option<Digest>), E> {
        match &self.way {
            Way::Local => {
                let digest = self.digest(from).await?;
                if is_known(digest).await? {
                    return Ok((digest, None));
                }
                Ok((digest, Some(self.get(from, to, progress).await?)))
            }
            Way::Ssh(_) => Box::pin(download::get_unless(self, from, size, to, progress, is_known)).await,
        }
    }

    /// How many bytes a file there has.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read, and those of the transport.
    pub async fn size(&self, path: &str) -> Result<u64, Error> {
        download::size(self, path).await
    }

    /// The SHA-256 of a file there.
    ///
    /// # Errors
    /// [`Error::Command`] with what it says when the file cannot be read, and those of the transport.
    pub async fn digest(&self, path: &str) -> Result<Digest, Error> {
        let command = format!("{{ {DIGEST}; }} < {}", quote(path));
        digest_of(&self.exec(&command, b"", DIGEST_LIMIT).await?.ok()?)
    }

    /// A shell that stays open, on one channel.
    ///
    /// # Errors
    /// Those of the transport.
    pub async fn shell(&self) -> Result<Shell, Error> {
        Ok(Shell::new(self.start("exec /bin/sh -s", None).await?))
    }

    /// Asks the server for an answer, of whatever kind.
    ///
    /// # Errors
    /// [`Error::Broken`], or [`Error::TimedOut`].
    pub async fn ping(&self, limit: Duration) -> Result<(), Error> {
        match &self.way {
            Way::Local => Ok(()),
            Way::Ssh(connection) => match timeout(limit, connection.ping()).await {
                Ok(answer) => answer,
                Err(_) => Err(Error::TimedOut { what: "a keepalive".to_owned(), limit }),
            },
        }
    }

    /// Whether the session is known to have ended.
    pub fn is_broken(&self) -> bool {
        match &self.way {
            Way::Local => false,
            Way::Ssh(connection) => connection.is_closed(),
        }
    }

    /// Ends the session, for all of its clones.
    pub async fn close(&self) {
        match &self.way {
            Way::Local => {}
            Way::Ssh(connection) => connection.close().await,
        }
    }

    /// Starts a command; one with a limit ends itself there when nobody can end it from here.
    async fn start(&self, command: &str, limit: Option<Duration>) -> Result<running::Running, Error> {
        match &self.way {
            Way::Local => Ok(running::Running::Local(local::Command::start(command)?)),
            Way::Ssh(connection) => Ok(running::Running::Ssh(connection.start(command, limit).await?)),
        }
    }
}

/// Files of at least this size are hashed there by a Python program while they come or go. With a smaller one it takes
/// longer to start that.
const HASHED_ON_THE_WAY_FROM: u64 = 16 << 20;

/// A command that prints the SHA-256 of its standard input: by the processor's own instructions, which coreutils often do
/// without. That is five times as fast.
const DIGEST: &str = "if command -v openssl > /dev/null; then openssl dgst -sha256 -r; else sha256sum; fi";

/// What such a command has printed.
fn digest_of(printed: &[u8]) -> Result<Digest, Error> {
    let text = String::from_utf8_lossy(printed);
    let digest = text.lines().last().and_then(|line| line.split_whitespace().next()?.parse().ok());
    digest.ok_or_else(|| Error::Broken(format!("a digest was asked for, and {text:?} is none")))
}

/// The first and the last lines of a text.
fn excerpt(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let is_left_out = |idx: usize| idx >= FIRST_LINES && idx + LAST_LINES < lines.len();
    let n_left_out = lines.len().saturating_sub(FIRST_LINES + LAST_LINES);
    let mut excerpt = Vec::new();
    for (idx, line) in lines.iter().enumerate().filter(|(idx, _)| !is_left_out(*idx)) {
        if n_left_out > 0 && idx + LAST_LINES == lines.len() {
            excerpt.push(format!("[{n_left_out} lines left out]"));
        }
        excerpt.push(shortened(line));
    }
    excerpt.join("\n")
}

/// A line without its middle if it is long: the end tells the cause.
pub(crate) fn shortened(line: &str) -> String {
    let n_chars = line.chars().count();
    if n_chars <= LINE_MAX {
        return line.to_owned();
    }
    let begin: String = line.chars().take(LINE_MAX / 2).collect();
    let end: String = line.chars().skip(n_chars - LINE_MAX / 2).collect();
    format!("{begin} [...] {end}")
}

/// Quotes a word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Quotes a path for a POSIX shell, as a word that no command takes for an option.
pub fn quote_path(path: &str) -> String {
    if path.starts_with('/') { quote(path) } else { quote(&format!("./{path}")) }
}

/// What a file of this content is called, beside its target, until that is verified.
pub(crate) fn beside(target: &Path, digest: &Digest) -> PathBuf {
    local::beside(target, &format!(".{digest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beside_a_file_are_never_too_long() {
        let digest = Digest::of(b"");
        let folder = Path::new("folder");
        for len in [1, 185, 186, 191, 250, 251, 255] {
            let target = folder.join("n".repeat(len));
            for beside in [local::part_of(&target), local::part_of(&beside(&target, &digest))] {
                assert!(
                    beside.file_name().is_some_and(|name| name.len() <= 255) && beside.starts_with(folder),
                    "{len}"
                );
            }
        }
        assert_eq!(local::part_of(Path::new("a/b")), Path::new("a/b.part"));
    }

    #[test]
    fn of_a_long_complaint_its_first_and_last_lines_are_kept() {
        assert_eq!((excerpt(""), excerpt("a\n"), excerpt("a\n\nb\r\n")), ("".into(), "a".into(), "a\nb".into()));
        assert_eq!(excerpt("1\n2\n3\n4\n5"), "1\n2\n3\n4\n5");
        assert_eq!(excerpt("1\n2\n3\n4\n5\n6\n7"), "1\n2\n3\n[2 lines left out]\n6\n7");
        let long = format!("cp: {}: No space left", "x".repeat(LINE_MAX));
        assert!(excerpt(&long).starts_with("cp: x") && excerpt(&long).ends_with("x: No space left"));
    }

    #[test]
    fn a_quoted_word_is_one_word() {
        assert_eq!(quote("a/b-1.txt"), "a/b-1.txt");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote("a b\n$(c)"), "'a b\n$(c)'");
    }
}
