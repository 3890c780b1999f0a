//! The lease of a process: the claim that takes it, the writes that it fences, and their answers.

use std::time::Duration;

use sea_orm::FromQueryResult;

use super::blob::{Checkpoint, Outcome, PackedCheckpoint};
use super::error::Error;
use crate::id::Pid;
use crate::spec::Spec;
use crate::state::{Desired, Place, State};

/// The number of deaths from which a process is quarantined: a worker claims at most one such process at a time, so
/// that it takes no other quarantined process down with it.
pub(super) const QUARANTINE_DEATHS: i64 = 2;

/// The proof of a lease, which each write of a holder carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromQueryResult)]
pub struct Fence {
    /// The process.
    #[sea_orm(from_alias = "id")]
    pub pid: Pid,
    /// The epoch of its claim.
    pub epoch: i64,
}

/// A process that was claimed.
#[derive(Debug)]
pub struct Claimed {
    /// The lease.
    pub fence: Fence,
    /// The time of the claim, by the database's clock.
    pub claimed_at: i64,
    /// The number of the try, from 1.
    pub try_number: i64,
    /// The number of holders that died in a row without a checkpoint.
    pub deaths: i64,
    /// The state that operators want.
    pub desired: Desired,
    /// Whether they want it at once (`pause --now`, `kill --force`).
    pub urgent: bool,
    /// Whether it has, or may have, a job at a site.
    pub has_outside: bool,
    /// The time since which every worker has refused it; `None` once a worker has run it.
    pub refused_at: Option<i64>,
    /// Its checkpoint, if it has one. An unreadable checkpoint is a failure of the process, a newer one is not.
    pub checkpoint: Option<Result<Checkpoint, Error>>,
    /// The spec.
    pub spec: Result<Spec, Error>,
    /// The W3C trace context of its launch.
    pub traceparent: Option<String>,
    /// The reply address for its end.
    pub reply_to: Option<Vec<u8>>,
}

/// The outcome of a claim.
#[derive(Debug)]
pub enum Claim {
    /// The lease is taken.
    Claimed(Box<Claimed>),
    /// The process is held, parked or ended, or queued in another queue: the message is obsolete.
    NotQueued,
    /// The process is queued and quarantined, and this worker holds another quarantined process.
    Quarantined,
    /// No such process.
    Absent,
    /// A launch with the pid of a process that has another spec.
    OtherSpec,
    /// A launch older than the prune horizon: its process may have run and been pruned.
    Pruned,
    /// The database can never store the spec of the launch, for this reason.
    Rejected(String),
}

/// A write of the holder.
#[derive(Clone, Debug)]
pub struct Fenced {
    /// The lease.
    pub fence: Fence,
    /// The change of the row.
    pub verb: Verb,
    /// The new checkpoint; `None` keeps the old one.
    pub checkpoint: Option<PackedCheckpoint>,
    /// The number of the try, from 1; 0 keeps the old one.
    pub try_number: i64,
    /// The attempt, if this write ends it. An attempt that ends in an ordinary wait leaves no row.
    pub ended: Option<Attempt>,
    /// The output of its program so far.
    pub outputs: Vec<Output>,
}

/// The change that a fenced write makes.
#[derive(Clone, Debug)]
pub enum Verb {
    /// Writes a checkpoint and keeps the lease.
    Keep,
    /// Waits for a duration.
    Park {
        /// The duration.
        wake_in: Duration,
    },
    /// Waits for a resource of a site. Its release wakes the process that has waited longest.
    Wait {
        /// The resource, such as `slot/cluster`; empty for a job, which wakes its own process.
        waits_for: String,
        /// The longest wait.
        wake_in: Duration,
        /// Whether a kill waits for the job to end.
        killing: bool,
    },
    /// Refuses the process, since this build cannot run it, for a duration.
    Refuse {
        /// The duration.
        wake_in: Duration,
        /// The reason, in words.
        reason: String,
    },
    /// Pauses, if a pause is still desired.
    Pause,
    /// Gives the process back at no charge.
    GiveBack,
    /// Ends the process.
    End {
        /// The final state: finished, excepted or killed.
        state: State,
        /// The outcome.
        outcome: Outcome,
    },
}

/// The end of an attempt, for its row.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The time of the claim, by the database's clock.
    pub started_at: i64,
    /// How it ended.
    pub how: How,
    /// The reason, in words.
    pub reason: Option<String>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It ended without an error.
    Ok,
    /// An error ended it.
    Error,
    /// The worker stopped and gave the process back.
    Drained,
    /// A pause was requested.
    Paused,
    /// A kill was requested.
    Killed,
}

impl How {
    /// The word in the `attempt` table. The sweep writes `lost`.
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

/// The stored part of one stream of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The stream.
    pub stream: Stream,
    /// Its beginning.
    pub head: Vec<u8>,
    /// Its end; empty if the head is the whole stream.
    pub tail: Vec<u8>,
    /// Its total length.
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
    /// The code in the `output` table.
    pub fn code(self) -> i16 {
        match self {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }

    /// The stream with this code; `None` for a code that no version writes.
    pub(super) fn from_code(code: i16) -> Option<Self> {
        [Stream::Stdout, Stream::Stderr].into_iter().find(|stream| stream.code() == code)
    }
}

/// The row after a fenced write.
#[derive(Clone, Debug, FromQueryResult)]
pub struct Written {
    /// The place of the process; `Held` means that the lease continues.
    pub place: Place,
    /// Its state.
    #[sea_orm(nested)]
    pub state: State,
    /// The state that operators want.
    pub desired: Desired,
    /// Whether they want it at once.
    pub urgent: bool,
    /// Its task queue.
    pub queue: String,
    /// The time when it was last announced, for the message to publish if it is queued.
    #[sea_orm(from_alias = "told_at")]
    pub announced_at: i64,
}

impl Claimed {
    /// Whether it is quarantined until its next checkpoint: a worker holds at most one such process at a time.
    pub fn is_quarantined(&self) -> bool {
        self.deaths >= QUARANTINE_DEATHS
    }
}
