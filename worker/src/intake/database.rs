//! Claims without the broker: the worker claims queued processes straight from the database while a queue delivers
//! nothing.
//!
//! A broker that is away, under an alarm or without a majority, or a queue without a leader, must not stop the fleet. The
//! claim is the same, so a late message finds nothing to claim. Workers compete for the same rows, which costs more than
//! messages, so this is only a fallback.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::Communicator;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::intake::claims::Claims;

/// Pause between two rounds. A queue that delivers nothing in two rounds is not just being opened.
const ROUND: Duration = Duration::from_secs(1);

/// Concurrent claims: as many as one commit handles well.
const CLAIMS_MAX: usize = 256;

/// Runs until it is dropped.
pub(crate) async fn run(claims: Arc<Claims>, communicator: Communicator) {
    let mut ticks = tokio::time::interval(ROUND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silent: HashSet<String> = HashSet::new();
    let mut named: HashSet<String> = HashSet::new();
    loop {
        ticks.tick().await;
        // A full worker receives no deliveries, which says nothing about the broker.
        if claims.slots.available_permits() == 0 {
            continue;
        }
        let now_silent: HashSet<String> = if claims.execution.gate.takes_tasks() {
            claims.queues.iter().filter(|queue| !communicator.delivers(queue)).cloned().collect()
        } else {
            HashSet::new()
        };
        for queue in named.difference(&now_silent) {
            info!(queue, "the broker delivers this queue again");
        }
        named.retain(|queue| now_silent.contains(queue));
        for queue in now_silent.intersection(&silent) {
            if named.insert(queue.clone()) {
                warn!(queue, "the broker does not deliver this queue; taking its tasks from the database");
            }
            while claim_page(&claims, &communicator, queue).await {
                // The next page waits for a free slot, but at most for a round.
                let slot = Arc::clone(&claims.slots).acquire_owned();
                if tokio::time::timeout(ROUND, slot).await.is_err() {
                    break;
                }
            }
        }
        silent = now_silent;
    }
}

/// Claims the oldest processes of one queue for the free slots; returns whether there may be more.
async fn claim_page(claims: &Arc<Claims>, communicator: &Communicator, queue: &str) -> bool {
    let free = claims.slots.available_permits().min(CLAIMS_MAX);
    if free == 0 || !claims.execution.gate.takes_tasks() || communicator.delivers(queue) {
        return false;
    }
    // Quarantined processes are claimed one by one elsewhere and must not hide the others.
    let quarantine = claims.quarantine.pids();
    let pids = match claims.execution.store.queued_in(queue, free + quarantine.len()).await {
        Ok(pids) => pids,
        Err(error) => {
            debug!(queue, %error, "could not look for queued processes");
            return false;
        }
    };
    let is_full = pids.len() == free + quarantine.len();
    let mut taking = JoinSet::new();
    for pid in pids.into_iter().filter(|pid| !quarantine.contains(pid)) {
        let Ok(permit) = Arc::clone(&claims.slots).try_acquire_owned() else { break };
        if let Some(guard) = claims.execution.leases.begin_claim(pid) {
            taking.spawn(Arc::clone(claims).take(pid, queue.to_owned(), permit, guard));
        }
    }
    let taken = taking.join_all().await;
    is_full && taken.contains(&true)
}
