//! What this incarnation holds: for each process the way to tell it something, and what it does right now.

use std::collections::{HashMap, hash_map};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_common::id::Pid;
use baton_common::message::{Effect, Status};
use baton_common::state::{Desired, State};
use baton_common::store::worker::Wish;
use baton_common::store::writer::Fence;
use tokio::sync::Notify;

use crate::local::sandbox::Sandbox;
use crate::process::Since;

/// What a held process has to obey before its next advance, or in the middle of one if it is urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Orders {
    /// What the row said when it was last read.
    pub(crate) desired: Desired,
    /// Whether that is wanted at once.
    pub(crate) urgent: bool,
    /// Whether the worker stops.
    pub(crate) drain: Drain,
    /// The lease is lost: drop everything and write nothing more.
    pub(crate) abandon: bool,
}

/// How urgently the worker wants its processes back in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Drain {
    /// It does not.
    No,
    /// Before the next advance.
    Soon,
    /// The grace has passed: drop the advance, and give it time to end what it runs.
    Now,
    /// Somebody is in a hurry: do not even wait for that.
    AtOnce,
}

/// What a held process does right now, written on its thread and read on another; and what it has to obey, the other way
/// round.
pub(crate) struct Live {
    facts: Mutex<Facts>,
    orders: Mutex<Orders>,
    ordered: Notify,
}

struct Facts {
    stage: Since<&'static str>,
    advances: u64,
    last_line: Option<String>,
    child: Option<u32>,
    memory_bytes: Option<u64>,
    /// Most held processes have none.
    sandbox: Option<Box<Sandbox>>,
    left_as: Option<State>,
}

/// The stage before the first advance.
const CLAIMED: &str = "claimed";

/// The stage of a short wait between two advances.
pub(crate) const SLEEPING: &str = "sleeping";

/// The stage of a fenced write.
pub(crate) const WRITING: &str = "writing";

/// One held process.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) fence: Fence,
    pub(crate) live: Arc<Live>,
    pub(crate) thread_idx: usize,
}

/// Everything that is held, and what is just being claimed.
#[derive(Default)]
pub(crate) struct Held {
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

impl Orders {
    pub(crate) fn new(desired: Desired, urgent: bool) -> Self {
        Self { desired, urgent, drain: Drain::No, abandon: false }
    }

    /// Whether there is anything to obey before the next advance.
    pub(crate) fn are_any(&self) -> bool {
        self.abandon || self.desired != Desired::Run || self.drain != Drain::No
    }

    /// Whether a running advance has to be dropped.
    pub(crate) fn interrupts(&self) -> bool {
        self.abandon
            || self.desired == Desired::Kill
            || (self.desired == Desired::Pause && self.urgent)
            || self.drain >= Drain::Now
    }
}

impl Live {
    pub(crate) fn new(advances: u64, orders: Orders) -> Self {
        let facts = Facts {
            stage: Since::now(CLAIMED),
            advances,
            last_line: None,
            child: None,
            memory_bytes: None,
            sandbox: None,
            left_as: None,
        };
        Self { facts: Mutex::new(facts), orders: Mutex::new(orders), ordered: Notify::new() }
    }

    /// What has to be obeyed now.
    pub(crate) fn orders(&self) -> Orders {
        *self.lock_orders()
    }

    /// Waits until the orders are such.
    pub(crate) async fn until(&self, are_such: impl Fn(&Orders) -> bool) {
        loop {
            // What is ordered between the look and the wait is not missed.
            let ordered = self.ordered.notified();
            if are_such(&self.orders()) {
                return;
            }
            ordered.await;
        }
    }

    /// What the row says is desired.
    pub(crate) fn wish(&self, desired: Desired, urgent: bool) {
        self.order(|orders| {
            orders.desired = desired;
            orders.urgent = urgent;
        });
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        let mut orders = self.lock_orders();
        let before = *orders;
        change(&mut orders);
        if *orders != before {
            self.ordered.notify_waiters();
        }
    }

    fn lock_orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_stage(&self, stage: &'static str) {
        let mut facts = self.lock();
        if facts.stage.what != stage {
            facts.stage = Since::now(stage);
        }
    }

    pub(crate) fn set_advances(&self, advances: u64) {
        self.lock().advances = advances;
    }

    pub(crate) fn set_last_line(&self, line: &str) {
        self.lock().last_line = Some(line.chars().take(200).collect());
    }

    pub(crate) fn set_child(&self, child: Option<u32>, memory_bytes: Option<u64>) {
        let mut facts = self.lock();
        facts.child = child;
        facts.memory_bytes = memory_bytes;
    }

    /// The state in which the row has left this holder, by its own last write.
    pub(crate) fn set_left_as(&self, state: State) {
        self.lock().left_as = Some(state);
    }

    /// What a request has come to, now that the process has left this holder.
    pub(crate) fn effect(&self, verb: Desired) -> Effect {
        match self.lock().left_as {
            Some(State::Paused(_)) => Effect::Paused,
            Some(state @ (State::Finished | State::Excepted | State::Killed)) => Effect::ended(state),
            // Back in the queue or asleep, since somebody has played it meanwhile or the worker stops.
            Some(State::Created | State::Running | State::Waiting) => Effect::pending(verb),
            None => Effect::NotHeld,
        }
    }

    pub(crate) fn set_sandbox(&self, sandbox: Sandbox) {
        self.lock().sandbox = Some(Box::new(sandbox));
    }

    pub(crate) fn sandbox(&self) -> Option<Sandbox> {
        self.lock().sandbox.as_deref().cloned()
    }

    /// Whether an advance is under way, so that a pause has to wait for it.
    pub(crate) fn is_advancing(&self) -> bool {
        !matches!(self.lock().stage.what, CLAIMED | SLEEPING | WRITING)
    }

    fn is_writing(&self) -> bool {
        self.lock().stage.what == WRITING
    }

    /// The answer to `status`.
    pub(crate) fn status(&self, worker: &str, epoch: i64) -> Status {
        let facts = self.lock();
        Status {
            stage: facts.stage.what.to_owned(),
            stage_ms: u64::try_from(facts.stage.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            advances: facts.advances,
            worker: worker.to_owned(),
            epoch,
            last_line: facts.last_line.clone(),
            child: facts.child,
            memory_bytes: facts.memory_bytes,
            blocked_ms: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        // Plain data: a panic while it was written leaves nothing half-done that matters.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Says that a claim is under way. `false` when one is already: that one will look once more if it finds nothing, so
    /// this message is dealt with.
    pub(crate) fn begin_claim(&self, pid: Pid) -> bool {
        match self.lock().claiming.entry(pid) {
            hash_map::Entry::Occupied(mut claim) => {
                claim.insert(true);
                false
            }
            hash_map::Entry::Vacant(claim) => {
                claim.insert(false);
                true
            }
        }
    }

    /// Whether another message came while this claim was under way; asking answers it.
    pub(crate) fn take_another(&self, pid: Pid) -> bool {
        self.lock().claiming.get_mut(&pid).is_some_and(std::mem::take)
    }

    /// Says how the claim ended. A worker that has begun to drain meanwhile tells the process at once.
    pub(crate) fn end_claim(&self, pid: Pid, entry: Option<Entry>) {
        let mut table = self.lock();
        table.claiming.remove(&pid);
        if let Some(entry) = entry {
            if table.draining {
                entry.live.order(|orders| orders.drain = Drain::Soon);
            }
            table.insert(entry);
        }
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
