//! Files that come from a site: by SFTP, many requests at a time.

use std::path::Path;
use std::time::Duration;

use baton_common::digest::Digest;
use futures_util::stream::{FuturesOrdered, StreamExt};
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::client::rawsession::Limits;
use russh_sftp::client::{Config, RawSftpSession};
use russh_sftp::extensions::LIMITS;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use tokio::time::timeout;

use super::landing::Landing;
use super::ssh::Connection;
use super::{Error, SILENCE_LIMIT};

/// Requests at a time, and bytes in each: with 8 MiB on the way, a gigabit takes 64 ms to fill.
const REQUESTS: usize = 64;
const PIECE: u32 = 128 << 10;

/// What every server takes in a request, if it does not say.
const PIECE_UNSAID: u32 = 32 << 10;

/// How long one request may take. Others may be before it on a slow line; silence is what ends a transfer.
const REQUEST_LIMIT: Duration = Duration::from_secs(3600);

/// One channel with SFTP on it.
struct Sftp<'a> {
    connection: &'a Connection,
    raw: RawSftpSession,
    read_piece: u32,
}

/// Fetches one file. See [`super::Session::get`].
pub(super) async fn get(
    connection: &Connection,
    from: &str,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let sftp = Sftp::open(connection).await?;
    let size = sftp.size(from).await?.ok_or_else(|| Error::file(from, "no such file"))?;
    let handle = sftp.open_file(from, OpenFlags::READ).await?;
    let mut target = Landing::open(to, size).await?;
    progress(target.done);
    sftp.read(&handle, from, &mut target, size, progress).await?;
    sftp.close(&handle, from).await?;
    target.finish(to).await
}

impl<'a> Sftp<'a> {
    async fn open(connection: &'a Connection) -> Result<Self, Error> {
        let stream = connection.sftp().await?;
        let config = Config { request_timeout_secs: REQUEST_LIMIT.as_secs(), ..Config::default() };
        let mut raw = RawSftpSession::new_with_config(stream, config);
        let failed = |error| fault(connection, "sftp", error);
        let version = within(raw.init()).await?.map_err(failed)?;
        let mut read_piece = PIECE_UNSAID;
        if version.extensions.contains_key(LIMITS) {
            let limits = Limits::from(within(raw.limits()).await?.map_err(failed)?);
            read_piece = limits.read_len.map_or(PIECE, |most| PIECE.min(u32::try_from(most).unwrap_or(PIECE)));
            raw.set_limits(limits);
        }
        Ok(Self { connection, raw, read_piece })
    }

    fn fault(&self, path: &str, error: SftpError) -> Error {
        fault(self.connection, path, error)
    }

    /// None if there is no such file.
    async fn size(&self, path: &str) -> Result<Option<u64>, Error> {
        match within(self.raw.stat(path)).await? {
            Ok(attrs) => Ok(Some(attrs.attrs.size.unwrap_or(0))),
            Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile => Ok(None),
            Err(error) => Err(self.fault(path, error)),
        }
    }

    async fn open_file(&self, path: &str, flags: OpenFlags) -> Result<String, Error> {
        let opened = within(self.raw.open(path, flags, FileAttributes::empty())).await?;
        Ok(opened.map_err(|error| self.fault(path, error))?.handle)
    }

    async fn close(&self, handle: &str, path: &str) -> Result<(), Error> {
        within(self.raw.close(handle)).await?.map_err(|error| self.fault(path, error)).map(drop)
    }

    /// Reads the rest of a file.
    async fn read(
        &self,
        handle: &str,
        path: &str,
        target: &mut Landing,
        end: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error> {
        let mut reads = FuturesOrdered::new();
        let mut asked = target.done;
        while target.done < end {
            while asked < end && reads.len() < REQUESTS {
                let most = u64::from(self.read_piece).min(end - asked);
                let (from, count) = (asked, u32::try_from(most).unwrap_or(self.read_piece));
                reads.push_back(async move { (count, self.raw.read(handle, from, count).await) });
                asked += most;
            }
            let Some((count, answer)) = within(reads.next()).await? else { break };
            let data = match answer {
                Ok(data) => data.data,
                Err(SftpError::Status(status)) if status.status_code == StatusCode::Eof => {
                    return Err(Error::file(path, "it has become shorter while it was read"));
                }
                Err(error) => return Err(self.fault(path, error)),
            };
            let is_short = data.len() < count as usize;
            target.write(data).await?;
            if is_short {
                // What follows would leave a gap.
                reads = FuturesOrdered::new();
                asked = target.done;
            }
            progress(target.done);
        }
        Ok(())
    }
}

/// What the server answers is about the file, everything else about the connection.
fn fault(connection: &Connection, path: &str, error: SftpError) -> Error {
    match error {
        SftpError::Status(status) => Error::file(path, status_text(&status.status_code, &status.error_message)),
        SftpError::Limited(reason) => Error::file(path, reason),
        SftpError::Timeout => Error::TimedOut { what: "a request for files".to_owned(), limit: REQUEST_LIMIT },
        SftpError::IO(reason) | SftpError::UnexpectedBehavior(reason) if !connection.is_closed() => {
            Error::Broken(reason)
        }
        SftpError::UnexpectedPacket => Error::Broken("an answer that is not SFTP".to_owned()),
        SftpError::IO(_) | SftpError::UnexpectedBehavior(_) => connection.broken(),
    }
}

fn status_text(code: &StatusCode, message: &str) -> String {
    let code = code.to_string();
    if message.is_empty() || message.eq_ignore_ascii_case(&code) { code } else { format!("{code}: {message}") }
}

async fn within<T>(answer: impl Future<Output = T>) -> Result<T, Error> {
    let silent = |_| Error::TimedOut { what: "an answer about files".to_owned(), limit: SILENCE_LIMIT };
    timeout(SILENCE_LIMIT, answer).await.map_err(silent)
}
