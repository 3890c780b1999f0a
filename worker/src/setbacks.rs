//! Pauses before messages that could not be used go back to the broker, which delivers them again at once.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The first pause. It doubles with each setback that follows without a success in between.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// The longest pause: what the cause was is noticed to be over within this time.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// How often in a row this worker had to give a message back.
#[derive(Default)]
pub(crate) struct Setbacks(AtomicU32);

impl Setbacks {
    /// Counts a setback, and says how long to keep the message before it goes back.
    pub(crate) fn next_pause(&self) -> Duration {
        let n_before = self.0.fetch_add(1, Ordering::Relaxed);
        PAUSE_MIN.saturating_mul(1 << n_before.min(16)).min(PAUSE_MAX)
    }

    /// A message was used.
    pub(crate) fn end(&self) {
        // Seldom anything but 0, and then nothing is written that other threads read.
        if self.0.load(Ordering::Relaxed) > 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_message_is_used() {
        let setbacks = Setbacks::default();
        let pauses: Vec<Duration> = (0..40).map(|_| setbacks.next_pause()).collect();
        assert_eq!(pauses[..3], [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN]);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[39], PAUSE_MAX);
        setbacks.end();
        assert_eq!(setbacks.next_pause(), PAUSE_MIN);
    }
}
