//! Entries of a batch, and the answers to them.

use std::collections::{HashMap, HashSet};

use tokio::sync::oneshot;

use crate::id::Pid;
use crate::store::blob::PackedCheckpoint;
use crate::store::error::Error;
use crate::store::fenced::Missed;
use crate::store::lease::{Claim, Claimed, Fence, Fenced, Written};
use crate::store::submit::NewProcess;

/// One claim, checkpoint or departure, and where its answer goes.
pub(super) enum Entry {
    Claim {
        pid: Pid,
        queue: String,
        launch: Option<Box<NewProcess>>,
        answer: oneshot::Sender<Claim>,
    },
    /// A checkpoint that keeps the lease.
    Checkpoint {
        fence: Fence,
        checkpoint: PackedCheckpoint,
        answer: oneshot::Sender<Result<Option<Written>, Error>>,
    },
    Write {
        fenced: Box<Fenced>,
        answer: oneshot::Sender<Result<Option<Written>, Error>>,
    },
}

/// Splits a batch into claims, checkpoints and departures.
pub(super) fn by_kind(batch: Vec<Entry>) -> [Vec<Entry>; 3] {
    let mut parts: [Vec<Entry>; 3] = Default::default();
    for entry in batch {
        let idx = match entry {
            Entry::Claim { .. } => 0,
            Entry::Checkpoint { .. } => 1,
            Entry::Write { .. } => 2,
        };
        parts[idx].push(entry);
    }
    parts
}

#[derive(Default)]
pub(super) struct Answers {
    pub(super) claimed: HashMap<Pid, Claimed>,
    pub(super) missed: HashMap<Pid, Missed>,
    pub(super) pruned: HashSet<Pid>,
    pub(super) written: HashMap<Pid, Written>,
}

impl Answers {
    /// Answers the entries that were claimed or written, and returns the others.
    pub(super) fn send_known(&mut self, batch: Vec<Entry>) -> Vec<Entry> {
        let mut rest = Vec::new();
        // A requester may be gone; the reconciling beat gives back a claim without a receiver.
        for entry in batch {
            let pid = entry.pid();
            match entry {
                Entry::Claim { answer, .. } if self.claimed.contains_key(&pid) => {
                    let claimed = self.claimed.remove(&pid).map(Box::new);
                    let _ = claimed.map(|claimed| answer.send(Claim::Claimed(claimed)));
                }
                Entry::Checkpoint { answer, .. } | Entry::Write { answer, .. } if self.written.contains_key(&pid) => {
                    let _ = answer.send(Ok(self.written.remove(&pid)));
                }
                Entry::Claim { .. } | Entry::Checkpoint { .. } | Entry::Write { .. } => rest.push(entry),
            }
        }
        rest
    }

    /// Answers why a claim found nothing, or that a lease is lost.
    pub(super) fn send_missing(&self, entry: Entry) {
        match entry {
            Entry::Claim { pid, launch, answer, .. } => {
                let other = |missed: &Missed| {
                    launch.is_some_and(|launch| launch.spec.digest().as_slice() != missed.digest.as_slice())
                };
                let claim = match self.missed.get(&pid) {
                    Some(missed) if other(missed) => Claim::OtherSpec,
                    Some(missed) if missed.is_queued_in_quarantine => Claim::Quarantined,
                    Some(_) => Claim::NotQueued,
                    None if self.pruned.contains(&pid) => Claim::Pruned,
                    None => Claim::Absent,
                };
                let _ = answer.send(claim);
            }
            Entry::Checkpoint { answer, .. } | Entry::Write { answer, .. } => {
                let _ = answer.send(Ok(None));
            }
        }
    }
}

/// A batch by kind of entry.
#[derive(Default)]
pub(super) struct Parts<'a> {
    pub(super) claims: Vec<(Pid, String)>,
    pub(super) launches: Vec<NewProcess>,
    pub(super) checkpoints: Vec<(Fence, &'a PackedCheckpoint)>,
    pub(super) writes: Vec<&'a Fenced>,
}

impl<'a> Parts<'a> {
    pub(super) fn of(batch: &'a [Entry]) -> Self {
        let mut parts = Parts::default();
        for entry in batch {
            match entry {
                Entry::Claim { pid, queue, launch, .. } => {
                    parts.claims.push((*pid, queue.clone()));
                    parts.launches.extend(launch.as_deref().cloned());
                }
                Entry::Checkpoint { fence, checkpoint, .. } => parts.checkpoints.push((*fence, checkpoint)),
                Entry::Write { fenced, .. } => parts.writes.push(fenced),
            }
        }
        parts
    }
}

impl Entry {
    /// The border after its commit.
    #[cfg(feature = "failpoints")]
    pub(super) fn border(&self) -> &'static str {
        match self {
            Entry::Claim { .. } => "claim-committed",
            Entry::Checkpoint { .. } => "checkpoint-committed",
            Entry::Write { .. } => "departure-committed",
        }
    }

    /// The failpoint at which the answer to its commit is lost.
    #[cfg(feature = "failpoints")]
    pub(super) fn unanswered(&self) -> &'static str {
        match self {
            Entry::Claim { .. } => "claim-unanswered",
            Entry::Checkpoint { .. } => "checkpoint-unanswered",
            Entry::Write { .. } => "departure-unanswered",
        }
    }

    /// Answers with the refusal of the database.
    pub(super) fn refuse(self, error: &Error) {
        let rejected = matches!(error, Error::Rejected(_));
        match self {
            Entry::Claim { answer, .. } if rejected => {
                let _ = answer.send(Claim::Rejected(error.to_string()));
            }
            // No answer: the caller retries later.
            Entry::Claim { .. } => {}
            Entry::Checkpoint { answer, .. } | Entry::Write { answer, .. } => {
                let text = error.to_string();
                let _ = answer.send(Err(if rejected { Error::Rejected(text) } else { Error::Database(text) }));
            }
        }
    }

    pub(super) fn pid(&self) -> Pid {
        match self {
            Entry::Claim { pid, .. } => *pid,
            Entry::Checkpoint { fence, .. } => fence.pid,
            Entry::Write { fenced, .. } => fenced.fence.pid,
        }
    }
}
