//! The configuration file: `baton.toml`.
//!
//! A flag overrides an environment variable, which overrides the file, which overrides the default.
//! `deploy/config/baton.toml` documents every option.

mod path;
mod site;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::duration;

pub use path::from_home;
pub use site::{Cache, Launcher, Site, SiteLimits, Ssh, Transport};

/// The default locations of the configuration file. The first file that exists is read.
const LOCATIONS: [&str; 3] = ["baton.toml", "~/.config/baton/baton.toml", "/etc/baton/baton.toml"];

/// The content of a configuration file. Every option may be absent.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The broker: RabbitMQ.
    pub broker: Broker,
    /// The database: PostgreSQL or SQLite.
    pub database: Database,
    /// Options of workers.
    pub worker: Worker,
    /// The object store, with the files of processes.
    pub objects: Objects,
    /// The sites by name.
    pub sites: BTreeMap<String, Site>,
    /// The SSH connections to sites by name.
    pub ssh: BTreeMap<String, Ssh>,
}

/// How to reach RabbitMQ.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Broker {
    /// `amqp://` or `amqps://` URLs of the nodes of one cluster, tried in turn.
    #[serde(deserialize_with = "one_or_many")]
    pub url: Vec<String>,
    /// A file that contains the URL, to keep the password out of the configuration.
    pub url_file: Option<PathBuf>,
}

/// How to reach the database.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://…` or `sqlite:PATH`.
    pub url: Option<String>,
    /// A file that contains the URL.
    pub url_file: Option<PathBuf>,
}

// Written by hand to keep passwords out of logs.
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

/// Options of a worker.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Worker {
    /// The worker's name. Default: the host name.
    pub name: Option<String>,
    /// The queues that the worker serves.
    pub queues: Option<Vec<String>>,
    /// Most processes that the worker holds at a time.
    pub slots: Option<u32>,
    /// Number of threads that advance processes. Default: the number of cores.
    pub threads: Option<usize>,
    /// Most connections to the database; at least 4.
    pub database_connections: Option<u32>,
    /// The folder of the sandboxes.
    pub root: Option<PathBuf>,
    /// The user that local programs run as.
    pub user: Option<String>,
    /// How long a stopping worker waits for an advance, and for a program between SIGTERM and SIGKILL.
    #[serde(with = "duration::optional_text")]
    pub grace: Option<Duration>,
    /// Most advances of a process.
    pub advances_max: Option<u64>,
    /// Most consecutive advances that change nothing.
    pub idle_advances_max: Option<u64>,
}

/// The object store.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// A folder, or `s3://BUCKET/PREFIX`. All controllers and workers must use the same store.
    pub url: Option<String>,
    /// The S3 server, such as `https://s3.example.org`. Default: AWS.
    pub endpoint: Option<String>,
    /// The region of the S3 server.
    pub region: Option<String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file, or a file with a URL, cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a wrong value.
    #[error("{}: {reason}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The problem, with its line.
        reason: String,
    },
}

impl Config {
    /// Reads the named file, or else the first default location that exists. Without a file, every option is absent.
    ///
    /// # Errors
    /// See [`Error`]. An absent file is an error only if it was named.
    pub fn load(named: Option<&Path>) -> Result<Self, Error> {
        if let Some(path) = named {
            let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
            return Self::parse(path, &text);
        }
        for location in LOCATIONS {
            let path = match (location.strip_prefix("~/"), std::env::home_dir()) {
                (Some(rest), Some(home)) => home.join(rest),
                (Some(_), None) => continue,
                (None, _) => PathBuf::from(location),
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
            // The parser's own text quotes the line, which may contain a password.
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            let location = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            Error::Content { path: path.to_owned(), reason: format!("{location}{}", error.message()) }
        })
    }

    /// The broker's URLs; empty if none is configured.
    ///
    /// # Errors
    /// [`Error::Read`] if `url_file` cannot be read.
    pub fn broker_urls(&self) -> Result<Vec<String>, Error> {
        match &self.broker.url_file {
            Some(path) if self.broker.url.is_empty() => Ok(split_urls(&read_secret(path)?)),
            Some(_) | None => Ok(self.broker.url.clone()),
        }
    }

    /// The database's URL.
    ///
    /// # Errors
    /// [`Error::Read`] if `url_file` cannot be read.
    pub fn database_url(&self) -> Result<Option<String>, Error> {
        match (&self.database.url, &self.database.url_file) {
            (None, Some(path)) => Ok(Some(read_secret(path)?)),
            (url, _) => Ok(url.clone()),
        }
    }
}

/// Splits a text into URLs at commas and white space. A comma without a URL after it belongs to the URL, since a
/// password may contain commas.
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

/// Reads a file without white space at its start and end, such as the line break that editors add.
///
/// # Errors
/// [`Error::Read`].
pub fn read_secret(path: &Path) -> Result<String, Error> {
    let named = || path.to_owned();
    let path = from_home(path).map_err(|problem| Error::Content { path: named(), reason: problem })?;
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
    Ok(text.trim().to_owned())
}

/// Reads a text with URLs, or a list of URLs.
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
    fn a_path_that_only_a_shell_expands_is_rejected() {
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
    fn urls_are_a_text_or_a_list() {
        assert_eq!(parse("broker.url = 'amqp://a'").unwrap().broker.url, ["amqp://a"]);
        for text in ["['amqp://a', 'amqp://b']", "'amqp://a,amqp://b'", "'amqp://a, amqp://b,'", "'amqp://a\tamqp://b'"]
        {
            assert_eq!(parse(&format!("broker.url = {text}")).unwrap().broker.url, ["amqp://a", "amqp://b"], "{text}");
        }
        assert_eq!(split_urls("amqp://u:a,b@h,amqps://c"), ["amqp://u:a,b@h", "amqps://c"]);
    }

    #[test]
    fn an_error_names_the_file_line_and_key_but_no_password() {
        let error = parse("[broker]\nurl = 'amqp://u:secret@h'\nurls = 'amqp://u:secret@h'").unwrap_err().to_string();
        assert!(error.contains("baton.toml: line 3") && error.contains("urls"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn the_documented_configuration_is_valid_and_complete() {
        let text = include_str!("../../deploy/config/baton.toml");
        // The file has every option as a comment. Without the comment signs it must parse and set every option.
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
    fn a_native_option_is_one_line_and_is_not_set_by_baton() {
        let site = |native: &str| {
            parse(&format!("sites.a = {{transport = 'local', launcher = 'slurm', root = '/r', native = {{{native}}}}}"))
        };
        site("account = 'a b'").unwrap();
        for wrong in ["comment = \"a\\ntouch x\"", "\"a b\" = 'x'", "job-n = 'x'", "array = '1-3'", "\"\" = 'x'"] {
            assert!(matches!(site(wrong), Err(Error::Content { .. })), "{wrong}");
        }
    }
}
