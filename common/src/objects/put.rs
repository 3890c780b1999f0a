//! Puts files and bytes into the store.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use chrono::Utc;
use futures_util::stream::{FuturesUnordered, StreamExt};
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::sync::MutexGuard;

use super::{Error, Objects, blocking, location};
use crate::digest::{Digest, Hasher};

/// Files of at least this size are sent in parts; also the smallest size of a part. S3 requires at least 5 MiB.
pub(super) const PART_BYTES_MIN: u64 = 8 << 20;

/// Most parts of one object. S3 accepts 10,000.
pub(super) const PARTS_MAX: u64 = 9_000;

/// Parts in flight at a time: enough to hide the latency of the store. Each part is in memory.
const PARTS_AT_ONCE: usize = 4;

/// Objects older than this are made young again when they are put again. Half of the age that `baton gc` spares by
/// default.
const YOUNG: Duration = Duration::from_secs(12 * 3600);

/// The result of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The digest of the object.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it was sent; false if the store already had it.
    pub sent: bool,
}

impl Objects {
    /// Puts a file, unless the store already has it.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, [`Error::Changed`] if it changes meanwhile, and the errors of the
    /// store.
    pub async fn put_file(&self, path: &Path) -> Result<Stored, Error> {
        let of_file = path.to_owned();
        match blocking(move || look(&of_file)).await? {
            Looked::Whole { digest, bytes } => self.put(digest, bytes).await,
            Looked::Large { digest, size } => {
                let _alone = self.lock(digest).await;
                let sent = !self.renew(digest, size).await?;
                if sent {
                    self.send_parts(path, digest, size).await?;
                }
                Ok(Stored { digest, size, sent })
            }
        }
    }

    /// Puts a private file whose digest is known. The file is moved if the store is a folder of the same file system,
    /// and copied otherwise.
    ///
    /// # Errors
    /// Those of [`Self::put_file`].
    pub async fn take_file(&self, path: &Path, digest: Digest, size: u64) -> Result<(), Error> {
        let _alone = self.lock(digest).await;
        if self.renew(digest, size).await? {
            return Ok(());
        }
        if let Some(target) = self.local_path(digest) {
            let source = path.to_owned();
            let moved = move || location::move_durably(&source, &target).map_err(|error| Error::file(&source, error));
            if blocking(moved).await? {
                return Ok(());
            }
        }
        self.send_parts(path, digest, size).await
    }

    /// Puts bytes, unless the store already has them.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn put_bytes(&self, bytes: Vec<u8>) -> Result<Digest, Error> {
        let (digest, bytes) = blocking(move || Ok((Digest::of(&bytes), bytes))).await?;
        Ok(self.put(digest, bytes.into()).await?.digest)
    }

    /// Whether the store has the object and the object is young; makes an old object young again where it can. A young
    /// object is not removed before a row can name it.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn renew(&self, digest: Digest, size: u64) -> Result<bool, Error> {
        let Some(meta) = self.head(digest).await?.filter(|meta| meta.size == size) else { return Ok(false) };
        if (Utc::now() - meta.last_modified).to_std().is_ok_and(|age| age > YOUNG) {
            // In a bucket only a new object is young, so the object is sent again.
            let Some(path) = self.local_path(digest) else { return Ok(false) };
            let touch = move || std::fs::File::options().write(true).open(path)?.set_modified(SystemTime::now());
            // A user who may not touch another user's file may still replace it.
            return blocking(move || Ok(touch().is_ok())).await;
        }
        Ok(true)
    }

    async fn put(&self, digest: Digest, bytes: Bytes) -> Result<Stored, Error> {
        let size = bytes.len() as u64;
        let _alone = self.lock(digest).await;
        let sent = !self.renew(digest, size).await?;
        if sent {
            let key = self.key(digest);
            self.store.put(&key, PutPayload::from_bytes(bytes)).await.map_err(|error| self.of_store(error))?;
        }
        Ok(Stored { digest, size, sent })
    }

    async fn lock(&self, digest: Digest) -> MutexGuard<'_, ()> {
        self.locks[usize::from(digest.bytes()[0])].lock().await
    }

    pub(super) async fn send_parts(&self, path: &Path, digest: Digest, size: u64) -> Result<(), Error> {
        let source = path.to_owned();
        let file = blocking(move || std::fs::File::open(&source).map_err(|error| Error::file(&source, error))).await?;
        let key = self.key(digest);
        let mut upload = self.store.put_multipart(&key).await.map_err(|error| self.of_store(error))?;
        let parts =
            Parts { path: path.to_owned(), file, hasher: Hasher::default(), left: size, part_len: part_len(size) };
        let sent = match self.send(upload.as_mut(), parts, digest).await {
            Ok(()) => upload.complete().await.map(drop).map_err(|error| self.of_store(error)),
            Err(error) => Err(error),
        };
        if sent.is_err() {
            // If this fails, the bucket's rule for unfinished uploads removes the parts.
            let _ = upload.abort().await;
        }
        sent
    }

    async fn send(&self, upload: &mut dyn MultipartUpload, mut parts: Parts, digest: Digest) -> Result<(), Error> {
        let mut under_way = FuturesUnordered::new();
        while parts.left > 0 {
            let part;
            (parts, part) = blocking(move || parts.next()).await?;
            under_way.push(upload.put_part(part.into()));
            if under_way.len() >= PARTS_AT_ONCE
                && let Some(done) = under_way.next().await
            {
                done.map_err(|error| self.of_store(error))?;
            }
        }
        while let Some(done) = under_way.next().await {
            done.map_err(|error| self.of_store(error))?;
        }
        if parts.hasher.finish() == digest { Ok(()) } else { Err(Error::Changed { path: parts.path }) }
    }
}

/// The result of reading a file once.
enum Looked {
    /// The file is small; these are its bytes.
    Whole { digest: Digest, bytes: Bytes },
    /// The file must be read once more, part by part.
    Large { digest: Digest, size: u64 },
}

/// Reads a file once. Its size and modification time must not change meanwhile.
fn look(path: &Path) -> Result<Looked, Error> {
    let of_file = |error| Error::file(path, error);
    let file = std::fs::File::open(path).map_err(of_file)?;
    let before = file.metadata().map_err(of_file)?;
    let size = before.len();
    let looked = if size < PART_BYTES_MIN {
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        std::io::Read::read_to_end(&mut std::io::Read::take(&file, PART_BYTES_MIN), &mut bytes).map_err(of_file)?;
        Looked::Whole { digest: Digest::of(&bytes), bytes: bytes.into() }
    } else {
        let (digest, size) = Digest::of_file(path).map_err(of_file)?;
        Looked::Large { digest, size }
    };
    let after = file.metadata().map_err(of_file)?;
    let found = match &looked {
        Looked::Whole { bytes, .. } => bytes.len() as u64,
        Looked::Large { size, .. } => *size,
    };
    if found != size
        || after.len() != size
        || after.modified().map_err(of_file)? != before.modified().map_err(of_file)?
    {
        return Err(Error::Changed { path: path.to_owned() });
    }
    Ok(looked)
}

/// A file that is being sent in parts.
struct Parts {
    path: PathBuf,
    file: std::fs::File,
    hasher: Hasher,
    left: u64,
    part_len: u64,
}

impl Parts {
    fn next(mut self) -> Result<(Self, Vec<u8>), Error> {
        let len = self.left.min(self.part_len);
        let mut part = vec![0; usize::try_from(len).expect("a part fits into memory")];
        match std::io::Read::read_exact(&mut self.file, &mut part) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(Error::Changed { path: self.path });
            }
            Err(error) => return Err(Error::file(&self.path, error)),
        }
        self.hasher.update(&part);
        self.left -= len;
        Ok((self, part))
    }
}

/// The length of each part but the last. Some servers require parts of equal length.
pub(super) fn part_len(size: u64) -> u64 {
    size.div_ceil(PARTS_MAX).max(PART_BYTES_MIN)
}
