//! The configuration of sites, and of the SSH connections to them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::path;
use crate::duration;
use crate::spec::on_site;

/// A site, where programs run: its transport and launcher.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// How commands and files get to the site.
    pub transport: Transport,
    /// What starts programs at the site.
    pub launcher: Launcher,
    /// Baton's folder at the site; absolute, or relative to the home folder.
    #[serde(deserialize_with = "site_root")]
    pub root: String,
    /// Interval between two queries of the jobs' states.
    #[serde(with = "duration::text", default = "poll_default")]
    pub poll: Duration,
    /// Time limit of one submission.
    #[serde(with = "duration::text", default = "submit_timeout_default")]
    pub submit_timeout: Duration,
    /// How long to look for a job whose submission was not answered.
    #[serde(with = "duration::text", default = "settle_default")]
    pub settle: Duration,
    /// Shell lines that run before every program, such as `module load`.
    #[serde(default)]
    pub pre: Vec<String>,
    /// The POSIX shell that runs these lines and the program, with its options.
    #[serde(default = "shell_default", deserialize_with = "shell")]
    pub shell: Vec<String>,
    /// Launcher options for every job, by their long names.
    #[serde(default, deserialize_with = "native")]
    pub native: BTreeMap<String, String>,
    /// The limits for the whole fleet.
    #[serde(default)]
    pub limits: SiteLimits,
    /// The cache of inputs that processes share.
    #[serde(default)]
    pub cache: Cache,
}

impl Site {
    /// The root as commands and file transfers need it, relative to the home folder.
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
    /// The site is the worker's own machine.
    Local,
    /// SSH, as configured in the `ssh` section of this name.
    Ssh(String),
}

/// What starts programs at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launcher {
    /// Baton itself, as a child process on that machine.
    Fork,
    /// Slurm.
    Slurm,
}

/// Limits of the whole fleet at a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteLimits {
    /// Most queued and running jobs at a time.
    pub queued: Option<u32>,
    /// Most running jobs at a time. Only the scheduler knows which job starts next, so this also limits the queued
    /// ones.
    pub running: Option<u32>,
    /// Most submissions per minute.
    pub submit_per_min: Option<u32>,
}

/// Limits of the cache of shared inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Most bytes. The least recently used inputs are removed first; inputs that a process uses are kept.
    pub max_bytes: u64,
    /// Inputs that are unused for this long are removed.
    #[serde(with = "duration::text")]
    pub max_age: Duration,
}

impl Default for Cache {
    fn default() -> Self {
        Self { max_bytes: 100 << 30, max_age: Duration::from_secs(30 * 86_400) }
    }
}

/// How to reach a machine by SSH. An absent option takes its value from `~/.ssh/config`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// The host name, address or alias in `~/.ssh/config`.
    pub host: String,
    /// The port.
    pub port: Option<u16>,
    /// The remote user.
    pub user: Option<String>,
    /// The private key file. Default: the agent and the default files.
    pub key: Option<PathBuf>,
    /// The known hosts file. Default: the default files.
    pub known_hosts: Option<PathBuf>,
    /// The OpenSSH configuration file. Default: the user's.
    pub config: Option<PathBuf>,
    /// Jump hosts, `USER@HOST:PORT`, separated by commas, or `none`. Default: `ProxyJump` or `ProxyCommand` of the
    /// OpenSSH configuration.
    pub jump: Option<String>,
    /// Most sessions of the whole fleet.
    #[serde(default = "max_connections_default")]
    pub max_connections: u32,
    /// Most channels of one session; fewer if the server allows fewer.
    #[serde(default = "channels_default")]
    pub channels: u32,
    /// Shortest interval between the openings of two sessions of the whole fleet.
    #[serde(with = "duration::text", default = "min_reconnect_default")]
    pub min_reconnect: Duration,
    /// A session is closed after this idle time.
    #[serde(with = "duration::text", default = "idle_close_default")]
    pub idle_close: Duration,
    /// A session of this age takes no new channels once another can be opened, and is closed.
    #[serde(with = "duration::text", default = "max_age_default")]
    pub max_age: Duration,
    /// A keepalive is sent after this time without data from the server.
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

fn shell<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words: Vec<String> = String::deserialize(deserializer)?.split_whitespace().map(str::to_owned).collect();
    if words.first().is_none_or(|program| program.starts_with('-')) {
        return Err(serde::de::Error::custom("`shell` must name a program, such as \"/bin/bash -l\""));
    }
    Ok(words)
}

fn site_root<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let root = String::deserialize(deserializer)?;
    if root.contains('\0') {
        return Err(serde::de::Error::custom("`root` must not contain a NUL byte"));
    }
    path::check_literal(Path::new(&root)).map_err(|problem| serde::de::Error::custom(format!("`root` {problem}")))?;
    Ok(root)
}

fn native<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
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

// The default of `MaxSessions` in OpenSSH's server is 10.
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
