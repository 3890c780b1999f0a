//! The heartbeat: it renews the lease of this incarnation and reconciles its held processes with the database.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::Communicator;
use baton_common::id::{Pid, RequestId};
use baton_common::lack::{Lack, Shortage};
use baton_common::state::Desired;
use baton_common::store::control::Request;
use baton_common::store::worker::{BEAT, Beat, Lease as Row, Load};
use baton_common::store::writer::{Attempt, Fence, Fenced, How, Verb, Writer};
use baton_common::store::{self, Store};
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio::time::error::Elapsed;
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

/// A beat that takes longer counts as failed. The next one comes long before the lease ends.
const BEAT_LIMIT: Duration = Duration::from_secs(3);

/// How long after its last beat a worker's row is kept for certain.
const ROW_KEPT: Duration = Duration::from_secs(12 * 3600);

/// Beats between two reconciliations, each of which reads a row for every held process.
const RECONCILE_EVERY: u64 = 5;

/// Beats with a reconciliation each after a commit without an answer. A process that is unknown at two of them is given
/// back, and a commit that is still running becomes visible to a later one.
const BEATS_UNTIL_SURE: u32 = 4;

/// The parts of a worker that a beat reports or controls.
pub(crate) struct Heartbeat {
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
    /// Cancelled when this incarnation was declared gone.
    pub(crate) gone: CancellationToken,
    /// Notified when the next beat should come at once.
    pub(crate) beat_now: Arc<Notify>,
}

/// The meaning of the answer to a beat.
#[derive(Debug)]
enum Answer {
    /// The lease is renewed.
    Alive { beat: i64, drain: bool, is_fleet_paused: bool },
    /// The database has an older state than this worker has seen.
    Older(Beat),
    /// This incarnation was declared gone.
    Gone,
    /// There was no answer, for this reason.
    Away(String),
}

/// Reads the answer to a beat. `age` is the time since the last successful beat.
fn read(answered: Result<Result<Beat, store::Error>, Elapsed>, last_beat: i64, age: Duration) -> Answer {
    match answered {
        Ok(Ok(answer)) if is_older(answer, last_beat, age) => Answer::Older(answer),
        Ok(Ok(Beat::Alive { beat, drain, is_fleet_paused })) => Answer::Alive { beat, drain, is_fleet_paused },
        Ok(Ok(Beat::Gone | Beat::Unknown)) => Answer::Gone,
        Ok(Err(error)) => Answer::Away(error.to_string()),
        Err(_) => Answer::Away("no answer".to_owned()),
    }
}

/// The state of the database and the fleet as of the last beat.
#[derive(Default)]
struct Known {
    last_beat: i64,
    is_away: bool,
    is_fleet_paused: bool,
}

/// Beats until this incarnation is gone.
pub(crate) async fn run(heartbeat: Heartbeat) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reconciliation = Reconciliation::default();
    let mut named = HashSet::new();
    let mut known = Known::default();
    let mut until_sure = 0_u32;
    for count in 0_u64.. {
        tokio::select! {
            _ = ticks.tick() => {}
            () = heartbeat.beat_now.notified() => {}
        }
        let load = Load {
            held: u32::try_from(heartbeat.leases.count()).unwrap_or(u32::MAX),
            blocked: blocked(&heartbeat.threads, &mut named),
            shortage: heartbeat.health.current().or_else(|| without_broker(&heartbeat)),
        };
        let sent_at = boottime_ms();
        let answered = tokio::time::timeout(BEAT_LIMIT, heartbeat.store.beat(heartbeat.identity.me, &load)).await;
        match read(answered, known.last_beat, heartbeat.lease.age(sent_at)) {
            Answer::Alive { beat, drain, is_fleet_paused } => {
                known.last_beat = beat;
                heartbeat.lease.renew(sent_at);
                if drain {
                    heartbeat.drain.cancel();
                }
                known.database_answers(&heartbeat, is_fleet_paused).await;
            }
            Answer::Older(answer) => match known.rollback(&heartbeat, answer).await {
                Some(evidence) => return pause_after_rollback(&heartbeat, &evidence).await,
                None => continue,
            },
            Answer::Gone => return heartbeat.gone.cancel(),
            Answer::Away(reason) => {
                known.database_is_away(&heartbeat, &reason).await;
                continue;
            }
        }
        obey(&heartbeat).await;
        if heartbeat.writer.take_unsure() {
            until_sure = BEATS_UNTIL_SURE;
        }
        if count % RECONCILE_EVERY == 0 || until_sure > 0 {
            until_sure = until_sure.saturating_sub(1);
            reconciliation.run(&heartbeat).await;
        }
    }
}

impl Known {
    /// Notes that the database answered, and whether the fleet is paused.
    async fn database_answers(&mut self, heartbeat: &Heartbeat, is_fleet_paused: bool) {
        if is_fleet_paused == self.is_fleet_paused && !self.is_away {
            return;
        }
        if self.is_away {
            info!("the database is back");
        }
        if is_fleet_paused {
            info!("the fleet is paused: held processes continue, nothing new is taken");
        }
        heartbeat.gate.has_database(is_fleet_paused).await;
        (self.is_away, self.is_fleet_paused) = (false, is_fleet_paused);
    }

    /// Notes that the database did not answer.
    async fn database_is_away(&mut self, heartbeat: &Heartbeat, reason: &str) {
        if !self.is_away {
            warn!(reason, "the database is away; taking no more tasks until it is back");
            self.is_away = true;
            heartbeat.gate.lacks_database().await;
        }
    }

    /// Reads the beat once more after an answer that suggests a rollback. A single answer is not enough, since it may
    /// belong to an earlier question. Returns the evidence if the database was rolled back.
    async fn rollback(&self, heartbeat: &Heartbeat, answer: Beat) -> Option<String> {
        let last_beat = self.last_beat;
        match heartbeat.store.last_beat(heartbeat.identity.me).await {
            Ok(Some(beat)) if beat > last_beat => {
                warn!(?answer, beat, last_beat, "the database answered an earlier question");
                None
            }
            Ok(beat) => {
                let now = beat.map_or_else(|| "its row is missing".to_owned(), |beat| format!("is {beat}"));
                Some(format!("its beat was {last_beat}, now {now}"))
            }
            Err(error) => {
                warn!(%error, "the database does not answer; the next beat asks again");
                None
            }
        }
    }
}

/// Whether an answer shows an older state of the database than an earlier one. The rows of workers are kept for a day.
fn is_older(answer: Beat, last_beat: i64, age: Duration) -> bool {
    match answer {
        Beat::Alive { beat, .. } => beat <= last_beat,
        Beat::Unknown => last_beat > 0 && age < ROW_KEPT,
        Beat::Gone => false,
    }
}

/// Handles a database rollback: a commit that this worker has seen is missing. The database was restored from an older
/// copy, or a standby that had not received everything was promoted. Everything recorded in between is lost, and
/// processes would repeat work. So this pauses the fleet, which outlives every worker, until a person decides.
async fn pause_after_rollback(heartbeat: &Heartbeat, evidence: &str) {
    error!(evidence, "database rollback detected; pausing the fleet and dropping all held processes");
    let reason = format!(
        "database rollback detected (by worker {}: {evidence}): everything recorded in between is lost, and processes would \
         repeat work. If the rollback is intended, run `baton play --fleet`",
        heartbeat.identity.name
    );
    let request = Request { reason: Some(reason), ..Request::new(Desired::Pause, "baton") };
    let id = RequestId::generate();
    while let Err(failure) = heartbeat.store.control_fleet(id, &request).await {
        warn!(%failure, "could not pause the fleet; trying again");
        tokio::time::sleep(BEAT).await;
    }
    if let Err(failure) = heartbeat.store.leave(heartbeat.identity.me).await {
        warn!(%failure, "deregistration failed; the lease will expire");
    }
    heartbeat.gone.cancel();
}

/// Passes requests in the rows to held processes, in case their control message was lost or never sent.
async fn obey(heartbeat: &Heartbeat) {
    match heartbeat.store.desired_of(heartbeat.identity.me, false).await {
        Ok(wishes) => wishes.into_iter().for_each(|wish| heartbeat.leases.order(wish)),
        Err(error) => warn!(%error, "could not read the requests; the next beat tries again"),
    }
}

/// The shortage of a worker without a broker.
fn without_broker(heartbeat: &Heartbeat) -> Option<Shortage> {
    let health = heartbeat.communicator.health();
    (health.unreachable && !heartbeat.store.is_embedded()).then(|| Shortage {
        lack: Lack::Broker,
        text: health.last_error.unwrap_or_else(|| "a connection could not be opened".to_owned()),
    })
}

/// Lists the processes that block their threads for the worker's row, and logs each once.
fn blocked(threads: &[Thread], named: &mut HashSet<Pid>) -> Vec<String> {
    let blocked: Vec<(Pid, Duration)> = threads.iter().filter_map(Thread::blocked).collect();
    for (pid, elapsed) in &blocked {
        if named.insert(*pid) {
            warn!(%pid, seconds = elapsed.as_secs(), "this process blocks its thread; the other processes there wait");
        }
    }
    named.retain(|pid| blocked.iter().any(|(other, _)| other == pid));
    blocked.iter().map(|(pid, elapsed)| format!("{pid} for {}s", elapsed.as_secs())).collect()
}

/// The differences found by the last reconciliation.
#[derive(Default)]
struct Reconciliation {
    missing: HashSet<Fence>,
    unknown: HashSet<Fence>,
}

impl Reconciliation {
    async fn run(&mut self, heartbeat: &Heartbeat) {
        // Taken before the query, so that later claims are not compared with its result.
        let before: HashMap<Pid, Entry> =
            heartbeat.leases.entries().into_iter().map(|entry| (entry.fence.pid, entry)).collect();
        let rows = match heartbeat.store.held_by(heartbeat.identity.me).await {
            Ok(rows) => rows,
            Err(error) => {
                warn!(%error, "could not reconcile the held processes with the database; trying again");
                return;
            }
        };
        let ours: HashSet<Fence> = rows.iter().map(|lease| lease.fence).collect();
        // A process that is missing twice was not just ended by its own write: its lease is lost.
        let missing: HashSet<Fence> =
            before.values().map(|entry| entry.fence).filter(|fence| !ours.contains(fence)).collect();
        for fence in missing.intersection(&self.missing) {
            if heartbeat.leases.get(fence.pid).is_some_and(|entry| entry.fence == *fence) {
                warn!(pid = %fence.pid, epoch = fence.epoch, "the lease is lost; dropping the process");
                heartbeat.leases.abandon(*fence);
            }
        }
        self.missing = missing;
        let is_known = |fence: Fence| heartbeat.leases.holds(fence) || heartbeat.leases.is_claiming(fence.pid);
        let unknown: Vec<Row> = rows.into_iter().filter(|lease| !is_known(lease.fence)).collect();
        for lease in unknown.iter().filter(|lease| self.unknown.contains(&lease.fence)) {
            let Fence { pid, epoch } = lease.fence;
            error!(%pid, epoch, "the database says that this worker holds a process that it does not know; giving it back");
            give_back(heartbeat, *lease).await;
        }
        self.unknown = unknown.into_iter().map(|lease| lease.fence).collect();
    }
}

async fn give_back(heartbeat: &Heartbeat, Row { fence, claimed_at, try_number }: Row) {
    let reason = Some("the answer to its claim was lost".to_owned());
    let ended = Some(Attempt { started_at: claimed_at, how: How::Drained, reason });
    let fenced = Fenced { fence, verb: Verb::GiveBack, checkpoint: None, try_number, ended, outputs: vec![] };
    if let Ok(Some(written)) = heartbeat.writer.write(fenced).await {
        heartbeat.outbox.announce(fence.pid, written.queue, written.announced_at).await;
    }
}
