//! Which queues are to be consumed, and for which slots; for RabbitMQ and for the broker in memory.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::envelope::classes;

/// Largest prefetch of a queue of normal priority; it is also at most the number of free slots. A worker acknowledges
/// after a commit, so this bounds the claims of one commit. More than some hundreds gain nothing, and keep tasks from
/// other workers.
const PREFETCH_MAX: usize = 400;

/// A worker that was full gathers at most this share of its slots, and at most this number.
const GATHER_SHARE: usize = 8;
const GATHER_MAX: usize = 32;

/// An order to the intake.
pub(super) enum Order {
    Consume { queues: Vec<String>, slots: Arc<Semaphore> },
    ConsumeControl,
    Stop { done: oneshot::Sender<()> },
}

/// What is to be consumed. It outlives connections.
#[derive(Default)]
pub(super) struct Wanted {
    pub(super) queues: Vec<String>,
    pub(super) slots: Option<Arc<Semaphore>>,
    /// The largest number of free slots that was seen.
    n_slots: usize,
    pub(super) control: bool,
}

impl Wanted {
    /// Whether nothing is to be consumed.
    pub(super) fn is_nothing(&self) -> bool {
        self.queues.is_empty() && !self.control
    }

    /// The prefetch of a queue of normal priority for the slots that are free now.
    pub(super) fn prefetch(&self) -> u16 {
        let free = self.slots.as_ref().map_or(0, |slots| slots.available_permits());
        u16::try_from(free.clamp(1, PREFETCH_MAX)).expect("some hundreds at most")
    }

    /// Whether fewer slots are free than a worker that was full gathers.
    pub(super) fn is_gathering(&self) -> bool {
        let free = self.slots.as_ref().map_or(0, |slots| slots.available_permits());
        free + 1 < (self.n_slots / GATHER_SHARE).min(GATHER_MAX)
    }

    /// Applies an order. Returns the sender that waits for its completion.
    pub(super) fn apply(&mut self, order: Order) -> Option<oneshot::Sender<()>> {
        match order {
            Order::Consume { queues, slots } => {
                let mut names: Vec<String> = queues.iter().flat_map(|queue| classes(queue)).collect();
                names.sort_unstable();
                names.dedup();
                self.queues = names;
                self.n_slots = slots.available_permits().max(self.n_slots);
                self.slots = Some(slots);
                None
            }
            Order::ConsumeControl => {
                self.control = true;
                None
            }
            Order::Stop { done } => {
                *self = Wanted::default();
                Some(done)
            }
        }
    }
}

/// Reports the completion of an order.
pub(super) fn finish(done: Option<oneshot::Sender<()>>) {
    if let Some(done) = done {
        let _ = done.send(());
    }
}

/// Waits for a slot. Never completes for a closed semaphore.
pub(super) async fn acquire(slots: Option<Arc<Semaphore>>) -> OwnedSemaphorePermit {
    if let Some(slots) = slots
        && let Ok(permit) = slots.acquire_owned().await
    {
        return permit;
    }
    std::future::pending().await
}
