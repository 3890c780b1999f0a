//! Rules about the source tree itself.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use self::imports::{Import, imports, imports_of_files, tops};
use crate::book::{documents, quoted, read};

mod imports;

/// The modules of the worker from the bottom up: each imports only from itself and from the ones before it.
const WORKER_ROOMS: [&str; 11] = [
    "machine",
    "author",
    "outbox",
    "transport",
    "local",
    "site",
    "builtin",
    "execution",
    "intake",
    "lifecycle",
    "testing",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Every Rust file of the workspace, with its path relative to the root.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = ["common", "worker", "controller", "tests", "examples"].map(|name| root().join(name)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 30, "sources were not found");
    files
}

/// The files outside tests that use a crate.
fn users(name: &str) -> Vec<String> {
    let used = [format!("use {name}::"), format!("{name}::")];
    let is_word = |text: &str, at: usize| {
        text[..at].chars().next_back().is_none_or(|before| !before.is_alphanumeric() && before != '_' && before != ':')
    };
    sources()
        .into_iter()
        .filter(|(path, _)| !path.starts_with("tests/") && !path.contains("/tests/"))
        .filter(|(_, text)| {
            text.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
                used.iter().any(|pattern| line.match_indices(pattern.as_str()).any(|(at, _)| is_word(line, at)))
            })
        })
        .map(|(path, _)| path)
        .collect()
}

#[test]
fn every_wire_is_known_in_one_place_only() {
    // The benchmark compares Baton with a plain AMQP client, so it has one.
    let amqp: &[&str] = &["common/src/communicator", "controller/src/bench/baseline/"];
    for (name, homes) in [
        ("lapin", amqp),
        ("async_rs", &["common/src/communicator"]),
        ("sea_orm", &["common/src/store"]),
        ("sea_query_sqlx", &["common/src/store"]),
        ("russh", &["worker/src/transport/"]),
        ("object_store", &["common/src/objects"]),
    ] {
        let users = users(name);
        assert!(!users.is_empty(), "{name} is used somewhere");
        for path in users {
            assert!(homes.iter().any(|home| path.starts_with(home)), "{path} uses {name}");
        }
    }
}

/// `CANCELLED` is not listed: Baton itself records the same word.
#[test]
fn only_the_launcher_for_slurm_names_the_states_of_its_jobs() {
    let states = "BOOT_FAIL COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED TIMEOUT";
    for (path, text) in sources() {
        if path.starts_with("worker/src/") && !path.starts_with("worker/src/site/launcher/slurm/") {
            let named = states.split(' ').find(|state| text.contains(&format!("\"{state}\"")));
            assert_eq!(named, None, "{path} names a Slurm state");
        }
    }
}

#[test]
fn common_knows_neither_worker_nor_controller_and_worker_knows_no_controller() {
    for path in users("baton_worker") {
        assert!(!path.starts_with("common/"), "{path} uses baton_worker");
    }
    let manifest = |name: &str| std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
    assert!(!manifest("common").contains("baton-worker") && !manifest("common").contains("baton-controller"));
    assert!(!manifest("worker").contains("baton-controller"));
}

#[test]
fn a_room_of_the_worker_imports_from_itself_and_from_those_below_it() {
    let (src, sources) = ("worker/src/", sources());
    assert_eq!(tops(src, &sources), WORKER_ROOMS.map(str::to_owned).into(), "every module is in the order");
    let height = |room: &str| WORKER_ROOMS.iter().position(|known| *known == room);
    let imports = imports(src, &sources);
    assert!(imports.len() > 100, "imports were not found");
    let up: Vec<String> =
        imports.iter().filter(|import| height(&import.from) < height(&import.to)).map(Import::to_string).collect();
    assert!(up.is_empty(), "imports of higher modules:\n{}", up.join("\n"));
}

/// The order of the worker's modules is a stronger rule.
#[test]
fn no_modules_of_a_crate_import_each_other_in_a_circle() {
    let sources = sources();
    for src in ["common/src/", "controller/src/"] {
        let imports = imports(src, &sources);
        assert!(imports.len() > 30, "imports were not found");
        assert_no_circle(&imports);
    }
}

#[test]
fn no_files_of_the_store_import_each_other_in_a_circle() {
    let imports = imports_of_files("common/src/", "store", &sources());
    assert!(imports.len() > 100, "imports were not found");
    assert_no_circle(&imports);
}

fn assert_no_circle(imports: &[Import]) {
    let is_circular = |import: &&Import| leads(imports, &import.to, &import.from);
    let circle: Vec<String> = imports.iter().filter(is_circular).map(Import::to_string).collect();
    assert!(circle.is_empty(), "cyclic imports:\n{}", circle.join("\n"));
}

/// Whether a module imports another one, directly or indirectly.
fn leads(imports: &[Import], from: &str, to: &str) -> bool {
    let mut seen = HashSet::from([from]);
    let mut next = vec![from];
    while let Some(module) = next.pop() {
        if module == to {
            return true;
        }
        let imported = imports.iter().filter(|import| import.from == module).map(|import| import.to.as_str());
        next.extend(imported.filter(|to| seen.insert(to)));
    }
    false
}

#[test]
fn a_file_is_read_in_one_sitting_and_says_what_it_is() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 800, "{path} is too long");
        assert!(text.starts_with("//!"), "{path} has no module documentation");
    }
}

#[test]
fn every_dependency_comes_from_the_public_registry() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let public = r#"source = "registry+https://github.com/rust-lang/crates.io-index""#;
    let offences: Vec<_> =
        lock.lines().filter(|line| line.starts_with("source = ") && *line != public).map(str::to_owned).collect();
    assert!(offences.is_empty(), "Cargo.lock names a registry other than the public one: {offences:?}");
}

#[test]
fn nothing_names_a_developers_machine() {
    // Joined here, so that this file does not contain the words.
    let mut words = vec!["/ro".to_owned() + "ot/", "/tmp/w".to_owned() + "t/", "/work/ma".to_owned() + "in"];
    words.push("/work/sha".to_owned() + "red");
    words.extend(mirrors());
    let offences: Vec<_> = texts()
        .iter()
        .flat_map(|(path, text)| {
            let lines = text.lines().enumerate();
            let named = lines.filter(|(_, line)| words.iter().any(|word| line.contains(word.as_str())));
            named.map(|(i, line)| format!("{}:{}: {}", path, i + 1, line.trim())).collect::<Vec<_>>()
        })
        .collect();
    assert!(offences.is_empty(), "a path or host of a developer's machine:\n{}", offences.join("\n"));
}

/// The words in backticks of every document, with the document.
fn quoted_in_documents() -> Vec<(String, String)> {
    let words = |document: String| {
        let words = quoted(&read(&document)).into_iter();
        words.map(|word| (document.clone(), word)).collect::<Vec<_>>()
    };
    documents().into_iter().flat_map(words).collect()
}

/// Words joined by `_` in the documents name tests, statements and files.
#[test]
fn every_test_that_the_documents_name_is_there() {
    let sources: Vec<(String, String)> = texts().into_iter().filter(|(path, _)| path.ends_with(".rs")).collect();
    let is_there = |name: &str| sources.iter().any(|(_, text)| text.contains(name));
    let is_test =
        |name: &str| name.matches('_').count() >= 2 && name.chars().all(|c| c == '_' || c.is_ascii_lowercase());
    let named = quoted_in_documents();
    assert!(named.iter().filter(|(_, name)| is_test(name)).count() > 100, "no test names were found");
    let missing: Vec<_> = named.iter().filter(|(_, name)| is_test(name) && !is_there(name)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

/// A word that ends in `.rs` or begins with a folder of the root is a path. The former may omit its first folders.
#[test]
fn every_file_that_the_documents_name_is_there() {
    let paths: HashSet<String> = texts().into_iter().map(|(path, _)| path).collect();
    let is_end = |name: &str| paths.iter().any(|path| path.ends_with(&format!("/{name}")));
    let tops: HashSet<&str> = paths.iter().filter_map(|path| path.split_once('/')).map(|(top, _)| top).collect();
    let mut missing = Vec::new();
    let mut n_paths = 0;
    for (document, word) in quoted_in_documents() {
        let name = word.split_whitespace().next().unwrap_or_default();
        let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
        let is_below_top = name.split_once('/').is_some_and(|(top, _)| tops.contains(top));
        if !is_plain || !(name.ends_with(".rs") || is_below_top) {
            continue;
        }
        n_paths += 1;
        if !(root().join(name).exists() || !is_below_top && is_end(name)) {
            missing.push(format!("{document}: {name}"));
        }
    }
    assert!(n_paths > 100, "no paths were found");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Every text file of the repository, with its path relative to the root.
fn texts() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            // In a linked worktree `.git` is a file.
            if [".git", ".baton", "target", "book"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                files.push((path.strip_prefix(root()).unwrap().display().to_string(), text));
            }
        }
    }
    files
}

/// Hosts of registry mirrors on this machine, from the settings of Cargo and pip.
fn mirrors() -> Vec<String> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let settings =
        [cargo.join("config.toml"), cargo.join("config"), home.join(".config/pip/pip.conf"), "/etc/pip.conf".into()];
    let texts = settings.iter().filter_map(|path| std::fs::read_to_string(path).ok());
    let public = ["crates.io", "github.com", "pypi.org", "localhost", "127.0.0.1"];
    texts
        .flat_map(|text| {
            let hosts = text
                .split("://")
                .skip(1)
                .map(|rest| rest.split(['/', '"', '\n', '\'', ' ']).next().unwrap_or("").to_owned());
            hosts.collect::<Vec<_>>()
        })
        .map(|host| host.rsplit('@').next().unwrap_or("").split(':').next().unwrap_or("").to_owned())
        .filter(|host| host.contains('.') && !public.iter().any(|known| host.ends_with(known)))
        .collect()
}
