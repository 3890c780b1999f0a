//! Files that come piece by piece, and what they are when they are whole.

use std::io::Read;
use std::path::{Path, PathBuf};

use baton_common::digest::{Digest, Hasher};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Error;
use super::local::{finish_part, open_part, part_of};

/// Pieces that wait to be hashed.
const PIECES: usize = 16;

/// Bytes of what came before that are hashed at once.
const PIECE_LEN: usize = 1 << 20;

/// So much is written to the disk at a time, while the next comes: at the end little is left.
const FLUSH_BYTES: u64 = 64 << 20;

/// A file that comes piece by piece. What has come is hashed and written to the disk while the rest comes.
pub(super) struct Landing {
    file: File,
    part: PathBuf,
    /// How much is there.
    pub(super) done: u64,
    pieces: mpsc::Sender<Vec<u8>>,
    hashing: JoinHandle<std::io::Result<Digest>>,
    flushed: u64,
    flushing: Option<JoinHandle<()>>,
}

impl Landing {
    /// Goes on where an earlier one was cut.
    pub(super) async fn open(to: &Path, size: u64) -> Result<Self, Error> {
        let part = part_of(to);
        let (file, done) = open_part(&part, size).await?;
        let (pieces, mut pieces_rx) = mpsc::channel::<Vec<u8>>(PIECES);
        let before = part.clone();
        let hashing = tokio::task::spawn_blocking(move || {
            let mut hasher = Hasher::default();
            let mut earlier = std::fs::File::open(before)?.take(done);
            let mut piece = vec![0; PIECE_LEN];
            loop {
                let count = earlier.read(&mut piece)?;
                if count == 0 {
                    break;
                }
                hasher.update(&piece[..count]);
            }
            while let Some(piece) = pieces_rx.blocking_recv() {
                hasher.update(&piece);
            }
            Ok(hasher.finish())
        });
        Ok(Self { file, part, done, pieces, hashing, flushed: done, flushing: None })
    }

    pub(super) async fn write(&mut self, piece: Vec<u8>) -> Result<(), Error> {
        self.file.write_all(&piece).await.map_err(|error| Error::local_file(&self.part, &error))?;
        self.done += piece.len() as u64;
        // If nobody takes it, the end says why.
        let _ = self.pieces.send(piece).await;
        let is_idle = self.flushing.as_ref().is_none_or(JoinHandle::is_finished);
        if is_idle
            && self.done - self.flushed >= FLUSH_BYTES
            && let Ok(file) = self.file.try_clone().await
        {
            self.flushed = self.done;
            self.flushing = Some(tokio::task::spawn_blocking(move || {
                // Only the last one has to succeed, and that is not this one.
                let _ = futures_util::FutureExt::now_or_never(file.into_std()).map(|file| file.sync_data());
            }));
        }
        Ok(())
    }

    /// Gives it its name.
    pub(super) async fn finish(self, to: &Path) -> Result<Digest, Error> {
        drop(self.pieces);
        let digest = self.hashing.await.map_err(std::io::Error::other).and_then(|digest| digest);
        let digest = digest.map_err(|error| Error::local_file(&self.part, &error))?;
        finish_part(self.file, &self.part, to).await?;
        Ok(digest)
    }
}
