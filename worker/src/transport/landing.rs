//! Files that come piece by piece, and what they are when they are whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use baton_common::digest::{Digest, Hasher};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::{CancellationToken, DropGuard, PollSender};

use super::Error;
use super::local::{open_part, part_of};

/// Bytes that are hashed and written at once: few enough to be in the processor's cache still.
const PIECE: usize = 256 << 10;

/// Pieces that wait to be written.
const PIECES: usize = 16;

/// So much is written to the disk at a time, while the next comes: at the end little is left.
const FLUSH_BYTES: u64 = 64 << 20;

/// A file that comes piece by piece. What has come is hashed and written to the disk while the rest comes.
pub(super) struct Landing<'a> {
    part: PathBuf,
    size: u64,
    /// How much has come.
    pub(super) done: u64,
    piece: BytesMut,
    pieces: PollSender<Bytes>,
    writing: JoinHandle<io::Result<Digest>>,
    /// Without it nothing more is written: another may go on with the part.
    here: DropGuard,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl<'a> Landing<'a> {
    /// Goes on where an earlier one was cut.
    pub(super) async fn open(to: &Path, size: u64, progress: &'a (dyn Fn(u64) + Send + Sync)) -> Result<Self, Error> {
        let part = part_of(to);
        let (file, done) = open_part(&part, size).await?;
        progress(done);
        let file = file.into_std().await;
        let before = part.clone();
        // At once: while the rest comes, nobody may wait for this.
        let hasher = spawn_blocking(move || hashed(File::open(before)?.take(done))).await;
        let hasher = hasher.map_err(io::Error::other).and_then(|hasher| hasher);
        let hasher = hasher.map_err(|error| Error::local_file(&part, &error))?;
        let (pieces, pieces_rx) = mpsc::channel(PIECES);
        let pieces = PollSender::new(pieces);
        let gone = CancellationToken::new();
        let is_gone = gone.clone();
        let writing = spawn_blocking(move || write(file, hasher, pieces_rx, &is_gone));
        let here = gone.drop_guard();
        Ok(Self { part, size, done, piece: BytesMut::new(), pieces, writing, progress, here })
    }

    /// Whether all has come that was there when it was asked for.
    pub(super) fn is_whole(&self) -> bool {
        self.done >= self.size
    }

    /// Gives it its name.
    pub(super) async fn finish(self, to: &Path) -> Result<Digest, Error> {
        let part = self.part.clone();
        let digest = self.written().await?;
        tokio::fs::rename(part, to).await.map_err(|error| Error::local_file(to, &error))?;
        Ok(digest)
    }

    /// Why nothing more can be written, if that is why it has ended. What has come stays for another.
    pub(super) async fn fault(self) -> Option<Error> {
        self.written().await.err()
    }

    async fn written(mut self) -> Result<Digest, Error> {
        // If nobody takes the last piece, the writing tells why.
        let _ = self.shutdown().await;
        let _here = self.here;
        let digest = self.writing.await.map_err(io::Error::other).and_then(|digest| digest);
        digest.map_err(|error| Error::local_file(&self.part, &error))
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.piece.is_empty() {
            ready!(self.pieces.poll_reserve(context)).map_err(io::Error::other)?;
            let piece = self.piece.split().freeze();
            self.pieces.send_item(piece).map_err(io::Error::other)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Landing<'_> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let missing = usize::try_from(self.size - self.done).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(missing)];
        if bytes.is_empty() {
            return Poll::Ready(Err(io::Error::other("it has become longer while it was read")));
        }
        if self.piece.len() + bytes.len() > PIECE {
            ready!(self.poll_send(context))?;
        }
        if self.piece.is_empty() {
            self.piece.reserve(PIECE.max(bytes.len()));
        }
        self.piece.extend_from_slice(bytes);
        self.done += bytes.len() as u64;
        (self.progress)(self.done);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(context))?;
        self.pieces.close();
        Poll::Ready(Ok(()))
    }
}

fn hashed(before: impl Read) -> io::Result<Hasher> {
    let mut hasher = Hasher::default();
    hasher.read(before)?;
    Ok(hasher)
}

/// Writes what comes behind what came before, and gives the SHA-256 of both.
fn write(
    mut file: File,
    mut hasher: Hasher,
    mut pieces: mpsc::Receiver<Bytes>,
    is_gone: &CancellationToken,
) -> io::Result<Digest> {
    let mut n_unflushed = 0;
    let mut flushing: Option<JoinHandle<()>> = None;
    while let Some(piece) = pieces.blocking_recv() {
        if is_gone.is_cancelled() {
            return Err(io::Error::other("nobody waits for it any more"));
        }
        file.write_all(&piece)?;
        hasher.update(&piece);
        n_unflushed += piece.len() as u64;
        if n_unflushed >= FLUSH_BYTES && flushing.as_ref().is_none_or(JoinHandle::is_finished) {
            n_unflushed = 0;
            let file = file.try_clone()?;
            // Only the last one has to succeed, and that is not this one.
            flushing = Some(spawn_blocking(move || _ = file.sync_data()));
        }
    }
    Ok(hasher.finish())
}
