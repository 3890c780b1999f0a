//! The exchange between a held process and its worker: what the process does at the moment, and the orders that it has to
//! obey.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use baton_common::message::{Effect, Status};
use baton_common::state::{Desired, State};
use tokio::sync::Notify;

/// What a held process has to obey before its next advance, or in the middle of one if it is urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Orders {
    /// What the operators want, as the row said when it was last read.
    pub(crate) desired: Desired,
    /// Whether they want it at once.
    pub(crate) urgent: bool,
    /// Whether the worker stops.
    pub(crate) drain: Drain,
    /// The lease is lost: the process is dropped and writes nothing more.
    pub(crate) abandon: bool,
}

/// How urgently the worker returns its processes to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Drain {
    /// Not at all.
    No,
    /// Before the next advance.
    Soon,
    /// The grace has passed: the advance is dropped and has time to clean up.
    Now,
    /// At once, without time to clean up.
    AtOnce,
}

/// The facts about a held process, written on its thread and read on others, and its orders, written on others and read on
/// its thread.
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
    /// Boxed, since most held processes have none.
    streams: Option<Box<Streams>>,
    left_as: Option<State>,
}

/// The stage before the first advance.
const CLAIMED: &str = "claimed";

/// The stage of a short wait between two advances.
pub(crate) const SLEEPING: &str = "sleeping";

/// The stage of a fenced write.
pub(crate) const WRITING: &str = "writing";

/// The files with the output of a running program.
#[derive(Clone)]
pub(crate) struct Streams {
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
}

impl Orders {
    pub(crate) fn new(desired: Desired, urgent: bool) -> Self {
        Self { desired, urgent, drain: Drain::No, abandon: false }
    }

    /// Whether there is an order to obey before the next advance.
    pub(crate) fn are_any(&self) -> bool {
        self.abandon || self.desired != Desired::Run || self.drain != Drain::No
    }

    /// Whether an order interrupts a running advance.
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
            streams: None,
            left_as: None,
        };
        Self { facts: Mutex::new(facts), orders: Mutex::new(orders), ordered: Notify::new() }
    }

    /// The present orders.
    pub(crate) fn orders(&self) -> Orders {
        *self.lock_orders()
    }

    /// Waits until the orders meet a condition.
    pub(crate) async fn until(&self, are_such: impl Fn(&Orders) -> bool) {
        loop {
            // An order between the look and the wait is not missed.
            let ordered = self.ordered.notified();
            if are_such(&self.orders()) {
                return;
            }
            ordered.await;
        }
    }

    /// Sets what the operators want, as the row says.
    pub(crate) fn wish(&self, desired: Desired, urgent: bool) {
        self.order(|orders| {
            orders.desired = desired;
            orders.urgent = urgent;
        });
    }

    /// Changes the orders and wakes everything that waits for a change.
    pub(crate) fn order(&self, change: impl FnOnce(&mut Orders)) {
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

    /// Sets the state in which the process left this holder, as its last write says.
    pub(crate) fn set_left_as(&self, state: State) {
        self.lock().left_as = Some(state);
    }

    /// The effect of a request, now that the process has left this holder.
    pub(crate) fn effect(&self, verb: Desired) -> Effect {
        match self.lock().left_as {
            Some(State::Paused(_)) => Effect::Paused,
            Some(state @ (State::Finished | State::Excepted | State::Killed)) => Effect::ended(state),
            // Queued or parked again, since an operator has played it meanwhile or the worker stops.
            Some(State::Created | State::Running | State::Waiting) => Effect::pending(verb),
            None => Effect::NotHeld,
        }
    }

    pub(crate) fn set_streams(&self, streams: Streams) {
        self.lock().streams = Some(Box::new(streams));
    }

    pub(crate) fn streams(&self) -> Option<Streams> {
        self.lock().streams.as_deref().cloned()
    }

    /// Whether an advance is under way, which a pause has to wait for.
    pub(crate) fn is_advancing(&self) -> bool {
        !matches!(self.lock().stage.what, CLAIMED | SLEEPING | WRITING)
    }

    /// Whether a fenced write is under way.
    pub(crate) fn is_writing(&self) -> bool {
        self.lock().stage.what == WRITING
    }

    /// The reply to `baton status`.
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
        // Plain data: a panic during a write leaves nothing inconsistent.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A value and the time of its last change.
#[derive(Clone, Copy, Debug)]
struct Since<T> {
    what: T,
    since: Instant,
}

impl<T> Since<T> {
    fn now(what: T) -> Self {
        Self { what, since: Instant::now() }
    }
}
