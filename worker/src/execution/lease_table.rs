//! The leases of this incarnation: what it holds and what it is just claiming, with the way to tell each process something.

use std::collections::{HashMap, hash_map};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_common::id::Pid;
use baton_common::store::worker::Wish;
use baton_common::store::writer::Fence;
use tokio::sync::Notify;

use crate::author::live::{Drain, Live};

/// One held process.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) fence: Fence,
    pub(crate) live: Arc<Live>,
    pub(crate) thread_idx: usize,
}

/// Everything that is held, and what is just being claimed.
#[derive(Default)]
pub(crate) struct LeaseTable {
    table: Mutex<Table>,
    changed: Notify,
}

#[derive(Default)]
struct Table {
    entries: HashMap<Pid, Entry>,
    /// Claims under way; `true` when another message for the same process came meanwhile.
    claiming: HashMap<Pid, bool>,
    draining: bool,
    /// How many entries each process thread has.
    loads: Vec<usize>,
}

impl Table {
    fn insert(&mut self, entry: Entry) {
        if self.loads.len() <= entry.thread_idx {
            self.loads.resize(entry.thread_idx + 1, 0);
        }
        self.loads[entry.thread_idx] += 1;
        if let Some(former) = self.entries.insert(entry.fence.pid, entry) {
            self.loads[former.thread_idx] -= 1;
        }
    }

    fn remove(&mut self, fence: Fence) {
        if self.entries.get(&fence.pid).is_some_and(|entry| entry.fence == fence)
            && let Some(entry) = self.entries.remove(&fence.pid)
        {
            self.loads[entry.thread_idx] -= 1;
        }
    }
}

/// A claim under way. It ends when this is dropped, whatever has become of it, and so a message that comes later for the
/// same process is claimed.
#[must_use = "the claim ends when this is dropped"]
pub(crate) struct Begun {
    /// None once the process is in the table.
    leases: Option<Arc<LeaseTable>>,
    pid: Pid,
}

impl Begun {
    /// Whether another message came while this claim was under way; asking answers it.
    pub(crate) fn take_another(&self) -> bool {
        let held = self.leases.as_ref();
        held.is_some_and(|held| held.lock().claiming.get_mut(&self.pid).is_some_and(std::mem::take))
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(held) = self.leases.take() {
            held.lock().claiming.remove(&self.pid);
            held.changed.notify_waiters();
        }
    }
}

impl LeaseTable {
    /// Begins a claim. `None` when one of the same process is under way: that one will look once more if it finds nothing,
    /// so this message is dealt with.
    pub(crate) fn begin_claim(self: &Arc<Self>, pid: Pid) -> Option<Begun> {
        match self.lock().claiming.entry(pid) {
            hash_map::Entry::Occupied(mut claim) => {
                claim.insert(true);
                None
            }
            hash_map::Entry::Vacant(claim) => {
                claim.insert(false);
                Some(Begun { leases: Some(Arc::clone(self)), pid })
            }
        }
    }

    /// Enters a process that has been claimed; its claim ends in the same step. A worker that has begun to drain meanwhile
    /// tells the process at once.
    pub(crate) fn enter(&self, entry: Entry, begun: Option<Begun>) {
        let mut table = self.lock();
        if let Some(mut begun) = begun {
            table.claiming.remove(&begun.pid);
            begun.leases = None;
        }
        if table.draining {
            entry.live.order(|orders| orders.drain = Drain::Soon);
        }
        table.insert(entry);
        drop(table);
        self.changed.notify_waiters();
    }

    pub(crate) fn get(&self, pid: Pid) -> Option<Entry> {
        self.lock().entries.get(&pid).cloned()
    }

    /// Forgets a process, unless it has been claimed anew meanwhile.
    pub(crate) fn remove(&self, fence: Fence) {
        self.lock().remove(fence);
        self.changed.notify_waiters();
    }

    /// Waits until this holding has ended, or the limit has passed; says whether it has ended.
    pub(crate) async fn left(&self, fence: Fence, limit: Duration) -> bool {
        self.wait(limit, || !self.holds(fence)).await
    }

    /// Waits until all of these holdings have ended, or the limit has passed.
    pub(crate) async fn all_left(&self, entries: &[Entry], limit: Duration) {
        // Asked at every change of thousands: those at the front that have ended are not looked at again.
        let mut n_left = 0;
        let reached = || {
            while entries.get(n_left).is_some_and(|entry| !self.holds(entry.fence)) {
                n_left += 1;
            }
            n_left == entries.len()
        };
        self.wait(limit, reached).await;
    }

    /// How many each process thread has.
    pub(crate) fn loads(&self, n_threads: usize) -> Vec<usize> {
        let mut loads = self.lock().loads.clone();
        loads.resize(n_threads, 0);
        loads
    }

    /// Whether this holding has not ended.
    pub(crate) fn holds(&self, fence: Fence) -> bool {
        self.lock().entries.get(&fence.pid).is_some_and(|entry| entry.fence == fence)
    }

    /// Waits until nothing is held or being claimed, or the limit has passed; says whether nothing is.
    pub(crate) async fn emptied(&self, limit: Duration) -> bool {
        self.wait(limit, || self.count() == 0).await
    }

    async fn wait(&self, limit: Duration, mut reached: impl FnMut() -> bool) -> bool {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                if reached() {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(limit, waiting).await.is_ok() || reached()
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.lock().entries.values().cloned().collect()
    }

    /// How many are held or are just being claimed.
    pub(crate) fn count(&self) -> usize {
        let table = self.lock();
        table.entries.len() + table.claiming.len()
    }

    pub(crate) fn is_claiming(&self, pid: Pid) -> bool {
        self.lock().claiming.contains_key(&pid)
    }

    /// What the row of a held process says; ignored if that holding has ended.
    pub(crate) fn order(&self, wish: Wish) {
        if let Some(entry) = self.lock().entries.get(&wish.fence.pid).filter(|entry| entry.fence == wish.fence) {
            entry.live.wish(wish.desired, wish.urgent);
        }
    }

    /// The row is not held under this fence: the holding stops at once and writes nothing more. If it is writing, that
    /// may be what has taken the row out of `held`, and the answer to it says so.
    pub(crate) fn abandon(&self, fence: Fence) {
        let table = self.lock();
        let entry = table.entries.get(&fence.pid).filter(|entry| entry.fence == fence);
        if let Some(entry) = entry.filter(|entry| !entry.live.is_writing()) {
            entry.live.order(|orders| orders.abandon = true);
        }
    }

    pub(crate) fn drain(&self, drain: Drain) {
        let mut table = self.lock();
        table.draining = true;
        for entry in table.entries.values() {
            entry.live.order(|orders| orders.drain = drain);
        }
    }

    pub(crate) fn abandon_all(&self) -> usize {
        let table = self.lock();
        for entry in table.entries.values() {
            entry.live.order(|orders| orders.abandon = true);
        }
        table.entries.len()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
