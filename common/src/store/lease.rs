//! A lease, and what its holder writes and learns: the claim, the fenced write, and the answer to it.

use std::time::Duration;

use sea_orm::FromQueryResult;

use super::blob::{Checkpoint, Outcome, PackedCheckpoint};
use super::error::Error;
use crate::id::Pid;
use crate::spec::Spec;
use crate::state::{Desired, Place, State};

/// From so many deaths of its holders on, a process is claimed only as a worker's sole such one, so that it takes no
/// neighbours of its kind with it.
pub(super) const SUSPECT_DEATHS: i64 = 2;

/// What a holder proves with each write: the process and the number of the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromQueryResult)]
pub struct Fence {
    /// The process.
    #[sea_orm(from_alias = "id")]
    pub pid: Pid,
    /// Its epoch when it was claimed.
    pub epoch: i64,
}

/// A process whose lease was just taken.
#[derive(Debug)]
pub struct Claimed {
    /// The lease.
    pub fence: Fence,
    /// When, in database time.
    pub claimed_at: i64,
    /// The number of the try that it is in, from 1.
    pub try_number: i64,
    /// How many of its holders died in a row without a checkpoint.
    pub deaths: i64,
    /// What the operators want of it.
    pub desired: Desired,
    /// Whether that is wanted at once (`pause --now`, `kill --force`).
    pub urgent: bool,
    /// Whether it has, or may have, a job at a site.
    pub has_outside: bool,
    /// Since when one worker after the other could not go on with it, although another build may; `None` once one has.
    pub refused_at: Option<i64>,
    /// Its progress, if there is any. An unreadable one is the process's own failure, not the worker's; a newer one is
    /// neither's.
    pub checkpoint: Option<Result<Checkpoint, Error>>,
    /// What to run.
    pub spec: Result<Spec, Error>,
    /// W3C trace context of its launch.
    pub traceparent: Option<String>,
    /// Whom to tell of the end.
    pub reply_to: Option<Vec<u8>>,
}

/// What became of a claim.
#[derive(Debug)]
pub enum Claim {
    /// The lease is ours.
    Claimed(Box<Claimed>),
    /// Somebody holds it, or it is parked or ended, or queued elsewhere: the message means nothing any more.
    NotQueued,
    /// It is queued, but two of its holders or more have died, and this worker has another such one at the moment.
    NotBesideAnother,
    /// No such process.
    Absent,
    /// A launch whose pid belongs to a process with another spec.
    OtherSpec,
    /// A launch that is older than what is kept: its process may have run and been pruned.
    Pruned,
    /// The database can never store what the launch brings along, for this reason.
    Rejected(String),
}

/// A write of the holder.
#[derive(Clone, Debug)]
pub struct Fenced {
    /// The lease.
    pub fence: Fence,
    /// What to do with the row.
    pub verb: Verb,
    /// The new progress; `None` leaves the old one.
    pub checkpoint: Option<PackedCheckpoint>,
    /// The number of the try, from 1; 0 leaves it as it is.
    pub try_number: i64,
    /// The attempt's row, if this write ends the holding. A holding that ends in an ordinary wait leaves none.
    pub ended: Option<Attempt>,
    /// What its program has written so far.
    pub outputs: Vec<Output>,
}

/// What a fenced write does.
#[derive(Clone, Debug)]
pub enum Verb {
    /// Checkpoint and go on.
    Keep,
    /// Wait for a time from now.
    Park {
        /// How long.
        wake_in: Duration,
    },
    /// Wait for something at a site: whoever has it to give wakes those that wait, the longest first.
    Wait {
        /// For what, such as `slot/cluster`; empty for a job, which wakes its own process.
        waits_for: String,
        /// It is woken after this time in any case.
        wake_in: Duration,
        /// It is a kill that waits, for what is outside to be ended.
        killing: bool,
    },
    /// Wait for a time from now, since this build cannot go on with it.
    Refuse {
        /// How long.
        wake_in: Duration,
        /// Why, in words.
        reason: String,
    },
    /// Pause, if that is still desired.
    Pause,
    /// Back to the queue at no charge.
    GiveBack,
    /// The end.
    End {
        /// Which one: finished, excepted or killed.
        state: State,
        /// With what.
        outcome: Outcome,
    },
}

/// How a holding ended, for its row.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When it was claimed, in database time.
    pub started_at: i64,
    /// How it ended.
    pub how: How,
    /// Why, in words.
    pub reason: Option<String>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By itself, well.
    Ok,
    /// By itself, not well.
    Error,
    /// The worker stopped and gave it back.
    Drained,
    /// Somebody asked for a pause.
    Paused,
    /// Somebody asked for its end.
    Killed,
}

impl How {
    /// The word in the `attempt` table. `lost` is written by the sweep.
    pub fn word(self) -> &'static str {
        match self {
            How::Ok => "ok",
            How::Error => "error",
            How::Drained => "drained",
            How::Paused => "paused",
            How::Killed => "killed",
        }
    }
}

/// What is kept of one stream of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Which.
    pub stream: Stream,
    /// Its beginning.
    pub head: Vec<u8>,
    /// Its end; empty when the head is all of it.
    pub tail: Vec<u8>,
    /// Its length.
    pub total_bytes: u64,
}

/// A stream of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The number in the `output` table.
    pub fn code(self) -> i16 {
        match self {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }

    /// The stream of a number in the `output` table; `None` for a number that no version writes.
    pub(super) fn from_code(code: i16) -> Option<Self> {
        [Stream::Stdout, Stream::Stderr].into_iter().find(|stream| stream.code() == code)
    }
}

/// What the row says after a fenced write.
#[derive(Clone, Debug, FromQueryResult)]
pub struct Written {
    /// Where the process is now; `Held` means go on.
    pub place: Place,
    /// Its state.
    #[sea_orm(nested)]
    pub state: State,
    /// What the operators want of it.
    pub desired: Desired,
    /// Whether that is wanted at once.
    pub urgent: bool,
    /// Its task queue.
    pub queue: String,
    /// When it was last told, for the message that must follow if it is queued.
    #[sea_orm(from_alias = "told_at")]
    pub announced_at: i64,
}

impl Claimed {
    /// Whether so many of its holders have died that a worker takes only one such process at a time, until its next
    /// checkpoint.
    pub fn is_suspect(&self) -> bool {
        self.deaths >= SUSPECT_DEATHS
    }
}
