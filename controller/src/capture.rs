//! Captures the client files that a spec needs: finds and checks them, then puts them into the object store. The captured
//! spec no longer depends on the client.
//!
//! `client://` is the folder of the document. Files outside of it are never captured, not even through a symbolic link.

mod finder;

use std::fmt;
use std::iter::from_fn;
use std::path::{Path, PathBuf};

use baton_common::objects::{Entry, Manifest, Objects, Stored};
use baton_common::relative::BytePath;
use baton_common::spec::Spec;
use baton_common::spec::on_site::{How, Input, Location, RESERVED, Scope, WAITING};
use futures_util::{StreamExt, TryStreamExt};

use self::finder::Finder;
use crate::failure::Failure;
use crate::output;

/// Files that are read and sent at a time. More files would not hide the latency of the store any better, and each one may
/// hold several parts in memory.
pub(crate) const FILES_AT_ONCE: usize = 8;

/// Name of a single file that waits in the sandbox to be copied to its destination.
const ONE_FILE: &str = "file";

/// The client files and folders that a spec needs.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Files, in the order of the entries of `in`.
    pub(crate) files: Vec<ClientFile>,
    /// Empty folders, in the order of the entries of `in`.
    pub(crate) folders: Vec<ClientFolder>,
}

/// A client file and its destination.
#[derive(Debug)]
pub(crate) struct ClientFile {
    pub(crate) source: PathBuf,
    pub(crate) size: u64,
    pub(crate) is_executable: bool,
    /// Destination file, or the folder into which an archive is unpacked.
    pub(crate) to: Place,
    pub(crate) how: How,
    /// Index of the entry in `in`.
    entry_idx: usize,
}

/// An empty client folder and its destination.
#[derive(Debug)]
pub(crate) struct ClientFolder {
    pub(crate) to: Place,
    /// Index of the entry in `in`.
    entry_idx: usize,
}

/// A destination: a scope and a path of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) scope: Scope,
    pub(crate) path: BytePath,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scope.word(), self.path)
    }
}

impl Plan {
    pub(crate) fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// Returns whether the files of an entry are staged into the sandbox by the manifest. Other entries become inputs.
fn is_staged(input: &Input) -> bool {
    input.to.scope == Scope::Task && input.how == How::Auto
}

/// Finds the client files of a document in this folder.
///
/// # Errors
/// All files that are missing, cannot be read or are outside of the folder, in one failure.
pub(crate) fn plan(spec: &Spec, folder: &Path) -> Result<Plan, Failure> {
    let Some(on_site) = &spec.on_site else { return Ok(Plan::default()) };
    if !on_site.needs_client() {
        return Ok(Plan::default());
    }
    let mut finder = Finder::open(folder)?;
    for (entry_idx, input) in on_site.inputs.iter().enumerate() {
        if input.from.scope == Scope::Client {
            finder.entry(entry_idx, input);
        }
    }
    finder.finish()
}

/// Puts the files into the object store and returns a spec that needs no client files.
///
/// # Errors
/// A file cannot be read, or the store fails. Objects that are already stored stay there until `baton gc`.
pub(crate) async fn capture(spec: &Spec, plan: Plan, objects: &Objects) -> Result<Spec, Failure> {
    let mut captured = spec.clone();
    let Some(on_site) = &mut captured.on_site else { return Ok(captured) };
    let bar = output::progress_bar(plan.total_bytes(), "captured");
    let stored: Vec<(ClientFile, Stored)> = futures_util::stream::iter(plan.files)
        .map(|file| async {
            let stored = objects.put_file(&file.source).await?;
            bar.inc(file.size);
            Ok::<_, Failure>((file, stored))
        })
        .buffered(FILES_AT_ONCE)
        .try_collect()
        .await?;
    bar.finish_and_clear();
    // The inputs for the files of an entry replace the entry.
    let written = std::mem::take(&mut on_site.inputs);
    let (mut entries, mut folders) = (Vec::new(), Vec::new());
    let (mut files, mut empty) = (stored.into_iter().peekable(), plan.folders.into_iter().peekable());
    for (entry_idx, input) in written.into_iter().enumerate() {
        if input.from.scope != Scope::Client {
            on_site.inputs.push(input);
            continue;
        }
        let files: Vec<_> = from_fn(|| files.next_if(|(file, _)| file.entry_idx == entry_idx)).collect();
        let empty: Vec<_> = from_fn(|| empty.next_if(|folder| folder.entry_idx == entry_idx)).collect();
        let is_plain =
            empty.is_empty() && files.iter().all(|(file, _)| !file.is_executable && file.to.path.as_str().is_some());
        if is_staged(&input) {
            entries.extend(files.into_iter().map(|(file, stored)| entry(&file, file.to.path.clone(), stored)));
            folders.extend(empty.into_iter().map(|folder| folder.to.path));
        } else if is_plain || input.how == How::Unpack {
            on_site.inputs.extend(files.into_iter().map(|(file, stored)| {
                let from = Location { scope: Scope::Store, path: stored.digest.to_string() };
                let to = Location { scope: file.to.scope, path: file.to.path.as_str().unwrap_or_default().to_owned() };
                Input { from, to, how: file.how, optional: false }
            }));
        } else if !files.is_empty() || !empty.is_empty() {
            // An input by digest has a UTF-8 name and is not executable. Other files wait in the sandbox.
            let waiting = format!("{RESERVED}/{WAITING}/{entry_idx}/");
            let place = |path: &BytePath| -> BytePath {
                let below = path.as_bytes().strip_prefix(input.to.path.as_bytes()).filter(|below| !below.is_empty());
                [waiting.as_bytes(), below.unwrap_or(ONE_FILE.as_bytes())].concat().into()
            };
            entries.extend(files.into_iter().map(|(file, stored)| entry(&file, place(&file.to.path), stored)));
            // An empty folder that the entry itself names becomes the folder of the input.
            let is_named = |path: &BytePath| path.as_bytes() == input.to.path.trim_end_matches('/').as_bytes();
            let place_folder = |path: &BytePath| -> BytePath {
                if is_named(path) { waiting.trim_end_matches('/').to_owned().into() } else { place(path) }
            };
            folders.extend(empty.iter().map(|folder| place_folder(&folder.to.path)));
            let path = if input.to.is_folder() { waiting } else { format!("{waiting}{ONE_FILE}") };
            let from = Location { scope: Scope::Task, path };
            on_site.inputs.push(Input { from, to: input.to, how: How::Copy, optional: false });
        }
    }
    let manifest = Manifest::with_folders(entries, folders)?;
    if !manifest.is_empty() {
        on_site.staged_version = manifest.version();
        on_site.staged = Some(objects.put_manifest(&manifest).await?);
    }
    Ok(captured)
}

fn entry(file: &ClientFile, path: BytePath, stored: Stored) -> Entry {
    Entry { path, digest: stored.digest, size: stored.size, executable: file.is_executable }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use baton_common::config;
    use baton_common::digest::Digest;
    use baton_common::spec::{self, Format};

    use super::*;

    pub(super) fn spec(lines: &str) -> Spec {
        spec::parse(&format!("run: [x]\nat: a\nsession: s\n{lines}"), Format::Yaml).unwrap()
    }

    pub(super) fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    fn objects(folder: &Path) -> Objects {
        let url = Some(folder.join("objects").display().to_string());
        Objects::open(&config::Objects { url, ..config::Objects::default() }).unwrap()
    }

    #[tokio::test]
    async fn files_and_folders_become_a_manifest_and_other_entries_become_inputs() {
        let folder =
            tree(&[("a.txt", "a"), ("data/b.txt", "b"), ("data/deep/same.txt", "a"), ("c.tgz", "c"), ("d", "d")]);
        std::fs::set_permissions(folder.path().join("d"), std::fs::Permissions::from_mode(0o755)).unwrap();
        symlink("data/b.txt", folder.path().join("link")).unwrap();
        let spec = spec(
            "in: [client://a.txt, client://data/, client://link > l.txt, client://d, resource://r,
                 {from: client://c.tgz, how: unpack, to: in/}, client://data/ > session://kept, client://a.txt > resource://a,
                 {from: client://a.txt, to: own.txt, how: copy}, {from: client://absent, optional: true}]",
        );
        let plan = plan(&spec, folder.path()).unwrap();
        assert_eq!((plan.files.len(), plan.total_bytes()), (10, 10));
        let store = tempfile::tempdir().unwrap();
        let objects = objects(store.path());
        let on_site = capture(&spec, plan, &objects).await.unwrap().on_site.unwrap();

        let manifest = objects.get_manifest(on_site.staged.unwrap()).await.unwrap();
        let entries: Vec<(&str, Digest, bool)> = manifest
            .entries()
            .iter()
            .map(|entry| (entry.path.as_str().unwrap(), entry.digest, entry.executable))
            .collect();
        let (a, b, c, d) = (Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c"), Digest::of(b"d"));
        assert_eq!(
            entries,
            [
                ("a.txt", a, false),
                ("d", d, true),
                ("data/b.txt", b, false),
                ("data/deep/same.txt", a, false),
                ("l.txt", b, false)
            ]
        );
        let inputs: Vec<String> =
            on_site.inputs.iter().map(|input| format!("{} {} {:?}", input.from, input.to, input.how)).collect();
        assert_eq!(
            inputs,
            [
                "resource://r task://r Auto".to_owned(),
                format!("store://{c} task://in/ Unpack"),
                format!("store://{b} session://kept/b.txt Auto"),
                format!("store://{a} session://kept/deep/same.txt Auto"),
                format!("store://{a} resource://a Auto"),
                format!("store://{a} task://own.txt Copy"),
            ]
        );
        assert!(!on_site.needs_client());
        // Four contents and the manifest.
        let n_objects = objects.list().try_collect::<Vec<_>>().await.unwrap().len();
        assert_eq!(n_objects, 5);
    }

    #[tokio::test]
    async fn spec_without_client_files_is_unchanged() {
        let store = tempfile::tempdir().unwrap();
        let spec = spec("in: [resource://r]");
        let plan = plan(&spec, Path::new("/no/such/folder")).unwrap();
        assert_eq!(capture(&spec, plan, &objects(store.path())).await.unwrap(), spec);
    }

    #[tokio::test]
    async fn names_that_are_not_utf8_empty_folders_and_executable_bits_are_captured() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tree(&[("in/run", "r"), ("plain/a", "a")]);
        std::fs::set_permissions(folder.path().join("in/run"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let latin = std::ffi::OsStr::from_bytes(b"caf\xe9\n");
        std::fs::write(folder.path().join("in").join(latin), "c").unwrap();
        std::fs::write(folder.path().join("in").join("n".repeat(255)), "n").unwrap();
        std::fs::create_dir_all(folder.path().join("in/empty/deep")).unwrap();
        std::fs::create_dir(folder.path().join("bare")).unwrap();
        let spec = spec(
            "in: [client://in/, client://bare/, client://in/ > session://kept/, client://plain/ > session://plain/,
                 client://bare/ > session://bare/, {from: client://in/run, to: go, how: copy}]",
        );
        let plan = plan(&spec, folder.path()).unwrap();
        let store = tempfile::tempdir().unwrap();
        let objects = objects(store.path());
        let on_site = capture(&spec, plan, &objects).await.unwrap().on_site.unwrap();
        let manifest = objects.get_manifest(on_site.staged.unwrap()).await.unwrap();
        let names = ["caf\\xe9\\n".to_owned(), "n".repeat(255), "run".to_owned()];
        let below = |folder: &str| names.clone().map(|name| format!("{folder}/{name}"));
        let mut expected = below(".baton/in/2").to_vec();
        expected.push(".baton/in/5/file".to_owned());
        expected.extend(below("in"));
        let paths: Vec<String> = manifest.entries().iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(paths, expected);
        let executable = manifest.entries().iter().filter(|entry| entry.executable).count();
        let folders: Vec<String> = manifest.folders().iter().map(ToString::to_string).collect();
        assert_eq!(
            (executable, folders),
            (3, [".baton/in/2/empty/deep", ".baton/in/4", "bare", "in/empty/deep"].map(str::to_owned).to_vec())
        );
        let inputs: Vec<String> =
            on_site.inputs.iter().map(|input| format!("{} {} {:?}", input.from, input.to, input.how)).collect();
        assert_eq!(
            inputs,
            [
                "task://.baton/in/2/ session://kept/ Copy".to_owned(),
                format!("store://{} session://plain/a Auto", Digest::of(b"a")),
                "task://.baton/in/4/ session://bare/ Copy".to_owned(),
                "task://.baton/in/5/file task://go Copy".to_owned(),
            ]
        );
        assert_eq!(on_site.staged_version, 2);
    }
}
