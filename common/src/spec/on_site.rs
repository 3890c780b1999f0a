//! What a program on a site has beyond one on the worker's own machine: the site, its needs, its files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The folder of each sandbox that belongs to Baton: the program's streams, and how it ended.
pub const RESERVED: &str = ".baton";

/// The folder below [`RESERVED`] in which files of the client wait that go on to another place: by paths that need not be
/// UTF-8, and with empty folders and executable bits.
pub const WAITING: &str = "in";

/// Options that would make a job another one than Baton looks for, or none.
const OPTIONS_OF_BATON: [&str; 16] = [
    "array",
    "chdir",
    "clusters",
    "error",
    "help",
    "job-name",
    "no-requeue",
    "output",
    "parsable",
    "requeue",
    "test-only",
    "usage",
    "version",
    "wait",
    "workdir",
    "wrap",
];

/// Longest name of an option.
const OPTION_BYTES_MAX: usize = 128;

/// Whether an option of a launcher, by its long name, may stand in `native`.
///
/// # Errors
/// Why not.
pub fn check_option(name: &str) -> Result<(), String> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if name.is_empty() || name.len() > OPTION_BYTES_MAX || !is_plain || name.starts_with('-') {
        return Err("must be an option's long name without the `--` before it, such as `account`".to_owned());
    }
    // Launchers take the beginning of a name for the whole if no other name begins so. Of one letter, that is job-name's.
    let is_short_for = |option: &str| option.starts_with(name) && (name.len() > 1 || name == "j");
    if let Some(option) = OPTIONS_OF_BATON.iter().find(|option| is_short_for(option)) {
        return Err(format!("is not for `native`: Baton sets or forbids `{option}`, by which it finds the job again"));
    }
    Ok(())
}

/// Whether an option of a launcher may have this value.
///
/// # Errors
/// Why not.
pub fn check_option_value(value: &str) -> Result<(), String> {
    if value.chars().any(char::is_control) {
        return Err("must be one line without control characters".to_owned());
    }
    Ok(())
}

/// Whether a session's name can be the name of its folder at a site.
///
/// # Errors
/// Why not.
pub fn check_session(name: &str) -> Result<(), String> {
    let is_folder = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if is_folder { Ok(()) } else { Err(format!("must name a folder of its own; {name:?} does not")) }
}

/// Where and with what a program runs that a site's launcher starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OnSite {
    /// The site's name (`at`).
    pub at: String,
    /// What the launcher is asked for.
    pub needs: Needs,
    /// Options passed to the launcher as they are, by their long names (`native`).
    pub native: BTreeMap<String, String>,
    /// Shell lines before the program, such as `module load` (`pre`).
    pub pre: Vec<String>,
    /// What is there before the program starts (`in`). What the client sends is captured when it is submitted: most of it
    /// goes into [`OnSite::staged`], and nothing of [`Scope::Client`] is left here.
    pub inputs: Vec<Input>,
    /// The manifest of what the client sent into the sandbox, with paths relative to that; see
    /// [`crate::objects::Manifest`].
    pub staged: Option<Digest>,
    /// The version of that manifest.
    #[serde(skip_serializing_if = "is_one")]
    pub staged_version: u32,
    /// What is kept when it has ended (`out`).
    pub outputs: Vec<Output>,
    /// The file whose JSON object becomes the process's values, relative to its sandbox (`values`).
    pub values: Option<String>,
}

/// What the launcher is asked for; what is `None` is left to its defaults. The time is [`super::Spec::time`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Needs {
    /// Nodes.
    pub nodes: Option<u32>,
    /// Tasks of a parallel program.
    pub ranks: Option<u32>,
    /// Cores for each rank.
    pub cpus: Option<u32>,
    /// Memory of each node in bytes.
    pub mem: Option<u64>,
    /// GPUs of each node.
    pub gpus: Option<u32>,
}

/// A line of `in`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Where it comes from. A folder stands for its content.
    pub from: Location,
    /// Where it goes: a file for a file; for a folder and an archive, the folder that takes in the content.
    pub to: Location,
    /// How it gets there.
    #[serde(default)]
    pub how: How,
    /// That it is missing is no failure.
    #[serde(default)]
    pub optional: bool,
}

/// A line of `out`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// What is kept: a file, a folder (with `/` at its end), or a [`glob`] of files, relative to the sandbox.
    pub from: String,
    /// Where it goes: the object store, or in a scope of the site a file for a file, and a folder for a folder or a glob.
    pub to: Location,
    /// How it gets to a scope of the site.
    #[serde(default)]
    pub how: How,
    /// After which ends.
    #[serde(default)]
    pub when: When,
    /// That nothing matches is no failure.
    #[serde(default)]
    pub optional: bool,
}

/// A path in a scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// What the path is relative to.
    pub scope: Scope,
    /// Relative, without `..` and `.`. A folder ends with `/`, and the scope's own folder is empty. For [`Scope::Store`] a
    /// digest, or empty for "under its own digest".
    pub path: String,
}

/// What a path is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The folder of the document, on the machine of whoever submits; captured then.
    Client,
    /// The sandbox of the try.
    Task,
    /// A folder of the site that all processes of a session share.
    Session,
    /// A folder of the site that everything there shares.
    Resource,
    /// The object store, by digest.
    Store,
}

/// How a file gets from one place to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// A link where the source is shared and does not change, else a copy.
    #[default]
    Auto,
    /// A copy of its own.
    Copy,
    /// A symbolic link.
    Link,
    /// The source is gone afterwards.
    Move,
    /// An archive (tar, also compressed by gzip) whose content is put into the folder.
    Unpack,
}

/// After which ends an output is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// After success.
    #[default]
    Ok,
    /// After a failure.
    Error,
    /// After both.
    Always,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_one(number: &u32) -> bool {
    *number == 1
}

impl Default for OnSite {
    fn default() -> Self {
        Self {
            at: String::new(),
            needs: Needs::default(),
            native: BTreeMap::new(),
            pre: Vec::new(),
            inputs: Vec::new(),
            staged: None,
            staged_version: 1,
            outputs: Vec::new(),
            values: None,
        }
    }
}

impl OnSite {
    /// Whether something is still to be captured from whoever submits it.
    pub fn needs_client(&self) -> bool {
        self.inputs.iter().any(|input| input.from.scope == Scope::Client)
    }
}

impl Output {
    /// Whether several files may be meant.
    pub fn is_glob(&self) -> bool {
        self.from.contains(['*', '?', '[', ']', '{', '}', '\\'])
    }
}

impl Location {
    /// Whether it is a folder: that of the scope, or one below it.
    pub fn is_folder(&self) -> bool {
        self.path.is_empty() || self.path.ends_with('/')
    }
}

/// The pattern of an output: `*` and `?` do not match `/`, `**` does, and `\` takes a sign's meaning away.
///
/// # Errors
/// What is wrong with it.
pub fn glob(pattern: &str) -> Result<globset::Glob, globset::Error> {
    globset::GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build()
}

impl Scope {
    /// Before `://` in documents.
    pub fn word(self) -> &'static str {
        match self {
            Scope::Client => "client",
            Scope::Task => "task",
            Scope::Session => "session",
            Scope::Resource => "resource",
            Scope::Store => "store",
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scope.word(), self.path)
    }
}
