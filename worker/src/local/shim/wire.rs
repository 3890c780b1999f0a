//! What a worker and a shim say to each other: an order and requests go in, reports come out, one line each.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::local::user::Ids;

/// What to run, and how: the first line that a shim reads, as JSON. It cannot be printed by accident: it holds secrets.
#[derive(Clone, Serialize, Deserialize)]
pub struct Order {
    /// The program and its arguments; never empty.
    pub argv: Vec<String>,
    /// A script to be written before the program starts.
    pub script: Option<Script>,
    /// As whom everything is done; as whom the worker is, if absent.
    pub user: Option<Ids>,
    /// The whole environment. It travels here and not in arguments, because it may hold secrets.
    pub env: BTreeMap<String, String>,
    /// The program's working directory.
    pub cwd: PathBuf,
    /// What the program reads from its standard input; nothing if absent.
    pub stdin: Option<String>,
    /// Where the program's standard output goes; made empty at the start.
    pub stdout: PathBuf,
    /// Where the program's standard error goes; made empty at the start.
    pub stderr: PathBuf,
    /// Where the [`Ended`] is written at the end, under this name only once it is whole.
    pub done: PathBuf,
    /// How long the program may run.
    pub time_limit_ms: Option<u64>,
    /// How long the program has between TERM and KILL.
    pub grace_ms: u64,
    /// How long a lease lasts after a renewal.
    pub lease_ms: u64,
    /// When the lease was renewed last, on CLOCK_BOOTTIME.
    pub leased_at_ms: u64,
    /// How many files the program may have open; as many as the shim if absent.
    pub open_files: Option<u64>,
}

/// A script, and where it goes. The shim writes it: as the user whose folder that is.
#[derive(Clone, Serialize, Deserialize)]
pub struct Script {
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub text: String,
    /// Whether it is executed itself, as its first line names an interpreter.
    pub is_executable: bool,
}

/// What a worker asks of a shim whose program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The lease was renewed at this time on CLOCK_BOOTTIME. The time travels with it, so that a renewal that lay in the
    /// pipe while the machine was frozen does not count as a new one.
    Renew {
        /// Milliseconds on CLOCK_BOOTTIME.
        leased_at_ms: u64,
    },
    /// TERM, and after the grace KILL.
    Term,
    /// KILL at once.
    Kill,
}

/// What a shim says, as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The program has a process of its own.
    Started {
        /// The id of that process.
        pid: u32,
    },
    /// The program has ended, and nothing of it is left.
    Ended(Ended),
    /// The shim could not start the program, for a reason that lies in the machine. Nothing was run.
    Failed {
        /// What went wrong.
        message: String,
        /// The operating system's number for it, if it has one.
        errno: Option<i32>,
    },
}

/// How a program ended; also what `done.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The program's exit code, if it exited: 127 if there is no such program, 126 if it could not be executed.
    pub exit: Option<i32>,
    /// The signal that ended the program, if one did.
    pub signal: Option<i32>,
    /// What made it end.
    pub ended_by: EndedBy,
    /// Why the program could not be executed at all. The same sentence stands on its standard error.
    pub not_started: Option<String>,
    /// When it started, in microseconds since 1970.
    pub started_at: i64,
    /// When it ended, in microseconds since 1970.
    pub ended_at: i64,
    /// Processor time of the program and of all that it started, in user mode.
    pub user_ms: u64,
    /// Processor time of the program and of all that it started, in the kernel.
    pub system_ms: u64,
    /// How many processes were still there although they had been sent KILL for half a minute: they hang in the kernel,
    /// and will end when it lets them go, or they belong to another user.
    pub left_behind: u32,
}

impl Ended {
    /// Whether the program was ended because it had used up its time.
    pub fn timed_out(&self) -> bool {
        self.ended_by == EndedBy::TimeLimit
    }
}

/// What made a program end: the first of these that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// It ended by itself.
    Own,
    /// It had used up its time.
    TimeLimit,
    /// The worker asked for TERM.
    Term,
    /// The worker asked for KILL.
    Kill,
    /// Nobody renewed the worker's lease.
    Lease,
    /// The worker closed its end of the pipe, or died.
    WorkerGone,
}

impl Request {
    /// The request as the line that stands for it, with its end.
    pub(crate) fn to_line(self) -> String {
        match self {
            Self::Renew { leased_at_ms } => format!("renew {leased_at_ms}\n"),
            Self::Term => "term\n".to_owned(),
            Self::Kill => "kill\n".to_owned(),
        }
    }

    /// Reads a line; `None` if it is no request.
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
    fn every_request_is_read_as_it_was_written() {
        for request in [Request::Renew { leased_at_ms: 12_345 }, Request::Term, Request::Kill] {
            assert_eq!(Request::from_line(&request.to_line()), Some(request));
        }
        for line in ["", "renew", "renew soon", "stop"] {
            assert_eq!(Request::from_line(line), None, "{line}");
        }
    }
}
