//! The group commit: two lanes through which every claim, checkpoint and departure of a process goes. Claims take the
//! first lane, checkpoints the second; departures take the second unless it is committing checkpoints.
//!
//! A lane commits the entries that arrived during its previous commit, in one transaction per kind of entry (on SQLite
//! in one for all). So an idle system answers after one commit, and a busy one makes few commits. After a large commit
//! the lane waits for twice its duration to gather claims and departures, unless the worker's slots are nearly full:
//! otherwise several workers would share the same processes out over several times as many commits. One lane prepares
//! its commit while the other's is being written to disk. While both are idle, everything takes the first lane, since
//! the server process of a recently used connection answers sooner. Each transaction goes through its rows once, in the
//! order of their ids, so overlapping transactions wait for each other and do not deadlock.

mod batch;
mod lane;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc, oneshot};

use batch::Entry;
use lane::{BATCH_ROWS_MAX, GATHER_FREE, Lane, Room};

use super::blob::Checkpoint;
use super::error::Error;
use super::handle::Store;
pub use super::lease::{Attempt, Claim, Claimed, Fence, Fenced, How, Output, Stream, Verb, Written};
use super::submit::NewProcess;
use crate::id::{Incarnation, Pid};

/// The capacity of a lane's channel: two batches. Later entries wait at the channel, which is the back pressure that a
/// slow database needs.
const QUEUE_LENGTH: usize = 2 * BATCH_ROWS_MAX;

/// The handle on the writer. Cheap to clone; the writer ends when the last handle is dropped.
#[derive(Clone)]
pub struct Writer {
    first: mpsc::Sender<Entry>,
    second: mpsc::Sender<Entry>,
    /// The number of checkpoints without an answer.
    n_checkpoints: Arc<AtomicUsize>,
    /// The number of lanes that are committing.
    busy: Arc<AtomicUsize>,
    unsure: Arc<AtomicBool>,
}

impl Writer {
    /// Creates the writer of one incarnation, and the task that its caller must run. `slots` are the slots of the
    /// worker, all free.
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
            let (entries, receiver) = mpsc::channel(QUEUE_LENGTH);
            let (busy, unsure) = (Arc::clone(&busy), Arc::clone(&unsure));
            let lane = Lane { db, dialect: store.dialect, me, room, busy, unsure };
            Ok::<_, Error>((entries, lane.run(receiver)))
        };
        if store.is_embedded() {
            // SQLite has a single writer.
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

    /// Returns whether a commit has gone without an answer since the last call. The database may then say that this
    /// worker holds a process that it does not know.
    pub fn take_unsure(&self) -> bool {
        self.unsure.swap(false, Ordering::AcqRel)
    }

    /// The lane for a checkpoint: the first while both are idle.
    fn for_checkpoint(&self) -> &mpsc::Sender<Entry> {
        if self.busy.load(Ordering::Relaxed) == 0 { &self.first } else { &self.second }
    }

    /// The lane for a departure. Its separate statement would delay processes that wait for a checkpoint in the same
    /// lane; in the lane of claims it delays processes that have not begun.
    fn for_departure(&self) -> &mpsc::Sender<Entry> {
        let checkpoints_are_under_way = self.n_checkpoints.load(Ordering::Relaxed) > 0;
        if self.busy.load(Ordering::Relaxed) == 0 || checkpoints_are_under_way { &self.first } else { &self.second }
    }

    /// Claims a process. A launch from outside is inserted first.
    ///
    /// Waits while the database is unreachable.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the worker is stopping.
    ///
    /// # Cancel safety
    /// Not cancel safe: a lease whose answer is dropped is given back at the second beat.
    pub async fn claim(&self, pid: Pid, queue: String, launch: Option<Box<NewProcess>>) -> Result<Claim, Error> {
        let (answer, receiver) = oneshot::channel();
        let entry = Entry::Claim { pid, queue, launch, answer };
        self.first.send(entry).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)
    }

    /// Writes a checkpoint and keeps the lease. Returns as [`Writer::write`] does.
    ///
    /// # Errors
    /// See [`Writer::write`].
    pub async fn checkpoint(&self, fence: Fence, checkpoint: &Checkpoint) -> Result<Option<Written>, Error> {
        let (answer, receiver) = oneshot::channel();
        let entry = Entry::Checkpoint { fence, checkpoint: checkpoint.into(), answer };
        let _counted = Counted::new(&self.n_checkpoints);
        self.for_checkpoint().send(entry).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)?
    }

    /// Writes; `None` means that the lease is lost: stop the process at once and write nothing more.
    ///
    /// Waits while the database is unreachable.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the worker is stopping. [`Error::Rejected`] if the database can never store the values, or
    /// another error if it refuses this write; nothing is written then.
    pub async fn write(&self, fenced: Fenced) -> Result<Option<Written>, Error> {
        let (answer, receiver) = oneshot::channel();
        let entry = Entry::Write { fenced: Box::new(fenced), answer };
        self.for_departure().send(entry).await.map_err(|_| Error::Stopped)?;
        receiver.await.map_err(|_| Error::Stopped)?
    }
}

/// Counts its owner for as long as it lives.
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
