//! The errors of a transport.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::output::OUTPUT_MAX;

/// Why a transport failed. The texts contain no keys, passphrases or inputs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file of known hosts has the key of the host. A person has to verify it.
    #[error("the host key of {host} is not known: {fingerprint}; {remedy}")]
    UnknownHostKey {
        /// Its name in the file of known hosts.
        host: String,
        /// Its SHA-256, in OpenSSH's notation.
        fingerprint: String,
        /// The remedy.
        remedy: String,
    },
    /// The host presented another key than the known one: another machine may have answered.
    #[error("the host key of {host} has changed to {fingerprint}; {}, line {line}, has another one", .file.display())]
    HostKeyChanged {
        /// Its name in the file of known hosts.
        host: String,
        /// The fingerprint of the presented key.
        fingerprint: String,
        /// The file of known hosts.
        file: PathBuf,
        /// The line of the known key, from 1.
        line: usize,
    },
    /// The server rejected the credentials or lacks a needed service. It may pass: an account can be locked, or a server
    /// overloaded, for a while.
    #[error("{host} refuses: {reason}")]
    Refused {
        /// The machine.
        host: String,
        /// The credentials that were tried, or the missing service.
        reason: String,
    },
    /// No session could be opened.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// The machine.
        host: String,
        /// The message of the system or the server.
        reason: String,
    },
    /// The server opens no more channels on this session (`MaxSessions`).
    #[error("the server opens no further channel: {0}")]
    NoChannel(String),
    /// The session or the shell has ended, or is out of step. Whether the command ran is unknown.
    #[error("the connection is broken: {0}")]
    Broken(String),
    /// A time limit has passed. Whether the command ran is unknown.
    #[error("{what} took longer than {} s", .limit.as_secs())]
    TimedOut {
        /// The operation.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// The command failed.
    #[error("the command ended with {}{}", end_text(*.exit, .signal.as_deref()), stderr_text(.stderr))]
    Command {
        /// Its exit code, if it has one.
        exit: Option<i32>,
        /// The signal that ended it, without `SIG`.
        signal: Option<String>,
        /// Its standard error, shortened.
        stderr: String,
    },
    /// A file cannot be read or written, locally or at the site.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// The message of the system.
        reason: String,
        /// The errno, for a local file.
        errno: Option<i32>,
    },
    /// The command wrote more than fits in memory (16 MiB for each output).
    #[error("the command wrote more than {} MiB", OUTPUT_MAX >> 20)]
    TooMuchOutput,
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
}

impl Error {
    /// Whether the transport failed, not the operation. Worth retrying over a new session.
    pub fn is_of_transport(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::NoChannel(_) | Self::Broken(_) | Self::TimedOut { .. } => true,
            Self::UnknownHostKey { .. }
            | Self::HostKeyChanged { .. }
            | Self::Refused { .. }
            | Self::Command { .. }
            | Self::File { .. }
            | Self::TooMuchOutput
            | Self::Config(_) => false,
        }
    }

    /// Whether the cause may pass by itself: the transport failed, or the server refuses logins or commands.
    pub fn may_pass(&self) -> bool {
        self.is_of_transport() || matches!(self, Self::Refused { .. })
    }

    pub(super) fn file(path: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), reason: reason.to_string(), errno: None }
    }

    pub(super) fn local_file(path: &Path, error: &std::io::Error) -> Self {
        Self::File { path: path.display().to_string(), reason: error.to_string(), errno: error.raw_os_error() }
    }
}

pub(super) fn end_text(exit: Option<i32>, signal: Option<&str>) -> String {
    match (exit, signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "neither exit code nor signal".to_owned(),
    }
}

fn stderr_text(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}
