//! The object store: files by the SHA-256 of their content, in a folder or in an S3 bucket.
//!
//! An object is named after its content and never changes, so it is sent once however many processes need it, and
//! whoever reads it verifies it. What no process needs any more is removed by `baton gc`, which spares what is young:
//! [`Objects::put_file`] makes what it finds and is not young any more young again, so nothing is removed between
//! its submission and the commit of the row that names it. A database that puts something leaves its mark beside the
//! objects, since what one database needs is not known to another.

mod error;
mod file_url;
mod location;
pub mod manifest;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::stream::{BoxStream, FuturesUnordered, StreamExt};
use object_store::path::Path as Key;
use object_store::{GetResultPayload, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::sync::{Mutex, MutexGuard, mpsc};
use uuid::Uuid;

use crate::config;
use crate::digest::{Digest, Hasher};
use location::Location;

pub use error::Error;
pub use manifest::{Entry, Manifest};

/// What is larger is sent in parts; also the smallest size of a part. S3 wants at least 5 MiB.
const PART_BYTES_MIN: u64 = 8 << 20;

/// Most parts of one object. S3 takes 10,000.
const PARTS_MAX: u64 = 9_000;

/// Parts under way at a time: they hide the way to the store, and each is memory.
const PARTS_AT_ONCE: usize = 4;

/// Bytes that are read from a file and hashed at once.
const PIECE_LEN: usize = 256 * 1024;

/// Pieces between the network and the disk. One is written while the next comes; more would only be memory.
const PIECES: usize = 4;

/// Locks among which digests are spread, so that what several put at once is sent once. More than anybody puts at a time.
const N_LOCKS: usize = 256;

/// What is older is made young again when it is put again. Half of what `baton gc` spares unless it is told otherwise.
const YOUNG: Duration = Duration::from_secs(12 * 3600);

/// The folder beneath which objects are, named after the digest.
const ROOT: &str = "sha256";

/// The folder beneath which databases that keep objects here have their marks, named after their ids.
const OWNERS: &str = "owners";

/// The folder beneath which fleets have the marks of the store that they share.
const FLEETS: &str = "fleets";

/// The folder of objects when nobody names another one, in the home of the user.
const DEFAULT_FOLDER: &str = "~/.local/share/baton/objects";

/// A place where objects are. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    location: Arc<Location>,
    locks: Arc<[Mutex<()>; N_LOCKS]>,
}

/// What became of something that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it had to be sent; otherwise the store had it.
    pub sent: bool,
}

/// An object of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// When it was put, by the store's clock.
    pub at: DateTime<Utc>,
}

impl Objects {
    /// Opens the place that the configuration names: a folder, which is made if it is absent, `file://` with one, or
    /// `s3://BUCKET/PREFIX`, whose keys are taken from the environment (`AWS_ACCESS_KEY_ID` and so on). No connection is
    /// made yet.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Folder`].
    pub fn open(config: &config::Objects) -> Result<Self, Error> {
        if let Some(folder) = location::folder(config)? {
            std::fs::create_dir_all(&folder).map_err(|source| Error::Folder { path: folder, source })?;
        }
        Self::new(config)
    }

    /// The same for somebody who only reads: a folder that is absent is not made, and gives `None`.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Folder`].
    pub fn open_existing(config: &config::Objects) -> Result<Option<Self>, Error> {
        match location::folder(config)? {
            Some(folder) if !folder.exists() => Ok(None),
            Some(_) | None => Self::new(config).map(Some),
        }
    }

    fn new(config: &config::Objects) -> Result<Self, Error> {
        let (store, location) = location::open(config)?;
        Ok(Self { store, location: Arc::new(location), locks: Arc::new(std::array::from_fn(|_| Mutex::new(()))) })
    }

    /// Puts a file, unless the store has it.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read, [`Error::Changed`] when somebody writes to it meanwhile, and what the
    /// store answers.
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

    /// Puts a file that nobody else knows and whose digest is known. Into a folder of the same file system it is moved, and
    /// elsewhere copied.
    ///
    /// # Errors
    /// As [`Self::put_file`].
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

    /// Puts bytes, unless the store has them.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn put_bytes(&self, bytes: Vec<u8>) -> Result<Digest, Error> {
        let (digest, bytes) = blocking(move || Ok((Digest::of(&bytes), bytes))).await?;
        Ok(self.put(digest, bytes.into()).await?.digest)
    }

    /// The content of an object, verified.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::TooLarge`] when it has more than `limit_bytes`, [`Error::Damaged`], and what the store
    /// answers.
    pub async fn get_bytes(&self, digest: Digest, limit_bytes: u64) -> Result<Vec<u8>, Error> {
        let got = self.store.get(&self.key(digest)).await.map_err(|error| self.of_object(error, digest))?;
        if got.meta.size > limit_bytes {
            return Err(Error::TooLarge { digest, size: got.meta.size, limit: limit_bytes });
        }
        let bytes = got.bytes().await.map_err(|error| self.of_object(error, digest))?;
        blocking(move || verified(digest, Digest::of(&bytes)).map(|()| bytes.into())).await
    }

    /// Writes an object to a file and gives its length. It is written beside it under another name, `.baton-….part`, and renamed when it is verified, so that the file is there whole or not at all. What is there already is
    /// replaced, and no link there is followed. `progress` is told the bytes of each piece.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::Damaged`], [`Error::File`] when the file cannot be written, and what the store answers.
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
                        // The other side has ended because it cannot write, and says so.
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

    /// Where an object lies, or will, if the store is a folder; whoever only reads it needs no copy.
    pub fn local_path(&self, digest: Digest) -> Option<PathBuf> {
        match &*self.location {
            Location::Folder(folder) => Some(folder.join(name(digest))),
            Location::Bucket { .. } => None,
        }
    }

    /// Where an object lies, for people and other programs.
    pub fn url(&self, digest: Digest) -> String {
        self.url_of(&self.key(digest))
    }

    /// Where the mark of a database lies.
    pub fn owner_url(&self, database: Uuid) -> String {
        self.url_of(&self.owner_key(database))
    }

    /// The place itself, for people.
    pub fn location(&self) -> String {
        self.location.to_string()
    }

    /// When an object was put, by the store's clock; `None` if it is absent.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn put_at(&self, digest: Digest) -> Result<Option<DateTime<Utc>>, Error> {
        Ok(self.head(digest).await?.map(|meta| meta.last_modified))
    }

    /// Whether the store has an object.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn has(&self, digest: Digest) -> Result<bool, Error> {
        Ok(self.head(digest).await?.is_some())
    }

    /// Removes an object; that it is absent is no error.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn delete(&self, digest: Digest) -> Result<(), Error> {
        match self.store.delete(&self.key(digest)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// Marks a database as one that keeps objects here.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn add_owner(&self, database: Uuid) -> Result<(), Error> {
        let key = self.owner_key(database);
        match self.store.head(&key).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => {
                self.store.put(&key, PutPayload::new()).await.map(drop).map_err(|error| self.of_store(error))
            }
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// The databases that have marked themselves.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn owners(&self) -> Result<Vec<Uuid>, Error> {
        let mut owners = Vec::new();
        let mut listed = self.store.list(Some(&self.location.prefix().join(OWNERS)));
        while let Some(found) = listed.next().await {
            let meta = found.map_err(|error| self.of_store(error))?;
            owners.extend(meta.location.filename().and_then(|name| name.parse::<Uuid>().ok()));
        }
        Ok(owners)
    }

    /// Puts the mark by which a fleet knows the store that it shares.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn add_mark(&self, mark: Uuid) -> Result<(), Error> {
        let put = self.store.put(&self.mark_key(mark), PutPayload::new()).await;
        put.map(drop).map_err(|error| self.of_store(error))
    }

    /// Whether the mark is there.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn has_mark(&self, mark: Uuid) -> Result<bool, Error> {
        match self.store.head(&self.mark_key(mark)).await {
            Ok(_) => Ok(true),
            Err(error @ object_store::Error::NotFound { .. }) if !error::names_no_bucket(&error) => Ok(false),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// Removes the mark; that it is absent is no error.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn remove_mark(&self, mark: Uuid) -> Result<(), Error> {
        match self.store.delete(&self.mark_key(mark)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// Where the mark lies.
    pub fn mark_url(&self, mark: Uuid) -> String {
        self.url_of(&self.mark_key(mark))
    }

    /// All objects, in no order. What lies there and is not named like an object is passed over.
    ///
    /// The stream holds a page at a time, however many there are. Its errors are what the store answers.
    pub fn list(&self) -> BoxStream<'static, Result<Listed, Error>> {
        let this = self.clone();
        let prefix = self.location.prefix().join(ROOT);
        let listed = self.store.list(Some(&prefix)).filter_map(move |found| {
            let listed = match found {
                Ok(meta) => digest_of(&meta.location)
                    .map(|digest| Ok(Listed { digest, size: meta.size, at: meta.last_modified })),
                // Somebody else removed it meanwhile.
                Err(object_store::Error::NotFound { .. }) if matches!(&*this.location, Location::Folder(_)) => None,
                Err(error) => Some(Err(this.of_store(error))),
            };
            std::future::ready(listed)
        });
        listed.boxed()
    }

    /// Removes what puts that were cut short have left in a folder, if it is older than this, and gives its number. In a
    /// bucket its own rule for unfinished uploads does so.
    ///
    /// # Errors
    /// [`Error::Folder`].
    pub async fn remove_leftovers(&self, age: Duration) -> Result<u64, Error> {
        match &*self.location {
            Location::Bucket { .. } => Ok(0),
            Location::Folder(folder) => {
                let folder = folder.clone();
                let remove = move || {
                    location::remove_leftovers(&folder.join(ROOT), age)
                        .map_err(|source| Error::Folder { path: folder, source })
                };
                blocking(remove).await
            }
        }
    }

    async fn head(&self, digest: Digest) -> Result<Option<object_store::ObjectMeta>, Error> {
        match self.store.head(&self.key(digest)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.of_store(error)),
        }
    }

    async fn lock(&self, digest: Digest) -> MutexGuard<'_, ()> {
        self.locks[usize::from(digest.bytes()[0])].lock().await
    }

    /// Whether the store has it and it is young, or has been made so: then nobody removes it before a row can name it.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn renew(&self, digest: Digest, size: u64) -> Result<bool, Error> {
        let Some(meta) = self.head(digest).await?.filter(|meta| meta.size == size) else { return Ok(false) };
        if (Utc::now() - meta.last_modified).to_std().is_ok_and(|age| age > YOUNG) {
            // In a bucket only a new object is young, so it is sent again.
            let Some(path) = self.local_path(digest) else { return Ok(false) };
            let touch = move || std::fs::File::options().write(true).open(path)?.set_modified(SystemTime::now());
            // Whoever may not touch another user's file may still replace it.
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

    async fn send_parts(&self, path: &Path, digest: Digest, size: u64) -> Result<(), Error> {
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
            // What cannot be taken back now, the bucket's own rule for unfinished uploads removes.
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

    fn key(&self, digest: Digest) -> Key {
        name(digest).split('/').fold(self.location.prefix(), |key, part| key.join(part))
    }

    fn owner_key(&self, database: Uuid) -> Key {
        self.location.prefix().join(OWNERS).join(database.to_string())
    }

    fn mark_key(&self, mark: Uuid) -> Key {
        self.location.prefix().join(FLEETS).join(mark.to_string())
    }

    fn url_of(&self, key: &Key) -> String {
        match &*self.location {
            Location::Folder(folder) => file_url::of_path(&folder.join(key.as_ref())),
            Location::Bucket { name, .. } => format!("s3://{name}/{key}"),
        }
    }

    fn of_store(&self, error: object_store::Error) -> Error {
        error::of_store(error, &self.location)
    }

    fn of_object(&self, error: object_store::Error, digest: Digest) -> Error {
        match (error, &*self.location) {
            (error @ object_store::Error::NotFound { .. }, Location::Bucket { .. })
                if error::names_no_bucket(&error) =>
            {
                self.of_store(error)
            }
            (object_store::Error::NotFound { .. }, location) => {
                Error::Absent { digest, location: location.to_string() }
            }
            (error, _) => self.of_store(error),
        }
    }
}

/// What was found out about a file by reading it once.
enum Looked {
    /// It is small, and this is it.
    Whole { digest: Digest, bytes: Bytes },
    /// It has to be read once more, part by part.
    Large { digest: Digest, size: u64 },
}

/// Reads a file once. That its size and time stay as they are shows that nobody writes to it meanwhile.
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

/// A file on its way into the store.
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

/// The length of a part: parts of one object are equally long but for the last, as some servers demand.
fn part_len(size: u64) -> u64 {
    size.div_ceil(PARTS_MAX).max(PART_BYTES_MIN)
}

/// A file on its way out of the store.
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
        // The name may be as long as names can be. Files of one folder that come at once have parts of their own.
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
                // That of an earlier attempt, or a link that somebody has put there.
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
        // An empty object comes in no piece.
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

/// The key below the prefix.
fn name(digest: Digest) -> String {
    let hex = digest.to_string();
    format!("{ROOT}/{}/{}", &hex[..2], &hex[2..])
}

/// The digest that a key stands for.
fn digest_of(key: &Key) -> Option<Digest> {
    let mut parts = key.as_ref().rsplit('/');
    let (rest, first) = (parts.next()?, parts.next()?);
    if first.len() == 2 { format!("{first}{rest}").parse().ok() } else { None }
}

/// Runs what reads files or hashes on the blocking pool.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The program ends; nobody waits for the answer any more.
        Err(_) => std::future::pending().await,
    }
}
