//! What a test sees of an advance and of the end of a process.

use std::time::Duration;

use serde_json::{Map, Value};

#[cfg(doc)]
use crate::author::process::{Advance, Error};
#[cfg(doc)]
use crate::testing::Harness;

/// What became of one advance.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Step {
    /// It is committed, and the next advance follows at once: [`Advance::Again`].
    Again,
    /// It is committed, and the next advance follows after this time: [`Advance::After`].
    After(Duration),
    /// It is committed, and the next advance follows after this time, which the process spends in memory:
    /// [`Advance::Linger`].
    Linger(Duration),
    /// The process has ended.
    Ended(End),
    /// It failed with [`Error::Failed`], or the process finished with an exit code that is not in `ok.exit`; the spec's
    /// `retry` allows another try after this pause.
    Retried {
        /// Why it failed.
        reason: String,
        /// The pause before the next try, without jitter.
        pause: Duration,
    },
    /// It ended with [`Error::Interrupted`] or [`Error::Lacking`]. The process is queued, and no try was charged.
    GivenBack {
        /// Why.
        reason: String,
    },
    /// It ended with [`Error::NotNow`]. The process is parked, for at most this time.
    Waits(Duration),
    /// It ended with [`Error::Stuck`]. The process is paused until [`Harness::play`].
    Paused {
        /// Why.
        reason: String,
    },
}

/// The end of a process.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// How it ended.
    pub how: How,
    /// The exit code of [`Advance::Finished`].
    pub exit: Option<i32>,
    /// Whether the spec calls the exit code success.
    pub ok: bool,
    /// Why, where the exit code does not say it.
    pub reason: Option<String>,
    /// The values that the process returned; none if it is excepted.
    pub values: Map<String, Value>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By itself, with [`Advance::Finished`].
    Finished,
    /// By an error.
    Excepted,
    /// By a kill.
    Killed,
}
