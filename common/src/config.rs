//! The configuration file: `baton.toml`.
//!
//! A flag wins over an environment variable, that over the file, that over the default. `deploy/config/baton.toml`
//! shows every option with its meaning.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::duration;
use crate::spec::on_site;

/// Where a configuration is looked for when nobody names one, in this order.
const PLACES: [&str; 3] = ["baton.toml", "~/.config/baton/baton.toml", "/etc/baton/baton.toml"];

/// What a configuration file says. Everything may be absent.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// RabbitMQ.
    pub broker: Broker,
    /// PostgreSQL, or SQLite.
    pub database: Database,
    /// Workers only.
    pub worker: Worker,
    /// Where the files of processes are kept.
    pub objects: Objects,
    /// Where programs run other than on the workers' own machines, by name.
    pub sites: BTreeMap<String, Site>,
    /// How to reach the machines of sites, by name.
    pub ssh: BTreeMap<String, Ssh>,
}

/// How to reach RabbitMQ.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Broker {
    /// `amqp://` or `amqps://` URLs of one cluster, tried in turn.
    #[serde(deserialize_with = "one_or_many")]
    pub url: Vec<String>,
    /// A file that holds the URL, so that its password stands in no other place.
    pub url_file: Option<PathBuf>,
}

/// How to reach the database.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://…` or `sqlite:PATH`.
    pub url: Option<String>,
    /// A file that holds the URL.
    pub url_file: Option<PathBuf>,
}

// Written by hand, so that no password gets into a log by `{:?}`.
impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Broker").field("urls", &self.url.len()).field("url_file", &self.url_file).finish()
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("url", &self.url.is_some()).field("url_file", &self.url_file).finish()
    }
}

/// How a worker works.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Worker {
    /// Its label; the host's name if absent.
    pub name: Option<String>,
    /// The queues that it serves.
    pub queues: Option<Vec<String>>,
    /// How many processes it holds at a time.
    pub slots: Option<u32>,
    /// How many threads advance them; as many as there are cores if absent.
    pub threads: Option<usize>,
    /// How many connections to the database it has at most; at least 4.
    pub database_connections: Option<u32>,
    /// Where sandboxes are made.
    pub root: Option<PathBuf>,
    /// As whom local programs run.
    pub user: Option<String>,
    /// How long an advance may go on when the worker stops, and how long a program has between TERM and KILL.
    #[serde(with = "duration::optional_text")]
    pub grace: Option<Duration>,
    /// Advances that a process may make in all.
    pub advances_max: Option<u64>,
    /// Advances in a row that change nothing.
    pub idle_advances_max: Option<u64>,
}

/// Where files are kept by their SHA-256.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// A folder, or `s3://BUCKET/PREFIX`; controllers and workers need the same.
    pub url: Option<String>,
    /// The S3 server, such as `https://s3.example.org`; that of AWS if absent.
    pub endpoint: Option<String>,
    /// Its region.
    pub region: Option<String>,
}

/// A place to run programs: a transport and a launcher.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// How commands and files get there.
    pub transport: Transport,
    /// What starts programs there.
    pub launcher: Launcher,
    /// The folder there below which everything of Baton is; absolute, or relative to the home folder.
    #[serde(deserialize_with = "site_root")]
    pub root: String,
    /// Pause between two looks at the jobs.
    #[serde(with = "duration::text", default = "poll_default")]
    pub poll: Duration,
    /// How long one submission may take.
    #[serde(with = "duration::text", default = "submit_timeout_default")]
    pub submit_timeout: Duration,
    /// For how long a job is looked for whose submission was not answered.
    #[serde(with = "duration::text", default = "settle_default")]
    pub settle: Duration,
    /// Shell lines before every program, such as `module load`.
    #[serde(default)]
    pub pre: Vec<String>,
    /// The shell that runs these lines and then the program, in words: a POSIX shell, with options.
    #[serde(default = "shell_default", deserialize_with = "shell")]
    pub shell: Vec<String>,
    /// Options of every job, by their long names.
    #[serde(default, deserialize_with = "native")]
    pub native: BTreeMap<String, String>,
    /// What the whole fleet keeps to.
    #[serde(default)]
    pub limits: SiteLimits,
    /// The folder of inputs that many processes share.
    #[serde(default)]
    pub cache: Cache,
}

impl Site {
    /// The root for commands and files there, all of which begin at the home folder.
    pub fn root_from_home(&self) -> &str {
        let root = self.root.strip_prefix("~/").unwrap_or(&self.root).trim_end_matches('/');
        match root {
            "" if self.root.starts_with('/') => "/",
            "" => ".",
            root => root,
        }
    }
}

/// How commands and files get to a site.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// It is the worker's own machine.
    Local,
    /// By SSH, as the section of this name says.
    Ssh(String),
}

/// What starts programs at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launcher {
    /// A program of its own on that machine.
    Fork,
    /// Slurm.
    Slurm,
}

/// What the whole fleet keeps to at a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteLimits {
    /// Most jobs there at a time, waiting or running.
    pub queued: Option<u32>,
    /// Most jobs that may run at a time. Nobody but the scheduler knows which it starts, so no more than these are there.
    pub running: Option<u32>,
    /// Most submissions in a minute.
    pub submit_per_min: Option<u32>,
}

/// What the folder of shared inputs may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Most bytes; the longest unused go first, and none that a process uses.
    pub max_bytes: u64,
    /// What nobody has used for so long goes.
    #[serde(with = "duration::text")]
    pub max_age: Duration,
}

impl Default for Cache {
    fn default() -> Self {
        Self { max_bytes: 100 << 30, max_age: Duration::from_secs(30 * 86_400) }
    }
}

/// How to reach a machine by SSH. What is absent is what `~/.ssh/config` says of the host.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// Its name or address, or its alias in `~/.ssh/config`.
    pub host: String,
    /// Its port.
    pub port: Option<u16>,
    /// The user there.
    pub user: Option<String>,
    /// The file of a private key; the agent and the usual files if absent.
    pub key: Option<PathBuf>,
    /// The file that names the keys of hosts; the usual ones if absent.
    pub known_hosts: Option<PathBuf>,
    /// The configuration of OpenSSH to read; the usual one if absent.
    pub config: Option<PathBuf>,
    /// Machines on the way, `USER@HOST:PORT`, separated by commas, or `none`; if absent, what the configuration of OpenSSH
    /// says, be it `ProxyJump` or `ProxyCommand`.
    pub jump: Option<String>,
    /// Most sessions of the whole fleet.
    #[serde(default = "max_connections_default")]
    pub max_connections: u32,
    /// Most channels of one session; less where the server allows less.
    #[serde(default = "channels_default")]
    pub channels: u32,
    /// No two sessions of the whole fleet are opened within this time.
    #[serde(with = "duration::text", default = "min_reconnect_default")]
    pub min_reconnect: Duration,
    /// A session that nobody uses for so long is closed.
    #[serde(with = "duration::text", default = "idle_close_default")]
    pub idle_close: Duration,
    /// A session that is older than this takes nothing new, as soon as another can be opened, and is closed.
    #[serde(with = "duration::text", default = "max_age_default")]
    pub max_age: Duration,
    /// A session that is silent for so long is asked whether it lives.
    #[serde(with = "duration::text", default = "keepalive_default")]
    pub keepalive: Duration,
}

fn poll_default() -> Duration {
    Duration::from_secs(30)
}

fn submit_timeout_default() -> Duration {
    Duration::from_secs(30)
}

fn shell_default() -> Vec<String> {
    vec!["/bin/sh".to_owned()]
}

fn shell<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words: Vec<String> = String::deserialize(deserializer)?.split_whitespace().map(str::to_owned).collect();
    if words.first().is_none_or(|program| program.starts_with('-')) {
        return Err(serde::de::Error::custom("`shell` must name a program, such as \"/bin/bash -l\""));
    }
    Ok(words)
}

fn site_root<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let root = String::deserialize(deserializer)?;
    if root.contains('\0') {
        return Err(serde::de::Error::custom("`root` has a NUL byte, which no path can have"));
    }
    check_literal(Path::new(&root)).map_err(|problem| serde::de::Error::custom(format!("`root` {problem}")))?;
    Ok(root)
}

/// Whether a path can be taken as it is. No shell reads a configuration, so what only a shell expands would become the name of a
/// folder.
fn check_literal(path: &Path) -> Result<(), String> {
    let text = path.to_string_lossy();
    let first = text.split('/').next().unwrap_or_default();
    let rest = text.split_once('/').map_or("", |(_, rest)| rest);
    if first.starts_with('$') {
        return Err(format!("is `{text}`: variables are not expanded; write `~/{rest}`, or the whole path"));
    }
    if first.starts_with('~') && first != "~" {
        return Err(format!("is `{text}`: only `~/` stands for a home folder; write the whole path"));
    }
    Ok(())
}

/// A path of a configuration, in which `~/` stands for the home folder of this user.
///
/// # Errors
/// What is wrong with it, to be read after the name of the option.
pub fn from_home(path: &Path) -> Result<PathBuf, String> {
    check_literal(path)?;
    match path.strip_prefix("~") {
        Ok(rest) => {
            let home = std::env::home_dir().ok_or("begins with `~/`, and no home folder is known: set HOME")?;
            Ok(home.join(rest))
        }
        Err(_) => Ok(path.to_owned()),
    }
}

fn native<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let native = BTreeMap::<String, String>::deserialize(deserializer)?;
    for (name, value) in &native {
        on_site::check_option(name)
            .and_then(|()| on_site::check_option_value(value))
            .map_err(|problem| serde::de::Error::custom(format!("`{name}` {problem}")))?;
    }
    Ok(native)
}

fn settle_default() -> Duration {
    Duration::from_secs(60)
}

fn max_connections_default() -> u32 {
    2
}

// MaxSessions of OpenSSH's server is 10 unless somebody has set it.
fn channels_default() -> u32 {
    8
}

fn min_reconnect_default() -> Duration {
    Duration::from_secs(5)
}

fn idle_close_default() -> Duration {
    Duration::from_secs(300)
}

fn max_age_default() -> Duration {
    Duration::from_secs(1800)
}

fn keepalive_default() -> Duration {
    Duration::from_secs(30)
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that was named, or one that holds a secret, cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not TOML, or has a key that nobody knows.
    #[error("{}: {reason}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and on which line.
        reason: String,
    },
}

impl Config {
    /// Reads the file that was named, or else the first that exists of the usual ones, or else nothing.
    ///
    /// # Errors
    /// See [`Error`]. That there is no file is an error only if one was named.
    pub fn load(named: Option<&Path>) -> Result<Self, Error> {
        if let Some(path) = named {
            let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
            return Self::parse(path, &text);
        }
        for place in PLACES {
            let path = match (place.strip_prefix("~/"), std::env::home_dir()) {
                (Some(rest), Some(home)) => home.join(rest),
                (Some(_), None) => continue,
                (None, _) => PathBuf::from(place),
            };
            match std::fs::read_to_string(&path) {
                Ok(text) => return Self::parse(&path, &text),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::Read { path, source }),
            }
        }
        Ok(Self::default())
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        toml::from_str(text).map_err(|error| {
            // The parser's own text quotes the line, which may hold a password.
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            Error::Content { path: path.to_owned(), reason: format!("{place}{}", error.message()) }
        })
    }

    /// The broker's URLs; empty when none is configured.
    ///
    /// # Errors
    /// [`Error::Read`] when `url_file` cannot be read.
    pub fn broker_urls(&self) -> Result<Vec<String>, Error> {
        match &self.broker.url_file {
            Some(path) if self.broker.url.is_empty() => Ok(split_urls(&read_secret(path)?)),
            Some(_) | None => Ok(self.broker.url.clone()),
        }
    }

    /// The database's URL.
    ///
    /// # Errors
    /// [`Error::Read`] when `url_file` cannot be read.
    pub fn database_url(&self) -> Result<Option<String>, Error> {
        match (&self.database.url, &self.database.url_file) {
            (None, Some(path)) => Ok(Some(read_secret(path)?)),
            (url, _) => Ok(url.clone()),
        }
    }
}

/// Several URLs in one text, separated by commas or white space. A comma that no URL follows is part of one, since a
/// password may have commas.
pub fn split_urls(text: &str) -> Vec<String> {
    let mut urls: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        for (idx, part) in word.split(',').enumerate() {
            match urls.last_mut() {
                Some(url) if idx > 0 && !part.is_empty() && !part.starts_with("amqp") => {
                    url.push(',');
                    url.push_str(part);
                }
                Some(_) | None if part.is_empty() => {}
                Some(_) | None => urls.push(part.to_owned()),
            }
        }
    }
    urls
}

/// A file's content without the line end that editors add.
///
/// # Errors
/// [`Error::Read`].
pub fn read_secret(path: &Path) -> Result<String, Error> {
    let place = || path.to_owned();
    let path = from_home(path).map_err(|problem| Error::Content { path: place(), reason: problem })?;
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
    Ok(text.trim().to_owned())
}

/// A string, or a list of strings.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct OneOrMany;

    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a URL or a list of URLs")
        }

        fn visit_str<E>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(split_urls(text))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
            let mut urls = Vec::new();
            while let Some(url) = list.next_element()? {
                urls.push(url);
            }
            Ok(urls)
        }
    }

    deserializer.deserialize_any(OneOrMany)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(Path::new("baton.toml"), text)
    }

    #[test]
    fn a_path_that_only_a_shell_would_expand_is_refused() {
        for path in ["$HOME/x", "${HOME}/x", "~ann/x"] {
            assert!(from_home(Path::new(path)).unwrap_err().contains("write"), "{path}");
            let site = format!("[sites.a]\ntransport = 'local'\nlauncher = 'fork'\nroot = '{path}'");
            assert!(Config::parse(Path::new("baton.toml"), &site).unwrap_err().to_string().contains(path), "{path}");
        }
        assert_eq!(from_home(Path::new("/a/$b/~")).unwrap(), Path::new("/a/$b/~"));
        let home = std::env::home_dir().unwrap();
        assert_eq!(from_home(Path::new("~/x")).unwrap(), home.join("x"));
    }

    #[test]
    fn one_url_or_several() {
        assert_eq!(parse("broker.url = 'amqp://a'").unwrap().broker.url, ["amqp://a"]);
        for text in ["['amqp://a', 'amqp://b']", "'amqp://a,amqp://b'", "'amqp://a, amqp://b,'", "'amqp://a\tamqp://b'"]
        {
            assert_eq!(parse(&format!("broker.url = {text}")).unwrap().broker.url, ["amqp://a", "amqp://b"], "{text}");
        }
        assert_eq!(split_urls("amqp://u:a,b@h,amqps://c"), ["amqp://u:a,b@h", "amqps://c"]);
    }

    #[test]
    fn errors_name_file_line_and_key_and_no_password() {
        let error = parse("[broker]\nurl = 'amqp://u:secret@h'\nurls = 'amqp://u:secret@h'").unwrap_err().to_string();
        assert!(error.contains("baton.toml: line 3") && error.contains("urls"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn the_documented_configuration_is_valid_and_whole() {
        let text = include_str!("../../deploy/config/baton.toml");
        // Every option stands there as a comment; with the comment signs gone it must parse and leave nothing out.
        let all: String =
            text.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).map(|line| format!("{line}\n")).collect();
        let config = parse(&all).unwrap();
        assert!(!config.broker.url.is_empty() && config.broker.url_file.is_some());
        assert!(config.database.url.is_some() && config.database.url_file.is_some());
        let Worker {
            name,
            queues,
            slots,
            threads,
            root,
            user,
            grace,
            database_connections,
            advances_max,
            idle_advances_max,
        } = config.worker;
        assert!(database_connections.is_some());
        assert!(name.is_some() && queues.is_some() && slots.is_some() && threads.is_some() && root.is_some());
        assert!(user.is_some() && grace.is_some() && advances_max.is_some() && idle_advances_max.is_some());
        assert_eq!(parse(text).unwrap(), Config::default());
    }

    #[test]
    fn an_option_of_every_job_is_one_line_and_not_one_of_batons() {
        let site = |native: &str| {
            parse(&format!("sites.a = {{transport = 'local', launcher = 'slurm', root = '/r', native = {{{native}}}}}"))
        };
        site("account = 'a b'").unwrap();
        for wrong in ["comment = \"a\\ntouch x\"", "\"a b\" = 'x'", "job-n = 'x'", "array = '1-3'", "\"\" = 'x'"] {
            assert!(matches!(site(wrong), Err(Error::Content { .. })), "{wrong}");
        }
    }
}
