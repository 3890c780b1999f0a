//! Checkpoints of older versions, kept in files.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use baton_common::store::blob::Checkpoint;
use serde_json::Value;

use super::{Harness, KIND};
use crate::author::process::Process;
use crate::author::registry::{NotMade, Registry};

/// The environment variable that allows [`Harness::keep_golden`] to write a missing file: `BATON_WRITE_GOLDEN=1 cargo test`.
pub const WRITE_GOLDEN: &str = "BATON_WRITE_GOLDEN";

/// Why a process could not be restored from a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum NotRestored {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file's path.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The bytes are no checkpoint.
    #[error("not a checkpoint: {0}")]
    NoCheckpoint(String),
    /// The present version of the process cannot read the state in the checkpoint. A worker of this version would leave the
    /// process to a worker of another version.
    #[error("{0}; give new fields `#[serde(default)]`, and keep the names and types of old ones")]
    OtherShape(String),
}

/// A checkpoint in bytes, or the file that holds it.
#[derive(Clone, Copy, Debug)]
pub enum Golden<'a> {
    /// The bytes of [`Harness::checkpoint_bytes`].
    Bytes(&'a [u8]),
    /// A file of [`Harness::keep_golden`].
    File(&'a Path),
}

impl<'a> From<&'a [u8]> for Golden<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Golden::Bytes(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Golden<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Golden::Bytes(bytes)
    }
}

impl<'a> From<&'a Path> for Golden<'a> {
    fn from(path: &'a Path) -> Self {
        Golden::File(path)
    }
}

impl<'a> From<&'a str> for Golden<'a> {
    fn from(path: &'a str) -> Self {
        Golden::File(Path::new(path))
    }
}

impl Harness {
    /// The last checkpoint, as a worker stores it in the database; `None` before the first commit.
    pub fn checkpoint_bytes(&self) -> Option<&[u8]> {
        self.row.checkpoint.as_deref()
    }

    /// Keeps the last checkpoint in a file for the tests of later versions. It never replaces a file: an existing one is left
    /// as it is, and a missing one is written only when the environment has `BATON_WRITE_GOLDEN=1`.
    ///
    /// # Panics
    /// There is no checkpoint yet, the file cannot be written, or it is missing and the variable is not set.
    #[track_caller]
    pub fn keep_golden(&self, path: impl AsRef<Path>) {
        let path = path.as_ref();
        let bytes = self.checkpoint_bytes().expect("a golden file needs a checkpoint; advance the process first");
        if path.exists() {
            return;
        }
        let is_allowed = std::env::var(WRITE_GOLDEN).is_ok_and(|value| value == "1");
        assert!(is_allowed, "there is no {}; run the test once with {WRITE_GOLDEN}=1 to write it", path.display());
        let write = || {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            File::create_new(path)?.write_all(bytes)
        };
        write().unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    /// Restores a process of this type from a kept checkpoint: bytes, or the path of a file. `with` is the `with` of its
    /// spec. The process continues where the checkpoint was made.
    ///
    /// # Errors
    /// See [`NotRestored`].
    pub fn from_golden<'a, P: Process>(with: Value, golden: impl Into<Golden<'a>>) -> Result<Self, NotRestored> {
        let mut registry = Registry::new();
        registry.register::<P>(KIND);
        let bytes = match golden.into() {
            Golden::Bytes(bytes) => bytes.to_vec(),
            Golden::File(path) => {
                fs::read(path).map_err(|source| NotRestored::File { path: path.display().to_string(), source })?
            }
        };
        Checkpoint::from_bytes(&bytes).map_err(|error| NotRestored::NoCheckpoint(error.to_string()))?;
        let mut harness = Self::new::<P>(with);
        harness.row.checkpoint = Some(bytes);
        match harness.claim() {
            Ok(()) => Ok(harness),
            Err(
                NotMade::OtherBuild(reason)
                | NotMade::Failed(reason)
                | NotMade::UnknownKind(reason)
                | NotMade::NotHere(reason),
            ) => Err(NotRestored::OtherShape(reason)),
        }
    }
}
