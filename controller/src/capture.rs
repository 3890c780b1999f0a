//! What a spec needs of the client's files: found and checked, then put into the object store, so that nothing depends
//! on the client any more.
//!
//! `client://` is the folder of the document. Nothing outside of it is taken, not even by a link.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::iter::from_fn;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use baton_common::objects::{Entry, Manifest, Objects, Stored};
use baton_common::relative::{self, BytePath};
use baton_common::spec::Spec;
use baton_common::spec::on_site::{How, Input, Location, RESERVED, Scope, WAITING};
use futures_util::{StreamExt, TryStreamExt};

use crate::failure::Failure;
use crate::output;

/// Files that are read and sent at a time. More hide the way to the store no better, and each may hold some parts.
pub(crate) const FILES_AT_ONCE: usize = 8;

/// Problems that are told at once; a person mends the first of them before reading the rest.
const PROBLEMS_MAX: usize = 20;

/// What a single file is called while it waits in the sandbox for its place.
const ONE_FILE: &str = "file";

/// The owner may execute it.
const EXECUTABLE: u32 = 0o100;

/// All that a spec needs of the client.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// The files, each with the entry of `in` that it belongs to.
    pub(crate) files: Vec<ClientFile>,
    /// The empty folders, likewise.
    pub(crate) folders: Vec<ClientFolder>,
}

/// A file of the client, and where it goes.
#[derive(Debug)]
pub(crate) struct ClientFile {
    pub(crate) source: PathBuf,
    pub(crate) size: u64,
    pub(crate) is_executable: bool,
    /// A file, or the folder into which an archive is unpacked.
    pub(crate) to: Place,
    pub(crate) how: How,
    /// The entry of `in` that it belongs to.
    entry_idx: usize,
}

/// An empty folder of the client, and where it goes.
#[derive(Debug)]
pub(crate) struct ClientFolder {
    pub(crate) to: Place,
    /// The entry of `in` that it belongs to.
    entry_idx: usize,
}

/// Where something goes, by the bytes of its path.
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

/// Whether what an entry names goes into the sandbox in the usual way; the others become inputs of their own.
fn is_staged(input: &Input) -> bool {
    input.to.scope == Scope::Task && input.how == How::Auto
}

/// Finds the client's files, of a document in this folder.
///
/// # Errors
/// All that are missing, cannot be read or lead out of the folder, at once.
pub(crate) fn plan(spec: &Spec, folder: &Path) -> Result<Plan, Failure> {
    let Some(on_site) = &spec.on_site else { return Ok(Plan::default()) };
    if !on_site.needs_client() {
        return Ok(Plan::default());
    }
    let root = folder
        .canonicalize()
        .map_err(|error| Failure::usage(format!("cannot use the folder {}: {error}", folder.display())))?;
    let mut finder = Finder { root, files: Vec::new(), folders: Vec::new(), problems: Vec::new(), above: Vec::new() };
    for (entry_idx, input) in on_site.inputs.iter().enumerate() {
        if input.from.scope == Scope::Client {
            finder.entry(entry_idx, input);
        }
    }
    finder.refuse_what_meets();
    let Finder { files, folders, problems, .. } = finder;
    if problems.is_empty() {
        return Ok(Plan { files, folders });
    }
    let n_more = problems.len().saturating_sub(PROBLEMS_MAX);
    let mut text = problems.into_iter().take(PROBLEMS_MAX).collect::<Vec<_>>().join("\n");
    if n_more > 0 {
        text.push_str(&format!("\nand {n_more} more"));
    }
    Err(Failure::usage(text))
}

/// Puts the files into the store, and gives the spec that needs nobody's files any more.
///
/// # Errors
/// What a file or the store answers; what was put already stays there until `baton gc`.
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
    // An input of several files takes the place of its entry.
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
            // Inputs by their digests have only a text for a name, and are no programs. These wait in the sandbox.
            let waiting = format!("{RESERVED}/{WAITING}/{entry_idx}/");
            let place = |path: &BytePath| -> BytePath {
                let below = path.as_bytes().strip_prefix(input.to.path.as_bytes()).filter(|below| !below.is_empty());
                [waiting.as_bytes(), below.unwrap_or(ONE_FILE.as_bytes())].concat().into()
            };
            entries.extend(files.into_iter().map(|(file, stored)| entry(&file, place(&file.to.path), stored)));
            // The folder that was named, if it is empty, is that of the input itself.
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

/// Goes through the client's files and collects what is wrong with them.
struct Finder {
    /// The document's folder without links.
    root: PathBuf,
    files: Vec<ClientFile>,
    folders: Vec<ClientFolder>,
    problems: Vec<String>,
    /// The folders in which it is, without links, to notice a link that leads back to one of them.
    above: Vec<PathBuf>,
}

impl Finder {
    fn entry(&mut self, entry_idx: usize, input: &Input) {
        let name = input.from.path.trim_end_matches('/');
        let source = self.root.join(name);
        if input.optional
            && matches!(std::fs::symlink_metadata(&source), Err(error) if error.kind() == ErrorKind::NotFound)
        {
            return;
        }
        let Some((whole, metadata)) = self.look(&source) else { return };
        let to = Place { scope: input.to.scope, path: input.to.path.as_str().into() };
        match (metadata.is_dir(), input.from.is_folder()) {
            (true, true) => self.folder(entry_idx, input, &whole, to.path.as_bytes()),
            (false, false) => self.file(entry_idx, input, whole, &metadata, to),
            (true, false) => self.complain(&source, &format!("is a folder; write client://{name}/")),
            (false, true) => self.complain(&source, &format!("is a file; write client://{name} without the `/`")),
        }
    }

    /// What is in a folder goes to the folder `to`, which ends with `/` or is empty.
    fn folder(&mut self, entry_idx: usize, input: &Input, folder: &Path, to: &[u8]) {
        if self.above.iter().any(|above| above.starts_with(folder)) {
            return self.complain(folder, "has a link in it that leads back to it");
        }
        let names = match names(folder) {
            Ok(names) => names,
            Err(error) => return self.complain(folder, &error.to_string()),
        };
        if let Some(path) = to.strip_suffix(b"/").filter(|_| names.is_empty()) {
            let to = Place { scope: input.to.scope, path: path.to_vec().into() };
            if is_batons(&to) {
                return self.complain(folder, &format!("cannot go to task://{RESERVED}, which belongs to Baton"));
            }
            self.folders.push(ClientFolder { to, entry_idx });
        }
        self.above.push(folder.to_owned());
        for name in names {
            let source = folder.join(&name);
            let path = BytePath::from([to, name.as_encoded_bytes()].concat());
            if let Err(problem) = relative::check(&path) {
                self.complain(&source, &format!("cannot go to {path}, which {problem}"));
                continue;
            }
            let Some((whole, metadata)) = self.look(&source) else { continue };
            if metadata.is_dir() {
                self.folder(entry_idx, input, &whole, &[path.as_bytes(), b"/"].concat());
            } else {
                self.file(entry_idx, input, whole, &metadata, Place { scope: input.to.scope, path });
            }
        }
        self.above.pop();
    }

    fn file(&mut self, entry_idx: usize, input: &Input, source: PathBuf, metadata: &Metadata, to: Place) {
        if !metadata.is_file() {
            return self.complain(&source, "is neither a file nor a folder");
        }
        if is_batons(&to) {
            return self.complain(&source, &format!("cannot go to task://{RESERVED}, which belongs to Baton"));
        }
        if let Err(error) = std::fs::File::open(&source) {
            return self.complain(&source, &error.to_string());
        }
        let is_executable = metadata.permissions().mode() & EXECUTABLE != 0;
        self.files.push(ClientFile { source, size: metadata.len(), is_executable, to, how: input.how, entry_idx });
    }

    /// Where a path leads, and what is there; `None` together with a problem.
    fn look(&mut self, source: &Path) -> Option<(PathBuf, Metadata)> {
        let looked = source.canonicalize().and_then(|whole| Ok((whole.metadata()?, whole)));
        match looked {
            Ok((_, whole)) if !whole.starts_with(&self.root) => {
                let root = self.root.display();
                self.complain(
                    source,
                    &format!("leads to {}, out of {root}; copy it, or submit from there", whole.display()),
                );
                None
            }
            Ok((metadata, whole)) => Some((whole, metadata)),
            Err(error) if error.kind() == ErrorKind::NotFound && source.is_symlink() => {
                self.complain(source, "is a link that leads nowhere");
                None
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.complain(source, "is not there");
                None
            }
            Err(error) => {
                self.complain(source, &error.to_string());
                None
            }
        }
    }

    /// Folders that go to one place must not bring the same file.
    fn refuse_what_meets(&mut self) {
        let mut places: BTreeSet<(&str, &[u8])> = BTreeSet::new();
        let mut problems = Vec::new();
        let files = self.files.iter().filter(|file| file.how != How::Unpack);
        for file in files.clone() {
            if !places.insert((file.to.scope.word(), file.to.path.as_bytes())) {
                problems.push(format!("{} and another file go to {}", shown(&file.source), file.to));
            }
        }
        for file in files {
            if let Some(other) = above(&file.to.path).find(|above| places.contains(&(file.to.scope.word(), above))) {
                let other = Place { scope: file.to.scope, path: other.to_vec().into() };
                problems.push(format!("{} goes below {other}, which is a file", shown(&file.source)));
            }
        }
        for Place { scope, path } in self.folders.iter().map(|folder| &folder.to) {
            let at = std::iter::once(path.as_bytes());
            if at.chain(above(path)).any(|at| places.contains(&(scope.word(), at))) {
                problems.push(format!("an empty folder and a file go to {}://{path}", scope.word()));
            }
        }
        self.problems.append(&mut problems);
    }

    fn complain(&mut self, source: &Path, problem: &str) {
        self.problems.push(format!("{} {problem}", shown(source)));
    }
}

/// A path on one line.
fn shown(path: &Path) -> BytePath {
    path.as_os_str().as_encoded_bytes().to_vec().into()
}

/// The folders above a path.
fn above(path: &BytePath) -> impl Iterator<Item = &[u8]> {
    let bytes = path.as_bytes();
    bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(slash_idx, _)| &bytes[..slash_idx])
}

fn is_batons(to: &Place) -> bool {
    to.scope == Scope::Task && to.path.as_bytes().split(|byte| *byte == b'/').next() == Some(RESERVED.as_bytes())
}

/// The names in a folder, in order, so that the same tree is always the same plan.
fn names(folder: &Path) -> std::io::Result<BTreeSet<std::ffi::OsString>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use baton_common::config;
    use baton_common::digest::Digest;
    use baton_common::spec::{self, Format};

    use super::*;

    fn spec(lines: &str) -> Spec {
        spec::parse(&format!("run: [x]\nat: a\nsession: s\n{lines}"), Format::Yaml).unwrap()
    }

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    fn problems(spec: &Spec, folder: &Path) -> Vec<String> {
        let failure = plan(spec, folder).expect_err("there is a problem");
        failure.text().lines().map(str::to_owned).collect()
    }

    fn objects(folder: &Path) -> Objects {
        let url = Some(folder.join("objects").display().to_string());
        Objects::open(&config::Objects { url, ..config::Objects::default() }).unwrap()
    }

    #[tokio::test]
    async fn files_and_folders_become_a_manifest_and_the_rest_inputs_from_the_store() {
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
    async fn a_spec_without_files_of_the_client_stays_as_it_is() {
        let store = tempfile::tempdir().unwrap();
        let spec = spec("in: [resource://r]");
        let plan = plan(&spec, Path::new("/no/such/folder")).unwrap();
        assert_eq!(capture(&spec, plan, &objects(store.path())).await.unwrap(), spec);
    }

    #[test]
    fn all_that_is_missing_is_told_at_once() {
        let folder = tree(&[("file", ""), ("folder/x", "")]);
        let spec = spec("in: [client://one, client://folder, client://file/ > f/, client://two, client://sub/three]");
        let found = problems(&spec, folder.path());
        let root = folder.path().canonicalize().unwrap();
        let expected = [
            ("one", "is not there"),
            ("folder", "is a folder; write client://folder/"),
            ("file", "is a file; write client://file without the `/`"),
            ("two", "is not there"),
            ("sub/three", "is not there"),
        ];
        assert_eq!(found, expected.map(|(path, problem)| format!("{} {problem}", root.join(path).display())));
    }

    #[test]
    fn what_leads_out_of_the_folder_is_refused() {
        let outside = tree(&[("secret", "s"), ("more/secret", "s")]);
        let folder = tree(&[("in/ok", ""), ("beside/ok", "")]);
        let at = |name: &str| folder.path().join(name);
        symlink(outside.path().join("secret"), at("in/file")).unwrap();
        symlink(outside.path().join("more"), at("in/folder")).unwrap();
        symlink("../beside", at("in/beside")).unwrap();
        symlink("nowhere", at("in/broken")).unwrap();
        symlink("..", at("in/up")).unwrap();
        symlink(outside.path().join("secret"), at("named")).unwrap();
        let found = problems(&spec("in: [client://in/, client://named]"), folder.path());
        let has = |name: &str, problem: &str| {
            let is = |line: &&String| line.contains(&format!("/{name} ")) && line.contains(problem);
            assert_eq!(found.iter().filter(is).count(), 1, "{name} {problem}: {found:?}");
        };
        has("in/file", "leads to");
        has("in/folder", "leads to");
        has("in/broken", "is a link that leads nowhere");
        has("named", "leads to");
        let back =
            format!("{} has a link in it that leads back to it", folder.path().canonicalize().unwrap().display());
        assert!(found.contains(&back), "{found:?}");
        assert!(!found.iter().any(|line| line.contains("beside")), "{found:?}");
        assert!(!found.iter().any(|line| line.contains("more/secret is")), "{found:?}");
    }

    /// Names that are not UTF-8, empty folders and executable bits go wherever an entry sends them.
    #[tokio::test]
    async fn every_file_and_folder_goes_by_its_bytes() {
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

    #[test]
    fn strange_files_are_refused() {
        let folder = tree(&[("in/ok", "")]);
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("in/socket")).unwrap();
        let found = problems(&spec("in: [client://in/]"), folder.path());
        assert!(found.len() == 1 && found[0].contains("is neither a file nor a folder"), "{found:?}");
    }

    #[test]
    fn two_folders_must_not_bring_the_same_file() {
        let folder = tree(&[("one/a", ""), ("two/a", ""), ("three/a/b", ""), (".x/.baton/y", "")]);
        let found = problems(&spec("in: [client://one/ > task://, client://two/ > task://]"), folder.path());
        assert!(found.len() == 1 && found[0].ends_with("two/a and another file go to task://a"), "{found:?}");
        let found = problems(&spec("in: [client://one/ > task://, client://three/ > task://]"), folder.path());
        assert!(found.len() == 1 && found[0].ends_with("goes below task://a, which is a file"), "{found:?}");
        let found = problems(&spec("in: [client://.x/ > task://]"), folder.path());
        assert!(found.len() == 1 && found[0].contains("belongs to Baton"), "{found:?}");
        let many: Vec<String> = (0..30).map(|n| format!("client://absent{n}")).collect();
        let found = problems(&spec(&format!("in: [{}]", many.join(", "))), folder.path());
        assert_eq!((found.len(), found.last().unwrap().as_str()), (21, "and 10 more"));
    }
}
