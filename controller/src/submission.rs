//! Submits many processes in pages. A page is committed while two earlier ones are being announced.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use baton_common::store::Store;
use baton_common::store::submit::{ByQueue, NewProcess};
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Maximum number of processes that are committed and then announced together.
const PAGE_MAX: u32 = 1_000;

/// Size of the first page, which measures how fast the broker is.
const PAGE_FIRST: u32 = 100;

/// Pages that are announced at once: one is being published while the last confirms of the other arrive.
const ANNOUNCED_AT_ONCE: usize = 2;

/// Target time to publish a page. A row whose message arrives much later than its commit looks lost: with an empty queue,
/// the head rule allows two seconds, and a row waits for the previous page and for its own.
const ANNOUNCE_TIME: Duration = Duration::from_millis(500);

/// Submits `count` processes and announces them. Calls `accepted` after each commit.
///
/// The inner result is the reason why processes could not be announced. They are recorded, and workers find them in the
/// database.
///
/// # Errors
/// The database failed. Processes that were accepted before stay accepted.
pub(crate) async fn submit(
    store: &Store,
    count: u32,
    make: impl Fn() -> NewProcess,
    announce: impl AsyncFn(&ByQueue) -> Result<(), String>,
    mut accepted: impl FnMut(&[NewProcess]),
) -> Result<Result<(), String>, Failure> {
    let (pages_tx, mut pages) = mpsc::channel::<(u32, ByQueue)>(1);
    let page_size = AtomicU32::new(PAGE_FIRST);
    let accepting = async {
        let pages_tx = pages_tx;
        let mut rest = count;
        // Reserve first: a page is committed only when the previous one is being announced. The receiver takes all pages.
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
    let is_announced = Cell::new(true);
    let announcing = stream::poll_fn(|cx| pages.poll_recv(cx))
        .map(async |(n_announced, queued)| {
            if !is_announced.get() {
                return Ok(());
            }
            let since = Instant::now();
            let announced = announce(&queued).await;
            is_announced.set(is_announced.get() && announced.is_ok());
            page_size.store(next_page(n_announced, since.elapsed()), Ordering::Relaxed);
            announced
        })
        .buffered(ANNOUNCED_AT_ONCE)
        .fold(Ok(()), async |before, announced| before.and(announced));
    let (accepted, announced) = tokio::join!(accepting, announcing);
    accepted.map(|()| announced)
}

/// Returns the page size that takes [`ANNOUNCE_TIME`], given that `n_announced` processes took `took`.
fn next_page(n_announced: u32, took: Duration) -> u32 {
    let n_next = u128::from(n_announced) * ANNOUNCE_TIME.as_micros() / took.as_micros().max(1);
    u32::try_from(n_next).unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_size_follows_the_speed_of_the_broker() {
        assert_eq!(next_page(100, Duration::from_millis(5)), PAGE_MAX);
        assert_eq!(next_page(100, Duration::from_millis(250)), 200);
        assert_eq!(next_page(1_000, Duration::from_secs(5)), 100);
        assert_eq!(next_page(1, Duration::from_secs(60)), 1);
        assert_eq!(next_page(1_000, Duration::ZERO), PAGE_MAX);
    }
}
