//! Giving many processes to the fleet: in pages, of which the next is committed while the last is being told.

use baton_common::store::Store;
use baton_common::store::submit::{ByQueue, NewProcess};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Processes that are committed and then published together. The rows of one big commit would look lost before the last
/// of them is published: the head rule has two seconds' patience with an empty queue.
const PAGE: u32 = 1_000;

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
    let (pages_tx, mut pages) = mpsc::channel::<ByQueue>(1);
    let accepting = async {
        let pages_tx = pages_tx;
        let mut rest = count;
        while rest > 0 {
            let n_next = rest.min(PAGE);
            let page: Vec<NewProcess> = (0..n_next).map(|_| make()).collect();
            let queued = store.submit(&page).await?.queued;
            rest -= n_next;
            accepted(&page);
            // The other side takes them to the end.
            let _ = pages_tx.send(queued).await;
        }
        Ok::<_, Failure>(())
    };
    let telling = async {
        let mut told = Ok(());
        while let Some(queued) = pages.recv().await {
            if told.is_ok() {
                told = tell(&queued).await;
            }
        }
        told
    };
    let (accepted, told) = tokio::join!(accepting, telling);
    accepted.map(|()| told)
}
