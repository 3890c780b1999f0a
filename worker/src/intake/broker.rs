//! Tasks from the broker: claim, then acknowledge.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_common::border;
use baton_common::communicator::{Communicator, Delivery};
use baton_common::id::Pid;
use baton_common::message::{Reply, Task};
use baton_common::spec::{self, OnSite};
use baton_common::store::Store;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::Claim;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::intake::backoff::Backoff;
use crate::intake::claims::Claims;
use crate::intake::heads::Heads;
use crate::machine::shortage::Health;
use crate::outbox::end_reply;

/// How far the clock of the maker of an id may be ahead.
const CLOCKS_APART: Duration = Duration::from_secs(86_400);

/// The parts of a worker that take tasks from the broker.
pub(crate) struct Intake {
    pub(crate) claims: Arc<Claims>,
    pub(crate) communicator: Communicator,
    pub(crate) heads: Arc<Heads>,
    pub(crate) backoff: Arc<Backoff>,
    pub(crate) health: Arc<Health>,
    pub(crate) drain: CancellationToken,
}

/// Takes deliveries until the communicator stops.
pub(crate) async fn run(intake: Arc<Intake>, mut deliveries: mpsc::Receiver<Delivery>) {
    // At most one for each slot, since each delivery holds one.
    let mut claims = JoinSet::new();
    loop {
        tokio::select! {
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => {
                    intake.heads.note(&delivery.queue, delivery.task.announced_at());
                    claims.spawn(take(Arc::clone(&intake), delivery));
                }
                None => break,
            },
            Some(claimed) = claims.join_next() => if let Err(failure) = claimed {
                tracing::error!(%failure, "a claim's task has panicked");
            },
        }
    }
}

/// Takes one delivery. Futures of rare cases are boxed to keep this one small, since a flood has one for each delivery.
async fn take(intake: Arc<Intake>, delivery: Delivery) {
    border!("task-taken");
    let Intake { claims, communicator, .. } = &*intake;
    if intake.health.stops_taking() {
        // Consumption stops first; otherwise the task would come back at once.
        claims.execution.gate.take_what_it_can().await;
        delivery.settle.give_back().await;
        return;
    }
    let pid = delivery.task.pid();
    let launch = match launch(&delivery) {
        Ok(launch) => launch,
        Err(reason) => {
            Box::pin(refuse(communicator, delivery, &reason)).await;
            return;
        }
    };
    let mut guard = None;
    // A message with a reply address is answered even if another copy is being claimed.
    if delivery.reply_to.is_none() {
        guard = claims.execution.leases.begin_claim(pid);
        if guard.is_none() {
            delivery.settle.ack().await;
            return;
        }
    }
    let (claim, guard) = claims.claim(pid, &delivery.queue, launch, guard).await;
    match claim {
        Ok(Claim::Claimed(claimed)) => {
            intake.backoff.end(Some(pid));
            answer_launch(communicator, &delivery).await;
            border!("launch-answered");
            let Delivery { permit, settle, .. } = delivery;
            let start = claims.start(claimed, permit, guard);
            // The process starts first; the acknowledgement is not urgent.
            start.await;
            settle.ack().await;
        }
        Ok(Claim::NotQueued) => {
            debug!(%pid, queue = delivery.queue, "nothing to claim: a duplicate or stale message");
            answer_launch(communicator, &delivery).await;
            Box::pin(answer_if_ended(communicator, &claims.execution.store, &delivery)).await;
            delivery.settle.ack().await;
        }
        Ok(Claim::Quarantined) => {
            answer_launch(communicator, &delivery).await;
            claims.quarantine.wait(pid, delivery.queue.clone());
            delivery.settle.ack().await;
        }
        Ok(Claim::Absent) => {
            Box::pin(refuse(communicator, delivery, "there is no such process in the database")).await;
        }
        Ok(Claim::Pruned) => {
            let reason = "it was launched longer ago than ended processes are kept (`baton prune`), so it may have run \
                          already; to run it, launch it under a new pid";
            Box::pin(refuse(communicator, delivery, reason)).await;
        }
        Ok(Claim::OtherSpec) => {
            Box::pin(refuse(communicator, delivery, "a process with this pid and another spec exists")).await;
        }
        Ok(Claim::Rejected(reason)) => Box::pin(refuse(communicator, delivery, &reason)).await,
        Err(error) => {
            let pause = intake.backoff.next_pause(Some(pid));
            warn!(%pid, %error, pause_ms = pause.as_millis(), "not claimed; giving the message back after a pause");
            Box::pin(intake.drain.run_until_cancelled(tokio::time::sleep(pause))).await;
            delivery.settle.give_back().await;
        }
    }
}

/// The new process of a launch from outside; `None` for Baton's own messages, whose rows exist.
fn launch(delivery: &Delivery) -> Result<Option<Box<NewProcess>>, String> {
    let Task::Launch { pid, spec: Some(spec), wait, .. } = &delivery.task else { return Ok(None) };
    // The time in the id identifies a late copy of a launch whose process was pruned.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + CLOCKS_APART;
    match pid.made_at() {
        Some(made_at) if u128::try_from(made_at).is_ok_and(|made_at| made_at <= now.as_micros()) => {}
        Some(_) => {
            return Err("pid: its UUIDv7 was made in the future; set the clock of the machine that made it".to_owned());
        }
        None => return Err("pid: the id of a new process must be a UUID of version 7".to_owned()),
    }
    let spec = spec.clone().map_err(spec::Error::from).and_then(spec::from_json_value);
    let spec = spec.map_err(|error| format!("spec: {error}"))?;
    if spec.on_site.as_ref().is_some_and(OnSite::needs_client) {
        let reason = "spec: `in` has files of client://, but the sender of a message has no folder here; put them into the \
                      object store and name them store://, or use `baton submit`";
        return Err(reason.to_owned());
    }
    let reply_to = delivery.reply_to.as_ref().filter(|_| *wait);
    let reply_to = reply_to.map(baton_common::communicator::ReplyTo::to_bytes);
    Ok(Some(Box::new(NewProcess {
        pid: *pid,
        spec,
        created_by: "amqp".into(),
        traceparent: delivery.traceparent.clone(),
        reply_to,
        run_key: None,
    })))
}

async fn answer_launch(communicator: &Communicator, delivery: &Delivery) {
    if let (Task::Launch { pid, .. }, Some(to)) = (&delivery.task, &delivery.reply_to) {
        let reply = Reply { pid: Some(*pid), accepted: Some(true), ..Reply::default() };
        if let Err(error) = Box::pin(communicator.reply(to, &reply)).await {
            debug!(%pid, %error, "the launch was accepted, but the reply could not be sent");
        }
    }
}

/// Answers a launch that waits for a process that has already ended.
async fn answer_if_ended(communicator: &Communicator, store: &Store, delivery: &Delivery) {
    let Task::Launch { pid, wait: true, .. } = &delivery.task else { return };
    let Some(to) = &delivery.reply_to else { return };
    if let Ok(Some(details)) = store.show(*pid).await
        && details.summary.state.is_final()
    {
        let reply = end_reply(*pid, details.summary.state, details.summary.outcome.as_ref());
        if let Err(error) = communicator.reply(to, &reply).await {
            debug!(%pid, %error, "the reply with the end of this process could not be sent");
        }
    }
}

async fn refuse(communicator: &Communicator, delivery: Delivery, reason: &str) {
    let pid: Pid = delivery.task.pid();
    warn!(%pid, queue = delivery.queue, reason, "dead-lettering an unusable task");
    if let Some(to) = &delivery.reply_to {
        let reply = Reply { pid: Some(pid), accepted: Some(false), error: Some(reason.to_owned()), ..Reply::default() };
        if let Err(error) = communicator.reply(to, &reply).await {
            debug!(%pid, %error, "the reply could not be sent");
        }
    }
    delivery.settle.dead(reason).await;
}
