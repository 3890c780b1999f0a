//! What the machine lacks is found out, said in the log and in the worker's row, and the resource is tried until it is there
//! again.

use std::sync::Arc;
use std::time::Duration;

use baton_common::lack::{Lack, Shortage};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::incarnation::Shared;
use crate::local::probe::Prober;

/// Pause between two probes of a worker that lacks nothing: a shortage is in the worker's row within a few seconds.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// A child process is started at every so many probes: it costs milliseconds, all other probes microseconds.
const CHILD_EVERY: u64 = 2;

/// Pause of a worker that lacks something before it probes again, which doubles up to the second value. It grows also over
/// shortages that follow each other, so a worker whose slots exceed its machine does not take and give back all the time.
const SHORT_PAUSE_MIN: Duration = Duration::from_secs(1);
const SHORT_PAUSE_MAX: Duration = Duration::from_secs(10);

/// The longest pause while its own programs have what it lacks.
const OWN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// After so long without a shortage the pause begins anew.
const FORGET_AFTER: Duration = Duration::from_secs(30);

/// Probes until it is dropped. The first look is [`look_once`].
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut prober = Prober::default();
    let mut pause = SHORT_PAUSE_MIN;
    let mut well_since = Instant::now();
    for count in 1_u64.. {
        let wait = if shared.health.stops_taking() { pause } else { PROBE_INTERVAL };
        let is_noted = tokio::select! {
            () = tokio::time::sleep(wait) => false,
            () = shared.health.noted() => true,
        };
        if is_noted && shared.health.stops_taking() {
            // Others may have what it takes. Nothing more comes here before the resource has been tried.
            say(&shared).await;
            tokio::time::sleep(pause).await;
        }
        let was_short = shared.health.stops_taking();
        let before = shared.health.current().map(|shortage| shortage.lack);
        let found =
            prober.probe(&shared.root, shared.user.as_deref(), was_short || count.is_multiple_of(CHILD_EVERY)).await;
        shared.health.found(found, was_short);
        say(&shared).await;
        if was_short {
            // What its own programs have, it has again when they end.
            let is_own = before.is_some_and(Lack::is_shared_by_programs) && shared.programs.count() > 0;
            pause = (pause * 2).min(if is_own { OWN_PAUSE_MAX } else { SHORT_PAUSE_MAX });
            well_since = Instant::now();
        } else if well_since.elapsed() > FORGET_AFTER {
            pause = SHORT_PAUSE_MIN;
        }
    }
}

/// Looks before the worker takes its first process.
pub(crate) async fn look_once(shared: &Arc<Shared>) {
    let found = Prober::default().probe(&shared.root, shared.user.as_deref(), true).await;
    shared.health.found(found, true);
    say(shared).await;
}

/// Says in the log and in the worker's row what has changed, and takes processes or takes none.
async fn say(shared: &Arc<Shared>) {
    let now = shared.health.current();
    let lack = now.as_ref().map(|shortage| shortage.lack);
    let before = shared.health.say(lack);
    // A process may have met a shortage that a probe did not find, and have stopped the taking.
    shared.take_what_it_can().await;
    if before == lack {
        return;
    }
    match (before, &now) {
        (_, Some(Shortage { lack, text })) => {
            let effect = if lack.stops_taking() { "taking no processes until it is there" } else { "going on" };
            warn!(text, remedy = lack.remedy(), "this worker lacks {}; {effect}", lack.word());
        }
        (Some(before), None) => info!("this worker has {} again", before.word()),
        (None, None) => {}
    }
    // Others see it in the row.
    shared.beat_now.notify_one();
}
