//! The harness of the end-to-end tests: real services, real workers, real kills.
//!
//! `tests/run` starts the shared services and names them in the environment. A [`scene::Scene`] is the part that one
//! test uses: a virtual host, a schema and a folder. Tests that break a service start their own with
//! [`services::Services::private`].

pub mod amqp;
pub mod dice;
pub mod history;
pub mod journal;
pub mod operator;
pub mod process;
pub mod proxy;
pub mod scene;
pub mod services;
pub mod slurm;
pub mod sshd;
pub mod witness;

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Calls `probe` until it returns `Ok`; on a timeout fails with the last `Err`.
///
/// # Panics
/// After `limit`.
pub async fn eventually<T, E: Debug>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Result<T, E>) -> T {
    let started = Instant::now();
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(seen) => assert!(started.elapsed() < limit, "timed out after {limit:?}: {what}; last seen: {seen:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
