//! Giving many processes to the fleet: in pages, of which the next is committed while two others are being told.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use baton_common::store::Store;
use baton_common::store::submit::{ByQueue, NewProcess};
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Most processes that are committed and then published together.
const PAGE_MAX: u32 = 1_000;

/// The first page, from which it is learnt how fast the broker is.
const PAGE_FIRST: u32 = 100;

/// Pages that are told at once: the next one is on its way to the broker while the last confirms of one are on theirs.
const TOLD_AT_ONCE: usize = 2;

/// How long it may take to publish a page. Rows whose messages come much later than their commit look lost: the head rule
/// has two seconds' patience with an empty queue, and a row waits for the page before its own and for its own.
const TELL_TIME: Duration = Duration::from_millis(500);

/// Accepts so many, and tells them. `accepted` is called after each commit.
///
/// Gives why the broker could not be told, if it could not: they are recorded, and workers find them.
///
/// # Errors
/// The database took no more; what was accepted before stands.
pub(crate) async fn submit(
    store: &Store,
    count: u32,
    make: impl Fn() -> NewProcess,
    tell: impl AsyncFn(&ByQueue) -> Result<(), String>,
    mut accepted: impl FnMut(&[NewProcess]),
) -> Result<Result<(), String>, Failure> {
    let (pages_tx, mut pages) = mpsc::channel::<(u32, ByQueue)>(1);
    let page_size = AtomicU32::new(PAGE_FIRST);
    let accepting = async {
        let pages_tx = pages_tx;
        let mut rest = count;
        // Room first: no page is committed before the one before it is being told. The other side takes them to the end.
        while rest > 0
            && let Ok(room) = pages_tx.reserve().await
        {
            let n_next = rest.min(page_size.load(Ordering::Relaxed));
            let page: Vec<NewProcess> = (0..n_next).map(|_| make()).collect();
            let queued = store.submit(&page).await?.queued;
            rest -= n_next;
            accepted(&page);
            room.send((n_next, queued));
        }
        Ok::<_, Failure>(())
    };
    let is_told = Cell::new(true);
    let telling = stream::poll_fn(|cx| pages.poll_recv(cx))
        .map(async |(n_told, queued)| {
            if !is_told.get() {
                return Ok(());
            }
            let since = Instant::now();
            let told = tell(&queued).await;
            is_told.set(is_told.get() && told.is_ok());
            page_size.store(next_page(n_told, since.elapsed()), Ordering::Relaxed);
            told
        })
        .buffered(TOLD_AT_ONCE)
        .fold(Ok(()), async |before, told| before.and(told));
    let (accepted, told) = tokio::join!(accepting, telling);
    accepted.map(|()| told)
}

/// How many can be told in [`TELL_TIME`], where so many took so long.
fn next_page(n_told: u32, took: Duration) -> u32 {
    let n_next = u128::from(n_told) * TELL_TIME.as_micros() / took.as_micros().max(1);
    u32::try_from(n_next).unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_the_broker_takes_in_half_a_second() {
        assert_eq!(next_page(100, Duration::from_millis(5)), PAGE_MAX);
        assert_eq!(next_page(100, Duration::from_millis(250)), 200);
        assert_eq!(next_page(1_000, Duration::from_secs(5)), 100);
        assert_eq!(next_page(1, Duration::from_secs(60)), 1);
        assert_eq!(next_page(1_000, Duration::ZERO), PAGE_MAX);
    }
}
