//! What one channel has delivered and nobody has settled yet.
//!
//! Acknowledging many deliveries in one frame is one entry in a quorum queue's log instead of one for each, but it says
//! "everything up to here": so it is only said of a beginning in which every delivery is done with.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::Acker;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::time::timeout;

use super::link::ANSWER_LIMIT;

/// The deliveries of one channel.
#[derive(Debug)]
pub(super) struct Ledger {
    /// So many that are done with and not acknowledged hold up the next ones.
    many: usize,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    open: BTreeMap<u64, Entry>,
    n_done: usize,
}

#[derive(Debug)]
struct Entry {
    acker: Acker,
    is_done: bool,
}

/// One delivery in its ledger.
#[derive(Clone, Debug)]
pub(super) struct Receipt {
    ledger: Arc<Ledger>,
    tag: u64,
    acker: Acker,
}

impl Ledger {
    /// Of a channel that has so many deliveries at most.
    pub(super) fn new(prefetch: u16) -> Self {
        Self { many: usize::from(prefetch / 4).max(1), book: Mutex::default() }
    }

    /// Enters a delivery.
    pub(super) fn enter(self: &Arc<Self>, tag: u64, acker: Acker) -> Receipt {
        self.lock().open.insert(tag, Entry { acker: acker.clone(), is_done: false });
        Receipt { ledger: Arc::clone(self), tag, acker }
    }

    /// How many are not settled.
    pub(super) fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Acknowledges everything that is done with: a beginning of it in one frame, the others one by one. Says how many
    /// frames that took.
    pub(super) async fn acknowledge_done(&self) -> u64 {
        let (beginning, others) = {
            let mut book = self.lock();
            book.n_done = 0;
            let open = &mut book.open;
            let first_open = open.iter().find(|(_, entry)| !entry.is_done).map_or(u64::MAX, |(tag, _)| *tag);
            let rest = open.split_off(&first_open);
            let beginning = std::mem::replace(open, rest).pop_last().map(|(_, entry)| entry.acker);
            (beginning, open.extract_if(.., |_, entry| entry.is_done).map(|(_, entry)| entry.acker).collect::<Vec<_>>())
        };
        let mut n_frames = 0;
        if let Some(acker) = beginning {
            ack(&acker, true).await;
            n_frames += 1;
        }
        for acker in others {
            ack(&acker, false).await;
            n_frames += 1;
        }
        n_frames
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receipt {
    /// Says that it is done with; [`Ledger::acknowledge_done`] tells the broker. Gives the ledger, and whether so many of
    /// it are done with that it is time to.
    pub(super) fn done(&self) -> (&Arc<Ledger>, bool) {
        let mut book = self.ledger.lock();
        if let Some(entry) = book.open.get_mut(&self.tag) {
            entry.is_done = true;
            book.n_done += 1;
        }
        (&self.ledger, book.n_done >= self.ledger.many)
    }

    /// Acknowledges it now.
    pub(super) async fn ack(self) {
        ack(&self.acker, false).await;
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Gives it back to its queue.
    pub(super) async fn give_back(self) {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        let _ = timeout(ANSWER_LIMIT, self.acker.nack(options)).await;
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Whether its channel is still there.
    pub(super) fn is_usable(&self) -> bool {
        self.acker.usable()
    }
}

/// A delivery of a channel that has ended is someone else's by now, so a failure here means nothing.
async fn ack(acker: &Acker, multiple: bool) {
    let _ = timeout(ANSWER_LIMIT, acker.ack(BasicAckOptions { multiple })).await;
}
