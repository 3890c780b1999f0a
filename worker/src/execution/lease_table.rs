//! The leases of this incarnation: the processes that it holds or is claiming, and the channel to each.

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

/// All processes that are held or being claimed.
#[derive(Default)]
pub(crate) struct LeaseTable {
    table: Mutex<Table>,
    changed: Notify,
}

#[derive(Default)]
struct Table {
    entries: HashMap<Pid, Entry>,
    /// Claims under way; `true` if another message for the same process arrived meanwhile.
    claiming: HashMap<Pid, bool>,
    draining: bool,
    /// The number of entries of each process thread.
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

/// A claim under way. It ends when this is dropped, whatever its result, so that a later message for the same process can
/// claim again.
#[must_use = "the claim ends when this is dropped"]
pub(crate) struct ClaimGuard {
    /// `None` once the process is in the table.
    leases: Option<Arc<LeaseTable>>,
    pid: Pid,
}

impl ClaimGuard {
    /// Whether another message arrived during this claim. Resets the answer.
    pub(crate) fn take_another(&self) -> bool {
        let held = self.leases.as_ref();
        held.is_some_and(|held| held.lock().claiming.get_mut(&self.pid).is_some_and(std::mem::take))
    }
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        if let Some(held) = self.leases.take() {
            held.lock().claiming.remove(&self.pid);
            held.changed.notify_waiters();
        }
    }
}

impl LeaseTable {
    /// Begins a claim. `None` if a claim of the same process is under way; that claim tries again if it finds nothing, so
    /// the caller's message needs no claim.
    pub(crate) fn begin_claim(self: &Arc<Self>, pid: Pid) -> Option<ClaimGuard> {
        match self.lock().claiming.entry(pid) {
            hash_map::Entry::Occupied(mut claim) => {
                claim.insert(true);
                None
            }
            hash_map::Entry::Vacant(claim) => {
                claim.insert(false);
                Some(ClaimGuard { leases: Some(Arc::clone(self)), pid })
            }
        }
    }

    /// Enters a claimed process and ends its claim in the same step. If the worker is draining, the process is told at
    /// once.
    pub(crate) fn enter(&self, entry: Entry, guard: Option<ClaimGuard>) {
        let mut table = self.lock();
        if let Some(mut guard) = guard {
            table.claiming.remove(&guard.pid);
            guard.leases = None;
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

    /// Removes a process, unless it was claimed again meanwhile.
    pub(crate) fn remove(&self, fence: Fence) {
        self.lock().remove(fence);
        self.changed.notify_waiters();
    }

    /// Waits until this attempt has ended or the limit has passed; returns whether it has ended.
    pub(crate) async fn left(&self, fence: Fence, limit: Duration) -> bool {
        self.wait(limit, || !self.holds(fence)).await
    }

    /// Waits until all these attempts have ended or the limit has passed.
    pub(crate) async fn all_left(&self, entries: &[Entry], limit: Duration) {
        // Evaluated at every change, with thousands of entries: ended ones at the front are not checked again.
        let mut n_left = 0;
        let reached = || {
            while entries.get(n_left).is_some_and(|entry| !self.holds(entry.fence)) {
                n_left += 1;
            }
            n_left == entries.len()
        };
        self.wait(limit, reached).await;
    }

    /// The number of processes of each process thread.
    pub(crate) fn loads(&self, n_threads: usize) -> Vec<usize> {
        let mut loads = self.lock().loads.clone();
        loads.resize(n_threads, 0);
        loads
    }

    /// Whether this attempt has not ended.
    pub(crate) fn holds(&self, fence: Fence) -> bool {
        self.lock().entries.get(&fence.pid).is_some_and(|entry| entry.fence == fence)
    }

    /// Waits until nothing is held or being claimed or the limit has passed; returns whether the table is empty.
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

    /// The number of processes that are held or being claimed.
    pub(crate) fn count(&self) -> usize {
        let table = self.lock();
        table.entries.len() + table.claiming.len()
    }

    pub(crate) fn is_claiming(&self, pid: Pid) -> bool {
        self.lock().claiming.contains_key(&pid)
    }

    /// Passes the request in its row to a held process; ignored if the attempt has ended.
    pub(crate) fn order(&self, wish: Wish) {
        if let Some(entry) = self.lock().entries.get(&wish.fence.pid).filter(|entry| entry.fence == wish.fence) {
            entry.live.wish(wish.desired, wish.urgent);
        }
    }

    /// Stops the attempt at once, without further writes, because its row is not held under this fence. An attempt that
    /// is writing is spared: that write may have taken the row out of `held`, and its answer says so.
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
