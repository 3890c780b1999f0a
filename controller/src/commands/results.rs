//! `baton results`: what a process has left in the object store.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use baton_common::digest::Digest;
use baton_common::id::Pid;
use baton_common::objects::{Entry, Manifest, Objects};
use baton_worker::cli::exit;
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
    let pid = read_ids::<Pid>(&[arguments.pid])?.pop().ok_or_else(|| Failure::usage("no process is named"))?;
    let summary = client.store.show(pid).await?.ok_or_else(|| absent(pid))?.summary;
    let outcome = summary.outcome.as_ref().ok_or_else(|| {
        let remedy = format!("`baton watch {pid}` waits for its end");
        Failure::new(exit::CONFLICT, format!("{pid} is {} and has no results yet", summary.state.word()))
            .with_remedy(remedy)
    })?;
    let Some(results) = outcome.results else {
        let none = Failure::new(exit::NOT_FOUND, format!("{pid} has left no files in the object store"));
        return Err(none.with_remedy("the spec's `out` names those that are kept"));
    };
    let objects = Objects::open_existing(&client.objects)?.ok_or_else(|| {
        let place = client.objects.url.as_deref().unwrap_or("the default folder");
        Failure::new(exit::NOT_FOUND, format!("there are no objects in {place}"))
            .with_remedy("name the same place as the workers in BATON_OBJECTS_URL or `objects.url`")
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
            let files: Vec<Value> = manifest.entries().iter().map(|entry| json_of(entry, objects)).collect();
            output::print_json(&Value::Array(files))
        }
        Output::Ids => output::print(&pid.to_string()),
        Output::Table => {
            let mut table = output::table(&["PATH", "SIZE", "SHA-256", "URL"]);
            for entry in manifest.entries() {
                table.add_row([
                    output::one_line(&entry.path, usize::MAX),
                    HumanBytes(entry.size).to_string(),
                    entry.digest.to_string(),
                    objects.url(entry.digest),
                ]);
            }
            output::print(&table.to_string())
        }
    }
}

fn json_of(entry: &Entry, objects: &Objects) -> Value {
    json!({
        "path": entry.path,
        "size": entry.size,
        "digest": entry.digest,
        "executable": entry.executable,
        "url": objects.url(entry.digest),
    })
}

/// Fetches all, several at a time; after a failure the same command goes on with what is left.
async fn get(how: Output, manifest: &Manifest, objects: &Objects, folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::failed(format!("cannot make {}: {error}", folder.display())))?;
    let bar = output::progress_bar(manifest.total_bytes(), "fetched");
    let fetched: Vec<bool> = futures_util::stream::iter(manifest.entries())
        .map(|entry| fetch(objects, folder, entry, &bar))
        .buffer_unordered(FILES_AT_ONCE)
        .try_collect()
        .await?;
    bar.finish_and_clear();
    let n_fetched = fetched.iter().filter(|fetched| **fetched).count();
    let n_there = fetched.len() - n_fetched;
    match how {
        Output::Json => output::print_json(&json!({"folder": folder, "fetched": n_fetched, "there": n_there})),
        Output::Ids => Ok(()),
        Output::Table => {
            output::print(&format!("{n_fetched} files are fetched into {}, {n_there} were there", folder.display()))
        }
    }
}

/// Whether it had to be fetched.
async fn fetch(objects: &Objects, folder: &Path, entry: &Entry, bar: &ProgressBar) -> Result<bool, Failure> {
    let (target, wanted) = (folder.join(&entry.path), (entry.digest, entry.size));
    let (root, path) = (folder.to_owned(), entry.path.clone());
    let prepared = tokio::task::spawn_blocking(move || prepare(&root, &path, wanted)).await;
    if prepared.map_err(|error| Failure::failed(error.to_string()))?? {
        bar.inc(entry.size);
        return Ok(false);
    }
    let told = bar.clone();
    objects.get_file(entry.digest, &target, move |n_bytes| told.inc(n_bytes)).await?;
    if entry.executable {
        let mode = std::fs::metadata(&target)?.permissions().mode();
        // Whoever may read it may execute it.
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(mode | (mode & 0o444) >> 2))?;
    }
    Ok(true)
}

/// Makes the folders for a file, none of which may be a link, and says whether the file is there already.
fn prepare(root: &Path, path: &str, wanted: (Digest, u64)) -> Result<bool, Failure> {
    let refused = |path: &Path, what: &str| {
        let text = format!("{} is {what}; nothing is written there", path.display());
        Failure::new(exit::REFUSED, text).with_remedy("name another folder by --get, or remove it")
    };
    let mut place = PathBuf::from(root);
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        place.push(part);
        let found = match place.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            found => Some(found?),
        };
        match (parts.peek().is_some(), found) {
            (true, Some(found)) if found.is_dir() => {}
            (true, Some(_)) => return Err(refused(&place, "no folder, or a link to one")),
            (true, None) => match std::fs::create_dir(&place) {
                // Another file of the same folder has come first.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => made?,
            },
            (false, Some(found)) if found.is_dir() => return Err(refused(&place, "a folder")),
            (false, Some(found)) if found.is_file() && found.len() == wanted.1 => {
                return Ok(Digest::of_file(&place)? == wanted);
            }
            (false, Some(_) | None) => {}
        }
    }
    Ok(false)
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
            entries.push(Entry {
                path: (*path).to_owned(),
                digest,
                size: content.len() as u64,
                executable: *executable,
            });
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
    async fn what_is_there_and_equal_is_not_fetched_again() {
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
    async fn nothing_is_written_outside_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let objects = objects(dir.path());
        let manifest = left(&objects, &[("link/file", "1", false)]).await;
        let (folder, outside) = (dir.path().join("to"), dir.path().join("outside"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, folder.join("link")).unwrap();
        let failure = fetch_all(&objects, &manifest, &folder).await.unwrap_err();
        assert!(failure.text().contains("a link to one"), "{failure:?}");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        // A link in the place of the file itself is replaced.
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
