//! Versioned MessagePack in columns: one version byte, then a map with named fields.
//!
//! Named fields let old and new programs read each other as long as later fields have defaults; a change that cannot be
//! read so gets a new version byte. Golden files of every version are kept under `common/tests/golden`.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::Error;
use crate::digest::Digest;
use crate::message_pack;
use crate::spec::Spec;

/// The version byte that this program writes.
const VERSION: u8 = if cfg!(feature = "next-version") { 4 } else { 1 };

/// That of a spec for a site: a program that knows no sites would run it on its own machine.
const VERSION_ON_SITE: u8 = if cfg!(feature = "next-version") { 4 } else { 2 };

/// That of one whose files are in a manifest of version 2: a program that cannot read it would give the process up for ever.
const VERSION_OF_BYTES: u8 = if cfg!(feature = "next-version") { 4 } else { 3 };

/// The newest that this program reads.
const KNOWN: u8 = VERSION_OF_BYTES;

/// A process's progress between two advances.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Committed advances.
    pub advances: u64,
    /// Committed advances in a row that changed nothing; for the no-progress limit.
    #[serde(default)]
    pub idle_advances: u64,
    /// Attempts that failed and were charged to the process.
    #[serde(default)]
    pub failures: u32,
    /// Why the last of them failed.
    #[serde(default)]
    pub last_error: Option<String>,
    /// What the process returns so far.
    #[serde(default)]
    pub values: serde_json::Map<String, Value>,
    /// How far it is, in its own words and in 0..=1.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// The process's own state, as its kind writes it.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
}

/// How far a process says that it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub done: u64,
    /// Steps in all, if the process knows.
    pub total: Option<u64>,
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Exit code, when it came to its end by itself; 128 + N for a program that signal N ended.
    #[serde(default)]
    pub exit: Option<i32>,
    /// The signal that ended its program.
    #[serde(default)]
    pub signal: Option<i32>,
    /// What it returned.
    #[serde(default)]
    pub values: serde_json::Map<String, Value>,
    /// Whether the exit is one of those that the spec calls success.
    #[serde(default)]
    pub ok: bool,
    /// Why, in words, where the exit does not say it.
    #[serde(default)]
    pub reason: Option<String>,
    /// Where its files are on the worker that ran it, and which worker that was.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// The manifest of the outputs that are kept in the object store; see [`crate::objects::Manifest`].
    #[serde(default)]
    pub results: Option<Digest>,
}

/// A checkpoint as it is written.
#[derive(Clone, Debug)]
pub struct PackedCheckpoint {
    /// [`Checkpoint::advances`], which has a column of its own.
    pub advances: u64,
    /// The column's bytes.
    pub bytes: Vec<u8>,
}

impl From<&Checkpoint> for PackedCheckpoint {
    fn from(checkpoint: &Checkpoint) -> Self {
        Self { advances: checkpoint.advances, bytes: checkpoint.to_bytes() }
    }
}

impl Checkpoint {
    /// The column's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Reads the column.
    ///
    /// # Errors
    /// [`Error::Newer`] when a newer version wrote it, [`Error::Unreadable`] when nobody did.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        from_bytes(bytes)
    }
}

impl Outcome {
    /// The outcome of a process that ended for this reason and not by itself.
    pub fn because(reason: impl Into<String>) -> Self {
        Outcome { reason: Some(reason.into()), ..Outcome::default() }
    }

    /// The column's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Reads the column.
    ///
    /// # Errors
    /// [`Error::Newer`] when a newer version wrote it, [`Error::Unreadable`] when nobody did.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        from_bytes(bytes)
    }
}

/// A spec as the bytes of its column.
pub fn spec_to_bytes(spec: &Spec) -> Vec<u8> {
    let version = match &spec.on_site {
        None => VERSION,
        Some(on_site) if on_site.staged_version > 1 => VERSION_OF_BYTES,
        Some(_) => VERSION_ON_SITE,
    };
    to_bytes_of(version, spec)
}

/// Reads a spec's column.
///
/// # Errors
/// [`Error::Newer`] when a newer version wrote it, [`Error::Unreadable`] when nobody did.
pub fn spec_from_bytes(bytes: &[u8]) -> Result<Spec, Error> {
    from_bytes(bytes)
}

fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    to_bytes_of(VERSION, value)
}

fn to_bytes_of<T: Serialize>(version: u8, value: &T) -> Vec<u8> {
    let mut bytes = vec![version];
    rmp_serde::encode::write_named(&mut bytes, value).expect("blobs have only string keys and plain data");
    bytes
}

fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    match bytes.split_first() {
        Some((&found, _)) if found > KNOWN => Err(Error::Newer { found, known: KNOWN }),
        Some((0, _)) => Err(Error::Unreadable("no version has ever written this".into())),
        Some((version, body)) => message_pack::read(body)
            .map_err(|error| Error::Unreadable(format!("not what version {version} writes: {error}"))),
        None => Err(Error::Unreadable("empty".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{OnSite, Work};

    #[test]
    fn a_newer_version_is_an_error_that_says_so() {
        let mut bytes = Checkpoint::default().to_bytes();
        bytes[0] = KNOWN + 1;
        let error = Checkpoint::from_bytes(&bytes).unwrap_err();
        assert!(matches!(error, Error::Newer { found, known: KNOWN } if found == KNOWN + 1), "{error}");
        assert!(Checkpoint::from_bytes(&[]).is_err());
        assert!(Checkpoint::from_bytes(&[VERSION, 0xff]).is_err());
    }

    #[test]
    fn only_a_spec_for_a_site_is_closed_to_programs_that_know_no_sites() {
        let mut spec = Spec::new(Work::Script { text: "true".into() });
        assert_eq!(spec_to_bytes(&spec)[0], VERSION);
        assert_eq!(spec_from_bytes(&spec_to_bytes(&spec)).unwrap(), spec);
        for (staged_version, version) in [(1, VERSION_ON_SITE), (2, VERSION_OF_BYTES)] {
            spec.on_site = Some(OnSite { at: "cluster".into(), staged_version, ..OnSite::default() });
            assert_eq!(spec_to_bytes(&spec)[0], version);
            assert_eq!(spec_from_bytes(&spec_to_bytes(&spec)).unwrap(), spec);
        }
    }
}
