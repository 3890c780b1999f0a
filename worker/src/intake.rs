//! Tasks come in: claim, then acknowledge.

use std::sync::Arc;

use baton_common::border;
use baton_common::communicator::Delivery;
use baton_common::id::Pid;
use baton_common::message::{Reply, Task};
use baton_common::spec::{self, OnSite};
use baton_common::store;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::{Claim, Claimed};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::held::Entry;
use crate::incarnation::{Shared, end_reply};
use crate::live::{Live, Orders};
use crate::run::Start;
use crate::thread::Thread;

/// Takes deliveries until the communicator has none any more.
pub(crate) async fn run(shared: Arc<Shared>, threads: Arc<Vec<Thread>>, mut deliveries: mpsc::Receiver<Delivery>) {
    // As many as there are slots, since each delivery comes with one.
    let mut claims = JoinSet::new();
    loop {
        tokio::select! {
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => {
                    shared.note_head(&delivery.queue, delivery.task.told_at());
                    claims.spawn(take(Arc::clone(&shared), Arc::clone(&threads), delivery));
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
async fn take(shared: Arc<Shared>, threads: Arc<Vec<Thread>>, delivery: Delivery) {
    #[cfg(feature = "without-ack-after-commit")]
    delivery.settle.ack_early().await;
    border!("task-taken");
    if shared.health.stops_taking() {
        // Given back while tasks are consumed, it would come here again at once.
        shared.take_what_it_can().await;
        delivery.settle.give_back().await;
        return;
    }
    let pid = delivery.task.pid();
    let launch = match launch(&delivery) {
        Ok(launch) => launch,
        Err(reason) => {
            Box::pin(refuse(&shared, delivery, &reason)).await;
            return;
        }
    };
    // A message that somebody waits for is answered, however many copies of it there are.
    if delivery.reply_to.is_none() && !shared.held.begin_claim(pid) {
        delivery.settle.ack().await;
        return;
    }
    match claim(&shared, pid, &delivery.queue, launch).await {
        Ok(Claim::Claimed(claimed)) => {
            shared.setbacks.end(Some(pid));
            answer_launch(&shared, &delivery).await;
            border!("launch-answered");
            let Delivery { permit, settle, .. } = delivery;
            let start = begin(&shared, &threads, claimed, permit);
            // The process first: nobody waits for the broker to hear of it.
            start.await;
            settle.ack().await;
        }
        Ok(Claim::NotQueued) => {
            shared.held.end_claim(pid, None);
            debug!(%pid, queue = delivery.queue, "nothing to claim; a duplicate or a stale message");
            answer_launch(&shared, &delivery).await;
            Box::pin(answer_if_ended(&shared, &delivery)).await;
            delivery.settle.ack().await;
        }
        Ok(Claim::NotBesideAnother) => {
            shared.held.end_claim(pid, None);
            answer_launch(&shared, &delivery).await;
            shared.suspects.wait(pid, delivery.queue.clone());
            delivery.settle.ack().await;
        }
        Ok(Claim::Absent) => {
            shared.held.end_claim(pid, None);
            Box::pin(refuse(&shared, delivery, "there is no such process in the database")).await;
        }
        Ok(Claim::Pruned) => {
            shared.held.end_claim(pid, None);
            let reason = "it was launched longer ago than ended processes are kept (`baton prune`), so it may have run \
                          already; to run it, launch it under a new pid";
            Box::pin(refuse(&shared, delivery, reason)).await;
        }
        Ok(Claim::OtherSpec) => {
            shared.held.end_claim(pid, None);
            Box::pin(refuse(&shared, delivery, "a process with this pid and another spec exists")).await;
        }
        Ok(Claim::Rejected(reason)) => {
            shared.held.end_claim(pid, None);
            Box::pin(refuse(&shared, delivery, &reason)).await;
        }
        Err(error) => {
            shared.held.end_claim(pid, None);
            let pause = shared.setbacks.next_pause(Some(pid));
            warn!(%pid, %error, pause_ms = pause.as_millis(), "not claimed; the message comes again after a pause");
            Box::pin(shared.drain.run_until_cancelled(tokio::time::sleep(pause))).await;
            delivery.settle.give_back().await;
        }
    }
}

/// Claims, and looks once more if another message for the same process has come meanwhile.
pub(crate) async fn claim(
    shared: &Shared,
    pid: Pid,
    queue: &str,
    launch: Option<Box<NewProcess>>,
) -> Result<Claim, store::Error> {
    loop {
        match shared.writer.claim(pid, queue.to_owned(), launch.clone()).await {
            Ok(Claim::NotQueued) if shared.held.take_another(pid) => {}
            claim => return claim,
        }
    }
}

/// The process that a launch from outside brings along; `None` for Baton's own messages, whose rows are there.
fn launch(delivery: &Delivery) -> Result<Option<Box<NewProcess>>, String> {
    let Task::Launch { pid, spec: Some(spec), wait, .. } = &delivery.task else { return Ok(None) };
    let spec = spec::from_json_value(spec.clone()).map_err(|error| format!("spec: {error}"))?;
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

/// Enters a claimed process into the table and finds it a thread: the one with the fewest, and none that is blocked. What
/// is returned starts it there.
pub(crate) fn begin(
    shared: &Arc<Shared>,
    threads: &[Thread],
    claimed: Box<Claimed>,
    permit: OwnedSemaphorePermit,
) -> impl Future<Output = ()> + use<> {
    let loads = shared.held.loads(threads.len());
    let idle = threads.iter().enumerate().min_by_key(|(idx, thread)| (thread.blocked().is_some(), loads[*idx]));
    let (thread_idx, thread) = idle.expect("a worker has at least one thread");
    let advances = match &claimed.checkpoint {
        Some(Ok(checkpoint)) => checkpoint.advances,
        Some(Err(_)) | None => 0,
    };
    let live = Arc::new(Live::new(advances, Orders::new(claimed.desired, claimed.urgent)));
    let entry = Entry { fence: claimed.fence, live: Arc::clone(&live), thread_idx };
    shared.held.end_claim(claimed.fence.pid, Some(entry));
    let start = Start { claimed, live, shared: Arc::clone(shared), permit };
    let starts = thread.starts();
    async move {
        // The thread ends only with the incarnation.
        let _ = starts.send(start).await;
    }
}

async fn answer_launch(shared: &Shared, delivery: &Delivery) {
    if let (Task::Launch { pid, .. }, Some(to)) = (&delivery.task, &delivery.reply_to) {
        let reply = Reply { pid: Some(*pid), accepted: Some(true), ..Reply::default() };
        if let Err(error) = Box::pin(shared.communicator.reply(to, &reply)).await {
            debug!(%pid, %error, "the launch was accepted, but its sender could not be told");
        }
    }
}

/// A launch that waits for a process that has ended already is answered now.
async fn answer_if_ended(shared: &Shared, delivery: &Delivery) {
    let Task::Launch { pid, wait: true, .. } = &delivery.task else { return };
    let Some(to) = &delivery.reply_to else { return };
    if let Ok(Some(details)) = shared.store.show(*pid).await
        && details.summary.state.is_final()
    {
        let reply = end_reply(*pid, details.summary.state, details.summary.outcome.as_ref());
        if let Err(error) = shared.communicator.reply(to, &reply).await {
            debug!(%pid, %error, "whoever waits for the end of this process could not be told");
        }
    }
}

async fn refuse(shared: &Shared, delivery: Delivery, reason: &str) {
    let pid: Pid = delivery.task.pid();
    warn!(%pid, queue = delivery.queue, reason, "a task that nobody can use goes to the dead-letter queue");
    if let Some(to) = &delivery.reply_to {
        let reply = Reply { pid: Some(pid), accepted: Some(false), error: Some(reason.to_owned()), ..Reply::default() };
        if let Err(error) = shared.communicator.reply(to, &reply).await {
            debug!(%pid, %error, "the sender could not be told");
        }
    }
    delivery.settle.dead(reason).await;
}
