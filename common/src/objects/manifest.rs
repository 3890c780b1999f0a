//! Manifests: the files of a tree by their digests, themselves kept as an object.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Error, Objects};
use crate::digest::Digest;
use crate::relative;

/// The version that this program writes, and the newest that it reads.
const VERSION: u32 = 1;

/// Largest manifest that is read: a tree of some hundred thousand files.
const BYTES_MAX: u64 = 64 << 20;

/// The files of a tree.
///
/// No two have one path, and none lies below another, so they can be laid out in a folder in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
}

/// A file of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where it is, relative to the tree's folder; it stays within that.
    pub path: String,
    /// Its content.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Whether its owner may execute it.
    #[serde(default)]
    pub executable: bool,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    entries: &'a [Entry],
}

#[derive(Deserialize)]
struct Read {
    version: u32,
    #[serde(default)]
    entries: Vec<Entry>,
}

impl Manifest {
    /// The manifest of these files, in the order of their paths.
    ///
    /// # Errors
    /// [`Error::Manifest`] when a path leaves the folder, stands there twice, or lies below another file.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, Error> {
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        let mut files: BTreeSet<&str> = BTreeSet::new();
        for entry in &entries {
            let path = entry.path.as_str();
            relative::check(path).map_err(|problem| wrong(format!("the path {path:?} {problem}")))?;
            if !files.insert(path) {
                return Err(wrong(format!("the path {path:?} stands there twice")));
            }
        }
        for path in &files {
            let above = path.match_indices('/').map(|(idx, _)| &path[..idx]);
            if let Some(file) = above.into_iter().find(|above| files.contains(above)) {
                return Err(wrong(format!("{path:?} lies below {file:?}, which is a file")));
            }
        }
        Ok(Self { entries })
    }

    /// Its files, in the order of their paths.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Its files by value, in the order of their paths.
    pub fn into_entries(self) -> Vec<Entry> {
        self.entries
    }

    /// The bytes of all its files.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }

    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&Written { version: VERSION, entries: &self.entries }).expect("a manifest is plain data")
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let read: Read = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if read.version != VERSION {
            return Err(wrong(format!("it is of version {}, and this program reads {VERSION}", read.version)));
        }
        Self::new(read.entries)
    }
}

impl Objects {
    /// Puts a manifest, unless the store has it.
    ///
    /// # Errors
    /// [`Error::Manifest`] when it is larger than anybody reads, and what the store answers.
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<Digest, Error> {
        let bytes = manifest.to_bytes();
        if bytes.len() as u64 > BYTES_MAX {
            let n_files = manifest.entries.len();
            return Err(wrong(format!("{n_files} files are too many for one; put them into an archive")));
        }
        self.put_bytes(bytes).await
    }

    /// Gets a manifest and checks it.
    ///
    /// # Errors
    /// [`Error::Manifest`] when it is none, or has paths that leave its folder; and those of [`Objects::get_bytes`].
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
        Entry { path: path.to_owned(), digest: Digest::of(path.as_bytes()), size: 1, executable: path == "b" }
    }

    #[test]
    fn it_comes_back_from_its_bytes_in_the_order_of_its_paths() {
        let manifest = Manifest::new(["b", "a/c", "a/b", "a-b"].map(entry).to_vec()).unwrap();
        let paths: Vec<&str> = manifest.entries().iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["a-b", "a/b", "a/c", "b"]);
        assert_eq!(Manifest::from_bytes(&manifest.to_bytes()).unwrap(), manifest);
        assert_eq!(manifest.total_bytes(), 4);
        // The order of the files makes no other manifest.
        let again = Manifest::new(["a/b", "b", "a-b", "a/c"].map(entry).to_vec()).unwrap();
        assert_eq!(again.to_bytes(), manifest.to_bytes());
    }

    /// Manifests are stored: what is written must be read by later versions.
    #[test]
    fn its_written_form_stays_as_it_is() {
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
    fn a_manifest_that_leaves_its_folder_is_refused() {
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
            let bytes = serde_json::to_vec(&Written { version: VERSION, entries: &entries }).unwrap();
            assert!(matches!(Manifest::from_bytes(&bytes), Err(Error::Manifest { .. })), "{paths:?}");
        }
        for bytes in [b"{}".as_slice(), b"[]", b"", b"{\"version\":2,\"entries\":[]}", b"\xff"] {
            assert!(matches!(Manifest::from_bytes(bytes), Err(Error::Manifest { .. })), "{bytes:?}");
        }
    }
}
