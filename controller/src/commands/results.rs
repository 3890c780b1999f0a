//! `baton results`: lists and fetches the result files of a process.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use baton_common::digest::Digest;
use baton_common::exit;
use baton_common::id::Pid;
use baton_common::objects::{Entry, Manifest, Objects, manifest};
use baton_common::relative::BytePath;
use baton_common::sharing;
use futures_util::{StreamExt, TryStreamExt};
use indicatif::{HumanBytes, ProgressBar};
use serde_json::{Value, json};

use crate::capture::FILES_AT_ONCE;
use crate::cli::{Global, Output, ResultsArguments};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(global: &Global, arguments: ResultsArguments) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let pid = read_ids::<Pid>(&[arguments.pid])?.pop().ok_or_else(|| Failure::usage("expected one process id"))?;
    let summary = client.store.show(pid).await?.ok_or_else(|| absent(pid))?.summary;
    let outcome = summary.outcome.as_ref().ok_or_else(|| {
        let remedy = format!("`baton watch {pid}` waits for its end");
        Failure::new(exit::CONFLICT, format!("{pid} is {} and has no results yet", summary.state.word()))
            .with_remedy(remedy)
    })?;
    let Some(results) = outcome.results else {
        let none = Failure::new(exit::NOT_FOUND, format!("{pid} has no result files in the object store"));
        return Err(none.with_remedy("`out` in the spec names the files that are kept"));
    };
    let objects = Objects::open_existing(&client.objects)?;
    if let Some(foreign) = sharing::look(&client.store, objects.as_ref()).await? {
        return Err(foreign.into());
    }
    let objects = objects.ok_or_else(|| {
        let place = client.objects.url.as_deref().unwrap_or("the default folder");
        Failure::new(exit::NOT_FOUND, format!("there is no object store at {place}"))
            .with_remedy("set BATON_OBJECTS_URL or `objects.url` to the location that the workers use")
    })?;
    let manifest = objects.get_manifest(results).await?;
    match arguments.get {
        None => list(global.output, pid, &manifest, &objects)?,
        Some(folder) => get(global.output, &manifest, &objects, &folder).await?,
    }
    Ok(exit::OK)
}

fn list(how: Output, pid: Pid, manifest: &Manifest, objects: &Objects) -> Result<(), Failure> {
    match how {
        Output::Json => {
            let files = manifest.entries().iter().map(|entry| json_of(entry, objects));
            let folders = manifest.folders().iter().map(|folder| with_path(json!({"folder": true}), folder));
            output::print_json(&Value::Array(files.chain(folders).collect()))
        }
        Output::Ids => output::print(&pid.to_string()),
        Output::Table => {
            let mut table = output::table(&["PATH", "SIZE", "SHA-256", "URL"]);
            for entry in manifest.entries() {
                table.add_row([
                    entry.path.to_string(),
                    HumanBytes(entry.size).to_string(),
                    entry.digest.to_string(),
                    objects.url(entry.digest),
                ]);
            }
            for folder in manifest.folders() {
                table.add_row([format!("{folder}/"), "empty folder".to_owned(), String::new(), String::new()]);
            }
            output::print(&table.to_string())
        }
    }
}

fn json_of(entry: &Entry, objects: &Objects) -> Value {
    let value = json!({
        "size": entry.size,
        "digest": entry.digest,
        "executable": entry.executable,
        "url": objects.url(entry.digest),
    });
    with_path(value, &entry.path)
}

/// Adds the path, and its bytes in hexadecimal if it is not UTF-8.
fn with_path(mut value: Value, path: &BytePath) -> Value {
    let (text, hex) = manifest::written(path);
    value["path"] = json!(text);
    if let Some(hex) = hex {
        value["path_hex"] = json!(hex);
    }
    value
}

/// Fetches all files, several at a time. After a failure, the same command fetches the remaining ones.
async fn get(how: Output, manifest: &Manifest, objects: &Objects, folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::failed(format!("cannot create {}: {error}", folder.display())))?;
    let bar = output::progress_bar(manifest.total_bytes(), "fetched");
    let fetched: Vec<bool> = futures_util::stream::iter(manifest.entries())
        .map(|entry| fetch(objects, folder, entry, &bar))
        .buffer_unordered(FILES_AT_ONCE)
        .try_collect()
        .await?;
    for path in manifest.folders() {
        let (root, path) = (folder.to_owned(), path.clone());
        blocking(move || prepare_folder(&root, &path)).await?;
    }
    bar.finish_and_clear();
    let n_fetched = fetched.iter().filter(|fetched| **fetched).count();
    let n_there = fetched.len() - n_fetched;
    match how {
        Output::Json => {
            output::print_json(&json!({"folder": folder.display().to_string(), "fetched": n_fetched, "there": n_there}))
        }
        Output::Ids => Ok(()),
        Output::Table => {
            output::print(&format!("{n_fetched} files fetched into {}, {n_there} already there", folder.display()))
        }
    }
}

/// Fetches a file unless it is already there. Returns whether it was fetched.
async fn fetch(objects: &Objects, folder: &Path, entry: &Entry, bar: &ProgressBar) -> Result<bool, Failure> {
    let (target, wanted) = (folder.join(entry.path.as_path()), (entry.digest, entry.size));
    let (root, path) = (folder.to_owned(), entry.path.clone());
    let is_there = blocking(move || prepare(&root, &path, wanted)).await?;
    if is_there {
        bar.inc(entry.size);
    } else {
        let bar = bar.clone();
        objects.get_file(entry.digest, &target, move |n_bytes| bar.inc(n_bytes)).await?;
    }
    if entry.executable {
        let mode = std::fs::metadata(&target)?.permissions().mode();
        // Every user that may read the file may execute it.
        let executable = mode | (mode & 0o444) >> 2;
        if executable != mode {
            std::fs::set_permissions(&target, std::fs::Permissions::from_mode(executable))?;
        }
    }
    Ok(!is_there)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::failed(error.to_string()))?
}

fn refused(path: &Path, what: &str) -> Failure {
    let text = format!("{} is {what}; nothing was written", path.display());
    Failure::new(exit::REFUSED, text).with_remedy("choose another folder with --get, or remove it")
}

fn of_path(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("cannot use {}: {error}", path.display()))
}

/// Creates a folder and the folders above it, none of which may be a symbolic link. Returns its path.
fn prepare_folder(root: &Path, path: &BytePath) -> Result<PathBuf, Failure> {
    let mut place = PathBuf::from(root);
    for part in path.as_path() {
        place.push(part);
        match place.symlink_metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(refused(&place, "a symbolic link or not a folder")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match std::fs::create_dir(&place) {
                // A concurrent fetch has created it.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => made.map_err(|error| of_path(&place, &error))?,
            },
            Err(error) => return Err(of_path(&place, &error)),
        }
    }
    Ok(place)
}

/// Creates the folders for a file. Returns whether the unchanged file is already there.
fn prepare(root: &Path, path: &BytePath, wanted: (Digest, u64)) -> Result<bool, Failure> {
    let bytes = path.as_bytes();
    let slash_idx = bytes.iter().rposition(|byte| *byte == b'/');
    let folder = BytePath::from(slash_idx.map_or(&b""[..], |slash_idx| &bytes[..slash_idx]).to_vec());
    let name = OsStr::from_bytes(slash_idx.map_or(bytes, |slash_idx| &bytes[slash_idx + 1..]));
    let place = prepare_folder(root, &folder)?.join(name);
    let found = match place.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        found => found.map_err(|error| of_path(&place, &error))?,
    };
    if found.is_dir() {
        return Err(refused(&place, "a folder"));
    }
    Ok(found.is_file() && found.len() == wanted.1 && Digest::of_file(&place)? == wanted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use baton_common::config;

    use super::*;

    async fn left(objects: &Objects, files: &[(&str, &str, bool)]) -> Manifest {
        let mut entries = Vec::new();
        for (path, content, executable) in files {
            let digest = objects.put_bytes(content.as_bytes().to_vec()).await.unwrap();
            entries.push(Entry { path: (*path).into(), digest, size: content.len() as u64, executable: *executable });
        }
        Manifest::new(entries).unwrap()
    }

    fn objects(folder: &Path) -> Objects {
        let url = Some(folder.join("objects").display().to_string());
        Objects::open(&config::Objects { url, ..config::Objects::default() }).unwrap()
    }

    async fn fetch_all(objects: &Objects, manifest: &Manifest, folder: &Path) -> Result<Vec<bool>, Failure> {
        let mut fetched = Vec::new();
        for entry in manifest.entries() {
            fetched.push(fetch(objects, folder, entry, &ProgressBar::hidden()).await?);
        }
        Ok(fetched)
    }

    #[tokio::test]
    async fn unchanged_files_are_not_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let objects = objects(dir.path());
        let manifest = left(&objects, &[("a", "1", false), ("a.part", "2", false), ("b/c/d", "3", true)]).await;
        let folder = dir.path().join("to");
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(fetch_all(&objects, &manifest, &folder).await.unwrap(), [true, true, true]);
        assert_eq!(fetch_all(&objects, &manifest, &folder).await.unwrap(), [false, false, false]);
        std::fs::write(folder.join("a"), "x").unwrap();
        std::fs::remove_file(folder.join("a.part")).unwrap();
        assert_eq!(fetch_all(&objects, &manifest, &folder).await.unwrap(), [true, true, false]);
        for (path, content) in [("a", "1"), ("a.part", "2"), ("b/c/d", "3")] {
            assert_eq!(std::fs::read_to_string(folder.join(path)).unwrap(), content);
        }
        let mode = |path: &str| std::fs::metadata(folder.join(path)).unwrap().permissions().mode();
        assert_eq!((mode("a") & 0o100, mode("b/c/d") & 0o100), (0, 0o100));
    }

    #[tokio::test]
    async fn names_that_are_not_utf8_and_empty_folders_are_restored() {
        let dir = tempfile::tempdir().unwrap();
        let objects = objects(dir.path());
        let digest = objects.put_bytes(b"x".to_vec()).await.unwrap();
        let names: [&[u8]; 5] = [b"caf\xe9", b"two\nlines", b"-rf *", b"\\\"'", &[b'n'; 255]];
        let entry = |name: &&[u8]| Entry { path: name.to_vec().into(), digest, size: 1, executable: false };
        let folders = vec!["empty/deep".into(), vec![0xff].into()];
        let manifest = Manifest::with_folders(names.iter().map(entry).collect(), folders).unwrap();
        let folder = dir.path().join("to");
        get(Output::Ids, &manifest, &objects, &folder).await.unwrap();
        for name in names {
            assert_eq!(std::fs::read(folder.join(OsStr::from_bytes(name))).unwrap(), b"x");
        }
        assert!(folder.join("empty/deep").is_dir() && folder.join(OsStr::from_bytes(b"\xff")).is_dir());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 7);
        let shown = json_of(&manifest.entries()[2], &objects);
        assert_eq!((&shown["path"], &shown["path_hex"]), (&json!("caf\\xe9"), &json!("636166e9")));
    }

    #[tokio::test]
    async fn nothing_is_written_outside_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let objects = objects(dir.path());
        let manifest = left(&objects, &[("link/file", "1", false)]).await;
        let (folder, outside) = (dir.path().join("to"), dir.path().join("outside"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, folder.join("link")).unwrap();
        let failure = fetch_all(&objects, &manifest, &folder).await.unwrap_err();
        assert!(failure.text().contains("a symbolic link"), "{failure:?}");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        // A symbolic link in place of the file itself is replaced.
        let manifest = left(&objects, &[("file", "1", false)]).await;
        std::fs::write(outside.join("mine"), "mine").unwrap();
        symlink(outside.join("mine"), folder.join("file")).unwrap();
        assert_eq!(fetch_all(&objects, &manifest, &folder).await.unwrap(), [true]);
        assert_eq!(std::fs::read_to_string(outside.join("mine")).unwrap(), "mine");
        std::fs::create_dir(folder.join("taken")).unwrap();
        let manifest = left(&objects, &[("taken", "1", false)]).await;
        assert!(fetch_all(&objects, &manifest, &folder).await.is_err());
    }
}
