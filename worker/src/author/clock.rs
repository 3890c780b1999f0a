//! The clock of a process: the system's in a worker, a simulated one in the test kit.
//!
//! The simulated clock stands still while an advance has something to do, and jumps to the end of the next sleep when the
//! advance waits for nothing else. It is not tokio's paused clock: that one also moves while a process waits for a real
//! program or a socket, so real timeouts would expire at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// The clock by which a process waits.
#[derive(Clone)]
pub(crate) enum Clock {
    System,
    Simulated(Simulated),
}

/// A clock that moves only when it is told to. Clones are the same clock.
#[derive(Clone, Default)]
pub(crate) struct Simulated {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    elapsed: Duration,
    sleepers: Vec<Sleeper>,
    /// Pieces of work outside of the advance, such as closures on the blocking pool, for which the clock stands still.
    n_held: usize,
}

struct Sleeper {
    wakes_at: Duration,
    wake: oneshot::Sender<()>,
}

impl Clock {
    /// Waits for this time.
    pub(crate) async fn sleep(&self, duration: Duration) {
        match self {
            Clock::System => tokio::time::sleep(duration).await,
            Clock::Simulated(clock) => clock.sleep(duration).await,
        }
    }

    /// Keeps a simulated clock still until the guard is dropped.
    pub(crate) fn hold(&self) -> Option<Held> {
        match self {
            Clock::System => None,
            Clock::Simulated(clock) => Some(clock.hold()),
        }
    }
}

impl Simulated {
    /// The time since the clock was made.
    pub(crate) fn elapsed(&self) -> Duration {
        self.lock().elapsed
    }

    /// Moves the clock forward and wakes every sleeper that is due.
    pub(crate) fn move_by(&self, duration: Duration) {
        let mut state = self.lock();
        state.elapsed += duration;
        let elapsed = state.elapsed;
        for sleeper in state.sleepers.extract_if(.., |sleeper| sleeper.wakes_at <= elapsed) {
            // A sleep that was dropped has no receiver.
            let _ = sleeper.wake.send(());
        }
    }

    /// Moves the clock to the end of the next sleep, unless it is held. Returns whether there was a sleeper.
    pub(crate) fn jump(&self) -> bool {
        let pause = {
            let mut state = self.lock();
            if state.n_held > 0 {
                return false;
            }
            state.sleepers.retain(|sleeper| !sleeper.wake.is_closed());
            let Some(next) = state.sleepers.iter().map(|sleeper| sleeper.wakes_at).min() else { return false };
            next.saturating_sub(state.elapsed)
        };
        self.move_by(pause);
        true
    }

    /// Whether something holds the clock.
    pub(crate) fn is_held(&self) -> bool {
        self.lock().n_held > 0
    }

    async fn sleep(&self, duration: Duration) {
        let woken = {
            let mut state = self.lock();
            let (wake, woken) = oneshot::channel();
            let wakes_at = state.elapsed.saturating_add(duration);
            state.sleepers.push(Sleeper { wakes_at, wake });
            woken
        };
        if woken.await.is_err() {
            // The clock has ended, and time does not pass any more.
            std::future::pending::<()>().await;
        }
    }

    fn hold(&self) -> Held {
        self.lock().n_held += 1;
        Held(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a simulated clock still.
pub(crate) struct Held(Simulated);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.lock().n_held -= 1;
    }
}
