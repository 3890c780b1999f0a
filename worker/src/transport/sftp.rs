//! Files by SFTP, many requests at a time.

use std::path::Path;
use std::time::Duration;

use futures_util::stream::{FuturesOrdered, StreamExt};
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::client::rawsession::Limits;
use russh_sftp::client::{Config, RawSftpSession};
use russh_sftp::extensions::LIMITS;
use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::timeout;

use super::ssh::Connection;
use super::{Error, SILENCE_LIMIT, local};

/// Requests at a time, and bytes in each: with 8 MiB on the way, a gigabit takes 64 ms to fill.
const REQUESTS: usize = 64;
const PIECE: u32 = 128 << 10;

/// What every server takes in a request, if it does not say.
const PIECE_UNSAID: u32 = 32 << 10;

/// How long one request may take. Others may be before it on a slow line; silence is what ends a transfer.
const REQUEST_LIMIT: Duration = Duration::from_secs(3600);

/// Renames over what is there.
const POSIX_RENAME: &str = "posix-rename@openssh.com";

/// One channel with SFTP on it.
struct Sftp<'a> {
    connection: &'a Connection,
    raw: RawSftpSession,
    has_posix_rename: bool,
    read_piece: u32,
    write_piece: u32,
}

/// Writes one file there. See [`super::Session::put`].
pub(super) async fn put(
    connection: &Connection,
    from: &Path,
    to: &str,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), Error> {
    let of_source = |error: std::io::Error| Error::local_file(from, &error);
    let mut source = File::open(from).await.map_err(of_source)?;
    let size = source.metadata().await.map_err(of_source)?.len();
    let sftp = Sftp::open(connection).await?;
    let part = format!("{to}.part");
    let there = sftp.size(&part).await?.unwrap_or(0);
    let (done, flags) = if there > size { (0, OpenFlags::TRUNCATE) } else { (there, OpenFlags::empty()) };
    source.seek(std::io::SeekFrom::Start(done)).await.map_err(of_source)?;
    let handle = sftp.open_file(&part, OpenFlags::WRITE | OpenFlags::CREATE | flags).await?;
    progress(done);
    sftp.write(&handle, &part, (from, source), done, progress).await?;
    // A server may tell of a full disk or a quota as late as now.
    sftp.close(&handle, &part).await?;
    sftp.rename(&part, to).await
}

/// Fetches one file. See [`super::Session::get`].
pub(super) async fn get(
    connection: &Connection,
    from: &str,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), Error> {
    let sftp = Sftp::open(connection).await?;
    let size = sftp.size(from).await?.ok_or_else(|| Error::file(from, "no such file"))?;
    let handle = sftp.open_file(from, OpenFlags::READ).await?;
    let part = local::part_of(to);
    let (mut target, done) = local::open_part(&part, size).await?;
    progress(done);
    sftp.read(&handle, from, (&part, &mut target), done..size, progress).await?;
    sftp.close(&handle, from).await?;
    local::finish_part(target, &part, to).await
}

impl<'a> Sftp<'a> {
    async fn open(connection: &'a Connection) -> Result<Self, Error> {
        let stream = connection.sftp().await?;
        let config = Config { request_timeout_secs: REQUEST_LIMIT.as_secs(), ..Config::default() };
        let mut raw = RawSftpSession::new_with_config(stream, config);
        let failed = |error| fault(connection, "sftp", error);
        let version = within(raw.init()).await?.map_err(failed)?;
        let (mut read_piece, mut write_piece) = (PIECE_UNSAID, PIECE_UNSAID);
        if version.extensions.contains_key(LIMITS) {
            let limits = Limits::from(within(raw.limits()).await?.map_err(failed)?);
            read_piece = limits.read_len.map_or(PIECE, |most| PIECE.min(u32::try_from(most).unwrap_or(PIECE)));
            write_piece = limits.write_len.map_or(PIECE, |most| PIECE.min(u32::try_from(most).unwrap_or(PIECE)));
            raw.set_limits(limits);
        }
        let has_posix_rename = version.extensions.contains_key(POSIX_RENAME);
        Ok(Self { connection, raw, has_posix_rename, read_piece, write_piece })
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

    /// Writes the rest of a local file.
    async fn write(
        &self,
        handle: &str,
        path: &str,
        (from, mut source): (&Path, File),
        mut done: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error> {
        source.set_max_buf_size(PIECE as usize);
        let mut writes = FuturesOrdered::new();
        let mut offset = done;
        let mut is_read = false;
        loop {
            while !is_read && writes.len() < REQUESTS {
                let mut piece = Vec::with_capacity(self.write_piece as usize);
                let count = (&mut source)
                    .take(self.write_piece.into())
                    .read_to_end(&mut piece)
                    .await
                    .map_err(|error| Error::local_file(from, &error))?;
                if count == 0 {
                    is_read = true;
                    break;
                }
                let write = self.raw.write(handle, offset, piece);
                offset += count as u64;
                writes.push_back(async move { (count, write.await) });
            }
            let Some((count, written)) = within(writes.next()).await? else { return Ok(()) };
            if let Err(error) = written {
                return Err(self.write_fault(path, error).await);
            }
            done += count as u64;
            progress(done);
        }
    }

    /// OpenSSH's server says nothing but "Failure" when a disk is full.
    async fn write_fault(&self, path: &str, error: SftpError) -> Error {
        if matches!(&error, SftpError::Status(status) if status.status_code == StatusCode::Failure) {
            let disk = within(self.raw.statvfs(path)).await;
            if matches!(disk, Ok(Ok(disk)) if disk.blocks_avail == 0) {
                return Error::file(path, "no space left there");
            }
        }
        self.fault(path, error)
    }

    /// Reads a range into a local file.
    async fn read(
        &self,
        handle: &str,
        path: &str,
        (part, target): (&Path, &mut File),
        range: std::ops::Range<u64>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error> {
        let mut reads = FuturesOrdered::new();
        let (mut asked, mut done) = (range.start, range.start);
        while done < range.end {
            while asked < range.end && reads.len() < REQUESTS {
                let most = u64::from(self.read_piece).min(range.end - asked);
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
            target.write_all(&data).await.map_err(|error| Error::local_file(part, &error))?;
            done += data.len() as u64;
            if data.len() < count as usize {
                // What follows would leave a gap.
                reads = FuturesOrdered::new();
                asked = done;
            }
            progress(done);
        }
        Ok(())
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let renamed = if self.has_posix_rename {
            let mut data = Vec::new();
            for path in [from, to] {
                data.extend_from_slice(&u32::try_from(path.len()).unwrap_or(u32::MAX).to_be_bytes());
                data.extend_from_slice(path.as_bytes());
            }
            match within(self.raw.extended(POSIX_RENAME, data)).await? {
                Ok(Packet::Status(status)) if status.status_code == StatusCode::Ok => Ok(()),
                Ok(Packet::Status(status)) => Err(SftpError::Status(status)),
                Ok(_) => Err(SftpError::UnexpectedPacket),
                Err(error) => Err(error),
            }
        } else {
            // It does not rename over what is there; that there is nothing is no error.
            let _ = within(self.raw.remove(to)).await?;
            within(self.raw.rename(from, to)).await?.map(drop)
        };
        renamed.map_err(|error| self.fault(to, error))
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
