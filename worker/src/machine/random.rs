//! Random numbers, to spread retries.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Returns a number in 0..1 to spread retries; nothing depends on its quality.
pub(crate) fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() & u64::from(u32::MAX);
    f64::from(u32::try_from(bits).expect("masked to 32 bits")) / (f64::from(u32::MAX) + 1.0)
}
