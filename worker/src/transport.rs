//! Transports run commands and copy files at a site, by SSH or on the worker's own machine.
//!
//! A [`Session`] is an open connection to one machine. Nothing here is retried: every error says whether the transport
//! failed ([`Error::is_of_transport`]), and the caller decides whether to open another session. Relative paths start at
//! the home folder of the user at the site, as they do for commands.
//!
//! By SSH, the login shell gets the command in a form that every shell reads alike, and only `/bin/sh` interprets it.
//! Output of the login shell before and after the command is dropped. A command whose future is dropped, or that exceeds
//! its limit, is killed if the server supports that, and its channel is closed.

mod config;
mod download;
mod error;
mod known_hosts;
mod local;
mod login;
mod marks;
mod output;
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

pub use self::error::Error;
pub use self::output::Output;
pub(crate) use self::output::shortened;
use self::running::Limit;
pub use self::shell::Shell;

/// Time limit of a connection, including all jump hosts.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// How long a transfer may stall. A file system that hangs for longer counts as gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// Time limit for the SHA-256 of a whole file: a terabyte at 300 MB/s.
const DIGEST_LIMIT: Duration = Duration::from_secs(3600);

/// An open connection to a site's machine. Clones share the session.
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

    /// Runs a command with these bytes as its standard input. It may write 16 MiB to each output.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when it exceeds the limit, [`Error::TooMuchOutput`], and errors of the transport. A command that
    /// fails is no error here; see [`Output::ok`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the command is killed if the server supports that, and its channel is closed.
    pub async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output, Error> {
        let run = Box::pin(async { self.start(command, Some(limit)).await?.exchange(stdin, None).await });
        match timeout(limit, run).await {
            Ok(output) => output,
            Err(_) => Err(Error::TimedOut { what: "a command".to_owned(), limit }),
        }
    }

    /// Runs a command with `input` as its standard input.
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

    /// Runs a command and streams its standard output to `output`. The returned [`Output`] has no standard output.
    ///
    /// # Errors
    /// As [`Self::exec`]; [`Error::TimedOut`] when no byte has moved for 60 s; [`Error::File`] when `output` fails.
    pub async fn receive<E: Display>(
        &self,
        command: &str,
        output: impl Sink<Bytes, Error = E> + Send + Unpin + 'static,
    ) -> Result<Output, Error> {
        self.receive_within(|_| SILENCE_LIMIT, command, output, |_| ()).await.0
    }

    /// The same, and returns `output`. Data received by SSH goes from the task that decrypts it to another task of the
    /// same runtime, not to the caller's thread, which may be busy.
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
            // The runtime is shutting down.
            Err(Err(_)) => std::future::pending().await,
        }
    }

    /// Writes one file to the site: to `TO.part`, resuming an interrupted transfer, and renamed to `to` when it is
    /// complete. A name that would be too long is replaced by its digest. The parent folder must exist. `progress` gets
    /// the number of bytes at the site.
    ///
    /// Returns the SHA-256 of the file at the site. The caller has to compare it: a `.part` may belong to another file.
    ///
    /// # Errors
    /// [`Error::File`] with the server's message, for a full disk among others, and errors of the transport.
    pub async fn put(&self, from: &Path, to: &str, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<Digest, Error> {
        match &self.way {
            Way::Local => local::copy(from, &local::at_home(to), progress).await,
            Way::Ssh(_) => Box::pin(upload::put(self, from, to, progress)).await,
        }
    }

    /// Fetches one file as [`Self::put`] writes one, by way of a local `TO.part`. Returns the SHA-256 of the local file.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn get(&self, from: &str, to: &Path, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<Digest, Error> {
        match &self.way {
            Way::Local => local::copy(&local::at_home(from), to, progress).await,
            Way::Ssh(_) => Box::pin(download::get(self, from, to, progress)).await,
        }
    }

    /// Fetches one file of this size while the site computes its SHA-256. As soon as the digest is known, `is_known` says
    /// whether the transfer can stop. Returns the digest at the site and, unless it stopped, that of the local file,
    /// which is shorter if the file has shrunk.
    ///
    /// # Errors
    /// As [`Self::get`], and errors of `is_known`.
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

    /// The size of a file at the site, in bytes.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read, and errors of the transport.
    pub async fn size(&self, path: &str) -> Result<u64, Error> {
        download::size(self, path).await
    }

    /// The SHA-256 of a file at the site.
    ///
    /// # Errors
    /// [`Error::Command`] with the message of the system when the file cannot be read, and errors of the transport.
    pub async fn digest(&self, path: &str) -> Result<Digest, Error> {
        let command = format!("{{ {DIGEST}; }} < {}", quote(path));
        digest_of(&self.exec(&command, b"", DIGEST_LIMIT).await?.ok()?)
    }

    /// Opens a persistent shell on one channel.
    ///
    /// # Errors
    /// Errors of the transport.
    pub async fn shell(&self) -> Result<Shell, Error> {
        Ok(Shell::new(self.start("exec /bin/sh -s", None).await?))
    }

    /// Waits for any answer of the server to a keepalive.
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

    /// Ends the session for all its clones.
    pub async fn close(&self) {
        match &self.way {
            Way::Local => {}
            Way::Ssh(connection) => connection.close().await,
        }
    }

    /// Starts a command. With a limit it also ends itself at the site, in case it cannot be killed from here.
    async fn start(&self, command: &str, limit: Option<Duration>) -> Result<running::Running, Error> {
        match &self.way {
            Way::Local => Ok(running::Running::Local(local::Command::start(command)?)),
            Way::Ssh(connection) => Ok(running::Running::Ssh(connection.start(command, limit).await?)),
        }
    }
}

/// Files of at least this size are hashed at the site by a Python program during the transfer. For a smaller one,
/// starting the program takes longer than hashing.
const HASHED_ON_THE_WAY_FROM: u64 = 16 << 20;

/// A command that prints the SHA-256 of its standard input. OpenSSL uses the processor's SHA instructions, unlike many
/// coreutils, and is five times as fast.
const DIGEST: &str = "if command -v openssl > /dev/null; then openssl dgst -sha256 -r; else sha256sum; fi";

/// Reads the output of such a command.
fn digest_of(printed: &[u8]) -> Result<Digest, Error> {
    let text = String::from_utf8_lossy(printed);
    let digest = text.lines().last().and_then(|line| line.split_whitespace().next()?.parse().ok());
    digest.ok_or_else(|| Error::Broken(format!("expected a digest, got {text:?}")))
}

/// Quotes a word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Quotes a path for a POSIX shell such that no command takes it for an option.
pub fn quote_path(path: &str) -> String {
    if path.starts_with('/') { quote(path) } else { quote(&format!("./{path}")) }
}

/// The temporary name, next to its target, of a file with this content until it is verified.
pub(crate) fn beside(target: &Path, digest: &Digest) -> PathBuf {
    local::beside(target, &format!(".{digest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_never_too_long() {
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
    fn a_quoted_word_is_one_word() {
        assert_eq!(quote("a/b-1.txt"), "a/b-1.txt");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote("a b\n$(c)"), "'a b\n$(c)'");
    }
}
