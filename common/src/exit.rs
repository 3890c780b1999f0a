//! Exit codes of Baton's programs. They are part of the interface and never change.
//!
//! `baton` uses all of them. `baton-worker` uses [`OK`] after a drain, [`FAILED`], [`USAGE`], [`REFUSED`] and [`CONFLICT`];
//! instead of [`UNREACHABLE`] it waits until the database and the broker answer. `baton run` exits with the code of its
//! process, and with [`INTERRUPTED`] after Ctrl-C.

use crate::store::Error as StoreError;

/// Success. For a worker: it has drained.
pub const OK: u8 = 0;
/// A failure without a code of its own.
pub const FAILED: u8 = 1;
/// The command line, the configuration or a spec is wrong.
pub const USAGE: u8 = 2;
/// There is no such process, worker, dead letter or file.
pub const NOT_FOUND: u8 = 3;
/// Wrong credentials, or a database schema that is newer than the program.
pub const REFUSED: u8 = 4;
/// The request conflicts with the present state. For a worker: the virtual host belongs to another database.
pub const CONFLICT: u8 = 5;
/// The limit of `--wait` or `--timeout` has passed.
pub const WAIT_TIMED_OUT: u8 = 6;
/// The broker or the database cannot be reached, and nothing was recorded.
pub const UNREACHABLE: u8 = 7;
/// The process itself failed.
pub const PROCESS_FAILED: u8 = 8;
/// Some of many failed.
pub const SOME_FAILED: u8 = 9;
/// `baton run` was interrupted with Ctrl-C, as shells report it.
pub const INTERRUPTED: u8 = 130;

/// The exit code for an error of the database.
pub fn of_store(error: &StoreError) -> u8 {
    match error {
        StoreError::Url | StoreError::UrlParts(_) => USAGE,
        StoreError::Unreachable(_) | StoreError::Full(_) | StoreError::Retry(_) => UNREACHABLE,
        StoreError::Refused(_) | StoreError::SchemaNewer { .. } | StoreError::Newer { .. } => REFUSED,
        StoreError::Folder { .. }
        | StoreError::Unreadable(_)
        | StoreError::NoRow
        | StoreError::Stopped
        | StoreError::Rejected(_)
        | StoreError::Database(_) => FAILED,
    }
}
