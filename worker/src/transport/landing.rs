//! Files that come piece by piece, and what they are when they are whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use baton_common::digest::{Digest, Hasher};
use bytes::Bytes;
use futures_util::{Sink, SinkExt};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::{CancellationToken, DropGuard, PollSender};

use super::Error;
use super::local::{open_part, part_of};

/// Bytes that are hashed and written at once: few enough to be in the processor's cache still.
const BATCH_BYTES: usize = 256 << 10;

/// Batches that wait to be written.
const BATCHES: usize = 16;

/// So much is written to the disk at a time, while the next comes: at the end little is left.
const FLUSH_BYTES: u64 = 64 << 20;

/// A file that comes piece by piece. What has come is hashed and written to the disk while the rest comes.
pub(super) struct Landing<'a> {
    part: PathBuf,
    size: u64,
    /// How much has come.
    pub(super) done: u64,
    /// What goes to the writing next.
    batch: Vec<Bytes>,
    n_gathered: usize,
    batches: PollSender<Vec<Bytes>>,
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
        let (batches, batches_rx) = mpsc::channel(BATCHES);
        let batches = PollSender::new(batches);
        let gone = CancellationToken::new();
        let is_gone = gone.clone();
        let writing = spawn_blocking(move || write(file, hasher, batches_rx, &is_gone));
        let here = gone.drop_guard();
        Ok(Self { part, size, done, batch: Vec::new(), n_gathered: 0, batches, writing, progress, here })
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
        let _ = self.close().await;
        let _here = self.here;
        let digest = self.writing.await.map_err(io::Error::other).and_then(|digest| digest);
        digest.map_err(|error| Error::local_file(&self.part, &error))
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.batch.is_empty() {
            ready!(self.batches.poll_reserve(context)).map_err(io::Error::other)?;
            self.n_gathered = 0;
            let batch = std::mem::take(&mut self.batch);
            self.batches.send_item(batch).map_err(io::Error::other)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Sink<Bytes> for Landing<'_> {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.n_gathered < BATCH_BYTES { Poll::Ready(Ok(())) } else { self.poll_send(context) }
    }

    fn start_send(mut self: Pin<&mut Self>, mut piece: Bytes) -> io::Result<()> {
        if self.is_whole() {
            return Err(io::Error::other("it has become longer while it was read"));
        }
        piece.truncate(usize::try_from(self.size - self.done).unwrap_or(usize::MAX));
        self.done += piece.len() as u64;
        self.n_gathered += piece.len();
        self.batch.push(piece);
        (self.progress)(self.done);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(context))?;
        self.batches.close();
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
    mut batches: mpsc::Receiver<Vec<Bytes>>,
    is_gone: &CancellationToken,
) -> io::Result<Digest> {
    let mut n_unflushed = 0;
    let mut flushing: Option<JoinHandle<()>> = None;
    while let Some(batch) = batches.blocking_recv() {
        if is_gone.is_cancelled() {
            return Err(io::Error::other("nobody waits for it any more"));
        }
        for piece in batch {
            file.write_all(&piece)?;
            hasher.update(&piece);
            n_unflushed += piece.len() as u64;
        }
        if n_unflushed >= FLUSH_BYTES && flushing.as_ref().is_none_or(JoinHandle::is_finished) {
            n_unflushed = 0;
            let file = file.try_clone()?;
            // Only the last one has to succeed, and that is not this one.
            flushing = Some(spawn_blocking(move || _ = file.sync_data()));
        }
    }
    Ok(hasher.finish())
}
