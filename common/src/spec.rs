//! The spec of a process: what the user writes, read and checked.
//!
//! One document is one process, in YAML, JSON or TOML with the same keys:
//!
//! ```yaml
//! name: hello                  # shown in lists; need not be unique
//! run: [echo, hello]           # argv, never passed through a shell; or
//! script: echo hello           # text for /bin/sh; or
//! call: baton.count            # a Rust process of the workers, with its inputs:
//! with: {advances: 50}
//! vars: {KEY: value}           # environment variables              (run and script only)
//! stdin: text                  # standard input                     (run and script only)
//! needs: {time: 2h}            # wall time of one attempt           (run and script only)
//! ok: {exit: [0]}              # the exits that mean success        (run and script only)
//! retry: {max: 3, wait: 30s}   # attempts in all; or wait: {first: 1s, factor: 2, max: 10m, jitter: 0.2}
//! timeout: {total: 2d, queue: 12h}
//! priority: high               # high, normal, low; or -100..100, of which the sign counts
//! queue: default
//! hold: false                  # true: accepted and stored, not executed until `play`
//! labels: {campaign: si}       # the selector for list, pause, play, kill and broadcast
//! session: si-2026
//! at: cluster                  # a site of the configuration; `here`, the default, is the worker's own machine
//! ```
//!
//! With a site, `run` and `script` have more keys. Files are paths in scopes: `client://` is the document's folder, read
//! when it is submitted; `task://` the program's own folder; `session://` and `resource://` folders of the site that
//! a session, and everything there, share; `store://` the object store.
//!
//! ```yaml
//! needs: {nodes: 1, ranks: 8, cpus: 4, mem: 32GiB, gpus: 0, time: 2h}
//! native: {account: s1234}     # options of the site's launcher by their long names
//! pre: [module load qe]        # shell lines before the program
//! in:
//!   - client://relax.in        # to task://relax.in; a folder has `/` at its end
//!   - client://b.tgz > task://data/
//!   - {from: resource://pseudo/Si.upf, to: task://Si.upf, how: link, optional: true}   # auto, copy, link, move, unpack
//! out:
//!   - relax.out                # from task://, to store://
//!   - {from: "*.chk", to: session://chk/, how: move, when: always, optional: true}     # ok, error, always
//! # `move` gives a file away without a copy; what a pattern matches keeps its path below the pattern's folder.
//! values: result.json          # its JSON object becomes the values
//! ```
//!
//! A key that this version knows nothing of is an error with its line and the nearest known key; nothing is accepted
//! without effect.

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

/// What a process is to do, complete and checked.
///
/// The serialized form is for checkpoints and messages between parts of Baton, not for users: it ignores fields that it
/// does not know and takes the default for those that are missing. A later field is an `Option` that is skipped when it
/// is `None`, so that the digests of older specs stay as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The name that the user gave; need not be unique. See [`Spec::effective_name`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The work itself.
    pub what: Work,
    /// Environment variables of the program.
    #[serde(default)]
    pub vars: BTreeMap<String, String>,
    /// Longest wall time of one attempt (`needs.time`).
    #[serde(default, with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub time: Option<Duration>,
    /// The exits that mean success; never empty, each within 0..=255.
    #[serde(default = "success")]
    pub ok_exit: Vec<i32>,
    /// How often and when it is tried again.
    #[serde(default)]
    pub retry: Retry,
    /// What selectors match.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The session it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Its class within the queue.
    #[serde(default)]
    pub priority: Priority,
    /// The queue without the class; see [`Spec::task_queue`].
    #[serde(default = "default_queue")]
    pub queue: String,
    /// Accepted and stored, but not executed until `play`.
    #[serde(default)]
    pub hold: bool,
    /// When to give up.
    #[serde(default)]
    pub timeout: Timeout,
    /// The text on the program's standard input; without it the input is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// What a program on a site has beyond one on the worker's own machine; `None` for `at: here`, and for Rust processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_site: Option<OnSite>,
}

/// The work: a program, a shell text, or a Rust process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A program, never passed through a shell.
    Run {
        /// The program and its arguments; never empty, and neither is the first.
        argv: Vec<String>,
    },
    /// A text for the shell.
    Script {
        /// The text, not blank.
        text: String,
    },
    /// A Rust process that the workers know.
    Call {
        /// The name it is registered under, such as `baton.count`.
        name: String,
        /// Its inputs; an empty object when none are given.
        with: Value,
    },
}

/// How often and when the work is tried again after it failed by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retry {
    /// Attempts in all that are charged to the program; at least 1. What the site breaks is not charged.
    pub max: u32,
    /// The pauses between them.
    pub wait: Wait,
}

/// The pause before the next attempt: it grows by a factor up to a limit, less a random part so that processes that
/// failed together do not come back together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wait {
    /// Before the second attempt.
    #[serde(with = "duration::text")]
    pub first: Duration,
    /// Each pause is the one before times this; 1..=1000.
    pub factor: f64,
    /// No pause is longer.
    #[serde(with = "duration::text")]
    pub max: Duration,
    /// The largest part of a pause that chance may take away; 0..=1.
    pub jitter: f64,
}

/// The class within a queue; each has a queue of its own in the broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Before the others, but never alone.
    High,
    /// The usual.
    #[default]
    Normal,
    /// After the others, but never starved.
    Low,
}

/// When to give up on a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timeout {
    /// From its creation to its end.
    #[serde(with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
    /// From its creation to its first claim by a worker.
    #[serde(with = "duration::optional_text", skip_serializing_if = "Option::is_none")]
    pub queue: Option<Duration>,
}

/// The notation of a document.
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
/// What cannot be read is one problem; what can be read but means nothing is reported all at once.
pub fn parse(text: &str, format: Format) -> Result<Spec, Error> {
    if text.len() > tree::BYTES_MAX {
        let kib = text.len() / 1024;
        return Err(Problem::at(None, format!("the document has {kib} KiB; at most 1 MiB; put data into files")).into());
    }
    // Editors on some systems put a byte order mark first, which JSON and TOML do not know.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let node = match format {
        Format::Yaml => tree::from_yaml(text)?,
        Format::Json => tree::from_json(text)?,
        Format::Toml => tree::from_toml(text)?,
    };
    document::read(node)
}

/// Checks a document that is part of a message. The same keys and rules as for [`parse`].
///
/// # Errors
/// All that means nothing, without lines.
pub fn from_json_value(value: Value) -> Result<Spec, Error> {
    document::read(tree::from_value(value)?)
}

impl Spec {
    /// The work with the default for everything else.
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

    /// The name for lists: the user's, or that of the program or Rust process; `script` for a script.
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

    /// Which code executes it: the name of the Rust process, or for `run` and `script` `program`, and `job` on a site.
    pub fn kind(&self) -> &str {
        match &self.what {
            Work::Run { .. } | Work::Script { .. } if self.on_site.is_some() => JOB,
            Work::Run { .. } | Work::Script { .. } => PROGRAM,
            Work::Call { name, .. } => name,
        }
    }

    /// The queue with its class: `default`, `default.high`, `default.low`.
    pub fn task_queue(&self) -> String {
        match self.priority {
            Priority::High => format!("{}.high", self.queue),
            Priority::Normal => self.queue.clone(),
            Priority::Low => format!("{}.low", self.queue),
        }
    }

    /// The spec's identity: the BLAKE3 of its canonical JSON (sorted keys, defaults applied). Notation, comments and the
    /// order of keys do not count; everything else does.
    pub fn digest(&self) -> [u8; 32] {
        let value = serde_json::to_value(self).expect("a spec has text keys only");
        let mut canonical = String::new();
        write_canonical(&value, &mut canonical);
        blake3::hash(canonical.as_bytes()).into()
    }
}

impl Default for Retry {
    /// One attempt; and the default pauses if the user asks for more.
    fn default() -> Self {
        Self { max: 1, wait: Wait::default() }
    }
}

impl Default for Wait {
    /// A second, then twice as long each time up to ten minutes, of which chance may take a fifth.
    fn default() -> Self {
        Self { first: Duration::from_secs(1), factor: 2.0, max: Duration::from_secs(600), jitter: 0.2 }
    }
}

impl Wait {
    /// Always the same pause.
    pub fn constant(pause: Duration) -> Self {
        Self { first: pause, factor: 1.0, max: pause, jitter: 0.0 }
    }

    /// The pause after `attempt` charged attempts (1 for the first). `random` is from 0 to 1: how much of the jitter
    /// is taken away.
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
    /// By the extension: `.json`, `.toml`, and YAML for everything else.
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

/// The kinds of everything that is not a Rust process: a program on the worker's own machine, and one on a site.
const PROGRAM: &str = "program";
pub(crate) const JOB: &str = "job";

fn success() -> Vec<i32> {
    vec![0]
}

fn default_queue() -> String {
    "default".to_owned()
}

/// Sorts the keys itself: whether `serde_json` does depends on the features that any crate of the program turns on.
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
