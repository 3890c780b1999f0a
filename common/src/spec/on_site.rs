//! The part of a spec that only programs on a site have: the site, its resources, its files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The folder in each sandbox that is reserved for Baton: it has the program's streams and its result.
pub const RESERVED: &str = ".baton";

/// The folder below [`RESERVED`] for files of the client that are moved on to another scope. It keeps paths that are
/// not UTF-8, empty folders and executable bits.
pub const WAITING: &str = "in";

/// Options with which Baton could not find the job again, or would start no job or several.
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

/// Longest name of a launcher option.
const OPTION_BYTES_MAX: usize = 128;

/// Checks that a launcher option, by its long name, is allowed in `native`.
///
/// # Errors
/// The reason why not.
pub fn check_option(name: &str) -> Result<(), String> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if name.is_empty() || name.len() > OPTION_BYTES_MAX || !is_plain || name.starts_with('-') {
        return Err("must be the long name of an option without `--`, such as `account`".to_owned());
    }
    // Launchers accept an unambiguous prefix of an option's name. The only one of a single letter is `j` for
    // `job-name`.
    let is_short_for = |option: &str| option.starts_with(name) && (name.len() > 1 || name == "j");
    if let Some(option) = OPTIONS_OF_BATON.iter().find(|option| is_short_for(option)) {
        return Err(format!("is not allowed in `native`: Baton sets or forbids `{option}`"));
    }
    Ok(())
}

/// Checks the value of a launcher option.
///
/// # Errors
/// The reason why it is invalid.
pub fn check_option_value(value: &str) -> Result<(), String> {
    if value.chars().any(char::is_control) {
        return Err("must be one line without control characters".to_owned());
    }
    Ok(())
}

/// Checks that the name of a session is a valid folder name at a site.
///
/// # Errors
/// The reason why not.
pub fn check_session(name: &str) -> Result<(), String> {
    let is_folder = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if is_folder { Ok(()) } else { Err(format!("must be a valid folder name; {name:?} is not")) }
}

/// The site, resources and files of a program that a site's launcher starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OnSite {
    /// The site's name (`at`).
    pub at: String,
    /// The resources to request from the launcher (`needs`).
    pub needs: Needs,
    /// Launcher options by their long names, passed unchanged (`native`).
    pub native: BTreeMap<String, String>,
    /// Shell lines that run before the program, such as `module load` (`pre`).
    pub pre: Vec<String>,
    /// The files to stage in before the program starts (`in`). The client's files are captured at submission: most go
    /// into [`OnSite::staged`], and no [`Scope::Client`] remains here.
    pub inputs: Vec<Input>,
    /// The manifest of the client's files for the sandbox, with paths relative to the sandbox; see
    /// [`crate::objects::Manifest`].
    pub staged: Option<Digest>,
    /// The version of that manifest.
    #[serde(skip_serializing_if = "is_one")]
    pub staged_version: u32,
    /// The files to keep when the program has ended (`out`).
    pub outputs: Vec<Output>,
    /// The file with the JSON object that becomes the values of the process, relative to its sandbox (`values`).
    pub values: Option<String>,
}

/// The resources to request from the launcher; `None` is the launcher's default. The time limit is
/// [`super::Spec::time`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Needs {
    /// Number of nodes.
    pub nodes: Option<u32>,
    /// Number of tasks of a parallel program.
    pub ranks: Option<u32>,
    /// Cores per rank.
    pub cpus: Option<u32>,
    /// Memory per node in bytes.
    pub mem: Option<u64>,
    /// GPUs per node.
    pub gpus: Option<u32>,
}

/// An entry of `in`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The source. A folder stands for its content.
    pub from: Location,
    /// The target: a file for a file; for a folder or an archive, the folder for its content.
    pub to: Location,
    /// The method of the transfer.
    #[serde(default)]
    pub how: How,
    /// Whether the source may be missing.
    #[serde(default)]
    pub optional: bool,
}

/// An entry of `out`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The source: a file, a folder (with a trailing `/`), or a [`glob`] of files, relative to the sandbox.
    pub from: String,
    /// The target: the object store; or in a scope of the site, a file for a file and a folder for a folder or a glob.
    pub to: Location,
    /// The method of the transfer to a scope of the site.
    #[serde(default)]
    pub how: How,
    /// The ends after which it is kept.
    #[serde(default)]
    pub when: When,
    /// Whether the source may be missing, or the glob match nothing.
    #[serde(default)]
    pub optional: bool,
}

/// A path in a scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// The scope that the path is relative to.
    pub scope: Scope,
    /// The path: relative, without `..` and `.`; with a trailing `/` for a folder, and empty for the scope's own
    /// folder. For [`Scope::Store`] a digest, or empty for a file that is stored under its own digest.
    pub path: String,
}

/// The folder or store that a path is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The folder of the document on the client's machine; captured at submission.
    Client,
    /// The sandbox of the try.
    Task,
    /// A folder of the site that the processes of a session share.
    Session,
    /// A folder of the site that all processes share.
    Resource,
    /// The object store, by digest.
    Store,
}

/// The method of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// A link if the source is shared and does not change, else a copy.
    #[default]
    Auto,
    /// A copy.
    Copy,
    /// A symbolic link.
    Link,
    /// A move, which removes the source.
    Move,
    /// Unpacks a tar archive, which may be compressed with gzip, into the folder.
    Unpack,
}

/// The ends after which an output is kept.
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

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
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
    /// Whether files of the client are still to be captured.
    pub fn needs_client(&self) -> bool {
        self.inputs.iter().any(|input| input.from.scope == Scope::Client)
    }
}

impl Output {
    /// Whether the source is a pattern.
    pub fn is_glob(&self) -> bool {
        self.from.contains(['*', '?', '[', ']', '{', '}', '\\'])
    }
}

impl Location {
    /// Whether the location is a folder: the scope's own or one below it.
    pub fn is_folder(&self) -> bool {
        self.path.is_empty() || self.path.ends_with('/')
    }
}

/// Parses the pattern of an output: `*` and `?` do not match `/`, `**` does, and `\` escapes the next character.
///
/// # Errors
/// The syntax error.
pub fn glob(pattern: &str) -> Result<globset::Glob, globset::Error> {
    globset::GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build()
}

impl Scope {
    /// The word before `://` in documents.
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
