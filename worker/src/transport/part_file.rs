//! Files that are received piece by piece, hashed and written meanwhile.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use baton_common::digest::{Digest, Hasher};
use bytes::Bytes;
use futures_util::{Sink, SinkExt};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Error;
use super::local::{open_part, part_of};
use super::uncached::{Block, Uncached};

/// Blocks of a file: one is filled, one hashed, one written, and one waits.
const BLOCKS: usize = 4;

/// Bytes between two progress reports, each of which wakes a task.
const TOLD_BYTES: u64 = 512 << 10;

/// A file that is received piece by piece; received data is hashed and written to the disk while the rest arrives.
pub(super) struct PartFile {
    part: PathBuf,
    /// The expected size.
    pub(super) size: u64,
    /// The received size.
    pub(super) done: u64,
    /// Received data that is in no block yet.
    rest: Bytes,
    block: Option<Block>,
    empty: mpsc::Receiver<Block>,
    /// The channel has room for all blocks.
    full: Option<mpsc::Sender<Block>>,
    hashing: JoinHandle<Digest>,
    writing: JoinHandle<io::Result<()>>,
    told: watch::Sender<u64>,
}

impl PartFile {
    /// Opens the part file to resume an interrupted transfer. Dropping the guard stops all writing, so that another
    /// transfer can resume from the part even if this value lives on in another task.
    pub(super) async fn open(to: &Path, size: u64) -> Result<(Self, DropGuard), Error> {
        let part = part_of(to);
        let (file, done) = open_part(&part, size).await?;
        let file = file.into_std().await;
        let before = part.clone();
        // Awaited before the transfer starts, so that the transfer never waits for it.
        let hasher = spawn_blocking(move || hashed(File::open(before)?.take(done))).await;
        let hasher = hasher.map_err(io::Error::other).and_then(|hasher| hasher);
        let hasher = hasher.map_err(|error| Error::local_file(&part, &error))?;
        let (full_tx, full_rx) = mpsc::channel(BLOCKS);
        let (hashed_tx, hashed_rx) = mpsc::channel(BLOCKS);
        let (empty_tx, empty) = mpsc::channel(BLOCKS);
        for _ in 1..BLOCKS {
            // The channel has room for all of them.
            let _ = empty_tx.try_send(Block::behind(0));
        }
        let gone = CancellationToken::new();
        let is_gone = gone.clone();
        let hashing = spawn_blocking(move || hash(hasher, full_rx, &hashed_tx));
        let writing = spawn_blocking(move || write(Uncached::new(file, done), hashed_rx, &empty_tx, &is_gone));
        let landing = Self {
            part,
            size,
            done,
            rest: Bytes::new(),
            block: Some(Block::behind(done)),
            empty,
            full: Some(full_tx),
            hashing,
            writing,
            told: watch::Sender::new(done),
        };
        Ok((landing, gone.drop_guard()))
    }

    /// Whether the expected size has been received.
    pub(super) fn is_whole(&self) -> bool {
        self.done >= self.size
    }

    /// The received size, in steps; exact at the end.
    pub(super) fn told(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// Completes the file and renames it.
    pub(super) async fn finish(self, to: &Path) -> Result<Digest, Error> {
        let part = self.part.clone();
        let digest = self.written().await?;
        tokio::fs::rename(part, to).await.map_err(|error| Error::local_file(to, &error))?;
        Ok(digest)
    }

    /// The error of the disk, if writing failed. The received part stays for a later transfer.
    pub(super) async fn fault(self) -> Option<Error> {
        self.written().await.err()
    }

    async fn written(mut self) -> Result<Digest, Error> {
        // If the last piece cannot be written, `writing` has the error.
        let _ = self.close().await;
        let written = self.writing.await.map_err(io::Error::other).and_then(|written| written);
        written.map_err(|error| Error::local_file(&self.part, &error))?;
        self.hashing.await.map_err(|error| Error::local_file(&self.part, &io::Error::other(error)))
    }

    /// Moves received data into blocks.
    fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.rest.is_empty() {
            if self.block.is_none() {
                self.block = ready!(self.empty.poll_recv(context));
            }
            let Some(block) = &mut self.block else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
            block.fill(&mut self.rest);
            if block.is_full() {
                self.give_block()?;
            }
        }
        Poll::Ready(Ok(()))
    }

    fn give_block(&mut self) -> io::Result<()> {
        match (self.block.take(), &self.full) {
            (Some(block), Some(full)) => full.try_send(block).map_err(|_| io::ErrorKind::BrokenPipe.into()),
            (Some(_), None) | (None, _) => Ok(()),
        }
    }
}

impl Sink<Bytes> for PartFile {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_rest(context)
    }

    fn start_send(mut self: Pin<&mut Self>, mut piece: Bytes) -> io::Result<()> {
        if self.is_whole() {
            return Err(io::Error::other("it has grown while it was read"));
        }
        piece.truncate(usize::try_from(self.size - self.done).unwrap_or(usize::MAX));
        let n_told = self.done / TOLD_BYTES;
        self.done += piece.len() as u64;
        self.rest = piece;
        if self.done / TOLD_BYTES > n_told || self.is_whole() {
            self.told.send_replace(self.done);
        }
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_rest(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let given = ready!(self.poll_rest(context)).and_then(|()| self.give_block());
        self.full = None;
        Poll::Ready(given)
    }
}

fn hashed(before: impl Read) -> io::Result<Hasher> {
    let mut hasher = Hasher::default();
    hasher.read(before)?;
    Ok(hasher)
}

/// Hashes the blocks after the earlier part of the file.
fn hash(mut hasher: Hasher, mut full: mpsc::Receiver<Block>, hashed: &mpsc::Sender<Block>) -> Digest {
    while let Some(block) = full.blocking_recv() {
        hasher.update(block.bytes());
        if hashed.blocking_send(block).is_err() {
            break;
        }
    }
    hasher.finish()
}

/// Writes the blocks after the earlier part of the file.
fn write(
    mut target: Uncached,
    mut hashed: mpsc::Receiver<Block>,
    empty: &mpsc::Sender<Block>,
    is_gone: &CancellationToken,
) -> io::Result<()> {
    while let Some(mut block) = hashed.blocking_recv() {
        if is_gone.is_cancelled() {
            return Err(io::Error::other("the transfer was cancelled"));
        }
        target.put(&block)?;
        block.clear();
        // The receiver is gone at the end of the transfer.
        let _ = empty.try_send(block);
    }
    Ok(())
}
