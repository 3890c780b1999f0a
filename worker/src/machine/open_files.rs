//! How many files may be open at once. A worker has several for each program that it runs; the usual limit of 1,024 is for
//! programs that have few, and those that still call `select` break beyond it. So a worker raises its own limit as far as it
//! may, and what it starts has the one that the worker was started with.

use std::fs::File;
use std::sync::OnceLock;

use rustix::io;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit before it was raised, if there was one.
static BEFORE: OnceLock<Option<u64>> = OnceLock::new();

/// Raises the soft limit of this program to the hard one. The first call counts.
pub(crate) fn raise() {
    BEFORE.get_or_init(|| {
        let limit = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
            tracing::debug!(%error, "the limit of open files stays as it is");
        }
        limit.current
    });
}

/// Whether so many more files can be opened.
///
/// # Errors
/// What the system says, with the limit and the remedy.
pub(crate) fn check(count: usize) -> std::io::Result<()> {
    let opened: std::io::Result<Vec<File>> = (0..count).map(|_| File::open("/dev/null")).collect();
    let Err(error) = opened else { return Ok(()) };
    let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let text =
        format!("{error}: {count} more open files are needed, and the limit is {limit}; raise it (`ulimit -n 1024`)");
    Err(std::io::Error::new(error.kind(), text))
}

/// The soft limit of what this program starts; its own, if none is given.
pub(crate) fn of_children() -> Option<u64> {
    BEFORE.get().copied().flatten()
}

/// Sets the soft limit of this program, as far as the hard one lets it: that may have been lowered since.
pub(crate) fn set(limit: u64) -> io::Result<()> {
    let now = getrlimit(Resource::Nofile);
    let limit = now.maximum.map_or(limit, |maximum| limit.min(maximum));
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..now })
}
