//! The gate for tasks: a worker takes none while it ends, its database is away, the fleet is paused or its machine has a
//! shortage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_common::communicator::Communicator;
use tokio::sync::{Mutex, Notify, Semaphore};

use crate::machine::shortage::Health;

/// Starts and stops the consumption of tasks.
pub(crate) struct Gate {
    communicator: Communicator,
    queues: Arc<[String]>,
    slots: Arc<Semaphore>,
    health: Arc<Health>,
    /// Notified when the gate opens, so quarantined processes can be claimed again.
    quarantine_free: Arc<Notify>,
    takes_tasks: AtomicBool,
    halts: Mutex<Halts>,
}

/// The reasons against taking tasks other than a shortage, and what the worker takes now.
#[derive(Default)]
struct Halts {
    is_ending: bool,
    is_database_away: bool,
    is_fleet_paused: bool,
    taking: Taking,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Taking {
    /// Neither tasks nor durable broadcasts.
    #[default]
    Nothing,
    /// Durable broadcasts only.
    Broadcasts,
    Everything,
}

impl Gate {
    /// A closed gate.
    pub(crate) fn new(
        communicator: Communicator,
        queues: Arc<[String]>,
        slots: Arc<Semaphore>,
        health: Arc<Health>,
        quarantine_free: Arc<Notify>,
    ) -> Self {
        let (takes_tasks, halts) = (AtomicBool::new(false), Mutex::default());
        Self { communicator, queues, slots, health, quarantine_free, takes_tasks, halts }
    }

    /// Notes that the database answered a beat, which also says whether the fleet is paused.
    pub(crate) async fn has_database(&self, is_fleet_paused: bool) {
        let mut halts = self.halts.lock().await;
        (halts.is_database_away, halts.is_fleet_paused) = (false, is_fleet_paused);
        self.settle(&mut halts).await;
    }

    /// Notes that the database does not answer.
    pub(crate) async fn lacks_database(&self) {
        let mut halts = self.halts.lock().await;
        halts.is_database_away = true;
        self.settle(&mut halts).await;
    }

    /// Closes the gate for good, at the end of the incarnation.
    pub(crate) async fn take_nothing_more(&self) {
        let mut halts = self.halts.lock().await;
        halts.is_ending = true;
        self.settle(&mut halts).await;
    }

    /// Opens or closes the gate by the current shortage.
    pub(crate) async fn take_what_it_can(&self) {
        self.settle(&mut *self.halts.lock().await).await;
    }

    async fn settle(&self, halts: &mut Halts) {
        let taking = if halts.is_ending || halts.is_database_away {
            Taking::Nothing
        } else if halts.is_fleet_paused || self.health.stops_taking() {
            Taking::Broadcasts
        } else {
            Taking::Everything
        };
        if std::mem::replace(&mut halts.taking, taking) == taking {
            return;
        }
        self.takes_tasks.store(taking == Taking::Everything, Ordering::Release);
        match taking {
            Taking::Nothing => self.communicator.stop_consuming().await,
            Taking::Broadcasts => {
                self.communicator.stop_consuming().await;
                self.communicator.consume_control().await;
            }
            Taking::Everything => {
                self.communicator.consume(self.queues.to_vec(), Arc::clone(&self.slots)).await;
                self.communicator.consume_control().await;
                self.quarantine_free.notify_one();
            }
        }
    }

    /// Whether this worker takes tasks now.
    pub(crate) fn takes_tasks(&self) -> bool {
        self.takes_tasks.load(Ordering::Acquire) && !self.health.stops_taking()
    }
}
