//! Processes whose holders have died again and again: a worker takes one at a time, and the next as soon as that one has
//! made a checkpoint or has left.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_common::id::Pid;
use baton_common::store::writer::Claim;
use tokio::sync::Notify;
use tracing::debug;

use crate::intake::claims::Claims;

/// So many are remembered; the messages of the others are told again by the head rule.
const WAITING_MAX: usize = 10_000;

/// Those that could not be claimed beside another. Their messages are gone, so whoever forgets them costs them no more
/// than the time until the head rule finds them.
pub(crate) struct Quarantine {
    waiting: Mutex<BTreeSet<(Pid, String)>>,
    /// Notified when another can be claimed: one has made a checkpoint or has left, or the worker takes tasks again.
    turn: Arc<Notify>,
}

impl Quarantine {
    /// None yet. Whoever notifies `turn` has the next one claimed.
    pub(crate) fn new(turn: Arc<Notify>) -> Self {
        Self { waiting: Mutex::default(), turn }
    }

    /// This one could not be claimed from this queue.
    pub(crate) fn wait(&self, pid: Pid, queue: String) {
        self.put(pid, queue);
        // The other may have gone on since it was refused.
        self.turn.notify_one();
    }

    /// Those that wait.
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

/// Claims them, the oldest first, until it is dropped.
pub(crate) async fn run(claims: Arc<Claims>) {
    loop {
        claims.quarantine.turn.notified().await;
        while claims.execution.gate.takes_tasks() && claim_next(&claims).await {}
    }
}

/// Whether the next can be tried, too.
async fn claim_next(claims: &Claims) -> bool {
    let Ok(permit) = Arc::clone(&claims.slots).acquire_owned().await else { return false };
    // That may have taken long.
    if !claims.execution.gate.takes_tasks() {
        return false;
    }
    let Some((pid, queue)) = claims.quarantine.take() else { return false };
    // A claim of the same that is under way puts it back if it is refused.
    let Some(begun) = claims.execution.leases.begin_claim(pid) else { return true };
    let (claim, begun) = claims.claim(pid, &queue, None, Some(begun)).await;
    match claim {
        Ok(Claim::Claimed(claimed)) => {
            // Whoever had it meanwhile may have made a checkpoint.
            let is_suspect = claimed.is_quarantined();
            claims.start(claimed, permit, begun).await;
            !is_suspect
        }
        Ok(Claim::Quarantined) => {
            claims.quarantine.put(pid, queue);
            false
        }
        Ok(Claim::NotQueued | Claim::Absent | Claim::OtherSpec | Claim::Pruned | Claim::Rejected(_)) => true,
        Err(error) => {
            debug!(%pid, %error, "not claimed; the head rule tells it again");
            false
        }
    }
}
