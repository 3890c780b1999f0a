//! The clock of leases.

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds on the clock of leases. It runs while the machine is suspended and cannot be set. The worker and its
/// shims read the same clock.
pub(crate) fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
