//! The spec of a process: a user's document, read and checked.
//!
//! A document describes one process, in YAML, JSON or TOML with the same keys:
//!
//! ```yaml
//! name: hello                  # shown in lists; need not be unique
//! run: [echo, hello]           # argv, without a shell; or
//! script: echo hello           # text for /bin/sh; or
//! call: baton.count            # a Rust process, with its inputs:
//! with: {advances: 50}
//! vars: {KEY: value}           # environment variables              (run and script only)
//! stdin: text                  # standard input                     (run and script only)
//! needs: {time: 2h}            # time limit of one try              (run and script only)
//! ok: {exit: [0]}              # the exit codes of success          (run and script only)
//! retry: {max: 3, wait: 30s}   # total number of tries; or wait: {first: 1s, factor: 2, max: 10m, jitter: 0.2}
//! timeout: {total: 2d, queue: 12h}
//! priority: high               # high, normal, low; or -100..100, where only the sign matters
//! queue: default
//! hold: false                  # true: stored, but not executed until `play`
//! labels: {campaign: si}       # for the selections of list, pause, play, kill and broadcast
//! session: si-2026
//! at: cluster                  # a site of the configuration; default: `here`, the worker's own machine
//! ```
//!
//! With a site, `run` and `script` have more keys. Files are paths in scopes: `client://` is the document's folder,
//! read at submission; `task://` is the sandbox of the program; `session://` is a folder of the site that a session
//! shares; `resource://` is a folder that all processes at the site share; `store://` is the object store.
//!
//! ```yaml
//! needs: {nodes: 1, ranks: 8, cpus: 4, mem: 32GiB, gpus: 0, time: 2h}
//! native: {account: s1234}     # launcher options by their long names
//! pre: [module load qe]        # shell lines before the program
//! in:
//!   - client://relax.in        # to task://relax.in; a folder has a trailing `/`
//!   - client://b.tgz > task://data/
//!   - {from: resource://pseudo/Si.upf, to: task://Si.upf, how: link, optional: true}   # auto, copy, link, move, unpack
//! out:
//!   - relax.out                # from task://, to store://
//!   - {from: "*.chk", to: session://chk/, how: move, when: always, optional: true}     # ok, error, always
//! # `move` makes no copy. A file that matches a pattern keeps its path below the pattern's folder.
//! values: result.json          # its JSON object becomes the values; integers have at most 64 bits
//! ```
//!
//! An unknown key is an error with its line and the nearest known key. No key is ignored.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::duration;

mod document;
mod error;
pub mod on_site;
#[cfg(test)]
mod tests;
mod tree;

pub use error::{Error, Problem};
pub use on_site::OnSite;

/// A complete, checked spec.
///
/// The serialized form is for checkpoints and for messages between parts of Baton, not for users. Unknown fields are
/// ignored, and absent fields have their defaults. A new field must be an `Option` that is skipped if it is `None`, so
/// that the digests of older specs do not change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The user's name for the process; need not be unique. See [`Spec::effective_name`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The work.
    pub what: Work,
    /// Environment variables of the program.
    #[serde(default)]
    pub vars: BTreeMap<String, String>,
    /// Time limit of one try (`needs.time`).
    #[serde(default, with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub time: Option<Duration>,
    /// The exit codes of success; never empty, each within 0..=255.
    #[serde(default = "success")]
    pub ok_exit: Vec<i32>,
    /// Number and pauses of the tries.
    #[serde(default)]
    pub retry: Retry,
    /// Labels, for selections.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The session of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// The class within the queue.
    #[serde(default)]
    pub priority: Priority,
    /// The queue without the class; see [`Spec::task_queue`].
    #[serde(default = "default_queue")]
    pub queue: String,
    /// Whether the process is not executed until `play`.
    #[serde(default)]
    pub hold: bool,
    /// Time limits of the process.
    #[serde(default)]
    pub timeout: Timeout,
    /// The program's standard input; empty if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// The part for a program on a site; `None` for `at: here`, and for Rust processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_site: Option<OnSite>,
}

/// The work: a program, a shell script, or a Rust process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A program, started without a shell.
    Run {
        /// The program and its arguments. The program is not empty.
        argv: Vec<String>,
    },
    /// A shell script.
    Script {
        /// The text; not blank.
        text: String,
    },
    /// A Rust process of the workers.
    Call {
        /// Its registered name, such as `baton.count`.
        name: String,
        /// Its inputs; default: an empty object.
        with: Value,
    },
}

/// Number and pauses of the tries after failures of the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retry {
    /// Total number of tries; at least 1. Failures of the site do not count.
    pub max: u32,
    /// The pauses between the tries.
    pub wait: Wait,
}

/// The pause before the next try. It grows by a factor up to a limit, less a random part, so that processes that failed
/// at the same time do not retry at the same time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wait {
    /// The pause before the second try.
    #[serde(with = "duration::text")]
    pub first: Duration,
    /// The growth factor; 1..=1000.
    pub factor: f64,
    /// The longest pause.
    #[serde(with = "duration::text")]
    pub max: Duration,
    /// The largest random part that is subtracted from a pause; 0..=1.
    pub jitter: f64,
}

/// The class within a queue. Each class has a separate queue on the broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Served before the others, but not exclusively.
    High,
    /// The default.
    #[default]
    Normal,
    /// Served after the others, but never starved.
    Low,
}

/// Time limits of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timeout {
    /// Limit from its creation to its end.
    #[serde(with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
    /// Limit from its creation to its first claim.
    #[serde(with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub queue: Option<Duration>,
}

/// The format of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML 1.2: only `true` and `false` are booleans.
    Yaml,
    /// JSON.
    Json,
    /// TOML 1.
    Toml,
}

/// Reads and checks a document.
///
/// # Errors
/// The first syntax error, or else all problems of the document.
pub fn parse(text: &str, format: Format) -> Result<Spec, Error> {
    if text.len() > tree::BYTES_MAX {
        let kib = text.len() / 1024;
        return Err(Problem::at(
            None,
            format!("the document has {kib} KiB, more than the limit of 1 MiB; put data into files"),
        )
        .into());
    }
    // Some editors write a byte order mark, which JSON and TOML do not allow.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let node = match format {
        Format::Yaml => tree::from_yaml(text)?,
        Format::Json => tree::from_json(text)?,
        Format::Toml => tree::from_toml(text)?,
    };
    document::read(node)
}

/// Checks a document from a message, with the keys and rules of [`parse`].
///
/// # Errors
/// All problems of the document, without lines.
pub fn from_json_value(value: Value) -> Result<Spec, Error> {
    document::read(tree::from_value(value)?)
}

impl Spec {
    /// A spec with this work and default values.
    pub fn new(what: Work) -> Self {
        Self {
            name: None,
            what,
            vars: BTreeMap::new(),
            time: None,
            ok_exit: success(),
            retry: Retry::default(),
            labels: BTreeMap::new(),
            session: None,
            priority: Priority::default(),
            queue: default_queue(),
            hold: false,
            timeout: Timeout::default(),
            stdin: None,
            on_site: None,
        }
    }

    /// The name for lists: the user's name, or else the name of the program or Rust process, or `script`.
    pub fn effective_name(&self) -> &str {
        match (&self.name, &self.what) {
            (Some(name), _) => name,
            (None, Work::Run { argv }) => {
                let program = argv.first().map_or(PROGRAM, String::as_str);
                program.rsplit('/').find(|part| !part.is_empty()).unwrap_or(program)
            }
            (None, Work::Script { .. }) => "script",
            (None, Work::Call { name, .. }) => name,
        }
    }

    /// The kind of the process: the name of the Rust process; `program` for `run` and `script`, or `job` if they run on
    /// a site.
    pub fn kind(&self) -> &str {
        match &self.what {
            Work::Run { .. } | Work::Script { .. } if self.on_site.is_some() => JOB,
            Work::Run { .. } | Work::Script { .. } => PROGRAM,
            Work::Call { name, .. } => name,
        }
    }

    /// The queue with the class: `default`, `default.high`, `default.low`.
    pub fn task_queue(&self) -> String {
        match self.priority {
            Priority::High => format!("{}.high", self.queue),
            Priority::Normal => self.queue.clone(),
            Priority::Low => format!("{}.low", self.queue),
        }
    }

    /// The digest of the spec: the BLAKE3 of its canonical JSON, with sorted keys and defaults applied. It does not
    /// depend on format, comments and the order of keys.
    pub fn digest(&self) -> [u8; 32] {
        let value = serde_json::to_value(self).expect("a spec has text keys only");
        let mut canonical = String::new();
        write_canonical(&value, &mut canonical);
        blake3::hash(canonical.as_bytes()).into()
    }
}

impl Default for Retry {
    /// One try, with the default pauses if there are more.
    fn default() -> Self {
        Self { max: 1, wait: Wait::default() }
    }
}

impl Default for Wait {
    /// One second, doubled each time up to ten minutes, less up to a fifth.
    fn default() -> Self {
        Self { first: Duration::from_secs(1), factor: 2.0, max: Duration::from_secs(600), jitter: 0.2 }
    }
}

impl Wait {
    /// A constant pause.
    pub fn constant(pause: Duration) -> Self {
        Self { first: pause, factor: 1.0, max: pause, jitter: 0.0 }
    }

    /// The pause after this try (1 for the first). `random`, from 0 to 1, is the part of the jitter to subtract.
    pub fn before(&self, try_number: u32, random: f64) -> Duration {
        let exponent = i32::try_from(try_number.saturating_sub(1)).unwrap_or(i32::MAX);
        let grown = self.first.as_secs_f64() * self.factor.powi(exponent);
        let pause = if grown < self.max.as_secs_f64() { Duration::from_secs_f64(grown) } else { self.max };
        pause.mul_f64(1.0 - self.jitter * random.clamp(0.0, 1.0))
    }
}

impl Priority {
    /// The word for documents, tables and messages.
    pub fn word(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }
}

impl Format {
    /// The format for a file name extension: JSON for `.json`, TOML for `.toml`, else YAML.
    pub fn of_path(path: &Path) -> Self {
        let is = |extension| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension));
        if is("json") {
            Format::Json
        } else if is("toml") {
            Format::Toml
        } else {
            Format::Yaml
        }
    }
}

/// The kinds of programs: on the worker's own machine, and on a site.
const PROGRAM: &str = "program";
pub(crate) const JOB: &str = "job";

fn success() -> Vec<i32> {
    vec![0]
}

fn default_queue() -> String {
    "default".to_owned()
}

/// Writes JSON with sorted keys. Whether `serde_json` sorts them depends on the features that other crates enable.
fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => out.push_str(&value.to_string()),
        Value::Array(values) => {
            out.push('[');
            for (value_idx, value) in values.iter().enumerate() {
                if value_idx > 0 {
                    out.push(',');
                }
                write_canonical(value, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            out.push('{');
            for (key_idx, (key, value)) in sorted.into_iter().enumerate() {
                if key_idx > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
    }
}
