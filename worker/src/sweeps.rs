//! The sweeps that every worker runs: free, timers, overdue, tell.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::border;
use baton_common::communicator::ReplyTo;
use baton_common::id::Pid;
use baton_common::state::{Place, State};
use baton_common::store::blob::Outcome;
use baton_common::store::sweep::PAGE_ROWS;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::incarnation::Shared;

/// Pause between two rounds of the cheap sweeps.
const ROUND: Duration = Duration::from_secs(1);

/// Pause between two applications of the head rule.
const TELL_ROUND: Duration = Duration::from_secs(2);

/// A row this much older than the head of its queue has no message any more. Bulk submits commit and publish in pages,
/// so rows and messages are nearly in the same order; this is the room for "nearly".
const MARGIN_US: i64 = 30_000_000;

/// The same for an empty queue: longer than a publish takes, and its delivery.
const MARGIN_EMPTY_US: i64 = 2_000_000;

/// When the next parked process of this worker's is due; only the earliest is kept.
#[derive(Default)]
pub(crate) struct Timer {
    next: Mutex<Option<Instant>>,
    changed: Notify,
}

impl Timer {
    /// A process is due after this time.
    pub(crate) fn due_in(&self, pause: Duration) {
        // What is due after the next round is found by that round.
        if pause > ROUND * 2 {
            return;
        }
        let due = Instant::now() + pause;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_none_or(|next| due < next) {
            *next = Some(due);
            self.changed.notify_one();
        }
    }

    /// Waits until something is due, or the round is over.
    async fn wait(&self, round_ends: Instant) {
        loop {
            let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let until = next.map_or(round_ends, |next| next.min(round_ends));
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                () = self.changed.notified() => {}
            }
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_some_and(|next| next <= Instant::now()) {
            *next = None;
        }
    }
}

/// Runs all of them until it is dropped.
pub(crate) async fn run(shared: Arc<Shared>) {
    if shared.store.is_embedded() {
        // The broker in memory has begun empty, and nobody else publishes: every queued row lacks its message.
        if let Ok(now) = shared.store.now().await {
            for queue in &shared.queues {
                tell_lost(&shared, queue, now + 1).await;
            }
        }
    }
    tokio::join!(timers(&shared), rounds(&shared), tells(&shared));
}

async fn timers(shared: &Shared) {
    loop {
        shared.timer.wait(Instant::now() + ROUND).await;
        loop {
            match shared.store.wake_due().await {
                Ok(woken) => {
                    let count: usize = woken.values().map(Vec::len).sum();
                    if count > 0 {
                        border!("wake-committed");
                    }
                    shared.tell_all(woken).await;
                    if count < PAGE_ROWS as usize {
                        break;
                    }
                }
                Err(error) => {
                    debug!(%error, "could not wake what is due");
                    break;
                }
            }
        }
        if let Ok(Some(micros)) = shared.store.next_wake_us().await {
            // Half a millisecond more, since SQLite's clock has whole ones.
            shared.timer.due_in(Duration::from_micros(u64::try_from(micros).unwrap_or(0) + 500));
        }
    }
}

async fn rounds(shared: &Shared) {
    let mut ticks = tokio::time::interval(ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut forgotten = Instant::now();
    loop {
        ticks.tick().await;
        free(shared).await;
        overdue(shared).await;
        if forgotten.elapsed() > Duration::from_secs(3600) {
            forgotten = Instant::now();
            if let Err(error) = shared.store.forget_gone().await {
                debug!(%error, "could not remove the rows of workers that are long gone");
            }
        }
    }
}

/// Frees what dead workers held, again and again: a zombie's claim may commit after the last time.
pub(crate) async fn free(shared: &Shared) {
    loop {
        let freed = match shared.store.free().await {
            Ok(freed) => freed,
            Err(error) => {
                debug!(%error, "could not free the processes of dead workers");
                return;
            }
        };
        let count = freed.count();
        if count == 0 {
            return;
        }
        border!("free-committed");
        info!(count, "freed processes of dead workers");
        shared.tell_all(freed.queued).await;
        for (pid, state, reply_to) in freed.ended {
            if state == State::Excepted {
                warn!(%pid, "this process has cost too many workers their life; it is excepted");
            }
            ended(shared, pid, state, reply_to).await;
        }
        for pid in freed.paused {
            shared.announce(pid, State::Paused(baton_common::state::Live::Running), None);
        }
    }
}

async fn overdue(shared: &Shared) {
    match shared.store.end_overdue().await {
        Ok(ended_rows) => {
            for row in ended_rows {
                info!(pid = %row.pid, "its `timeout` has passed");
                if row.place == Place::Ended {
                    ended(shared, row.pid, row.state, row.reply_to).await;
                }
            }
        }
        Err(error) => debug!(%error, "could not end what is overdue"),
    }
}

/// Says that a process has ended which nobody held.
pub(crate) async fn ended(shared: &Shared, pid: Pid, state: State, reply_to: Option<Vec<u8>>) {
    shared.announce(pid, state, None);
    if let Some(to) = reply_to.as_deref().and_then(ReplyTo::from_bytes) {
        shared.answer_end(pid, state, Some(&Outcome::default()), to).await;
    }
}

async fn tells(shared: &Shared) {
    let mut ticks = tokio::time::interval(TELL_ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A queue that does not deliver would only gather copies.
        for queue in shared.queues.iter().filter(|queue| shared.communicator.delivers(queue)) {
            // The time is read first: whatever was told two seconds before it should be in the queue by now.
            let Ok(now) = shared.store.now().await else { continue };
            let Ok(depth) = shared.communicator.depth(queue).await else { continue };
            let before =
                if depth == 0 { Some(now - MARGIN_EMPTY_US) } else { shared.head(queue).map(|head| head - MARGIN_US) };
            if let Some(before) = before {
                tell_lost(shared, queue, before).await;
            }
        }
    }
}

/// Publishes again what has been queued in a queue before a time and has no message any more.
async fn tell_lost(shared: &Shared, queue: &str, before: i64) {
    loop {
        match shared.store.tell_lost(queue, before).await {
            Ok(told) if told.is_empty() => return,
            Ok(told) => {
                let count: usize = told.values().map(Vec::len).sum();
                info!(queue, count, "queued processes had no message any more; telling them again");
                shared.tell_all(told).await;
            }
            Err(error) => {
                debug!(%error, "could not look for lost messages");
                return;
            }
        }
    }
}
