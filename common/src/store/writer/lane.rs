//! A lane: it gathers entries and commits them in batches.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};
use tracing::{debug, warn};
use uuid::Uuid;

use super::batch::{Answers, Entry, Parts, by_kind};
use crate::border;
use crate::failpoint::fail_point;
use crate::id::{Incarnation, Pid};
use crate::store::connection::LANE_IDLE;
use crate::store::dedicated_connection::DedicatedConnection;
use crate::store::dialect::Dialect;
use crate::store::error::Error;
use crate::store::lease::Written;
use crate::store::{fenced, prune, submit};

/// Rows in one transaction. More rows do not make a row cheaper, and each entry waits for the whole batch.
pub(super) const BATCH_ROWS_MAX: usize = 256;

/// The number of rows from which a commit counts as large, so that the lane gathers before the next one. A single entry
/// that follows another is not delayed.
const CROWD: usize = 8;

/// The longest gathering time, however long the last commit took.
const GATHER_MAX: Duration = Duration::from_millis(20);

/// The interval at which a gathering lane checks its conditions. Each check wakes a thread, which is costly on a busy
/// machine.
const GATHER_LOOK: Duration = Duration::from_millis(3);

/// A lane gathers while at least one slot in this many is free. With fewer free slots the worker has claimed what it
/// can take, and the broker delivers more only after that commit.
pub(super) const GATHER_FREE: usize = 4;

/// Pause before a batch is sent again to a database that does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

pub(super) struct Lane {
    pub(super) db: DedicatedConnection,
    pub(super) dialect: Dialect,
    pub(super) me: Incarnation,
    /// `None` where gathering gains nothing.
    pub(super) room: Option<Room>,
    pub(super) busy: Arc<AtomicUsize>,
    pub(super) unsure: Arc<AtomicBool>,
}

/// The free slots of the worker.
#[derive(Clone)]
pub(super) struct Room {
    pub(super) slots: Arc<Semaphore>,
    /// The number of free slots from which the lane gathers.
    pub(super) enough: usize,
}

impl Lane {
    pub(super) async fn run(self, mut receiver: mpsc::Receiver<Entry>) {
        let mut gathered = Vec::with_capacity(BATCH_ROWS_MAX);
        // A batch has at most one entry per pid; a second one waits for the next batch.
        let mut waiting: Vec<Entry> = Vec::new();
        let mut pause = Duration::ZERO;
        loop {
            gathered.append(&mut waiting);
            if gathered.is_empty() && self.receive(&mut receiver, &mut gathered).await == 0 {
                return;
            }
            self.busy.fetch_add(1, Ordering::Relaxed);
            // Each process waits for its checkpoint before it makes the next one.
            let has_checkpoints = gathered.iter().any(|entry| matches!(entry, Entry::Checkpoint { .. }));
            if let Some(room) = self.room.as_ref().filter(|_| !has_checkpoints) {
                gather(pause, || room.is_enough() && gathered.len() + receiver.len() < BATCH_ROWS_MAX).await;
            }
            while gathered.len() < BATCH_ROWS_MAX {
                match receiver.try_recv() {
                    Ok(entry) => gathered.push(entry),
                    Err(_) => break,
                }
            }
            let mut seen = HashSet::new();
            let mut batch = Vec::with_capacity(gathered.len());
            for entry in gathered.drain(..) {
                if seen.insert(entry.pid()) { batch.push(entry) } else { waiting.push(entry) }
            }
            batch.sort_unstable_by_key(|entry| Uuid::from(entry.pid()));
            let (n_rows, since) = (batch.len(), Instant::now());
            self.commit_for_sure(batch).await;
            pause = pause_after(n_rows, since.elapsed());
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Waits for entries and returns their number, which is 0 at the end. Closes the connection after a while without
    /// entries.
    async fn receive(&self, receiver: &mut mpsc::Receiver<Entry>, gathered: &mut Vec<Entry>) -> usize {
        if let Ok(n_received) = tokio::time::timeout(LANE_IDLE, receiver.recv_many(gathered, BATCH_ROWS_MAX)).await {
            return n_received;
        }
        self.db.close_idle().await;
        receiver.recv_many(gathered, BATCH_ROWS_MAX).await
    }

    /// Sends the batch until the database has answered. A batch that the database refuses for good is halved until the
    /// refused entry is alone; only that one gets the error.
    async fn commit_for_sure(&self, batch: Vec<Entry>) {
        let mut parts = match self.dialect {
            // One statement per kind, each its own transaction.
            Dialect::Postgres => {
                by_kind(batch).into_iter().filter(|part| !part.is_empty()).map(|part| (part, true)).collect()
            }
            Dialect::Sqlite => vec![(batch, false)],
        };
        let mut is_repeated = false;
        while let Some((mut part, is_first)) = parts.pop() {
            match self.attempt(&part, is_first).await {
                Ok(mut answers) if is_first => {
                    let rest = answers.send_known(part);
                    if !rest.is_empty() {
                        parts.push((rest, false));
                    }
                }
                Ok(mut answers) => {
                    let rest = answers.send_known(part);
                    // After a commit whose answer was lost, an end that it wrote looks like a lost lease.
                    if is_repeated {
                        answers.written.extend(self.own_ends(&rest).await);
                    }
                    for entry in answers.send_known(rest) {
                        answers.send_missing(entry);
                    }
                }
                Err(error) if error.is_transient() => {
                    warn!(%error, rows = part.len(), "the database does not take a batch; sending it again");
                    is_repeated = true;
                    self.unsure.store(true, Ordering::Release);
                    parts.push((part, is_first));
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(error) if part.len() == 1 => {
                    tracing::error!(%error, pid = %part[0].pid(), "the database refuses this write");
                    part.into_iter().for_each(|entry| entry.refuse(&error));
                }
                Err(error) => {
                    debug!(%error, rows = part.len(), "splitting a batch that the database refuses");
                    let rest = part.split_off(part.len() / 2);
                    parts.push((rest, is_first));
                    parts.push((part, is_first));
                }
            }
        }
    }

    async fn attempt(&self, batch: &[Entry], is_first: bool) -> Result<Answers, Error> {
        let answers = if is_first { self.commit_alone(batch).await? } else { self.commit(batch).await? };
        border!(batch.first().map_or("", Entry::border));
        fail_point!(batch.first().map_or("", Entry::unanswered), |_| {
            Err(Error::Unreachable("its answer was lost".into()))
        });
        Ok(answers)
    }

    /// Returns the entries that have already ended their process, with the same outcome.
    async fn own_ends(&self, batch: &[Entry]) -> HashMap<Pid, Written> {
        let mut own = HashMap::new();
        for entry in batch {
            let Entry::Write { fenced, .. } = entry else { continue };
            if let Ok(Some(written)) = fenced::own_end(&self.db, self.dialect, fenced).await {
                own.insert(fenced.fence.pid, written);
            }
        }
        own
    }

    /// The ordinary case: one statement per kind, each its own transaction, which saves three round trips. Entries
    /// without an answer go through [`Lane::commit`] next.
    async fn commit_alone(&self, batch: &[Entry]) -> Result<Answers, Error> {
        let Parts { claims, launches, checkpoints, writes } = Parts::of(batch);
        let is_launched = |pid: &Pid| launches.iter().any(|launch| launch.pid == *pid);
        let claims = claims.into_iter().filter(|(pid, _)| !is_launched(pid)).collect::<Vec<_>>();
        let writes = writes.into_iter().filter(|write| write.outputs.is_empty()).collect::<Vec<_>>();
        let claimed = fenced::claim(&self.db, self.dialect, self.me, &claims).await?;
        let mut written = fenced::checkpoint(&self.db, self.dialect, &checkpoints).await?;
        written.extend(fenced::write_alone(&self.db, self.me, &writes).await?);
        Ok(Answers { claimed, written, ..Answers::default() })
    }

    async fn commit(&self, batch: &[Entry]) -> Result<Answers, Error> {
        let Parts { claims, launches, checkpoints, writes } = Parts::of(batch);
        let transaction = self.db.begin().await?;
        let inserted = submit::insert(&transaction, self.dialect, &launches).await?;
        let pruned = prune::take_back_pruned(&transaction, self.dialect, inserted.into_keys()).await?;
        let claimed = fenced::claim(&transaction, self.dialect, self.me, &claims).await?;
        let missed = claims.into_iter().filter(|(pid, _)| !claimed.contains_key(pid)).collect::<Vec<_>>();
        let missed = fenced::missed(&transaction, self.dialect, missed).await?;
        let mut written = fenced::checkpoint(&transaction, self.dialect, &checkpoints).await?;
        written.extend(fenced::write(&transaction, self.dialect, self.me, &writes).await?);
        transaction.commit().await?;
        Ok(Answers { claimed, missed, pruned, written })
    }
}

impl Room {
    fn is_enough(&self) -> bool {
        self.slots.available_permits() >= self.enough
    }
}

/// The gathering time after a commit of this many rows and this duration.
fn pause_after(n_rows: usize, took: Duration) -> Duration {
    if n_rows < CROWD { Duration::ZERO } else { (2 * took).min(GATHER_MAX) }
}

/// Waits for the pause, or until no more entries are expected.
async fn gather(pause: Duration, is_more_to_come: impl Fn() -> bool) {
    let since = Instant::now();
    while since.elapsed() < pause && is_more_to_come() {
        tokio::time::sleep(GATHER_LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_millis(5);

    #[test]
    fn only_large_commits_make_a_lane_gather() {
        assert_eq!(pause_after(1, TOOK), Duration::ZERO);
        assert_eq!(pause_after(CROWD - 1, TOOK), Duration::ZERO);
        assert_eq!(pause_after(CROWD, TOOK), 2 * TOOK);
        assert_eq!(pause_after(CROWD, Duration::from_secs(30)), GATHER_MAX);
    }

    #[tokio::test]
    async fn full_worker_does_not_gather() {
        let slots = Arc::new(Semaphore::new(8));
        let room = Room { slots: Arc::clone(&slots), enough: 2 };
        let _taken = slots.acquire_many(7).await.unwrap();
        let gathered = gather(Duration::from_secs(60), || room.is_enough());
        assert!(tokio::time::timeout(Duration::from_secs(5), gathered).await.is_ok());
    }
}
