//! The worker's own view of its lease.
//!
//! No clocks are compared: other workers observe on their own clock that the beat does not change, and this worker stops
//! trusting its lease a tenth of it earlier, counted from before it sent its last successful beat.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_common::store::worker::LEASE;
use tokio::sync::watch;

use crate::machine::clock::boottime_ms;

/// How long after a beat this worker trusts its lease.
pub(crate) const TRUST: Duration = LEASE.checked_sub(Duration::from_secs(1)).expect("a lease is longer than a second");

/// The time of the last renewal, and the waiters for the next.
pub(crate) struct Lease {
    renewed_at_ms: AtomicU64,
    renewals: watch::Sender<u64>,
}

impl Lease {
    pub(crate) fn new(now_ms: u64) -> Self {
        Self { renewed_at_ms: AtomicU64::new(now_ms), renewals: watch::Sender::new(0) }
    }

    /// Renews the lease by a committed beat that was sent at `sent_at_ms`.
    pub(crate) fn renew(&self, sent_at_ms: u64) {
        self.renewed_at_ms.store(sent_at_ms, Ordering::Release);
        self.renewals.send_modify(|count| *count += 1);
    }

    /// A channel that changes at every renewal.
    pub(crate) fn renewals(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    /// The time since the last committed beat was sent.
    pub(crate) fn age(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms.saturating_sub(self.renewed_at_ms.load(Ordering::Acquire)))
    }

    /// Whether this worker may act on its lease.
    pub(crate) fn is_trusted(&self, now_ms: u64) -> bool {
        self.age(now_ms) < TRUST
    }

    /// Waits until the lease is not trusted any more.
    pub(crate) async fn distrusted(&self) {
        while let Some(left) = TRUST.checked_sub(self.age(boottime_ms())).filter(|left| !left.is_zero()) {
            tokio::time::sleep(left).await;
        }
    }

    /// Waits until the lease is trusted. A passed deadline does not mean that the lease is lost; the next beat decides.
    /// If it is lost, this never returns, and its caller is dropped.
    pub(crate) async fn trusted(&self) {
        let mut renewals = self.renewals();
        while !self.is_trusted(boottime_ms()) {
            if renewals.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_distrusts_itself_before_others_may_take_over() {
        let lease = Lease::new(0);
        assert!(lease.is_trusted(8_999));
        assert!(!lease.is_trusted(9_000));
        lease.renew(5_000);
        assert!(lease.is_trusted(13_999));
        assert!(u128::from(9_000_u64) < LEASE.as_millis());
    }
}
