//! Manifests: the files of a tree with their digests. A manifest is stored as an object.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Error, Objects};
use crate::digest::Digest;
use crate::relative::{self, BytePath};

/// Version of a manifest with only UTF-8 paths and without empty folders.
const VERSION: u32 = 1;

/// Version of other manifests, and the newest that this program reads. A program that knows only the first would lose
/// folders.
const VERSION_OF_BYTES: u32 = 2;

/// Largest manifest: a tree of some hundred thousand files.
const BYTES_MAX: u64 = 64 << 20;

/// The files of a tree, and its empty folders.
///
/// Paths are unique, and no path lies below a file, so the entries can be written to a folder in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
    folders: Vec<BytePath>,
}

/// A file of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WrittenEntry", into = "WrittenEntry")]
pub struct Entry {
    /// The path relative to the tree's folder; it does not lead out of it.
    pub path: BytePath,
    /// The digest of its content.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Whether its owner may execute it.
    pub executable: bool,
}

/// If the path is not UTF-8, `path_hex` has its bytes, and `path` is only for people.
#[derive(Serialize, Deserialize)]
struct WrittenEntry {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    digest: Digest,
    size: u64,
    #[serde(default)]
    executable: bool,
}

/// The path of a folder, as in an entry.
#[derive(Serialize, Deserialize)]
struct WrittenFolder {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    entries: &'a [Entry],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    folders: Vec<WrittenFolder>,
}

#[derive(Deserialize)]
struct Read {
    #[serde(default)]
    entries: Vec<Entry>,
    #[serde(default)]
    folders: Vec<WrittenFolder>,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The written form of a path: its text, and its bytes in hexadecimal if it is not UTF-8.
pub fn written(path: &BytePath) -> (String, Option<String>) {
    match path.as_str() {
        Some(text) => (text.to_owned(), None),
        None => (path.to_string(), Some(path.to_hex())),
    }
}

fn read(path: String, path_hex: Option<String>) -> Result<BytePath, String> {
    match path_hex {
        None => Ok(path.into()),
        Some(hex) => BytePath::from_hex(&hex).ok_or_else(|| format!("`{hex}` is not hexadecimal")),
    }
}

impl From<Entry> for WrittenEntry {
    fn from(entry: Entry) -> Self {
        let (path, path_hex) = written(&entry.path);
        Self { path, path_hex, digest: entry.digest, size: entry.size, executable: entry.executable }
    }
}

impl TryFrom<WrittenEntry> for Entry {
    type Error = String;

    fn try_from(written: WrittenEntry) -> Result<Self, String> {
        let path = read(written.path, written.path_hex)?;
        Ok(Self { path, digest: written.digest, size: written.size, executable: written.executable })
    }
}

impl Manifest {
    /// Makes a manifest of these files, in the order of their paths.
    ///
    /// # Errors
    /// [`Error::Manifest`] if a path leads out of the folder, is duplicate, or lies below another file.
    pub fn new(entries: Vec<Entry>) -> Result<Self, Error> {
        Self::with_folders(entries, Vec::new())
    }

    /// Makes a manifest of these files and empty folders.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn with_folders(mut entries: Vec<Entry>, mut folders: Vec<BytePath>) -> Result<Self, Error> {
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        folders.sort();
        let mut files: BTreeSet<&[u8]> = BTreeSet::new();
        for entry in &entries {
            check(&entry.path)?;
            if !files.insert(entry.path.as_bytes()) {
                return Err(wrong(format!("duplicate path {}", entry.path)));
            }
        }
        for folder in &folders {
            check(folder)?;
            if files.contains(folder.as_bytes()) {
                return Err(wrong(format!("{folder} is both a file and a folder")));
            }
        }
        for path in entries.iter().map(|entry| &entry.path).chain(&folders) {
            let slashes = path.as_bytes().iter().enumerate().filter(|(_, byte)| **byte == b'/');
            let mut above = slashes.map(|(idx, _)| &path.as_bytes()[..idx]);
            if let Some(file) = above.find(|above| files.contains(above)) {
                let file = BytePath::from(file.to_vec());
                return Err(wrong(format!("{path} lies below {file}, which is a file")));
            }
        }
        Ok(Self { entries, folders })
    }

    /// The files in the order of their paths.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The empty folders in the order of their paths.
    pub fn folders(&self) -> &[BytePath] {
        &self.folders
    }

    /// The files and the empty folders by value, in the order of their paths.
    pub fn into_parts(self) -> (Vec<Entry>, Vec<BytePath>) {
        (self.entries, self.folders)
    }

    /// Whether it has neither files nor folders.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.folders.is_empty()
    }

    /// Total size of the files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }

    /// The version of its written form: higher than 1 only if programs that know no other would lose content.
    pub fn version(&self) -> u32 {
        let is_plain = self.folders.is_empty() && self.entries.iter().all(|entry| entry.path.as_str().is_some());
        if is_plain { VERSION } else { VERSION_OF_BYTES }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let folder = |folder| {
            let (path, path_hex) = written(folder);
            WrittenFolder { path, path_hex }
        };
        let folders = self.folders.iter().map(folder).collect();
        let written = Written { version: self.version(), entries: &self.entries, folders };
        serde_json::to_vec(&written).expect("a manifest is plain data")
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let Version { version } = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if !(VERSION..=VERSION_OF_BYTES).contains(&version) {
            return Err(wrong(format!(
                "it has version {version}, and this program reads versions up to {VERSION_OF_BYTES}"
            )));
        }
        let found: Read = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        let folders = found.folders.into_iter().map(|folder| read(folder.path, folder.path_hex).map_err(wrong));
        Self::with_folders(found.entries, folders.collect::<Result<_, _>>()?)
    }
}

fn check(path: &BytePath) -> Result<(), Error> {
    relative::check(path).map_err(|problem| wrong(format!("the path {path} {problem}")))
}

impl Objects {
    /// Puts a manifest, unless the store already has it.
    ///
    /// # Errors
    /// [`Error::Manifest`] if it exceeds the size limit, and the errors of the store.
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<Digest, Error> {
        let bytes = manifest.to_bytes();
        if bytes.len() as u64 > BYTES_MAX {
            let n_files = manifest.entries.len();
            return Err(wrong(format!("{n_files} files are too many for one manifest; put them into an archive")));
        }
        self.put_bytes(bytes).await
    }

    /// Gets and checks a manifest.
    ///
    /// # Errors
    /// [`Error::Manifest`] if it is not a manifest or has invalid paths, and those of [`Objects::get_bytes`].
    pub async fn get_manifest(&self, digest: Digest) -> Result<Manifest, Error> {
        Manifest::from_bytes(&self.get_bytes(digest, BYTES_MAX).await?)
    }
}

fn wrong(reason: String) -> Error {
    Error::Manifest { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str) -> Entry {
        Entry { path: path.into(), digest: Digest::of(path.as_bytes()), size: 1, executable: path == "b" }
    }

    #[test]
    fn a_manifest_round_trips_in_the_order_of_its_paths() {
        let manifest = Manifest::new(["b", "a/c", "a/b", "a-b"].map(entry).to_vec()).unwrap();
        let paths: Vec<&str> = manifest.entries().iter().filter_map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["a-b", "a/b", "a/c", "b"]);
        assert_eq!(Manifest::from_bytes(&manifest.to_bytes()).unwrap(), manifest);
        assert_eq!(manifest.total_bytes(), 4);
        // The manifest does not depend on the order of the files.
        let again = Manifest::new(["a/b", "b", "a-b", "a/c"].map(entry).to_vec()).unwrap();
        assert_eq!(again.to_bytes(), manifest.to_bytes());
    }

    /// Manifests are stored, so later versions must read this form.
    #[test]
    fn the_written_form_does_not_change() {
        let digest = "87428fc522803d31065e7bce3cf03fe475096631e5e07bbd7a0fde60c4cf25c7";
        let text = format!(
            "{{\"version\":1,\"entries\":[{{\"path\":\"a\\n\",\"digest\":\"{digest}\",\"size\":2,\"executable\":true}}]}}"
        );
        let entries = vec![Entry { path: "a\n".into(), digest: Digest::of(b"a\n"), size: 2, executable: true }];
        let manifest = Manifest::new(entries).unwrap();
        assert_eq!(String::from_utf8(manifest.to_bytes()).unwrap(), text);
        assert_eq!(Manifest::from_bytes(text.as_bytes()).unwrap(), manifest);
        let later = text.replace("\"size\"", "\"later\":[1],\"size\"").replace(",\"executable\":true", "");
        assert!(!Manifest::from_bytes(later.as_bytes()).unwrap().entries()[0].executable);
    }

    #[test]
    fn names_that_are_not_utf8_and_empty_folders_round_trip() {
        let digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb";
        let text = format!(
            "{{\"version\":2,\"entries\":[{{\"path\":\"caf\\\\xe9\",\"path_hex\":\"636166e9\",\
             \"digest\":\"{digest}\",\"size\":1,\"executable\":false}}],\
             \"folders\":[{{\"path\":\"empty\"}},{{\"path\":\"\\\\xff\",\"path_hex\":\"ff\"}}]}}"
        );
        let path = BytePath::from(b"caf\xe9".to_vec());
        let entries = vec![Entry { path, digest: Digest::of(b"a"), size: 1, executable: false }];
        let folders = vec![BytePath::from(vec![0xff]), "empty".into()];
        let manifest = Manifest::with_folders(entries, folders).unwrap();
        assert_eq!(String::from_utf8(manifest.to_bytes()).unwrap(), text);
        assert_eq!(Manifest::from_bytes(text.as_bytes()).unwrap(), manifest);
        assert!(Manifest::with_folders(vec![entry("a")], vec!["a".into()]).is_err());
        assert!(Manifest::with_folders(vec![entry("a")], vec!["a/b".into()]).is_err());
        assert!(Manifest::from_bytes(text.replace("636166e9", "2e2e").as_bytes()).is_err(), "`..`");
    }

    #[test]
    fn a_manifest_that_leads_out_of_its_folder_is_rejected() {
        for paths in [
            ["../a", "b"],
            ["/etc/passwd", "b"],
            ["a//c", "b"],
            ["", "b"],
            ["a/.", "b"],
            ["a\0", "b"],
            ["b", "b"],
            ["b", "b/c"],
            ["b/c/d", "b"],
        ] {
            assert!(Manifest::new(paths.map(entry).to_vec()).is_err(), "{paths:?}");
            let entries = paths.map(entry);
            let bytes = serde_json::to_vec(&Written { version: VERSION, entries: &entries, folders: vec![] }).unwrap();
            assert!(matches!(Manifest::from_bytes(&bytes), Err(Error::Manifest { .. })), "{paths:?}");
        }
        for bytes in [b"{}".as_slice(), b"[]", b"", b"{\"version\":3,\"entries\":[]}", b"\xff"] {
            assert!(matches!(Manifest::from_bytes(bytes), Err(Error::Manifest { .. })), "{bytes:?}");
        }
    }
}
