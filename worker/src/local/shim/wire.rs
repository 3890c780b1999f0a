//! The messages between a worker and a shim: an order and requests go in, reports come out, one line each.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::local::user::Ids;

/// The program to run: the first line that a shim reads, as JSON. Not `Debug`, since it holds secrets.
#[derive(Clone, Serialize, Deserialize)]
pub struct Order {
    /// The program and its arguments; never empty.
    pub argv: Vec<String>,
    /// A script to be written before the program starts.
    pub script: Option<Script>,
    /// The user of the program; the worker's user if absent.
    pub user: Option<Ids>,
    /// The whole environment. Not in the arguments, since it may hold secrets.
    pub env: BTreeMap<String, String>,
    /// The program's working directory.
    pub cwd: PathBuf,
    /// The standard input of the program; empty if absent.
    pub stdin: Option<String>,
    /// The file for the program's standard output; truncated at the start.
    pub stdout: PathBuf,
    /// The file for the program's standard error; truncated at the start.
    pub stderr: PathBuf,
    /// The file for the [`Ended`]; it appears under this name only when it is complete.
    pub done: PathBuf,
    /// The time limit of the program.
    pub time_limit_ms: Option<u64>,
    /// The time between TERM and KILL.
    pub grace_ms: u64,
    /// The duration of a lease after a renewal.
    pub lease_ms: u64,
    /// The time of the last renewal, on CLOCK_BOOTTIME.
    pub leased_at_ms: u64,
    /// The program's limit of open files; the shim's if absent.
    pub open_files: Option<u64>,
}

/// A script and its path. The shim writes it, as the user who owns the folder.
#[derive(Clone, Serialize, Deserialize)]
pub struct Script {
    /// The path of the file.
    pub path: PathBuf,
    /// The content.
    pub text: String,
    /// Whether the file itself is executed, because its first line names an interpreter.
    pub is_executable: bool,
}

/// A request of the worker to a shim whose program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The lease was renewed at this time. The time is part of the request, so a renewal that waited in the pipe while
    /// the machine was frozen does not count as new.
    Renew {
        /// Milliseconds on CLOCK_BOOTTIME.
        leased_at_ms: u64,
    },
    /// Send TERM, and KILL after the grace.
    Term,
    /// Send KILL at once.
    Kill,
}

/// A report of a shim, as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The program has started.
    Started {
        /// Its process id.
        pid: u32,
    },
    /// The program and all its descendants have ended.
    Ended(Ended),
    /// The machine kept the shim from starting the program. Nothing was run.
    Failed {
        /// The error.
        message: String,
        /// The errno of the operating system, if there is one.
        errno: Option<i32>,
    },
}

/// How a program ended; also the content of `done.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The program's exit code, if it exited: 127 if it does not exist, 126 if it could not be executed.
    pub exit: Option<i32>,
    /// The signal that ended the program, if any.
    pub signal: Option<i32>,
    /// What made the program end.
    pub ended_by: EndedBy,
    /// Why the program could not be executed. Its standard error has the same text.
    pub not_started: Option<String>,
    /// The start time, in microseconds since 1970.
    pub started_at: i64,
    /// The end time, in microseconds since 1970.
    pub ended_at: i64,
    /// Processor time of the program and its descendants, in user mode.
    pub user_ms: u64,
    /// Processor time of the program and its descendants, in the kernel.
    pub system_ms: u64,
    /// The number of processes that survived KILL for half a minute: they hang in the kernel and end when it releases
    /// them, or they belong to another user.
    pub left_behind: u32,
}

impl Ended {
    /// Whether the program was ended for exceeding its time limit.
    pub fn timed_out(&self) -> bool {
        self.ended_by == EndedBy::TimeLimit
    }
}

/// What made a program end; the first cause counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// It exited by itself.
    Own,
    /// It exceeded its time limit.
    TimeLimit,
    /// The worker requested TERM.
    Term,
    /// The worker requested KILL.
    Kill,
    /// The worker's lease was not renewed.
    Lease,
    /// The worker closed its end of the pipe, or died.
    WorkerGone,
}

impl Request {
    /// The request as a line, with its line end.
    pub(crate) fn to_line(self) -> String {
        match self {
            Self::Renew { leased_at_ms } => format!("renew {leased_at_ms}\n"),
            Self::Term => "term\n".to_owned(),
            Self::Kill => "kill\n".to_owned(),
        }
    }

    /// Parses a line; `None` if it is not a request.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        match line.trim_end() {
            "term" => Some(Self::Term),
            "kill" => Some(Self::Kill),
            renewal => {
                let leased_at_ms = renewal.strip_prefix("renew ")?.parse().ok()?;
                Some(Self::Renew { leased_at_ms })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_round_trips() {
        for request in [Request::Renew { leased_at_ms: 12_345 }, Request::Term, Request::Kill] {
            assert_eq!(Request::from_line(&request.to_line()), Some(request));
        }
        for line in ["", "renew", "renew soon", "stop"] {
            assert_eq!(Request::from_line(line), None, "{line}");
        }
    }
}
