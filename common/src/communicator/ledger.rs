//! What one channel has delivered and nobody has settled yet.
//!
//! Acknowledging many deliveries in one frame is one entry in a quorum queue's log instead of one for each, but it says
//! "everything up to here": so it is only said of a beginning in which every delivery is done with.

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
    /// So many that are done with and not acknowledged hold up the next ones.
    many: usize,
    /// Whoever acknowledges has it: a frame that overtakes another one names deliveries that the broker knows no more, and
    /// it closes the channel over that.
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

/// How long a delivery that is done with waits for those before it.
const LAG_MAX: Duration = Duration::from_millis(100);

/// One delivery in its ledger.
#[derive(Clone, Debug)]
pub(super) struct Receipt {
    ledger: Arc<Ledger>,
    tag: u64,
}

impl Ledger {
    /// Of a channel that has so many deliveries at most.
    pub(super) fn new(prefetch: u16) -> Self {
        Self { many: usize::from(prefetch / 2).max(1), turn: tokio::sync::Mutex::default(), book: Mutex::default() }
    }

    /// Enters a delivery.
    pub(super) fn enter(self: &Arc<Self>, tag: u64, acker: Acker) -> Receipt {
        self.lock().open.insert(tag, Entry { acker, done_at: None });
        Receipt { ledger: Arc::clone(self), tag }
    }

    /// Whether so many are done with that it is time to acknowledge them.
    pub(super) fn is_due(&self) -> bool {
        self.lock().n_done >= self.many
    }

    /// How many are not settled.
    pub(super) fn len(&self) -> usize {
        self.lock().open.len()
    }

    /// Acknowledges what is done with: a beginning of it in one frame, and one by one what has waited for a gap to close
    /// for too long. Says how many frames that took, and whether anything is done with that waits.
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
    /// Says that it is done with; [`Ledger::acknowledge_done`] tells the broker. True when whoever calls that has to be
    /// told: of the first since it was called, and once it is time to.
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

    /// Acknowledges it now.
    pub(super) async fn ack(self) {
        if let Some(acker) = self.acker() {
            ack(&acker, false).await;
        }
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Gives it back to its queue.
    pub(super) async fn give_back(self) {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        if let Some(acker) = self.acker() {
            let _ = timeout(ANSWER_LIMIT, acker.nack(options)).await;
        }
        self.ledger.lock().open.remove(&self.tag);
    }

    /// Whether its channel is still there.
    pub(super) fn is_usable(&self) -> bool {
        self.acker().is_some_and(|acker| acker.usable())
    }

    /// None once it is settled.
    fn acker(&self) -> Option<Acker> {
        self.ledger.lock().open.get(&self.tag).map(|entry| entry.acker.clone())
    }
}

/// A delivery of a channel that has ended is someone else's by now, so a failure here means nothing.
async fn ack(acker: &Acker, multiple: bool) {
    let _ = timeout(ANSWER_LIMIT, acker.ack(BasicAckOptions { multiple })).await;
    border!("acknowledged");
}
