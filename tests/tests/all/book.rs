//! The book and the other documents: every page is listed, every link has a target, and the reference is complete.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use baton_tests::scene::{Scene, output};
use baton_tests::services::programs;
use tokio::process::Command;

/// The pages of the book, relative to its source folder.
const SOURCE: &str = "docs/src";

/// Documents outside the book.
const DOCUMENTS: [&str; 8] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "deploy/README.md",
    "tests/README.md",
    "tests/FAULTS.md",
];

/// Length limits: the README takes one sitting, the map of the source two.
const README_BYTES_MAX: usize = 8 * 1024;
const ARCHITECTURE_BYTES_MAX: usize = 12 * 1024;

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

pub(crate) fn read(document: &str) -> String {
    let path = root().join(document);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every page of the book below this folder, with its path relative to the root.
pub(crate) fn pages(folder: &str) -> Vec<String> {
    let mut pages = Vec::new();
    for entry in std::fs::read_dir(root().join(folder)).unwrap().flatten() {
        let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            pages.extend(self::pages(&name));
        } else if name.ends_with(".md") {
            pages.push(name);
        }
    }
    pages.sort();
    pages
}

/// Every document of the project, with its path relative to the root.
pub(crate) fn documents() -> Vec<String> {
    DOCUMENTS.map(str::to_owned).into_iter().chain(pages(SOURCE)).collect()
}

/// The text outside fenced blocks.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// The link targets of a document.
fn links(text: &str) -> Vec<String> {
    let text = prose(text);
    text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap_or_default().to_owned()).collect()
}

/// The anchor name of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#').trim()))
        .collect()
}

/// The path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            Component::Normal(_) | Component::Prefix(_) | Component::RootDir => normal.push(component),
        }
    }
    normal
}

/// The words in backticks of a document, outside fenced blocks.
pub(crate) fn quoted(text: &str) -> BTreeSet<String> {
    prose(text).split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_page_is_in_the_summary_once() {
    let summary = links(&read("docs/src/SUMMARY.md"));
    let listed: BTreeSet<String> = summary.iter().map(|page| format!("{SOURCE}/{page}")).collect();
    assert_eq!(listed.len(), summary.len(), "a page is listed twice in SUMMARY.md");
    let pages: BTreeSet<String> = pages(SOURCE).into_iter().filter(|page| !page.ends_with("/SUMMARY.md")).collect();
    assert_eq!(listed, pages);
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut dead = Vec::new();
    for document in documents() {
        let text = read(&document);
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link.as_str(), ""));
            let folder = Path::new(&document).parent().unwrap();
            let target = if file.is_empty() { PathBuf::from(&document) } else { normal(&folder.join(file)) };
            if document.starts_with(SOURCE) && !target.starts_with(SOURCE) {
                dead.push(format!("{document}: {link} leads out of the book"));
            } else if !root().join(&target).exists() {
                dead.push(format!("{document}: {link}: there is no {}", target.display()));
            } else if !fragment.is_empty() && !anchors(&read(&target.display().to_string())).contains(fragment) {
                dead.push(format!("{document}: {link}: {} has no such heading", target.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}

#[test]
fn the_first_documents_are_short() {
    for (document, bytes_max) in [("README.md", README_BYTES_MAX), ("ARCHITECTURE.md", ARCHITECTURE_BYTES_MAX)] {
        let n_bytes = read(document).len();
        assert!(n_bytes <= bytes_max, "{document} has {n_bytes} bytes; at most {bytes_max}");
    }
}

#[test]
fn every_configuration_key_is_in_the_reference() {
    let page = quoted(&read("docs/src/reference/configuration.md"));
    let mut section = String::new();
    let mut missing = Vec::new();
    for line in read("deploy/config/baton.toml").lines() {
        let line = line.strip_prefix("#: ").unwrap_or(line);
        if let Some(name) = line.strip_prefix('[') {
            section = name.split([']', '.']).next().unwrap_or_default().to_owned();
        } else if let Some((key, value)) = line.split_once(" = ")
            && !line.starts_with('#')
        {
            let inner = value.trim().strip_prefix('{').filter(|_| ["limits", "cache"].contains(&key));
            let keys: Vec<String> = match inner {
                Some(inner) => inner
                    .split(',')
                    .filter_map(|part| part.split_once(" = "))
                    .map(|(inner, _)| format!("{section}.{key}.{}", inner.trim()))
                    .collect(),
                None => vec![format!("{section}.{key}")],
            };
            missing.extend(keys.into_iter().filter(|key| !page.contains(key)));
        }
    }
    assert!(!section.is_empty(), "the documented configuration was not found");
    assert!(missing.is_empty(), "missing in the reference: {missing:?}");
}

/// The source lists keys as `path: "retry", known: &["max", "wait"]`.
#[test]
fn every_key_of_a_spec_is_in_the_reference() {
    let page = quoted(&read("docs/src/reference/spec.md"));
    let mut known = BTreeSet::new();
    let mut folders = vec![root().join("common/src/spec")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let text = std::fs::read_to_string(entry.path()).unwrap();
            for part in text.split("path: \"").skip(1) {
                let Some((path, rest)) = part.split_once('"') else { continue };
                let Some(list) = rest.split_once("known: &[").and_then(|(_, rest)| rest.split_once(']')) else {
                    continue;
                };
                let keys = list.0.split('"').skip(1).step_by(2);
                known.extend(keys.map(|key| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }));
            }
        }
    }
    assert!(known.len() > 40, "the keys of a spec were not found: {known:?}");
    // These have their own keys, which are listed.
    for parent in ["needs", "ok"] {
        known.remove(parent);
    }
    let missing: Vec<_> = known.into_iter().filter(|key| !page.contains(key)).collect();
    assert!(missing.is_empty(), "missing in the reference: {missing:?}");
}

/// The commands in the help of a command.
async fn commands(arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new(programs().join("baton"));
    command.args(arguments).arg("--help");
    let help = output(command).await.ok().stdout;
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    let lines = list.lines().take_while(|line| !line.trim().is_empty());
    // A continuation line is indented further.
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
    names.map(|name| [arguments, &[name]].concat().join(" ")).collect()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_reference_has_every_command_and_no_other() {
    let mut known = BTreeSet::new();
    for command in commands(&[]).await {
        let below = commands(&[&command]).await;
        if below.is_empty() {
            known.insert(command);
        }
        known.extend(below);
    }
    assert!(known.len() > 25, "the commands were not found: {known:?}");
    let page = read("docs/src/reference/cli.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `baton ")?.split('`').next());
    let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase());
    let listed: BTreeSet<String> =
        rows.map(|row| row.split(' ').take_while(is_name).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(listed, known);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn every_column_of_the_database_is_in_the_reference() {
    let scene = Scene::new().await;
    scene.baton(&["list"]).await.ok();
    let columns = scene
        .sql(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema() \
             ORDER BY 1, 2",
        )
        .await;
    let page = read("docs/src/reference/database.md");
    let small = page.split_once("\n## Small tables").expect("the last section").1;
    let mut missing = Vec::new();
    for line in columns.lines() {
        let (table, column) = line.split_once('|').expect("two columns");
        let heading = format!("\n## `{table}`\n");
        let row = small.lines().find(|line| line.starts_with(&format!("| `{table}`")));
        let part = page.split_once(&heading).map(|(_, rest)| rest.split("\n## ").next().unwrap_or_default()).or(row);
        if !part.is_some_and(|part| quoted(part).contains(column)) {
            missing.push(format!("{table}.{column}"));
        }
    }
    assert!(columns.lines().count() > 80, "{columns}");
    assert!(missing.is_empty(), "missing in the reference: {missing:?}");
}
