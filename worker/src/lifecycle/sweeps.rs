//! The sweeps of every worker: free the processes of dead workers, wake due ones, end overdue ones, announce lost ones.

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
const ANNOUNCE_ROUND: Duration = Duration::from_secs(2);

/// A row that is this much older than the head of its queue has lost its message. The margin allows for pages of bulk
/// submits, which put rows and messages in slightly different orders.
const MARGIN_US: i64 = 30_000_000;

/// The margin for an empty queue: longer than a publish and its delivery take.
const MARGIN_EMPTY_US: i64 = 2_000_000;

/// The parts of a worker that the sweeps use.
pub(crate) struct Sweeps {
    pub(crate) store: Store,
    pub(crate) communicator: Communicator,
    pub(crate) outbox: Arc<Outbox>,
    /// The queues that the worker serves, with all priority classes.
    pub(crate) queues: Arc<[String]>,
    pub(crate) heads: Arc<Heads>,
    pub(crate) timer: Arc<Timer>,
}

impl Sweeps {
    /// Runs all sweeps until it is dropped.
    pub(crate) async fn run(self: Arc<Self>) {
        if self.store.is_embedded() {
            // The broker in memory starts empty and has no other publisher, so every queued row lacks its message.
            if let Ok(now) = self.store.now().await {
                for queue in self.queues.iter() {
                    self.announce_lost(queue, now + 1).await;
                }
            }
        }
        tokio::join!(self.timers(), self.rounds(), self.announcements());
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
                        self.outbox.announce_all(woken).await;
                        if count < PAGE_ROWS as usize {
                            break;
                        }
                    }
                    Err(error) => {
                        debug!(%error, "could not wake due processes");
                        break;
                    }
                }
            }
            if let Ok(Some(micros)) = self.store.next_wake_us().await {
                // Half a millisecond more, since SQLite's clock has a resolution of one.
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

    /// Frees the processes of dead workers, repeatedly: a claim of a dead worker may still commit.
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
            self.outbox.announce_all(freed.queued).await;
            for (pid, state, reply_to) in freed.ended {
                if state == State::Excepted {
                    warn!(%pid, "this process killed too many workers; it is excepted");
                }
                self.outbox.ended(pid, state, reply_to).await;
            }
            for pid in freed.paused {
                self.outbox.publish_event(pid, State::Paused(baton_common::state::Live::Running), None);
            }
        }
    }

    async fn overdue(&self) {
        match self.store.end_overdue().await {
            Ok(ended_rows) => {
                for row in ended_rows {
                    info!(pid = %row.pid, "the `timeout` of this process has passed");
                    if row.place == Place::Ended {
                        self.outbox.ended(row.pid, row.state, row.reply_to).await;
                    }
                }
            }
            Err(error) => debug!(%error, "could not end overdue processes"),
        }
    }

    async fn announcements(&self) {
        let mut ticks = tokio::time::interval(ANNOUNCE_ROUND);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A queue that delivers nothing would only collect duplicates.
            for queue in self.queues.iter().filter(|queue| self.communicator.delivers(queue)) {
                // The time is read before the depth, so every message announced before the margin is in the queue.
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

    /// Announces again the rows of a queue that were announced before this time and have lost their messages.
    async fn announce_lost(&self, queue: &str, before: i64) {
        loop {
            match self.store.announce_lost(queue, before).await {
                Ok(lost) if lost.is_empty() => return,
                Ok(lost) => {
                    let count: usize = lost.values().map(Vec::len).sum();
                    info!(queue, count, "queued processes have lost their messages; announcing them again");
                    self.outbox.announce_all(lost).await;
                }
                Err(error) => {
                    debug!(%error, "could not look for lost messages");
                    return;
                }
            }
        }
    }
}
