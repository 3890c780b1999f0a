//! Pauses before messages that could not be used go back to the broker, which delivers them again at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_common::id::Pid;

/// The first pause. It doubles with each setback that follows.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// The longest pause: what the cause was is noticed to be over within this time.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Processes whose setbacks are remembered. Where there are more, all are forgotten, and their pauses begin anew.
const PIDS_MAX: usize = 10_000;

/// How often this worker had to give messages back: in a row, for which the database may be to blame, and those of one
/// process, however well it goes with others.
#[derive(Default)]
pub(crate) struct Setbacks {
    in_a_row: AtomicU32,
    of_pids: Mutex<HashMap<Pid, u32>>,
    /// So that those who have no setback need no lock.
    n_pids: AtomicUsize,
}

impl Setbacks {
    /// Counts a setback with a message, which may be about one process, and says how long to keep it before it goes back.
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

    /// A message was used.
    pub(crate) fn end(&self, pid: Option<Pid>) {
        // Seldom anything but 0, and then nothing is written that other threads read.
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
        let setbacks = Setbacks::default();
        let pauses: Vec<Duration> = (0..40).map(|_| setbacks.next_pause(None)).collect();
        assert_eq!(pauses[..3], [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN]);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[39], PAUSE_MAX);
        setbacks.end(None);
        assert_eq!(setbacks.next_pause(None), PAUSE_MIN);
    }

    #[test]
    fn what_goes_well_with_others_does_not_shorten_the_pauses_of_a_process() {
        let setbacks = Setbacks::default();
        let [bad, good] = [Pid::generate(), Pid::generate()];
        let pauses: Vec<Duration> = (0..3)
            .map(|_| {
                setbacks.end(Some(good));
                setbacks.next_pause(Some(bad))
            })
            .collect();
        assert_eq!(pauses, [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN]);
        setbacks.end(Some(bad));
        assert_eq!(setbacks.next_pause(Some(bad)), PAUSE_MIN);
        for _ in 0..2 * PIDS_MAX {
            setbacks.next_pause(Some(Pid::generate()));
        }
        assert!(setbacks.n_pids.load(Ordering::Relaxed) <= PIDS_MAX);
    }
}
