//! Failure detection: every worker watches the beats of all others and declares a worker gone whose beat does not change.
//!
//! That takes a whole lease. It is faster if a beat is missed and the broker says twice that the worker's control queue
//! does not exist, over the same connection over which the queue was seen before. Neither a restart of the database nor
//! one of the broker fences a worker: the first stops the reading of beats as well, and the second ends the connections
//! over which the queues were seen.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_common::communicator::Communicator;
use baton_common::id::Incarnation;
use baton_common::store::worker::{LEASE, Peer};
use baton_common::store::{self, Store};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::author::facilities::Identity;
use crate::lifecycle::sweeps::Sweeps;
use crate::machine::clock::boottime_ms;

/// Pause between two looks at the beats.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// After a longer gap between two looks all observations start again, since anything may have happened in it.
const GAP_MAX_MS: u64 = 2_500;

/// A beat that has not changed for this long is missed; beats come every second.
const SUSPECT_AFTER: Duration = Duration::from_millis(1_500);

/// Looks in a row that must have seen the same beat.
const LOOKS_MIN: u32 = 3;

/// The observation of one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    beat: i64,
    since_ms: u64,
    looks: u32,
}

/// The state of a peer by its beats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Alive,
    Suspect,
    Dead,
}

/// The beats of all peers, observed on this worker's own clock.
#[derive(Default)]
struct Observations {
    seen: HashMap<Incarnation, Seen>,
    last_look_ms: Option<u64>,
}

impl Observations {
    /// Adds a successful look. `now_ms` is on this worker's own clock.
    fn look(&mut self, peers: &[Peer], now_ms: u64) -> Vec<(Peer, Verdict)> {
        if self.last_look_ms.is_some_and(|last| now_ms.saturating_sub(last) > GAP_MAX_MS) {
            self.seen.clear();
        }
        self.last_look_ms = Some(now_ms);
        self.seen.retain(|id, _| peers.iter().any(|peer| peer.id == *id));
        peers
            .iter()
            .map(|peer| {
                let fresh = Seen { beat: peer.beat, since_ms: now_ms, looks: 0 };
                let seen = self.seen.entry(peer.id).or_insert(fresh);
                if seen.beat != peer.beat {
                    *seen = fresh;
                }
                seen.looks += 1;
                (peer.clone(), verdict(*seen, now_ms))
            })
            .collect()
    }

    /// Discards all observations after a failed look.
    fn forget(&mut self) {
        self.seen.clear();
    }
}

fn verdict(seen: Seen, now_ms: u64) -> Verdict {
    let still = Duration::from_millis(now_ms.saturating_sub(seen.since_ms));
    if seen.looks < LOOKS_MIN || still < SUSPECT_AFTER {
        Verdict::Alive
    } else if still < LEASE {
        Verdict::Suspect
    } else {
        Verdict::Dead
    }
}

/// Watches the beats of all workers for a program that is no worker, and calls `on_death` after each look in which it has
/// declared a worker gone. Use it while waiting for a process: when no worker is left, no other program notices.
///
/// It never returns. While the database does not answer, it declares no worker gone.
///
/// # Cancel safety
/// The future can be dropped at any time.
pub async fn watch(store: &Store, mut on_death: impl AsyncFnMut()) -> Infallible {
    let mut watch = Watch::default();
    loop {
        if watch.look(store).await.is_ok_and(|someone_died| someone_died) {
            on_death().await;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// The observations of a program that is no worker.
#[derive(Default)]
struct Watch {
    observations: Observations,
}

impl Watch {
    /// Takes a look and declares every worker gone whose beat has stood still for a whole lease. Returns whether there was
    /// one.
    ///
    /// # Errors
    /// The database does not answer. Earlier observations no longer count.
    async fn look(&mut self, store: &Store) -> Result<bool, store::Error> {
        let peers = match store.peers().await {
            Ok(peers) => peers,
            Err(error) => {
                self.observations.forget();
                return Err(error);
            }
        };
        let mut someone_died = false;
        for (peer, verdict) in self.observations.look(&peers, boottime_ms()) {
            if verdict == Verdict::Dead {
                someone_died |= store.declare_gone(peer.id, peer.beat).await?;
            }
        }
        Ok(someone_died)
    }
}

/// The time at which each peer's control queue was seen.
#[derive(Default)]
struct Queues {
    seen: HashMap<Incarnation, Instant>,
}

impl Queues {
    /// Checks the queue of each peer that was not seen over the current connection.
    async fn see(&mut self, communicator: &Communicator, peers: &[Peer]) {
        self.seen.retain(|id, _| peers.iter().any(|peer| peer.id == *id));
        for peer in peers {
            if !self.is_seen(communicator, peer) && matches!(communicator.ping(&peer.control_queue()).await, Ok(true)) {
                self.seen.insert(peer.id, Instant::now());
            }
        }
    }

    /// Whether the queue was seen over the current connection, which a restart of the broker replaces.
    fn is_seen(&self, communicator: &Communicator, peer: &Peer) -> bool {
        let age = communicator.control_connected_for();
        self.seen.get(&peer.id).is_some_and(|seen| age.is_some_and(|age| age > seen.elapsed()))
    }

    /// Whether the broker says twice that a queue does not exist that was seen before.
    async fn has_vanished(&self, communicator: &Communicator, peer: &Peer) -> bool {
        for _ in 0..2 {
            if !self.is_seen(communicator, peer) || !matches!(communicator.ping(&peer.control_queue()).await, Ok(false))
            {
                return false;
            }
        }
        self.is_seen(communicator, peer)
    }
}

/// Detects dead workers and frees their processes.
pub(crate) struct FailureDetector {
    pub(crate) identity: Arc<Identity>,
    pub(crate) store: Store,
    pub(crate) communicator: Communicator,
    /// The sweeps that free the processes of dead workers.
    pub(crate) sweeps: Arc<Sweeps>,
}

/// Watches the other workers until it is dropped.
pub(crate) async fn run(detector: Arc<FailureDetector>) {
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut observations = Observations::default();
    let mut queues = Queues::default();
    loop {
        ticks.tick().await;
        let peers = match detector.store.peers().await {
            Ok(peers) => peers,
            Err(error) => {
                debug!(%error, "could not read the other workers' beats");
                observations.forget();
                continue;
            }
        };
        let others: Vec<Peer> = peers.into_iter().filter(|peer| peer.id != detector.identity.me).collect();
        queues.see(&detector.communicator, &others).await;
        let mut someone_died = false;
        for (peer, verdict) in observations.look(&others, boottime_ms()) {
            let is_dead = match verdict {
                Verdict::Alive => false,
                Verdict::Suspect => queues.has_vanished(&detector.communicator, &peer).await,
                Verdict::Dead => true,
            };
            if is_dead {
                someone_died |= declare_gone(&detector, &peer).await;
            }
        }
        if someone_died {
            detector.sweeps.free().await;
        }
    }
}

/// Declares earlier incarnations of this worker gone, by name and host, if their operating system process has ended.
pub(crate) async fn take_up_own(detector: &FailureDetector) {
    let Ok(peers) = detector.store.peers().await else { return };
    for peer in peers {
        let is_mine = peer.id != detector.identity.me
            && peer.name == detector.identity.name
            && peer.host == detector.identity.host;
        if is_mine && !std::path::Path::new(&format!("/proc/{}", peer.os_pid)).exists() {
            declare_gone(detector, &peer).await;
        }
    }
    detector.sweeps.free().await;
}

async fn declare_gone(detector: &FailureDetector, peer: &Peer) -> bool {
    match detector.store.declare_gone(peer.id, peer.beat).await {
        Ok(declared) => {
            if declared {
                warn!(worker = peer.name, incarnation = %peer.id, "a worker is gone; freeing its processes");
            } else {
                info!(worker = peer.name, incarnation = %peer.id, "a worker is alive after all, or already gone");
            }
            declared
        }
        Err(error) => {
            debug!(%error, "could not declare a worker gone; the next look tries again");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(beat: i64) -> Peer {
        Peer { id: uuid(), name: "w".into(), host: "h".into(), os_pid: 1, beat }
    }

    fn uuid() -> Incarnation {
        serde_json::from_str("\"01940000-0000-7000-8000-000000000000\"").unwrap()
    }

    /// Returns the verdict after looks at these `(time, beat)`.
    fn after(looks: &[(u64, i64)]) -> Verdict {
        let mut observations = Observations::default();
        let mut verdict = Verdict::Alive;
        for (now_ms, beat) in looks {
            verdict = observations.look(&[peer(*beat)], *now_ms)[0].1;
        }
        verdict
    }

    #[test]
    fn a_worker_whose_beat_changes_is_alive() {
        assert_eq!(after(&[(0, 1), (2_000, 2), (4_000, 3), (6_000, 4)]), Verdict::Alive);
    }

    #[test]
    fn a_missed_beat_makes_a_suspect_and_a_missed_lease_a_dead_worker() {
        assert_eq!(after(&[(0, 1), (500, 1), (1_000, 1), (1_499, 1)]), Verdict::Alive);
        assert_eq!(after(&[(0, 1), (500, 1), (1_000, 1), (1_500, 1)]), Verdict::Suspect);
        let looks: Vec<(u64, i64)> = (0..=10).map(|second| (second * 1000, 1)).collect();
        assert_eq!(after(&looks[..10]), Verdict::Suspect);
        assert_eq!(after(&looks), Verdict::Dead);
    }

    #[test]
    fn a_gap_between_two_looks_proves_nothing() {
        assert_eq!(after(&[(0, 1), (60_000, 1)]), Verdict::Alive);
        assert_eq!(after(&[(0, 1), (500, 1), (60_000, 1), (60_500, 1), (61_000, 1)]), Verdict::Alive);
    }

    #[test]
    fn a_failed_look_discards_all_observations() {
        let mut observations = Observations::default();
        for second in 0..9 {
            observations.look(&[peer(1)], second * 1000);
        }
        observations.forget();
        assert_eq!(observations.look(&[peer(1)], 10_000)[0].1, Verdict::Alive);
    }
}
