//! Tasks come in: claim, then acknowledge.

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

use crate::intake::claims::Claims;
use crate::intake::heads::Heads;
use crate::intake::setbacks::Setbacks;
use crate::machine::shortage::Health;
use crate::outbox::end_reply;

/// How far the clock of whoever makes an id may be ahead.
const CLOCKS_APART: Duration = Duration::from_secs(86_400);

/// What it takes to take tasks from the broker.
pub(crate) struct Intake {
    pub(crate) claims: Arc<Claims>,
    pub(crate) communicator: Communicator,
    pub(crate) heads: Arc<Heads>,
    pub(crate) setbacks: Arc<Setbacks>,
    pub(crate) health: Arc<Health>,
    pub(crate) drain: CancellationToken,
}

/// Takes deliveries until the communicator has none any more.
pub(crate) async fn run(intake: Arc<Intake>, mut deliveries: mpsc::Receiver<Delivery>) {
    // As many as there are slots, since each delivery comes with one.
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

/// Each delivery of a flood has such a task: what is seldom needed is boxed, so that the rest is small.
async fn take(intake: Arc<Intake>, delivery: Delivery) {
    border!("task-taken");
    let Intake { claims, communicator, .. } = &*intake;
    if intake.health.stops_taking() {
        // Given back while tasks are consumed, it would come here again at once.
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
    let mut begun = None;
    // A message that somebody waits for is answered, however many copies of it there are.
    if delivery.reply_to.is_none() {
        begun = claims.execution.leases.begin_claim(pid);
        if begun.is_none() {
            delivery.settle.ack().await;
            return;
        }
    }
    let (claim, begun) = claims.claim(pid, &delivery.queue, launch, begun).await;
    match claim {
        Ok(Claim::Claimed(claimed)) => {
            intake.setbacks.end(Some(pid));
            answer_launch(communicator, &delivery).await;
            border!("launch-answered");
            let Delivery { permit, settle, .. } = delivery;
            let start = claims.start(claimed, permit, begun);
            // The process first: nobody waits for the broker to hear of it.
            start.await;
            settle.ack().await;
        }
        Ok(Claim::NotQueued) => {
            debug!(%pid, queue = delivery.queue, "nothing to claim; a duplicate or a stale message");
            answer_launch(communicator, &delivery).await;
            Box::pin(answer_if_ended(communicator, &claims.execution.store, &delivery)).await;
            delivery.settle.ack().await;
        }
        Ok(Claim::NotBesideAnother) => {
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
            let pause = intake.setbacks.next_pause(Some(pid));
            warn!(%pid, %error, pause_ms = pause.as_millis(), "not claimed; the message comes again after a pause");
            Box::pin(intake.drain.run_until_cancelled(tokio::time::sleep(pause))).await;
            delivery.settle.give_back().await;
        }
    }
}

/// The process that a launch from outside brings along; `None` for Baton's own messages, whose rows are there.
fn launch(delivery: &Delivery) -> Result<Option<Box<NewProcess>>, String> {
    let Task::Launch { pid, spec: Some(spec), wait, .. } = &delivery.task else { return Ok(None) };
    // By when an id was made a late copy of a launch is known after its process was pruned.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + CLOCKS_APART;
    match pid.made_at() {
        Some(made_at) if u128::try_from(made_at).is_ok_and(|made_at| made_at <= now.as_micros()) => {}
        Some(_) => return Err("pid: its UUIDv7 was made in the future; set the clock of its maker".to_owned()),
        None => return Err("pid: the id of a new process is a UUID of version 7".to_owned()),
    }
    let spec = spec.clone().map_err(spec::Error::from).and_then(spec::from_json_value);
    let spec = spec.map_err(|error| format!("spec: {error}"))?;
    if spec.on_site.as_ref().is_some_and(OnSite::needs_client) {
        let reason = "spec: `in` has files of client://, and whoever sends a message has no folder here; put them into the \
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
            debug!(%pid, %error, "the launch was accepted, but its sender could not be told");
        }
    }
}

/// A launch that waits for a process that has ended already is answered now.
async fn answer_if_ended(communicator: &Communicator, store: &Store, delivery: &Delivery) {
    let Task::Launch { pid, wait: true, .. } = &delivery.task else { return };
    let Some(to) = &delivery.reply_to else { return };
    if let Ok(Some(details)) = store.show(*pid).await
        && details.summary.state.is_final()
    {
        let reply = end_reply(*pid, details.summary.state, details.summary.outcome.as_ref());
        if let Err(error) = communicator.reply(to, &reply).await {
            debug!(%pid, %error, "whoever waits for the end of this process could not be told");
        }
    }
}

async fn refuse(communicator: &Communicator, delivery: Delivery, reason: &str) {
    let pid: Pid = delivery.task.pid();
    warn!(%pid, queue = delivery.queue, reason, "a task that nobody can use goes to the dead-letter queue");
    if let Some(to) = &delivery.reply_to {
        let reply = Reply { pid: Some(pid), accepted: Some(false), error: Some(reason.to_owned()), ..Reply::default() };
        if let Err(error) = communicator.reply(to, &reply).await {
            debug!(%pid, %error, "the sender could not be told");
        }
    }
    delivery.settle.dead(reason).await;
}
