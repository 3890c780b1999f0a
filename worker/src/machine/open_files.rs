//! The limit of open files. A worker needs several for each program that it runs, so it raises its own soft limit as far
//! as it may. Programs that still call `select` break beyond the usual 1,024, so the programs of a worker get the limit
//! with which the worker was started.

use std::fs::File;
use std::sync::OnceLock;

use rustix::io;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit before it was raised; `None` inside for no limit.
static BEFORE: OnceLock<Option<u64>> = OnceLock::new();

/// Raises the soft limit of this program to the hard one. Only the first call has an effect.
pub(crate) fn raise() {
    BEFORE.get_or_init(|| {
        let limit = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
            tracing::debug!(%error, "could not raise the limit of open files");
        }
        limit.current
    });
}

/// Checks that this many more files can be opened.
///
/// # Errors
/// The error of the system, with the limit and the remedy.
pub(crate) fn check(count: usize) -> std::io::Result<()> {
    let opened: std::io::Result<Vec<File>> = (0..count).map(|_| File::open("/dev/null")).collect();
    let Err(error) = opened else { return Ok(()) };
    let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let text =
        format!("{error}: {count} more open files are needed, and the limit is {limit}; raise it (`ulimit -n 1024`)");
    Err(std::io::Error::new(error.kind(), text))
}

/// The soft limit for the programs that this one starts; `None` to inherit its own.
pub(crate) fn of_children() -> Option<u64> {
    BEFORE.get().copied().flatten()
}

/// Sets the soft limit of this program, but not above the hard one, which may have been lowered since.
pub(crate) fn set(limit: u64) -> io::Result<()> {
    let now = getrlimit(Resource::Nofile);
    let limit = now.maximum.map_or(limit, |maximum| limit.min(maximum));
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..now })
}
