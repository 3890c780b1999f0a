//! What can go wrong with objects, by what whoever asked for them does next.

use std::io;
use std::path::{Path, PathBuf};

use super::location::Location;
use crate::digest::Digest;

/// Why something was not put, got or listed. No text contains keys, nor what a server echoes of a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names no usable place. Correct it.
    #[error("{reason}")]
    Config {
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// The folder of objects cannot be used. Correct its rights, make room, or name another one.
    #[error(
        "cannot use the folder of objects {}; make it writable for this user, make room there, or name another one in \
         `objects.url`", .path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file outside of the store cannot be read or written.
    #[error("cannot use {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody writes to the file. Wait for that, and put it again.
    #[error("{} was changed while it was read; try again when nobody writes to it", .path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The store has no such object.
    #[error(
        "there is no object {digest} in {location}; was it removed, or is `objects.url` another one than that of whoever put it?"
    )]
    Absent {
        /// Its name.
        digest: Digest,
        /// Where it was looked for.
        location: String,
    },
    /// The content is not what its name says. Remove it, and put it again.
    #[error(
        "the object {digest} is damaged: its content has another SHA-256; remove it, and submit what needs it again"
    )]
    Damaged {
        /// Its name.
        digest: Digest,
    },
    /// It is larger than its reader takes in.
    #[error("the object {digest} has {size} bytes; at most {limit} are taken in here")]
    TooLarge {
        /// Its name.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
        /// The most bytes.
        limit: u64,
    },
    /// An object is not the manifest that it should be. Nothing but a newer program or another submission helps.
    #[error("the object is no manifest that this program reads: {reason}")]
    Manifest {
        /// What is wrong with it.
        reason: String,
    },
    /// The bucket is not there. Make it, or correct its name.
    #[error("there is no bucket `{bucket}`; make it, or correct `objects.url`, `objects.endpoint` or `objects.region`")]
    NoBucket {
        /// Its name.
        bucket: String,
    },
    /// The server does not accept the keys, or they may not do this.
    #[error(
        "the server of bucket `{bucket}` refuses this ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what \
         they may do there"
    )]
    Refused {
        /// The bucket.
        bucket: String,
        /// The server's word for it.
        code: String,
    },
    /// The server did not answer, or not sensibly. Try again.
    #[error("{location} cannot be used now: {reason}")]
    Unreachable {
        /// What was asked.
        location: String,
        /// What went wrong.
        reason: String,
    },
}

impl Error {
    /// Whether trying again later may help.
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

/// What the store's answer means.
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
    #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum that grows; the rest is told as it is")]
    match error {
        object_store::Error::NotFound { .. } => Error::NoBucket { bucket },
        object_store::Error::PermissionDenied { .. } => {
            Error::Refused { bucket, code: code.unwrap_or("Forbidden").to_owned() }
        }
        object_store::Error::Unauthenticated { .. } => {
            Error::Refused { bucket, code: code.unwrap_or("Unauthorized").to_owned() }
        }
        _ => {
            // A body is the server's, and may echo the request.
            let first_line = text.split(['\n', '<']).next().unwrap_or_default().trim_end_matches([' ', ':']);
            let reason = code.unwrap_or(first_line).to_owned();
            Error::Unreachable { location: location.to_string(), reason }
        }
    }
}

/// Whether the server says that it is the bucket that is missing.
pub(super) fn names_no_bucket(error: &object_store::Error) -> bool {
    code(&innermost(error).to_string()) == Some("NoSuchBucket")
}

/// The code in the XML of an error of S3.
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

/// The system's error, without the library's words around it.
fn innermost_io(error: &object_store::Error) -> io::Error {
    let inner = innermost(error);
    match inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(inner.to_string()),
    }
}
