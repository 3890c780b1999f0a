//! How many files may be open at once. A worker has several for each program that it runs; the usual limit of 1,024 is for
//! programs that have few, and those that still call `select` break beyond it. So a worker raises its own limit as far as it
//! may, and what it starts has the one that the worker was started with.

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

/// The soft limit of what this program starts; its own, if none is given.
pub(crate) fn of_children() -> Option<u64> {
    BEFORE.get().copied().flatten()
}

/// Sets the soft limit of this program.
pub(crate) fn set(limit: u64) -> io::Result<()> {
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..getrlimit(Resource::Nofile) })
}
