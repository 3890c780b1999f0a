//! The time at which the next parked process is due.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Pause between two rounds of the cheap sweeps, which find all due processes.
pub(crate) const ROUND: Duration = Duration::from_secs(1);

/// The earliest time at which a process parked by this worker is due.
#[derive(Default)]
pub(crate) struct Timer {
    next: Mutex<Option<Instant>>,
    changed: Notify,
}

impl Timer {
    /// Notes that a process is due after this time.
    pub(crate) fn due_in(&self, pause: Duration) {
        // The next round finds later ones.
        if pause > ROUND * 2 {
            return;
        }
        let due = Instant::now() + pause;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_none_or(|next| due < next) {
            *next = Some(due);
            self.changed.notify_one();
        }
    }

    /// Waits until a process is due or the round is over.
    pub(crate) async fn wait(&self, round_ends: Instant) {
        loop {
            let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let until = next.map_or(round_ends, |next| next.min(round_ends));
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                () = self.changed.notified() => {}
            }
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_some_and(|next| next <= Instant::now()) {
            *next = None;
        }
    }
}
