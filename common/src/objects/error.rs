//! Errors of the object store, by what the caller does next.

use std::io;
use std::path::{Path, PathBuf};

use super::location::Location;
use crate::digest::Digest;

/// Why an operation on the object store failed. The text never contains keys or a server's echo of the request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names no usable store. Correct it.
    #[error("{reason}")]
    Config {
        /// The problem and its remedy.
        reason: String,
    },
    /// The folder of the store cannot be used. Correct its permissions, free space, or configure another folder.
    #[error(
        "cannot use the object store in folder {}; make it writable for this user, free space there, or configure another \
         folder in `objects.url`", .path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file outside the store cannot be read or written.
    #[error("cannot use {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is being written. Put it again when it no longer changes.
    #[error("{} changed while it was read; try again when no program writes to it", .path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The store has no such object.
    #[error(
        "object {digest} is not in {location}; it was removed, or it was put into another store than that of `objects.url`"
    )]
    Absent {
        /// The digest of the object.
        digest: Digest,
        /// The location of the store.
        location: String,
    },
    /// The content does not match the digest. Remove the object, and put it again.
    #[error(
        "object {digest} is damaged: its content has another SHA-256; remove it, and submit the processes that need it again"
    )]
    Damaged {
        /// The digest of the object.
        digest: Digest,
    },
    /// The object exceeds the reader's limit.
    #[error("object {digest} has {size} bytes, which exceeds the limit of {limit}")]
    TooLarge {
        /// The digest of the object.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
        /// The most bytes.
        limit: u64,
    },
    /// The object is not a readable manifest. Use a newer program, or submit again.
    #[error("the object is not a manifest that this program can read: {reason}")]
    Manifest {
        /// The problem.
        reason: String,
    },
    /// The bucket does not exist. Create it, or correct its name.
    #[error(
        "bucket `{bucket}` does not exist; create it, or correct `objects.url`, `objects.endpoint` or `objects.region`"
    )]
    NoBucket {
        /// The name of the bucket.
        bucket: String,
    },
    /// The server rejects the keys, or the keys lack the permission.
    #[error(
        "the server of bucket `{bucket}` denied access ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the \
         permissions of the key"
    )]
    Refused {
        /// The bucket.
        bucket: String,
        /// The server's error code.
        code: String,
    },
    /// The server did not answer, or answered with an unexpected error. Try again.
    #[error("{location} is unavailable: {reason}")]
    Unreachable {
        /// The location of the store.
        location: String,
        /// The reason.
        reason: String,
    },
}

impl Error {
    /// Whether the operation may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable { .. } => true,
            Error::Config { .. }
            | Error::Folder { .. }
            | Error::File { .. }
            | Error::Changed { .. }
            | Error::Absent { .. }
            | Error::Damaged { .. }
            | Error::TooLarge { .. }
            | Error::Manifest { .. }
            | Error::NoBucket { .. }
            | Error::Refused { .. } => false,
        }
    }

    pub(super) fn file(path: &Path, source: io::Error) -> Self {
        Error::File { path: path.to_owned(), source }
    }
}

/// Classifies an error of the store.
pub(super) fn of_store(error: object_store::Error, location: &Location) -> Error {
    let bucket = match location {
        Location::Folder(path) => {
            return Error::Folder { path: path.clone(), source: innermost_io(&error) };
        }
        Location::Bucket { name, .. } => name.clone(),
    };
    let text = innermost(&error).to_string();
    let code = code(&text);
    if code == Some("NoSuchBucket") {
        return Error::NoBucket { bucket };
    }
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum that grows; the others are reported unchanged")]
    match error {
        object_store::Error::NotFound { .. } => Error::NoBucket { bucket },
        object_store::Error::PermissionDenied { .. } => {
            Error::Refused { bucket, code: code.unwrap_or("Forbidden").to_owned() }
        }
        object_store::Error::Unauthenticated { .. } => {
            Error::Refused { bucket, code: code.unwrap_or("Unauthorized").to_owned() }
        }
        _ => {
            // The body comes from the server, and may echo the request.
            let first_line = text.split(['\n', '<']).next().unwrap_or_default().trim_end_matches([' ', ':']);
            let reason = code.unwrap_or(first_line).to_owned();
            Error::Unreachable { location: location.to_string(), reason }
        }
    }
}

/// Whether the server reports that the bucket does not exist.
pub(super) fn names_no_bucket(error: &object_store::Error) -> bool {
    code(&innermost(error).to_string()) == Some("NoSuchBucket")
}

/// The code in the XML of an S3 error.
fn code(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("<Code>")?;
    rest.split_once("</Code>").map(|(code, _)| code)
}

fn innermost(error: &object_store::Error) -> &(dyn std::error::Error + 'static) {
    let mut inner: &(dyn std::error::Error + 'static) = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner
}

/// The system's error, without the text of the library.
fn innermost_io(error: &object_store::Error) -> io::Error {
    let inner = innermost(error);
    match inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(inner.to_string()),
    }
}
