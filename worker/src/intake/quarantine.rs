//! Quarantined processes: their holders have died repeatedly, so a worker holds one at a time. It claims the next as soon
//! as that one has made a checkpoint or has left.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_common::id::Pid;
use baton_common::store::writer::Claim;
use tokio::sync::Notify;
use tracing::debug;

use crate::intake::claims::Claims;

/// Processes that are remembered; the head rule announces the others again.
const WAITING_MAX: usize = 10_000;

/// The quarantined processes that wait for a claim. Their messages are acknowledged; if this list is lost, the head rule
/// announces them again.
pub(crate) struct Quarantine {
    waiting: Mutex<BTreeSet<(Pid, String)>>,
    /// Notified when the next can be claimed: the last has made a checkpoint or has left, or the worker takes tasks
    /// again.
    turn: Arc<Notify>,
}

impl Quarantine {
    /// An empty quarantine. Notifying `turn` claims the next process.
    pub(crate) fn new(turn: Arc<Notify>) -> Self {
        Self { waiting: Mutex::default(), turn }
    }

    /// Adds a process that could not be claimed from this queue.
    pub(crate) fn wait(&self, pid: Pid, queue: String) {
        self.put(pid, queue);
        // The other process may have made a checkpoint since the refusal.
        self.turn.notify_one();
    }

    /// The waiting processes.
    pub(crate) fn pids(&self) -> HashSet<Pid> {
        self.lock().iter().map(|(pid, _)| *pid).collect()
    }

    fn put(&self, pid: Pid, queue: String) {
        let mut waiting = self.lock();
        if waiting.len() < WAITING_MAX {
            waiting.insert((pid, queue));
        }
    }

    fn take(&self) -> Option<(Pid, String)> {
        self.lock().pop_first()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<(Pid, String)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Claims the waiting processes, the oldest first, until it is dropped.
pub(crate) async fn run(claims: Arc<Claims>) {
    loop {
        claims.quarantine.turn.notified().await;
        while claims.execution.gate.takes_tasks() && claim_next(&claims).await {}
    }
}

/// Claims the next process; returns whether another can be tried.
async fn claim_next(claims: &Claims) -> bool {
    let Ok(permit) = Arc::clone(&claims.slots).acquire_owned().await else { return false };
    // The wait for a slot may have taken long.
    if !claims.execution.gate.takes_tasks() {
        return false;
    }
    let Some((pid, queue)) = claims.quarantine.take() else { return false };
    // If another claim of this process is under way, that claim puts it back when it is refused.
    let Some(guard) = claims.execution.leases.begin_claim(pid) else { return true };
    let (claim, guard) = claims.claim(pid, &queue, None, Some(guard)).await;
    match claim {
        Ok(Claim::Claimed(claimed)) => {
            // A checkpoint of another holder may have ended its quarantine.
            let is_quarantined = claimed.is_quarantined();
            claims.start(claimed, permit, guard).await;
            !is_quarantined
        }
        Ok(Claim::Quarantined) => {
            claims.quarantine.put(pid, queue);
            false
        }
        Ok(Claim::NotQueued | Claim::Absent | Claim::OtherSpec | Claim::Pruned | Claim::Rejected(_)) => true,
        Err(error) => {
            debug!(%pid, %error, "not claimed; the head rule announces it again");
            false
        }
    }
}
