//! The unsettled deliveries of one channel.
//!
//! A frame that acknowledges many deliveries is one entry in the log of a quorum queue instead of one for each
//! delivery. It acknowledges everything up to a tag, so it is used only up to the first delivery that is not complete.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::Acker;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::time::{Duration, Instant, timeout};

use super::link::ANSWER_LIMIT;
use crate::border;

/// The deliveries of one channel.
#[derive(Debug)]
pub(super) struct Ledger {
    /// From this number of completed deliveries on, the broker may stop delivering until they are acknowledged.
    many: usize,
    /// Held while acknowledging. If a frame overtakes another one, the other acknowledges deliveries that the broker no
    /// longer knows, and the broker closes the channel.
    turn: tokio::sync::Mutex<()>,
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
    done_at: Option<Instant>,
}

/// How long a completed delivery waits for earlier ones.
const LAG_MAX: Duration = Duration::from_millis(100);

/// One delivery in its ledger.
#[derive(Clone, Debug)]
pub(super) struct Receipt {
    ledger: Arc<Ledger>,
    tag: u64,
}

impl Ledger {
    /// The ledger of a channel with this prefetch.
    pub(super) fn new(prefetch: u16) -> Self {
        Self { many: usize::from(prefetch / 2).max(1), turn: tokio::sync::Mutex::default(), book: Mutex::default() }
    }

    /// Adds a delivery.
    pub(super) fn enter(self: &Arc<Self>, tag: u64, acker: Acker) -> Receipt {
        self.lock().open.insert(tag, Entry { acker, done_at: None });
        Receipt { ledger: Arc::clone(self), tag }
    }

    /// Whether enough deliveries are complete to acknowledge them now.
    pub(super) fn is_due(&self) -> bool {
        self.lock().n_done >= self.many
    }

    /// Number of unsettled deliveries.
    pub(super) fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Acknowledges completed deliveries: those before the first incomplete one in one frame, and later ones singly
    /// once they have waited too long. Returns the number of frames, and whether completed deliveries still wait.
    pub(super) async fn acknowledge_done(&self) -> (u64, bool) {
        let _turn = self.turn.lock().await;
        let (beginning, late, is_any_left) = {
            let mut book = self.lock();
            book.n_done = 0;
            let open = &mut book.open;
            let first_open = open.iter().find(|(_, entry)| entry.done_at.is_none()).map_or(u64::MAX, |(tag, _)| *tag);
            let rest = open.split_off(&first_open);
            let beginning = std::mem::replace(open, rest).pop_last().map(|(_, entry)| entry.acker);
            let is_late = |entry: &Entry| entry.done_at.is_some_and(|at| at.elapsed() > LAG_MAX);
            let late = open.extract_if(.., |_, entry| is_late(entry)).map(|(_, entry)| entry.acker).collect::<Vec<_>>();
            (beginning, late, open.values().any(|entry| entry.done_at.is_some()))
        };
        let mut n_frames = 0;
        if let Some(acker) = beginning {
            ack(&acker, true).await;
            n_frames += 1;
        }
        for acker in late {
            ack(&acker, false).await;
            n_frames += 1;
        }
        (n_frames, is_any_left)
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receipt {
    /// Marks the delivery as complete. [`Ledger::acknowledge_done`] acknowledges it. Returns true if that must be
    /// scheduled: for the first completed delivery since the last call, and once it is due.
    pub(super) fn done(&self) -> bool {
        let mut book = self.ledger.lock();
        if let Some(entry) = book.open.get_mut(&self.tag) {
            entry.done_at = Some(Instant::now());
            book.n_done += 1;
        }
        book.n_done == 1 || book.n_done >= self.ledger.many
    }

    pub(super) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Acknowledges the delivery now.
    pub(super) async fn ack(self) {
        if let Some(acker) = self.acker() {
            ack(&acker, false).await;
        }
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Requeues the delivery.
    pub(super) async fn give_back(self) {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        if let Some(acker) = self.acker() {
            let _ = timeout(ANSWER_LIMIT, acker.nack(options)).await;
        }
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Whether its channel is still open.
    pub(super) fn is_usable(&self) -> bool {
        self.acker().is_some_and(|acker| acker.usable())
    }

    /// Returns `None` once it is settled.
    fn acker(&self) -> Option<Acker> {
        self.ledger.lock().open.get(&self.tag).map(|entry| entry.acker.clone())
    }
}

/// Sends an acknowledgement. A failure means that the channel has ended, and then the broker delivers the message
/// again.
async fn ack(acker: &Acker, multiple: bool) {
    let _ = timeout(ANSWER_LIMIT, acker.ack(BasicAckOptions { multiple })).await;
    border!("acknowledged");
}
