//! Pauses before unusable messages go back to the broker, which delivers them again at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_common::id::Pid;

/// The first pause. It doubles with each further failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// The longest pause. The worker notices the end of the cause within this time.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Processes whose failures are counted. Beyond this number all counts are reset.
const PIDS_MAX: usize = 10_000;

/// Counts of messages that this worker gave back: in a row, for which the database may be to blame, and of each process,
/// independent of the others.
#[derive(Default)]
pub(crate) struct Backoff {
    in_a_row: AtomicU32,
    of_pids: Mutex<HashMap<Pid, u32>>,
    /// Saves the lock while no process has failures.
    n_pids: AtomicUsize,
}

impl Backoff {
    /// Counts a failure with a message, which may concern one process, and returns how long to keep it before giving it
    /// back.
    pub(crate) fn next_pause(&self, pid: Option<Pid>) -> Duration {
        let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed);
        let of_pid = pid.map_or(0, |pid| {
            let mut of_pids = self.of_pids.lock().unwrap_or_else(PoisonError::into_inner);
            if of_pids.len() >= PIDS_MAX && !of_pids.contains_key(&pid) {
                of_pids.clear();
            }
            let count = of_pids.entry(pid).or_default();
            let n_before = *count;
            *count = count.saturating_add(1);
            self.n_pids.store(of_pids.len(), Ordering::Relaxed);
            n_before
        });
        PAUSE_MIN.saturating_mul(1 << in_a_row.max(of_pid).min(16)).min(PAUSE_MAX)
    }

    /// Resets the counts after a message was used.
    pub(crate) fn end(&self, pid: Option<Pid>) {
        // Usually 0; then nothing is written to memory that other threads read.
        if self.in_a_row.load(Ordering::Relaxed) > 0 {
            self.in_a_row.store(0, Ordering::Relaxed);
        }
        if let Some(pid) = pid
            && self.n_pids.load(Ordering::Relaxed) > 0
        {
            let mut of_pids = self.of_pids.lock().unwrap_or_else(PoisonError::into_inner);
            of_pids.remove(&pid);
            self.n_pids.store(of_pids.len(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_message_is_used() {
        let backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..40).map(|_| backoff.next_pause(None)).collect();
        assert_eq!(pauses[..3], [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN]);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[39], PAUSE_MAX);
        backoff.end(None);
        assert_eq!(backoff.next_pause(None), PAUSE_MIN);
    }

    #[test]
    fn success_with_others_does_not_shorten_the_pauses_of_a_process() {
        let backoff = Backoff::default();
        let [bad, good] = [Pid::generate(), Pid::generate()];
        let pauses: Vec<Duration> = (0..3)
            .map(|_| {
                backoff.end(Some(good));
                backoff.next_pause(Some(bad))
            })
            .collect();
        assert_eq!(pauses, [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN]);
        backoff.end(Some(bad));
        assert_eq!(backoff.next_pause(Some(bad)), PAUSE_MIN);
        for _ in 0..2 * PIDS_MAX {
            backoff.next_pause(Some(Pid::generate()));
        }
        assert!(backoff.n_pids.load(Ordering::Relaxed) <= PIDS_MAX);
    }
}
