//! The object store: files named by the SHA-256 of their content, in a folder or in an S3 bucket.
//!
//! An object never changes, so it is sent once, however many processes need it, and every reader verifies it. `baton
//! gc` removes objects that no process needs, but spares young ones. [`Objects::put_file`] makes an old object young
//! again, so no object is removed between its submission and the commit of the row that names it. Each database that
//! puts objects leaves a mark in the store, since a database does not know which objects another one needs.

mod error;
mod file_url;
mod get;
mod location;
pub mod manifest;
mod marks;
mod put;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::stream::{BoxStream, StreamExt};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::sync::Mutex;

use crate::config;
use crate::digest::Digest;
use location::Location;

pub use error::Error;
pub use manifest::{Entry, Manifest};
pub use put::Stored;

/// Number of locks over which digests are spread, so that concurrent puts of one object send it once. More than the
/// puts that run at a time.
const N_LOCKS: usize = 256;

/// The folder of the objects.
const ROOT: &str = "sha256";

/// The default store: a folder in the user's home.
const DEFAULT_FOLDER: &str = "~/.local/share/baton/objects";

/// An object store. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    location: Arc<Location>,
    locks: Arc<[Mutex<()>; N_LOCKS]>,
}

/// An object in a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// When it was put, by the store's clock.
    pub at: DateTime<Utc>,
}

impl Objects {
    /// Opens the store that the configuration names: a folder or a `file://` URL of one, which is created if it is
    /// absent, or `s3://BUCKET/PREFIX`, whose keys come from the environment (`AWS_ACCESS_KEY_ID` and so on). Makes no
    /// connection yet.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Folder`].
    pub fn open(config: &config::Objects) -> Result<Self, Error> {
        if let Some(folder) = location::folder(config)? {
            std::fs::create_dir_all(&folder).map_err(|source| Error::Folder { path: folder, source })?;
        }
        Self::new(config)
    }

    /// Opens the store for reading. Returns `None` for a folder that is absent.
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

    /// The path of an object, present or not, if the store is a folder. A reader can use it instead of a copy.
    pub fn local_path(&self, digest: Digest) -> Option<PathBuf> {
        match &*self.location {
            Location::Folder(folder) => Some(folder.join(name(digest))),
            Location::Bucket { .. } => None,
        }
    }

    /// The URL of an object.
    pub fn url(&self, digest: Digest) -> String {
        self.url_of(&self.key(digest))
    }

    /// The location of the store, for people.
    pub fn location(&self) -> String {
        self.location.to_string()
    }

    /// When an object was put, by the store's clock; `None` if it is absent.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn put_at(&self, digest: Digest) -> Result<Option<DateTime<Utc>>, Error> {
        Ok(self.head(digest).await?.map(|meta| meta.last_modified))
    }

    /// Whether the store has an object.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn has(&self, digest: Digest) -> Result<bool, Error> {
        Ok(self.head(digest).await?.is_some())
    }

    /// Removes an object. An absent object is not an error.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn delete(&self, digest: Digest) -> Result<(), Error> {
        match self.store.delete(&self.key(digest)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// Lists all objects, in no order, and skips files that are not named like an object.
    ///
    /// The stream holds one page at a time. Its errors are those of the store.
    pub fn list(&self) -> BoxStream<'static, Result<Listed, Error>> {
        let this = self.clone();
        let prefix = self.location.prefix().join(ROOT);
        let listed = self.store.list(Some(&prefix)).filter_map(move |found| {
            let listed = match found {
                Ok(meta) => digest_of(&meta.location)
                    .map(|digest| Ok(Listed { digest, size: meta.size, at: meta.last_modified })),
                // It was removed meanwhile.
                Err(object_store::Error::NotFound { .. }) if matches!(&*this.location, Location::Folder(_)) => None,
                Err(error) => Some(Err(this.of_store(error))),
            };
            std::future::ready(listed)
        });
        listed.boxed()
    }

    /// Removes the files of this age that interrupted puts have left in a folder, and returns their number. In a
    /// bucket, the bucket's rule for unfinished uploads removes them.
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

    fn key(&self, digest: Digest) -> Key {
        name(digest).split('/').fold(self.location.prefix(), |key, part| key.join(part))
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

/// The key of an object, relative to the prefix.
fn name(digest: Digest) -> String {
    let hex = digest.to_string();
    format!("{ROOT}/{}/{}", &hex[..2], &hex[2..])
}

/// The digest in a key; `None` if the key is not that of an object.
fn digest_of(key: &Key) -> Option<Digest> {
    let mut parts = key.as_ref().rsplit('/');
    let (rest, first) = (parts.next()?, parts.next()?);
    if first.len() == 2 { format!("{first}{rest}").parse().ok() } else { None }
}

/// Runs work that reads files or hashes on the blocking pool.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is shutting down, and drops this future, too.
        Err(_) => std::future::pending().await,
    }
}
