//! Versioned MessagePack in columns: one version byte, then a map with named fields.
//!
//! Named fields let old and new programs read each other's rows if later fields have defaults. Any other change needs a
//! new version byte. Golden files of every version are kept in `common/tests/golden`.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::Error;
use crate::digest::Digest;
use crate::message_pack;
use crate::spec::Spec;

/// The version byte that this program writes.
const VERSION: u8 = if cfg!(feature = "next-version") { 4 } else { 1 };

/// The version byte of a spec for a site. A program without support for sites would run it on its own machine.
const VERSION_ON_SITE: u8 = if cfg!(feature = "next-version") { 4 } else { 2 };

/// The version byte of a spec whose files are in a manifest of version 2. A program that cannot read that manifest
/// would refuse the process again and again.
const VERSION_OF_BYTES: u8 = if cfg!(feature = "next-version") { 4 } else { 3 };

/// The newest version that this program reads.
const KNOWN: u8 = VERSION_OF_BYTES;

/// The progress of a process between two advances.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The number of committed advances.
    pub advances: u64,
    /// The number of consecutive committed advances without progress, for the no-progress limit.
    #[serde(default)]
    pub idle_advances: u64,
    /// The number of failed attempts that were charged to the process.
    #[serde(default)]
    pub failures: u32,
    /// The error of the last failed attempt.
    #[serde(default)]
    pub last_error: Option<String>,
    /// The values that the process has returned so far.
    #[serde(default)]
    pub values: serde_json::Map<String, Value>,
    /// The progress that the process reports.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// The state of the process, encoded by its kind.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
}

/// The progress that a process reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub done: u64,
    /// The total number of steps, if known.
    pub total: Option<u64>,
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The exit code, if the process ended by itself; 128 + N for a program that signal N ended.
    #[serde(default)]
    pub exit: Option<i32>,
    /// The signal that ended its program.
    #[serde(default)]
    pub signal: Option<i32>,
    /// The values that it returned.
    #[serde(default)]
    pub values: serde_json::Map<String, Value>,
    /// Whether the spec counts the exit code as success.
    #[serde(default)]
    pub ok: bool,
    /// The reason, if the exit code does not say it.
    #[serde(default)]
    pub reason: Option<String>,
    /// The location of its files and the worker that ran it.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// The manifest of the outputs in the object store; see [`crate::objects::Manifest`].
    #[serde(default)]
    pub results: Option<Digest>,
}

/// An encoded checkpoint.
#[derive(Clone, Debug)]
pub struct PackedCheckpoint {
    /// [`Checkpoint::advances`], which has its own column.
    pub advances: u64,
    /// The bytes of the column.
    pub bytes: Vec<u8>,
}

impl From<&Checkpoint> for PackedCheckpoint {
    fn from(checkpoint: &Checkpoint) -> Self {
        Self { advances: checkpoint.advances, bytes: checkpoint.to_bytes() }
    }
}

impl Checkpoint {
    /// Encodes the column.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Decodes the column.
    ///
    /// # Errors
    /// [`Error::Newer`] if a newer version wrote it, [`Error::Unreadable`] if no version wrote it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        from_bytes(bytes)
    }
}

impl Outcome {
    /// The outcome of a process that did not end by itself, with the reason.
    pub fn because(reason: impl Into<String>) -> Self {
        Outcome { reason: Some(reason.into()), ..Outcome::default() }
    }

    /// Encodes the column.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Decodes the column.
    ///
    /// # Errors
    /// [`Error::Newer`] if a newer version wrote it, [`Error::Unreadable`] if no version wrote it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        from_bytes(bytes)
    }
}

/// Encodes the column of a spec.
pub fn spec_to_bytes(spec: &Spec) -> Vec<u8> {
    let version = match &spec.on_site {
        None => VERSION,
        Some(on_site) if on_site.staged_version > 1 => VERSION_OF_BYTES,
        Some(_) => VERSION_ON_SITE,
    };
    to_bytes_of(version, spec)
}

/// Decodes the column of a spec.
///
/// # Errors
/// [`Error::Newer`] if a newer version wrote it, [`Error::Unreadable`] if no version wrote it.
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
    fn newer_version_is_a_specific_error() {
        let mut bytes = Checkpoint::default().to_bytes();
        bytes[0] = KNOWN + 1;
        let error = Checkpoint::from_bytes(&bytes).unwrap_err();
        assert!(matches!(error, Error::Newer { found, known: KNOWN } if found == KNOWN + 1), "{error}");
        assert!(Checkpoint::from_bytes(&[]).is_err());
        assert!(Checkpoint::from_bytes(&[VERSION, 0xff]).is_err());
    }

    #[test]
    fn only_site_specs_have_a_version_that_older_programs_refuse() {
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
