//! The group commit: two lanes through which every claim, every checkpoint and every departure of a process goes. Claims
//! have the first, checkpoints the second; departures take the second unless checkpoints are under way there.
//!
//! A lane sends what has gathered while its last commit was under way, in one transaction for each kind of request (on
//! SQLite in one for all): an idle system answers after one commit, and a busy one makes few. After a commit of many,
//! claims and departures gather for twice as long, unless all that this worker has room for is in hand: several workers
//! would otherwise share the same processes out to several times as many commits. One lane prepares its commit while
//! another's is being written to the disk; where none has anything to do, everything takes the first, since the server's
//! process of a connection that was just used answers sooner. Each transaction goes through its rows once and in the order
//! of their ids, so two that overlap wait for each other and do not deadlock.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};
use uuid::Uuid;

use super::blob::{Checkpoint, PackedCheckpoint};
use super::connection::LANE_IDLE;
use super::dedicated_connection::DedicatedConnection;
use super::dialect::Dialect;
use super::error::Error;
use super::fenced::Missed;
use super::handle::Store;
pub use super::lease::{Attempt, Claim, Claimed, Fence, Fenced, How, Output, Stream, Verb, Written};
use super::submit::NewProcess;
use super::{fenced, prune, submit};
use crate::border;
use crate::failpoint::fail_point;
use crate::id::{Incarnation, Pid};

/// Rows in one transaction. More does not make a row cheaper, and everybody in the batch waits for all of it.
const BATCH_ROWS_MAX: usize = 256;

/// Requests that may wait for a lane: two batches. Whoever comes later waits at the channel, which is the back pressure
/// that a slow database needs.
const QUEUE_LENGTH: usize = 2 * BATCH_ROWS_MAX;

/// After a commit of so many rows a lane gathers more before the next one. With fewer, nobody is in a crowd, and whoever
/// comes alone after one other is not held up.
const CROWD: usize = 8;

/// The longest for which a lane gathers, however long its last commit took.
const GATHER_MAX: Duration = Duration::from_millis(20);

/// How often a lane that gathers looks whether it is time. On a busy machine each look is a thread that is woken for it.
const GATHER_LOOK: Duration = Duration::from_millis(3);

/// A lane gathers while at least this part of the worker's slots is free. Where fewer are, what the worker can take is in
/// hand already, and the broker brings more only once that is committed.
const GATHER_FREE: usize = 4;

/// Pause before a batch is sent again to a database that does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The way to the writer. Cheap to clone; the writer ends when the last one is gone.
#[derive(Clone)]
pub struct Writer {
    first: mpsc::Sender<Request>,
    second: mpsc::Sender<Request>,
    /// Checkpoints that have no answer yet.
    n_checkpoints: Arc<AtomicUsize>,
    /// How many lanes have something to commit.
    busy: Arc<AtomicUsize>,
    unsure: Arc<AtomicBool>,
}

enum Request {
    Claim {
        pid: Pid,
        queue: String,
        launch: Option<Box<NewProcess>>,
        answer: oneshot::Sender<Claim>,
    },
    /// Progress, after which the process goes on under the same lease.
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

impl Writer {
    /// The writer of one incarnation, and the task that must be run for it. The slots are those of the worker, all free.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn new(
        store: &Store,
        me: Incarnation,
        slots: &Arc<Semaphore>,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), Error> {
        let unsure = Arc::new(AtomicBool::new(false));
        let busy = Arc::new(AtomicUsize::new(0));
        let lane = async |room: Option<Room>| {
            let db = store.dedicated_connection().await?;
            let (requests, receiver) = mpsc::channel(QUEUE_LENGTH);
            let (busy, unsure) = (Arc::clone(&busy), Arc::clone(&unsure));
            let lane = Lane { db, dialect: store.dialect, me, room, busy, unsure };
            Ok::<_, Error>((requests, lane.run(receiver)))
        };
        if store.is_embedded() {
            // SQLite has one writer at a time.
            let (first, run) = lane(None).await?;
            let n_checkpoints = Arc::default();
            return Ok((Self { second: first.clone(), first, n_checkpoints, busy, unsure }, run.left_future()));
        }
        let room = Room { slots: Arc::clone(slots), enough: (slots.available_permits() / GATHER_FREE).max(1) };
        let (first, running_first) = lane(Some(room.clone())).await?;
        let (second, running_second) = lane(Some(room)).await?;
        let run = async move { tokio::join!(running_first, running_second) }.map(drop);
        let n_checkpoints = Arc::default();
        Ok((Self { first, second, n_checkpoints, busy, unsure }, run.right_future()))
    }

    /// Whether, since this was last asked, the database has left a commit without its answer: then it may say that this
    /// worker holds what the worker does not know.
    pub fn take_unsure(&self) -> bool {
        self.unsure.swap(false, Ordering::AcqRel)
    }

    /// The lane for a checkpoint: the first while none is busy.
    fn for_checkpoint(&self) -> &mpsc::Sender<Request> {
        if self.busy.load(Ordering::Relaxed) == 0 { &self.first } else { &self.second }
    }

    /// The lane for a departure. A statement of its own among those of checkpoints would hold up each process that waits
    /// for one; among claims it holds up processes that have not begun.
    fn for_departure(&self) -> &mpsc::Sender<Request> {
        let checkpoints_are_under_way = self.n_checkpoints.load(Ordering::Relaxed) > 0;
        if self.busy.load(Ordering::Relaxed) == 0 || checkpoints_are_under_way { &self.first } else { &self.second }
    }

    /// Takes the lease of a process, inserting it first if a launch from outside brings it.
    ///
    /// While the database is away this waits.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker is stopping.
    ///
    /// # Cancel safety
    /// Not cancel safe: a lease that was taken and not received is given back at the second beat.
    pub async fn claim(&self, pid: Pid, queue: String, launch: Option<Box<NewProcess>>) -> Result<Claim, Error> {
        let (answer, receiver) = oneshot::channel();
        let request = Request::Claim { pid, queue, launch, answer };
        self.first.send(request).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)
    }

    /// Writes progress, after which the process goes on under the same lease; `None` and errors are as for
    /// [`Writer::write`].
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn checkpoint(&self, fence: Fence, checkpoint: &Checkpoint) -> Result<Option<Written>, Error> {
        let (answer, receiver) = oneshot::channel();
        let request = Request::Checkpoint { fence, checkpoint: checkpoint.into(), answer };
        let _counted = Counted::new(&self.n_checkpoints);
        self.for_checkpoint().send(request).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)?
    }

    /// Writes; `None` means that the lease is lost: stop at once and write nothing more.
    ///
    /// While the database is away this waits.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker is stopping. [`Error::Rejected`] when the database can never store what is written,
    /// or another error that says why it refuses this write; nothing is written then.
    pub async fn write(&self, fenced: Fenced) -> Result<Option<Written>, Error> {
        let (answer, receiver) = oneshot::channel();
        let request = Request::Write { fenced: Box::new(fenced), answer };
        self.for_departure().send(request).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)?
    }
}

/// One of a number of things, for as long as this is there.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Lane {
    db: DedicatedConnection,
    dialect: Dialect,
    me: Incarnation,
    /// None where nothing is to be gained by gathering.
    room: Option<Room>,
    busy: Arc<AtomicUsize>,
    unsure: Arc<AtomicBool>,
}

/// How much more a worker could take.
#[derive(Clone)]
struct Room {
    slots: Arc<Semaphore>,
    /// So many free ones are room enough.
    enough: usize,
}

impl Lane {
    async fn run(self, mut receiver: mpsc::Receiver<Request>) {
        let mut gathered = Vec::with_capacity(BATCH_ROWS_MAX);
        // Of one pid a batch takes one request; the second of two waits here for the next batch.
        let mut waiting: Vec<Request> = Vec::new();
        let mut pause = Duration::ZERO;
        loop {
            gathered.append(&mut waiting);
            if gathered.is_empty() && self.receive(&mut receiver, &mut gathered).await == 0 {
                return;
            }
            self.busy.fetch_add(1, Ordering::Relaxed);
            // Each process waits for its checkpoint before it makes the next one.
            let has_checkpoints = gathered.iter().any(|request| matches!(request, Request::Checkpoint { .. }));
            if let Some(room) = self.room.as_ref().filter(|_| !has_checkpoints) {
                gather(pause, || room.is_enough() && gathered.len() + receiver.len() < BATCH_ROWS_MAX).await;
            }
            while gathered.len() < BATCH_ROWS_MAX {
                match receiver.try_recv() {
                    Ok(request) => gathered.push(request),
                    Err(_) => break,
                }
            }
            let mut seen = HashSet::new();
            let mut batch = Vec::with_capacity(gathered.len());
            for request in gathered.drain(..) {
                if seen.insert(request.pid()) { batch.push(request) } else { waiting.push(request) }
            }
            batch.sort_unstable_by_key(|request| Uuid::from(request.pid()));
            let (n_rows, since) = (batch.len(), Instant::now());
            self.commit_for_sure(batch).await;
            pause = pause_after(n_rows, since.elapsed());
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Waits for requests; gives their number, which is 0 at the end. A connection that is not needed for a while is closed.
    async fn receive(&self, receiver: &mut mpsc::Receiver<Request>, gathered: &mut Vec<Request>) -> usize {
        if let Ok(n_received) = tokio::time::timeout(LANE_IDLE, receiver.recv_many(gathered, BATCH_ROWS_MAX)).await {
            return n_received;
        }
        self.db.close_idle().await;
        receiver.recv_many(gathered, BATCH_ROWS_MAX).await
    }

    /// Sends the batch until the database has answered it. One that the database refuses for good is halved until the
    /// request is alone that cannot be written; only that one goes without an answer.
    async fn commit_for_sure(&self, batch: Vec<Request>) {
        let mut parts = match self.dialect {
            // A statement for each kind, which stands or falls by itself.
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
                    // What has ended by a commit whose answer was lost looks like a lost lease.
                    if is_repeated {
                        answers.written.extend(self.own_ends(&rest).await);
                    }
                    for request in answers.send_known(rest) {
                        answers.send_missing(request);
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
                    part.into_iter().for_each(|request| request.refuse(&error));
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

    async fn attempt(&self, batch: &[Request], is_first: bool) -> Result<Answers, Error> {
        let answers = if is_first { self.commit_alone(batch).await? } else { self.commit(batch).await? };
        border!(batch.first().map_or("", Request::border));
        fail_point!(batch.first().map_or("", Request::unanswered), |_| {
            Err(Error::Unreachable("its answer was lost".into()))
        });
        Ok(answers)
    }

    /// The requests among these that have ended their process, with the very outcome that they ask for.
    async fn own_ends(&self, batch: &[Request]) -> HashMap<Pid, Written> {
        let mut own = HashMap::new();
        for request in batch {
            let Request::Write { fenced, .. } = request else { continue };
            if let Ok(Some(written)) = fenced::own_end(&self.db, self.dialect, fenced).await {
                own.insert(fenced.fence.pid, written);
            }
        }
        own
    }

    /// The ordinary case, in which one statement is all that is needed. It is its own transaction, which saves three ways
    /// to the server and back. What has no answer then goes through [`Lane::commit`].
    async fn commit_alone(&self, batch: &[Request]) -> Result<Answers, Error> {
        let Parts { claims, launches, checkpoints, writes } = Parts::of(batch);
        let is_launched = |pid: &Pid| launches.iter().any(|launch| launch.pid == *pid);
        let claims = claims.into_iter().filter(|(pid, _)| !is_launched(pid)).collect::<Vec<_>>();
        let writes = writes.into_iter().filter(|write| write.outputs.is_empty()).collect::<Vec<_>>();
        let claimed = fenced::claim(&self.db, self.dialect, self.me, &claims).await?;
        let mut written = fenced::checkpoint(&self.db, self.dialect, &checkpoints).await?;
        written.extend(fenced::write_alone(&self.db, self.me, &writes).await?);
        Ok(Answers { claimed, written, ..Answers::default() })
    }

    async fn commit(&self, batch: &[Request]) -> Result<Answers, Error> {
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

/// For how long a lane gathers after a commit of so many rows, which took so long.
fn pause_after(n_rows: usize, took: Duration) -> Duration {
    if n_rows < CROWD { Duration::ZERO } else { (2 * took).min(GATHER_MAX) }
}

/// Waits for so long, and no longer than there is more to come.
async fn gather(pause: Duration, is_more_to_come: impl Fn() -> bool) {
    let since = Instant::now();
    while since.elapsed() < pause && is_more_to_come() {
        tokio::time::sleep(GATHER_LOOK).await;
    }
}

/// Claims, checkpoints and departures.
fn by_kind(batch: Vec<Request>) -> [Vec<Request>; 3] {
    let mut parts: [Vec<Request>; 3] = Default::default();
    for request in batch {
        let idx = match request {
            Request::Claim { .. } => 0,
            Request::Checkpoint { .. } => 1,
            Request::Write { .. } => 2,
        };
        parts[idx].push(request);
    }
    parts
}

#[derive(Default)]
struct Answers {
    claimed: HashMap<Pid, Claimed>,
    missed: HashMap<Pid, Missed>,
    pruned: HashSet<Pid>,
    written: HashMap<Pid, Written>,
}

impl Answers {
    /// Answers those that were claimed or written, and gives back the others.
    fn send_known(&mut self, batch: Vec<Request>) -> Vec<Request> {
        let mut rest = Vec::new();
        // Whoever asked may have gone meanwhile; a claim that nobody received is given back by the reconciling beat.
        for request in batch {
            let pid = request.pid();
            match request {
                Request::Claim { answer, .. } if self.claimed.contains_key(&pid) => {
                    let claimed = self.claimed.remove(&pid).map(Box::new);
                    let _ = claimed.map(|claimed| answer.send(Claim::Claimed(claimed)));
                }
                Request::Checkpoint { answer, .. } | Request::Write { answer, .. }
                    if self.written.contains_key(&pid) =>
                {
                    let _ = answer.send(Ok(self.written.remove(&pid)));
                }
                Request::Claim { .. } | Request::Checkpoint { .. } | Request::Write { .. } => rest.push(request),
            }
        }
        rest
    }

    /// Says why a claim found nothing, or that a lease is lost.
    fn send_missing(&self, request: Request) {
        match request {
            Request::Claim { pid, launch, answer, .. } => {
                let other = |missed: &Missed| {
                    launch.is_some_and(|launch| launch.spec.digest().as_slice() != missed.digest.as_slice())
                };
                let claim = match self.missed.get(&pid) {
                    Some(missed) if other(missed) => Claim::OtherSpec,
                    Some(missed) if missed.is_queued_suspect => Claim::NotBesideAnother,
                    Some(_) => Claim::NotQueued,
                    None if self.pruned.contains(&pid) => Claim::Pruned,
                    None => Claim::Absent,
                };
                let _ = answer.send(claim);
            }
            Request::Checkpoint { answer, .. } | Request::Write { answer, .. } => {
                let _ = answer.send(Ok(None));
            }
        }
    }
}

/// A batch by what has to be done.
#[derive(Default)]
struct Parts<'a> {
    claims: Vec<(Pid, String)>,
    launches: Vec<NewProcess>,
    checkpoints: Vec<(Fence, &'a PackedCheckpoint)>,
    writes: Vec<&'a Fenced>,
}

impl<'a> Parts<'a> {
    fn of(batch: &'a [Request]) -> Self {
        let mut parts = Parts::default();
        for request in batch {
            match request {
                Request::Claim { pid, queue, launch, .. } => {
                    parts.claims.push((*pid, queue.clone()));
                    parts.launches.extend(launch.as_deref().cloned());
                }
                Request::Checkpoint { fence, checkpoint, .. } => parts.checkpoints.push((*fence, checkpoint)),
                Request::Write { fenced, .. } => parts.writes.push(fenced),
            }
        }
        parts
    }
}

impl Request {
    /// The border at which its commit stands.
    #[cfg(feature = "failpoints")]
    fn border(&self) -> &'static str {
        match self {
            Request::Claim { .. } => "claim-committed",
            Request::Checkpoint { .. } => "checkpoint-committed",
            Request::Write { .. } => "departure-committed",
        }
    }

    /// The failpoint at which the answer to its commit is lost.
    #[cfg(feature = "failpoints")]
    fn unanswered(&self) -> &'static str {
        match self {
            Request::Claim { .. } => "claim-unanswered",
            Request::Checkpoint { .. } => "checkpoint-unanswered",
            Request::Write { .. } => "departure-unanswered",
        }
    }

    /// Answers that the database refuses it.
    fn refuse(self, error: &Error) {
        let rejected = matches!(error, Error::Rejected(_));
        match self {
            Request::Claim { answer, .. } if rejected => {
                let _ = answer.send(Claim::Rejected(error.to_string()));
            }
            // Without an answer: the caller tries again later.
            Request::Claim { .. } => {}
            Request::Checkpoint { answer, .. } | Request::Write { answer, .. } => {
                let text = error.to_string();
                let _ = answer.send(Err(if rejected { Error::Rejected(text) } else { Error::Database(text) }));
            }
        }
    }

    fn pid(&self) -> Pid {
        match self {
            Request::Claim { pid, .. } => *pid,
            Request::Checkpoint { fence, .. } => fence.pid,
            Request::Write { fenced, .. } => fenced.fence.pid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_millis(5);

    #[test]
    fn only_a_crowd_is_gathered_and_not_for_long() {
        assert_eq!(pause_after(1, TOOK), Duration::ZERO);
        assert_eq!(pause_after(CROWD - 1, TOOK), Duration::ZERO);
        assert_eq!(pause_after(CROWD, TOOK), 2 * TOOK);
        assert_eq!(pause_after(CROWD, Duration::from_secs(30)), GATHER_MAX);
    }

    #[tokio::test]
    async fn a_worker_that_is_full_gathers_nothing() {
        let slots = Arc::new(Semaphore::new(8));
        let room = Room { slots: Arc::clone(&slots), enough: 2 };
        let _taken = slots.acquire_many(7).await.unwrap();
        let gathered = gather(Duration::from_secs(60), || room.is_enough());
        assert!(tokio::time::timeout(Duration::from_secs(5), gathered).await.is_ok());
    }
}
