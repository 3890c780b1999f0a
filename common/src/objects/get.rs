//! Gets objects out of the store, verified.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::{GetResultPayload, ObjectStoreExt};
use tokio::sync::mpsc;

use super::{Error, Objects, blocking};
use crate::digest::{Digest, Hasher};

/// Bytes that are read from a file and hashed at once.
const PIECE_LEN: usize = 256 * 1024;

/// Pieces buffered between the network and the disk. One is written while the next arrives; more would only use memory.
const PIECES: usize = 4;

impl Objects {
    /// Returns the content of an object, verified.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::TooLarge`] if it has more than `limit_bytes`, [`Error::Damaged`], and the errors of
    /// the store.
    pub async fn get_bytes(&self, digest: Digest, limit_bytes: u64) -> Result<Vec<u8>, Error> {
        let got = self.store.get(&self.key(digest)).await.map_err(|error| self.of_object(error, digest))?;
        if got.meta.size > limit_bytes {
            return Err(Error::TooLarge { digest, size: got.meta.size, limit: limit_bytes });
        }
        let bytes = got.bytes().await.map_err(|error| self.of_object(error, digest))?;
        blocking(move || verified(digest, Digest::of(&bytes)).map(|()| bytes.into())).await
    }

    /// Writes an object to a file and returns its length. The content goes to `.baton-….part` in the same folder, which
    /// is renamed once it is verified, so the file is complete or absent. An existing file is replaced, and a symbolic
    /// link is not followed. `progress` is called with the length of each piece.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::Damaged`], [`Error::File`] if the file cannot be written, and the errors of the
    /// store.
    pub async fn get_file(
        &self,
        digest: Digest,
        to: &Path,
        progress: impl Fn(u64) + Send + 'static,
    ) -> Result<u64, Error> {
        let got = self.store.get(&self.key(digest)).await.map_err(|error| self.of_object(error, digest))?;
        let mut target = Target::new(digest, to, progress);
        match got.payload {
            GetResultPayload::File(mut file, path) => {
                blocking(move || target.copy(&mut file, &path).and_then(|()| target.finish())).await
            }
            GetResultPayload::Stream(mut pieces) => {
                let (pieces_tx, mut pieces_rx) = mpsc::channel::<Result<Bytes, Error>>(PIECES);
                let receive = async {
                    while let Some(piece) = pieces.next().await {
                        let piece = piece.map_err(|error| self.of_object(error, digest));
                        // The writer has failed, and returns its error.
                        if pieces_tx.send(piece).await.is_err() {
                            break;
                        }
                    }
                    drop(pieces_tx);
                };
                let write = blocking(move || {
                    while let Some(piece) = pieces_rx.blocking_recv() {
                        target.write(&piece?)?;
                    }
                    target.finish()
                });
                tokio::join!(receive, write).1
            }
        }
    }
}

/// A file that an object is written to.
struct Target<P> {
    digest: Digest,
    to: PathBuf,
    part: PathBuf,
    file: Option<std::fs::File>,
    hasher: Hasher,
    size: u64,
    progress: P,
}

impl<P: Fn(u64)> Target<P> {
    fn new(digest: Digest, to: &Path, progress: P) -> Self {
        // The file's name may already have the maximum length. Files of one folder may be written at the same time.
        let name = to.file_name().unwrap_or_default().as_encoded_bytes();
        let own = Digest::of(&[name, digest.bytes().as_slice()].concat()).to_string();
        let part = to.with_file_name(format!(".baton-{}.part", &own[..16]));
        Self { digest, to: to.to_owned(), part, file: None, hasher: Hasher::default(), size: 0, progress }
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), Error> {
        let of_file = |error| Error::file(&self.part, error);
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                // Left by an interrupted write, or a symbolic link.
                let _ = std::fs::remove_file(&self.part);
                none.insert(std::fs::File::create_new(&self.part).map_err(of_file)?)
            }
        };
        std::io::Write::write_all(file, piece).map_err(of_file)?;
        self.hasher.update(piece);
        self.size += piece.len() as u64;
        (self.progress)(piece.len() as u64);
        Ok(())
    }

    fn copy(&mut self, source: &mut std::fs::File, path: &Path) -> Result<(), Error> {
        let mut piece = vec![0; PIECE_LEN];
        loop {
            let len = std::io::Read::read(source, &mut piece).map_err(|error| Error::file(path, error))?;
            if len == 0 {
                return Ok(());
            }
            self.write(&piece[..len])?;
        }
    }

    fn finish(mut self) -> Result<u64, Error> {
        // An empty object has no piece.
        self.write(&[])?;
        let finished = verified(self.digest, self.hasher.clone().finish())
            .and_then(|()| std::fs::rename(&self.part, &self.to).map_err(|error| Error::file(&self.to, error)));
        if finished.is_err() {
            let _ = std::fs::remove_file(&self.part);
        }
        finished.map(|()| self.size)
    }
}

fn verified(digest: Digest, found: Digest) -> Result<(), Error> {
    if digest == found { Ok(()) } else { Err(Error::Damaged { digest }) }
}
