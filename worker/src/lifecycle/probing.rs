//! Detection of shortages: the worker probes its machine, reports a shortage in the log and in its row, and probes on
//! until it is over.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_common::lack::{Lack, Shortage};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::builtin::program::Local;
use crate::execution::gate::Gate;
use crate::local::probe::Prober;
use crate::machine::shortage::Health;

/// Pause between two probes without a shortage: a new one is in the worker's row within a few seconds.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// Probes between two that start a child process, which costs milliseconds; the others cost microseconds.
const CHILD_EVERY: u64 = 2;

/// The first and the longest pause between probes during a shortage; it doubles. It also grows over consecutive
/// shortages, so a worker with too many slots for its machine does not take and give back all the time.
const SHORT_PAUSE_MIN: Duration = Duration::from_secs(1);
const SHORT_PAUSE_MAX: Duration = Duration::from_secs(10);

/// The longest pause while the worker's own programs use the resource.
const OWN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// Time without a shortage after which the pause is reset.
const FORGET_AFTER: Duration = Duration::from_secs(30);

/// The parts of a worker that probe and act on the result.
pub(crate) struct Probing {
    pub(crate) root: PathBuf,
    pub(crate) local: Arc<Local>,
    pub(crate) health: Arc<Health>,
    pub(crate) gate: Arc<Gate>,
    /// Notified when the worker's row has to change.
    pub(crate) beat_now: Arc<Notify>,
}

/// Probes until it is dropped. The first look is [`look_once`].
pub(crate) async fn run(probing: Probing) {
    let mut prober = Prober::default();
    let mut pause = SHORT_PAUSE_MIN;
    let mut well_since = Instant::now();
    for count in 1_u64.. {
        let wait = if probing.health.stops_taking() { pause } else { PROBE_INTERVAL };
        let is_noted = tokio::select! {
            () = tokio::time::sleep(wait) => false,
            () = probing.health.noted() => true,
        };
        if is_noted && probing.health.stops_taking() {
            // The worker takes nothing before the next probe; meanwhile other workers can.
            say(&probing).await;
            tokio::time::sleep(pause).await;
        }
        let was_short = probing.health.stops_taking();
        let before = probing.health.current().map(|shortage| shortage.lack);
        let found = prober
            .probe(&probing.root, probing.local.user.as_deref(), was_short || count.is_multiple_of(CHILD_EVERY))
            .await;
        probing.health.found(found, was_short);
        say(&probing).await;
        if was_short {
            // A resource that the worker's own programs use is free again when they end.
            let is_own = before.is_some_and(Lack::is_shared_by_programs) && probing.local.programs.count() > 0;
            pause = (pause * 2).min(if is_own { OWN_PAUSE_MAX } else { SHORT_PAUSE_MAX });
            well_since = Instant::now();
        } else if well_since.elapsed() > FORGET_AFTER {
            pause = SHORT_PAUSE_MIN;
        }
    }
}

/// Probes before the worker takes its first process.
pub(crate) async fn look_once(probing: &Probing) {
    let found = Prober::default().probe(&probing.root, probing.local.user.as_deref(), true).await;
    probing.health.found(found, true);
    say(probing).await;
}

/// Reports a change in the log and in the worker's row, and opens or closes the gate.
async fn say(probing: &Probing) {
    let now = probing.health.current();
    let lack = now.as_ref().map(|shortage| shortage.lack);
    let before = probing.health.say(lack);
    // A process may have met a shortage that the probe did not find, and closed the gate.
    probing.gate.take_what_it_can().await;
    if before == lack {
        return;
    }
    match (before, &now) {
        (_, Some(Shortage { lack, text })) => {
            let effect = if lack.stops_taking() { "taking no processes until it is over" } else { "continuing" };
            warn!(text, remedy = lack.remedy(), "this worker lacks {}; {effect}", lack.word());
        }
        (Some(before), None) => info!("this worker has {} again", before.word()),
        (None, None) => {}
    }
    // The row makes it visible to others.
    probing.beat_now.notify_one();
}
