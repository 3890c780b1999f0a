//! The beat: says that this incarnation lives, and compares what it holds with what the database says.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::Communicator;
use baton_common::id::{Pid, RequestId};
use baton_common::lack::{Lack, Shortage};
use baton_common::state::Desired;
use baton_common::store::Store;
use baton_common::store::control::Request;
use baton_common::store::worker::{BEAT, Beat, Lease as Row, Load};
use baton_common::store::writer::{Attempt, Fence, Fenced, How, Verb, Writer};
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::author::facilities::Identity;
use crate::execution::gate::Gate;
use crate::execution::lease::Lease;
use crate::execution::lease_table::{Entry, LeaseTable};
use crate::execution::thread::Thread;
use crate::machine::clock::boottime_ms;
use crate::machine::shortage::Health;
use crate::outbox::Outbox;

/// A beat that takes longer than this counts as failed. The next one tries again, long before the lease is over.
const BEAT_LIMIT: Duration = Duration::from_secs(3);

/// For how long after its last beat a worker's row must be there.
const ROW_KEPT: Duration = Duration::from_secs(12 * 3600);

/// Every so many beats everything held is compared with the database, which costs it a row for each.
const RECONCILE_EVERY: u64 = 5;

/// After a commit without an answer that is done at each of so many beats: what is unknown at two of them is given back,
/// and a commit that the database still works on is seen by the next.
const BEATS_UNTIL_SURE: u32 = 4;

/// What a beat says, and on what it acts.
pub(crate) struct Heart {
    pub(crate) identity: Arc<Identity>,
    pub(crate) store: Store,
    pub(crate) writer: Writer,
    pub(crate) communicator: Communicator,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) health: Arc<Health>,
    pub(crate) leases: Arc<LeaseTable>,
    pub(crate) lease: Arc<Lease>,
    pub(crate) threads: Arc<Vec<Thread>>,
    /// Cancelled when the worker is asked to drain.
    pub(crate) drain: CancellationToken,
    /// Cancelled when somebody has declared this incarnation gone.
    pub(crate) gone: CancellationToken,
    /// Notified when a beat has something to say or to learn.
    pub(crate) beat_now: Arc<Notify>,
}

/// Beats until this incarnation is gone.
pub(crate) async fn run(heart: Heart) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reconciliation = Reconciliation::default();
    let mut named = HashSet::new();
    let mut last_beat = 0;
    let mut until_sure = 0_u32;
    let mut is_away = false;
    let mut is_fleet_paused = false;
    for count in 0_u64.. {
        tokio::select! {
            _ = ticks.tick() => {}
            () = heart.beat_now.notified() => {}
        }
        let load = Load {
            held: u32::try_from(heart.leases.count()).unwrap_or(u32::MAX),
            blocked: blocked(&heart.threads, &mut named),
            shortage: heart.health.current().or_else(|| without_broker(&heart)),
        };
        let sent_at = boottime_ms();
        match tokio::time::timeout(BEAT_LIMIT, heart.store.beat(heart.identity.me, &load)).await {
            // Rows of workers are kept for a day after their end.
            Ok(Ok(answer)) if is_older(answer, last_beat, heart.lease.age(sent_at)) => {
                // So grave a verdict is not based on one answer, which may have been to an earlier question.
                match heart.store.last_beat(heart.identity.me).await {
                    Ok(Some(beat)) if beat > last_beat => {
                        warn!(?answer, beat, last_beat, "the database has answered what it was asked before");
                        continue;
                    }
                    Ok(beat) => {
                        let now = beat.map_or_else(|| "its row is missing".to_owned(), |beat| format!("is {beat}"));
                        refuse_the_past(&heart, &format!("its beat was {last_beat}, now {now}")).await;
                        return;
                    }
                    Err(error) => {
                        warn!(%error, "the database does not answer; the next beat asks again");
                        continue;
                    }
                }
            }
            Ok(Ok(Beat::Alive { beat, drain, is_fleet_paused: is_paused })) => {
                last_beat = beat;
                heart.lease.renew(sent_at);
                if drain {
                    heart.drain.cancel();
                }
                if is_paused != is_fleet_paused || is_away {
                    if is_away {
                        info!("the database is back");
                    }
                    if is_paused {
                        info!("the fleet is paused: what is held goes on, nothing new is taken");
                    }
                    heart.gate.has_database(is_paused).await;
                    (is_away, is_fleet_paused) = (false, is_paused);
                }
            }
            Ok(Ok(Beat::Gone | Beat::Unknown)) => {
                heart.gone.cancel();
                return;
            }
            failed => {
                if !is_away {
                    let reason = failed.map_or_else(
                        |_| "no answer".to_owned(),
                        |answer| match answer {
                            Ok(_) => String::new(),
                            Err(error) => error.to_string(),
                        },
                    );
                    warn!(reason, "the database is away; taking no more tasks until it is back");
                    is_away = true;
                    heart.gate.lacks_database().await;
                }
                continue;
            }
        }
        obey(&heart).await;
        if heart.writer.take_unsure() {
            until_sure = BEATS_UNTIL_SURE;
        }
        if count % RECONCILE_EVERY == 0 || until_sure > 0 {
            until_sure = until_sure.saturating_sub(1);
            reconciliation.run(&heart).await;
        }
    }
}

/// Whether an answer says that the database is older than it was.
fn is_older(answer: Beat, last_beat: i64, age: Duration) -> bool {
    match answer {
        Beat::Alive { beat, .. } => beat <= last_beat,
        Beat::Unknown => last_beat > 0 && age < ROW_KEPT,
        Beat::Gone => false,
    }
}

/// What this worker has seen committed is not there any more: the database was restored from an older copy, or a standby
/// that had not received everything has taken its place. What was recorded in between, by anybody, is lost, and processes
/// would do again what they have done. So the fleet is paused, which outlives every worker, until a person has decided.
async fn refuse_the_past(heart: &Heart, evidence: &str) {
    error!(evidence, "the database has gone back in time; pausing the fleet and dropping everything that is held");
    let reason = format!(
        "the database has gone back in time (as worker {} saw it: {evidence}): what was recorded in between is lost, and \
         processes would go on from where they were before. If that is as it should be, say so with `baton play --fleet`",
        heart.identity.name
    );
    let request = Request { reason: Some(reason), ..Request::new(Desired::Pause, "baton") };
    let id = RequestId::generate();
    while let Err(failure) = heart.store.control_fleet(id, &request).await {
        warn!(%failure, "could not pause the fleet; trying again");
        tokio::time::sleep(BEAT).await;
    }
    if let Err(failure) = heart.store.leave(heart.identity.me).await {
        warn!(%failure, "could not sign off; others find out by the beat");
    }
    heart.gone.cancel();
}

/// Tells held processes what their rows say, for requests whose message was lost or never sent.
async fn obey(heart: &Heart) {
    match heart.store.desired_of(heart.identity.me, false).await {
        Ok(wishes) => wishes.into_iter().for_each(|wish| heart.leases.order(wish)),
        Err(error) => warn!(%error, "could not read what is desired; the next beat tries again"),
    }
}

/// That the worker has no broker, for as long as that is so.
fn without_broker(heart: &Heart) -> Option<Shortage> {
    let health = heart.communicator.health();
    (health.unreachable && !heart.store.is_embedded()).then(|| Shortage {
        lack: Lack::Broker,
        text: health.last_error.unwrap_or_else(|| "a connection could not be opened".to_owned()),
    })
}

/// Names each process that blocks its thread, once in the log and with every beat in the worker's row.
fn blocked(threads: &[Thread], named: &mut HashSet<Pid>) -> Vec<String> {
    let blocked: Vec<(Pid, Duration)> = threads.iter().filter_map(Thread::blocked).collect();
    for (pid, elapsed) in &blocked {
        if named.insert(*pid) {
            warn!(%pid, seconds = elapsed.as_secs(), "this process blocks its thread; its neighbours there wait");
        }
    }
    named.retain(|pid| blocked.iter().any(|(other, _)| other == pid));
    blocked.iter().map(|(pid, elapsed)| format!("{pid} for {}s", elapsed.as_secs())).collect()
}

/// What did not agree at the last comparison.
#[derive(Default)]
struct Reconciliation {
    missing: HashSet<Fence>,
    unknown: HashSet<Fence>,
}

impl Reconciliation {
    async fn run(&mut self, heart: &Heart) {
        // What is in the table before the question was asked; what was claimed since is not the answer's business.
        let before: HashMap<Pid, Entry> =
            heart.leases.entries().into_iter().map(|entry| (entry.fence.pid, entry)).collect();
        let rows = match heart.store.held_by(heart.identity.me).await {
            Ok(rows) => rows,
            Err(error) => {
                warn!(%error, "could not compare what is held with the database; trying again");
                return;
            }
        };
        let ours: HashSet<Fence> = rows.iter().map(|lease| lease.fence).collect();
        // One that is missing twice has not just been written away by its own process: its lease is lost.
        let missing: HashSet<Fence> =
            before.values().map(|entry| entry.fence).filter(|fence| !ours.contains(fence)).collect();
        for fence in missing.intersection(&self.missing) {
            if heart.leases.get(fence.pid).is_some_and(|entry| entry.fence == *fence) {
                warn!(pid = %fence.pid, epoch = fence.epoch, "the lease is lost; dropping the process");
                heart.leases.abandon(*fence);
            }
        }
        self.missing = missing;
        let is_known = |fence: Fence| heart.leases.holds(fence) || heart.leases.is_claiming(fence.pid);
        let unknown: Vec<Row> = rows.into_iter().filter(|lease| !is_known(lease.fence)).collect();
        for lease in unknown.iter().filter(|lease| self.unknown.contains(&lease.fence)) {
            let Fence { pid, epoch } = lease.fence;
            error!(%pid, epoch, "the database says that this worker holds a process that it does not know; giving it back");
            give_back(heart, *lease).await;
        }
        self.unknown = unknown.into_iter().map(|lease| lease.fence).collect();
    }
}

async fn give_back(heart: &Heart, Row { fence, claimed_at, try_number }: Row) {
    let reason = Some("its worker never heard that it holds it".to_owned());
    let ended = Some(Attempt { started_at: claimed_at, how: How::Drained, reason });
    let fenced = Fenced { fence, verb: Verb::GiveBack, checkpoint: None, try_number, ended, outputs: vec![] };
    if let Ok(Some(written)) = heart.writer.write(fenced).await {
        heart.outbox.publish(fence.pid, written.queue, written.announced_at).await;
    }
}
