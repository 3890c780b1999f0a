//! Finds the client files of a spec and checks them.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use baton_common::relative::{self, BytePath};
use baton_common::spec::on_site::{How, Input, RESERVED, Scope};

use super::{ClientFile, ClientFolder, Place, Plan};
use crate::failure::Failure;

/// Problems that are reported at once. A user fixes the first ones before reading the rest.
const PROBLEMS_MAX: usize = 20;

/// Permission bit: the owner may execute the file.
const EXECUTABLE: u32 = 0o100;

/// Walks the client files and collects all problems.
pub(super) struct Finder {
    /// Folder of the document, without symbolic links.
    root: PathBuf,
    files: Vec<ClientFile>,
    folders: Vec<ClientFolder>,
    problems: Vec<String>,
    /// Folders on the way to the current one, without symbolic links, to detect cycles.
    above: Vec<PathBuf>,
}

impl Finder {
    /// Starts a search in the folder of the document.
    pub(super) fn open(folder: &Path) -> Result<Self, Failure> {
        let root = folder
            .canonicalize()
            .map_err(|error| Failure::usage(format!("cannot use the folder {}: {error}", folder.display())))?;
        Ok(Self { root, files: Vec::new(), folders: Vec::new(), problems: Vec::new(), above: Vec::new() })
    }

    /// Returns what was found, or all problems in one failure.
    pub(super) fn finish(mut self) -> Result<Plan, Failure> {
        self.refuse_same_destinations();
        let Self { files, folders, problems, .. } = self;
        if problems.is_empty() {
            return Ok(Plan { files, folders });
        }
        let n_more = problems.len().saturating_sub(PROBLEMS_MAX);
        let mut text = problems.into_iter().take(PROBLEMS_MAX).collect::<Vec<_>>().join("\n");
        if n_more > 0 {
            text.push_str(&format!("\nand {n_more} more problems"));
        }
        Err(Failure::usage(text))
    }

    /// Adds the files of one entry of `in`.
    pub(super) fn entry(&mut self, entry_idx: usize, input: &Input) {
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

    /// Adds the contents of a folder. `to` is the destination folder; it ends with `/` or is empty.
    fn folder(&mut self, entry_idx: usize, input: &Input, folder: &Path, to: &[u8]) {
        if self.above.iter().any(|above| above.starts_with(folder)) {
            return self.complain(folder, "contains a symbolic link back to itself");
        }
        let names = match names(folder) {
            Ok(names) => names,
            Err(error) => return self.complain(folder, &error.to_string()),
        };
        if let Some(path) = to.strip_suffix(b"/").filter(|_| names.is_empty()) {
            let to = Place { scope: input.to.scope, path: path.to_vec().into() };
            if is_reserved(&to) {
                return self
                    .complain(folder, &format!("cannot be staged to task://{RESERVED}, which is reserved for Baton"));
            }
            self.folders.push(ClientFolder { to, entry_idx });
        }
        self.above.push(folder.to_owned());
        for name in names {
            let source = folder.join(&name);
            let path = BytePath::from([to, name.as_encoded_bytes()].concat());
            if let Err(problem) = relative::check(&path) {
                self.complain(&source, &format!("cannot be staged to {path}, which {problem}"));
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
        if is_reserved(&to) {
            return self
                .complain(&source, &format!("cannot be staged to task://{RESERVED}, which is reserved for Baton"));
        }
        if let Err(error) = std::fs::File::open(&source) {
            return self.complain(&source, &error.to_string());
        }
        let is_executable = metadata.permissions().mode() & EXECUTABLE != 0;
        self.files.push(ClientFile { source, size: metadata.len(), is_executable, to, how: input.how, entry_idx });
    }

    /// Resolves symbolic links and returns the path and its metadata; adds a problem and returns `None` on failure.
    fn look(&mut self, source: &Path) -> Option<(PathBuf, Metadata)> {
        let looked = source.canonicalize().and_then(|whole| Ok((whole.metadata()?, whole)));
        match looked {
            Ok((_, whole)) if !whole.starts_with(&self.root) => {
                let root = self.root.display();
                self.complain(
                    source,
                    &format!(
                        "resolves to {}, which is outside of {root}; copy it into the folder, or submit from there",
                        whole.display()
                    ),
                );
                None
            }
            Ok((metadata, whole)) => Some((whole, metadata)),
            Err(error) if error.kind() == ErrorKind::NotFound && source.is_symlink() => {
                self.complain(source, "is a broken symbolic link");
                None
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.complain(source, "does not exist");
                None
            }
            Err(error) => {
                self.complain(source, &error.to_string());
                None
            }
        }
    }

    /// Adds a problem for each destination that two files share.
    fn refuse_same_destinations(&mut self) {
        let mut places: BTreeSet<(&str, &[u8])> = BTreeSet::new();
        let mut problems = Vec::new();
        let files = self.files.iter().filter(|file| file.how != How::Unpack);
        for file in files.clone() {
            if !places.insert((file.to.scope.word(), file.to.path.as_bytes())) {
                problems.push(format!(
                    "{} and another file have the same destination, {}",
                    shown(&file.source),
                    file.to
                ));
            }
        }
        for file in files {
            if let Some(other) = above(&file.to.path).find(|above| places.contains(&(file.to.scope.word(), above))) {
                let other = Place { scope: file.to.scope, path: other.to_vec().into() };
                problems.push(format!("{} has a destination below {other}, which is a file", shown(&file.source)));
            }
        }
        for Place { scope, path } in self.folders.iter().map(|folder| &folder.to) {
            let at = std::iter::once(path.as_bytes());
            if at.chain(above(path)).any(|at| places.contains(&(scope.word(), at))) {
                problems
                    .push(format!("an empty folder and a file have the same destination, {}://{path}", scope.word()));
            }
        }
        self.problems.append(&mut problems);
    }

    fn complain(&mut self, source: &Path, problem: &str) {
        self.problems.push(format!("{} {problem}", shown(source)));
    }
}

/// Formats a path on one line.
fn shown(path: &Path) -> BytePath {
    path.as_os_str().as_encoded_bytes().to_vec().into()
}

/// Returns the folders above a path.
fn above(path: &BytePath) -> impl Iterator<Item = &[u8]> {
    let bytes = path.as_bytes();
    bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(slash_idx, _)| &bytes[..slash_idx])
}

fn is_reserved(to: &Place) -> bool {
    to.scope == Scope::Task && to.path.as_bytes().split(|byte| *byte == b'/').next() == Some(RESERVED.as_bytes())
}

/// Returns the sorted names in a folder, so that the same tree always gives the same plan.
fn names(folder: &Path) -> std::io::Result<BTreeSet<std::ffi::OsString>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use baton_common::spec::Spec;

    use super::super::plan;
    use super::super::tests::{spec, tree};
    use super::*;

    fn problems(spec: &Spec, folder: &Path) -> Vec<String> {
        let failure = plan(spec, folder).expect_err("there is a problem");
        failure.text().lines().map(str::to_owned).collect()
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let folder = tree(&[("file", ""), ("folder/x", "")]);
        let spec = spec("in: [client://one, client://folder, client://file/ > f/, client://two, client://sub/three]");
        let found = problems(&spec, folder.path());
        let root = folder.path().canonicalize().unwrap();
        let expected = [
            ("one", "does not exist"),
            ("folder", "is a folder; write client://folder/"),
            ("file", "is a file; write client://file without the `/`"),
            ("two", "does not exist"),
            ("sub/three", "does not exist"),
        ];
        assert_eq!(found, expected.map(|(path, problem)| format!("{} {problem}", root.join(path).display())));
    }

    #[test]
    fn links_out_of_the_folder_and_cycles_are_refused() {
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
        has("in/file", "resolves to");
        has("in/folder", "resolves to");
        has("in/broken", "is a broken symbolic link");
        has("named", "resolves to");
        let back =
            format!("{} contains a symbolic link back to itself", folder.path().canonicalize().unwrap().display());
        assert!(found.contains(&back), "{found:?}");
        assert!(!found.iter().any(|line| line.contains("beside")), "{found:?}");
        assert!(!found.iter().any(|line| line.contains("more/secret is")), "{found:?}");
    }

    #[test]
    fn sockets_are_refused() {
        let folder = tree(&[("in/ok", "")]);
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("in/socket")).unwrap();
        let found = problems(&spec("in: [client://in/]"), folder.path());
        assert!(found.len() == 1 && found[0].contains("is neither a file nor a folder"), "{found:?}");
    }

    #[test]
    fn two_files_with_the_same_destination_are_refused() {
        let folder = tree(&[("one/a", ""), ("two/a", ""), ("three/a/b", ""), (".x/.baton/y", "")]);
        let found = problems(&spec("in: [client://one/ > task://, client://two/ > task://]"), folder.path());
        assert!(
            found.len() == 1 && found[0].ends_with("two/a and another file have the same destination, task://a"),
            "{found:?}"
        );
        let found = problems(&spec("in: [client://one/ > task://, client://three/ > task://]"), folder.path());
        assert!(
            found.len() == 1 && found[0].ends_with("has a destination below task://a, which is a file"),
            "{found:?}"
        );
        let found = problems(&spec("in: [client://.x/ > task://]"), folder.path());
        assert!(found.len() == 1 && found[0].contains("reserved for Baton"), "{found:?}");
        let many: Vec<String> = (0..30).map(|n| format!("client://absent{n}")).collect();
        let found = problems(&spec(&format!("in: [{}]", many.join(", "))), folder.path());
        assert_eq!((found.len(), found.last().unwrap().as_str()), (21, "and 10 more problems"));
    }
}
