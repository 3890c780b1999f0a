//! The commands and specs of the README and of the guide run as written.
//!
//! Blocks of `sh` run in order against one fleet for each page, in one shell. Blocks of `yaml` are specs: a first line
//! `# NAME.yaml` names the file that the commands use, and each spec passes `baton submit --dry-run`. Blocks of `toml`
//! are configurations, those of `json` messages. The site `cluster` is a folder of this machine. A block that cannot
//! run here has a reason in the line before it: `<!-- not run: REASON -->`.

use std::time::Duration;

use baton_common::config::Config;
use baton_common::message::{Control, Encoding, Task};
use baton_tests::eventually;
use baton_tests::process::clean_environment;
use baton_tests::scene::{Scene, output};
use baton_tests::services::programs;
use tokio::process::Command;

use crate::book::{documents, pages, read, root};

/// The number of blocks that do not run. A new one needs a reason, and a change of this number.
const N_NOT_RUN: usize = 6;

/// The servers of the compose file, which the servers of a scene replace.
const BROKER: &str = "amqp://baton:baton@127.0.0.1:5672/%2f";
const DATABASE: &str = "postgres://baton:baton@127.0.0.1:5432/baton";

struct Block {
    language: String,
    text: String,
    /// The line of its opening fence, counted from 1.
    line: usize,
    /// The reason why it does not run, if any.
    excuse: Option<String>,
}

/// The fenced blocks of a document.
fn blocks(document: &str) -> Vec<Block> {
    let text = read(document);
    let mut blocks: Vec<Block> = Vec::new();
    let (mut is_open, mut before) = (false, "");
    for (line_idx, line) in text.lines().enumerate() {
        if let Some(language) = line.strip_prefix("```") {
            is_open = !is_open;
            if is_open {
                let excuse = before.strip_prefix("<!-- not run: ").and_then(|rest| rest.strip_suffix(" -->"));
                let (language, excuse) = (language.to_owned(), excuse.map(str::to_owned));
                blocks.push(Block { language, text: String::new(), line: line_idx + 1, excuse });
            }
        } else if is_open {
            let block = blocks.last_mut().expect("one is open");
            block.text.push_str(line);
            block.text.push('\n');
        }
        before = line;
    }
    assert!(!is_open, "{document}: a block has no end");
    blocks
}

/// The documents whose blocks run.
fn walked() -> Vec<String> {
    [vec!["README.md".to_owned()], pages("docs/src/guide")].concat()
}

macro_rules! walks {
    ($($name:ident: $document:literal)*) => {
        const WALKS: &[&str] = &[$($document),*];

        mod a_page_runs_as_it_is_written {
            $(
                #[tokio::test]
                #[ignore = "needs services: run tests/run"]
                async fn $name() {
                    super::a_page_runs_as_it_is_written($document).await;
                }
            )*
        }
    };
}

walks! {
    readme: "README.md"
    coming_from: "docs/src/guide/coming-from.md"
    control: "docs/src/guide/control.md"
    files: "docs/src/guide/files.md"
    first_steps: "docs/src/guide/first-steps.md"
    own_processes: "docs/src/guide/own-processes.md"
    sites: "docs/src/guide/sites.md"
    specs: "docs/src/guide/specs.md"
}

async fn a_page_runs_as_it_is_written(document: &str) {
    let blocks = blocks(document);
    let commands: Vec<&Block> =
        blocks.iter().filter(|block| block.language == "sh" && block.excuse.is_none()).collect();
    let scene = Scene::new().await;
    std::os::unix::fs::symlink(root().join("examples"), scene.path("examples")).unwrap();
    let here = scene.folder().display();
    let config = format!(
        "[sites.cluster]\ntransport = 'local'\nlauncher = 'fork'\nroot = '{here}/site'\npoll = '1s'\n\n[objects]\nurl = \
         '{here}/objects'\n"
    );
    std::fs::write(scene.path("baton.toml"), config).unwrap();
    for block in blocks.iter().filter(|block| block.language == "yaml") {
        check_spec(&scene, document, block).await;
    }
    let ended = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n";
    let walk: String =
        commands.iter().map(|block| format!(": '{document}:{}'\n{}\n", block.line, block.text)).collect();
    let script = [ended, &walk].concat().replace(BROKER, &scene.broker_url()).replace(DATABASE, &scene.database_url());
    let config = scene.path("baton.toml").display().to_string();
    let has_own_workers = script.contains("\nbaton-worker ");
    let worker = if commands.is_empty() || has_own_workers {
        None
    } else {
        let worker = scene.worker_with(&[("BATON_CONFIG", &config)], "w1", &[]);
        worker.ready().await;
        Some(worker)
    };
    let mut command = Command::new("bash");
    clean_environment(&mut command);
    let path = format!("{}:{}", programs().display(), std::env::var("PATH").unwrap());
    command
        .args(["-euxo", "pipefail", "-c", &script])
        .current_dir(scene.folder())
        .env("PATH", path)
        .env("HOME", scene.folder())
        .env("USER", "tester");
    if !script.contains("export BATON_DATABASE_URL") {
        command.env("BATON_BROKER_URL", scene.broker_url()).env("BATON_DATABASE_URL", scene.database_url());
    }
    output(command).await.ok();
    drop(worker);
}

/// Writes a spec with its input files, and checks it.
async fn check_spec(scene: &Scene, document: &str, block: &Block) {
    let first = block.text.lines().next().unwrap_or_default();
    let name = first.strip_prefix("# ").filter(|name| name.ends_with(".yaml")).unwrap_or("unnamed.yaml");
    let spec = scene.spec(name, &block.text);
    for sent in block.text.split("client://").skip(1) {
        let name: String = sent.chars().take_while(|c| !c.is_whitespace() && !"],>}".contains(*c)).collect();
        let path = scene.path(&name);
        let file = if name.ends_with('/') { path.join("file") } else { path };
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "content").unwrap();
    }
    let output = scene.baton(&["submit", &spec.display().to_string(), "--dry-run"]).await;
    assert_eq!(output.code, 0, "{document}:{}: {output:?}", block.line);
}

#[test]
fn every_page_of_the_guide_is_run() {
    let mut walks: Vec<String> = WALKS.iter().map(|document| (*document).to_owned()).collect();
    walks.sort();
    let mut documents = walked();
    documents.sort();
    assert_eq!(walks, documents);
}

#[test]
fn every_block_runs_or_says_why_not() {
    let mut n_not_run = 0;
    for document in walked() {
        for block in blocks(&document) {
            let place = format!("{document}:{}", block.line);
            let is_known = ["sh", "yaml", "toml", "json", "text"].contains(&block.language.as_str());
            assert!(is_known, "{place}: unknown block language `{}`", block.language);
            let is_command = |line: &str| ["$ ", "baton ", "docker "].iter().any(|begin| line.starts_with(begin));
            let hides = block.language == "text" && block.text.lines().any(is_command);
            assert!(!hides, "{place}: a command in a block of `text` would not run");
            if let Some(excuse) = block.excuse {
                assert!(excuse.len() > 10, "{place}: give the reason why it does not run");
                n_not_run += 1;
            }
        }
    }
    assert_eq!(n_not_run, N_NOT_RUN, "blocks that do not run");
}

#[test]
fn every_block_of_the_documents_has_a_language() {
    for document in documents() {
        for block in blocks(&document) {
            assert!(!block.language.is_empty(), "{document}:{}: name the language, or `text`", block.line);
        }
    }
}

#[test]
fn every_configuration_and_message_of_the_book_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (mut n_configs, mut n_messages) = (0, 0);
    for document in documents() {
        for block in blocks(&document) {
            let place = format!("{document}:{}", block.line);
            if block.language == "toml" {
                let path = folder.path().join("baton.toml");
                std::fs::write(&path, &block.text).unwrap();
                Config::load(Some(&path)).unwrap_or_else(|error| panic!("{place}: {error}"));
                n_configs += 1;
            } else if block.language == "json" {
                let body = block.text.as_bytes();
                let is_task =
                    block.text.contains(r#""type": "launch""#) || block.text.contains(r#""type": "continue""#);
                let read = if is_task {
                    Task::decode(body, Encoding::Json).map(drop)
                } else {
                    Control::decode(body, Encoding::Json).map(drop)
                };
                read.unwrap_or_else(|error| panic!("{place}: {error}"));
                n_messages += 1;
            }
        }
    }
    assert!(n_configs > 0 && n_messages > 2, "blocks were not found");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_python_program_of_the_reference_launches_a_process() {
    let blocks = blocks("docs/src/reference/messages.md");
    let program = blocks.iter().find(|block| block.language == "python").expect("a program");
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let text = program.text.replace(BROKER, &scene.broker_url());
    assert_ne!(text, program.text, "the broker's URL was not found");
    let script = scene.spec("launch.py", &text);
    // A worker is ready before it declares its exchanges.
    eventually("the process has finished", Duration::from_secs(30), async || {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(&script);
        let output = output(command).await;
        if output.code == 0 && scene.count("state = 4").await == 1 { Ok(()) } else { Err(output) }
    })
    .await;
}

#[test]
fn a_block_is_found_with_its_reason() {
    let blocks = blocks("README.md");
    assert!(blocks.iter().any(|block| block.excuse.as_deref() == Some("needs Docker")));
    assert!(blocks.len() > 5);
}
