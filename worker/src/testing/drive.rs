//! Polls an advance and moves the simulated clock while the advance waits for nothing else.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::Notify;

use crate::author::clock::Simulated;

/// How long an advance may wait for something that is neither a sleep nor a closure of `Context::blocking`, in real time.
const HANG_LIMIT: Duration = Duration::from_secs(60);

/// Rounds in which all other tasks of the runtime are run before the clock moves: they may have something for the advance.
const IDLE_ROUNDS: u32 = 8;

/// Notes that a future is to be polled again.
struct Woken(Notify);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

/// Runs a future to its end, or drops it when it suspends for the given time (from 1) and returns `None`.
///
/// # Panics
/// The future waits for a minute for something that does not come.
pub(super) async fn drive<F: Future>(clock: &Simulated, future: F, suspension: Option<usize>) -> Option<F::Output> {
    let mut future = pin!(future);
    let woken = Arc::new(Woken(Notify::new()));
    let waker = Waker::from(Arc::clone(&woken));
    let mut n_suspensions = 0;
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        n_suspensions += 1;
        if suspension == Some(n_suspensions) {
            return None;
        }
        until_woken(clock, &woken.0).await;
    }
}

async fn until_woken(clock: &Simulated, woken: &Notify) {
    loop {
        for _ in 0..IDLE_ROUNDS {
            if woken.notified().now_or_never().is_some() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if clock.jump() {
            continue;
        }
        match tokio::time::timeout(HANG_LIMIT, woken.notified()).await {
            Ok(()) => return,
            // A closure on the blocking pool, or a command at a site, may take long.
            Err(_) if clock.is_held() => {}
            Err(_) => panic!("the advance has waited for {} s for something that does not come", HANG_LIMIT.as_secs()),
        }
    }
}
