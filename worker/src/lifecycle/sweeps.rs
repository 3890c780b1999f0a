//! The sweeps that every worker runs: free, timers, overdue, tell.

use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::communicator::Communicator;
use baton_common::state::{Place, State};
use baton_common::store::Store;
use baton_common::store::sweep::PAGE_ROWS;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::execution::timer::{ROUND, Timer};
use crate::intake::heads::Heads;
use crate::outbox::Outbox;

/// Pause between two applications of the head rule.
const TELL_ROUND: Duration = Duration::from_secs(2);

/// A row this much older than the head of its queue has no message any more. Bulk submits commit and publish in pages,
/// so rows and messages are nearly in the same order; this is the room for "nearly".
const MARGIN_US: i64 = 30_000_000;

/// The same for an empty queue: longer than a publish takes, and its delivery.
const MARGIN_EMPTY_US: i64 = 2_000_000;

/// What the sweeps work with.
pub(crate) struct Sweeps {
    pub(crate) store: Store,
    pub(crate) communicator: Communicator,
    pub(crate) outbox: Arc<Outbox>,
    /// The queues that the worker serves, with all their classes.
    pub(crate) queues: Arc<[String]>,
    pub(crate) heads: Arc<Heads>,
    pub(crate) timer: Arc<Timer>,
}

impl Sweeps {
    /// Runs all of them until it is dropped.
    pub(crate) async fn run(self: Arc<Self>) {
        if self.store.is_embedded() {
            // The broker in memory has begun empty, and nobody else publishes: every queued row lacks its message.
            if let Ok(now) = self.store.now().await {
                for queue in self.queues.iter() {
                    self.announce_lost(queue, now + 1).await;
                }
            }
        }
        tokio::join!(self.timers(), self.rounds(), self.tells());
    }

    async fn timers(&self) {
        loop {
            self.timer.wait(Instant::now() + ROUND).await;
            loop {
                match self.store.wake_due().await {
                    Ok(woken) => {
                        let count: usize = woken.values().map(Vec::len).sum();
                        if count > 0 {
                            border!("wake-committed");
                        }
                        self.outbox.tell_all(woken).await;
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
            if let Ok(Some(micros)) = self.store.next_wake_us().await {
                // Half a millisecond more, since SQLite's clock has whole ones.
                self.timer.due_in(Duration::from_micros(u64::try_from(micros).unwrap_or(0) + 500));
            }
        }
    }

    async fn rounds(&self) {
        let mut ticks = tokio::time::interval(ROUND);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut forgotten = Instant::now();
        loop {
            ticks.tick().await;
            self.free().await;
            self.overdue().await;
            if forgotten.elapsed() > Duration::from_secs(3600) {
                forgotten = Instant::now();
                if let Err(error) = self.store.forget_gone().await {
                    debug!(%error, "could not remove the rows of workers that are long gone");
                }
            }
        }
    }

    /// Frees what dead workers held, again and again: a zombie's claim may commit after the last time.
    pub(crate) async fn free(&self) {
        loop {
            let freed = match self.store.free().await {
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
            self.outbox.tell_all(freed.queued).await;
            for (pid, state, reply_to) in freed.ended {
                if state == State::Excepted {
                    warn!(%pid, "this process has cost too many workers their life; it is excepted");
                }
                self.outbox.ended(pid, state, reply_to).await;
            }
            for pid in freed.paused {
                self.outbox.announce(pid, State::Paused(baton_common::state::Live::Running), None);
            }
        }
    }

    async fn overdue(&self) {
        match self.store.end_overdue().await {
            Ok(ended_rows) => {
                for row in ended_rows {
                    info!(pid = %row.pid, "its `timeout` has passed");
                    if row.place == Place::Ended {
                        self.outbox.ended(row.pid, row.state, row.reply_to).await;
                    }
                }
            }
            Err(error) => debug!(%error, "could not end what is overdue"),
        }
    }

    async fn tells(&self) {
        let mut ticks = tokio::time::interval(TELL_ROUND);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A queue that does not deliver would only gather copies.
            for queue in self.queues.iter().filter(|queue| self.communicator.delivers(queue)) {
                // The time is read first: whatever was told two seconds before it should be in the queue by now.
                let Ok(now) = self.store.now().await else { continue };
                let Ok(depth) = self.communicator.depth(queue).await else { continue };
                let before = if depth == 0 {
                    Some(now - MARGIN_EMPTY_US)
                } else {
                    self.heads.of(queue).map(|head| head - MARGIN_US)
                };
                if let Some(before) = before {
                    self.announce_lost(queue, before).await;
                }
            }
        }
    }

    /// Publishes again what has been queued in a queue before a time and has no message any more.
    async fn announce_lost(&self, queue: &str, before: i64) {
        loop {
            match self.store.announce_lost(queue, before).await {
                Ok(told) if told.is_empty() => return,
                Ok(told) => {
                    let count: usize = told.values().map(Vec::len).sum();
                    info!(queue, count, "queued processes had no message any more; telling them again");
                    self.outbox.tell_all(told).await;
                }
                Err(error) => {
                    debug!(%error, "could not look for lost messages");
                    return;
                }
            }
        }
    }
}
