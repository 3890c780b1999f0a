//! Control requests come in: to one process by the worker's own queue, to many by broadcast, from inside and outside.
//!
//! A request carries no decision: Baton's own programs have written it into the row before they send it, and one from
//! outside is written here first. Then the row is read and the process is told.

use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::ControlRequest;
use baton_common::id::{Incarnation, Pid};
use baton_common::message::{Control, OutputChunk, Reply, Select};
use baton_common::state::{Desired, Place};
use baton_common::store;
use baton_common::store::control::{Answer, Controlled, Request};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::incarnation::Shared;
use crate::local::output;
use crate::sweeps;
use crate::thread::Thread;

/// Requests that are dealt with at a time. Each waits for the database or for a moment; more of them wait in the channel.
const REQUESTS_MAX: usize = 64;

/// How long an answer waits for the request to be applied before it says that it will be.
const APPLY_LIMIT: Duration = Duration::from_millis(50);

/// Most of a stream that one answer carries.
const CHUNK_BYTES_MAX: u64 = 256 * 1024;

/// Answers requests until the communicator has none any more.
pub(crate) async fn run(shared: Arc<Shared>, threads: Arc<Vec<Thread>>, mut requests: mpsc::Receiver<ControlRequest>) {
    let mut answers = JoinSet::new();
    while let Some(request) = requests.recv().await {
        while answers.len() >= REQUESTS_MAX || answers.try_join_next().is_some() {
            if answers.len() >= REQUESTS_MAX {
                answers.join_next().await;
            }
        }
        answers.spawn(handle(Arc::clone(&shared), Arc::clone(&threads), request));
    }
}

async fn handle(shared: Arc<Shared>, threads: Arc<Vec<Thread>>, request: ControlRequest) {
    let ControlRequest { control, from_broadcast, from_baton, message_id, reply_to, durable } = request;
    let reply = match control {
        Control::Obey { verb, select, reason } => {
            let asked = Request { verb, urgent: false, by: "amqp".into(), reason };
            if let Some(settle) = durable {
                match record(&shared, &select, &asked, message_id.as_deref(), from_baton).await {
                    Ok(()) => settle.ack().await,
                    Err(Refusal::Unusable(reason)) => settle.dead(&reason).await,
                    Err(Refusal::Database(error)) => {
                        warn!(%error, "a broadcast could not be recorded; it comes again");
                        settle.give_back().await;
                    }
                }
                return;
            }
            obey(&shared, verb, &select, from_baton || from_broadcast, &asked).await
        }
        Control::Status(pid) => status(&shared, &threads, pid),
        Control::Output { pid, stdout_offset, stderr_offset } => {
            written(&shared, pid, stdout_offset, stderr_offset).await
        }
        Control::Ping => Reply { outcome: Some("alive".into()), ..Reply::default() },
        Control::Drain => {
            info!("asked to drain");
            shared.drain.cancel();
            Reply { outcome: Some("draining".into()), ..Reply::default() }
        }
    };
    if let Some(to) = reply_to
        && let Err(error) = shared.communicator.reply(&to, &reply).await
    {
        debug!(%error, "the answer to a control request was not sent");
    }
}

/// Why a broadcast from outside is not recorded.
enum Refusal {
    Unusable(String),
    Database(store::Error),
}

/// Writes a broadcast from outside into the rows, once, whoever takes it.
async fn record(
    shared: &Shared,
    select: &Select,
    asked: &Request,
    message_id: Option<&str>,
    from_baton: bool,
) -> Result<(), Refusal> {
    if from_baton {
        // Its sender has written the rows itself.
        return Ok(());
    }
    // A message without an id cannot be told from its copy, so a copy is recorded again; that harms only the history.
    let unnamed = Incarnation::generate().to_string();
    let id = message_id.unwrap_or(&unnamed);
    if !shared.store.record_broadcast(id, asked).await.map_err(Refusal::Database)? {
        return Ok(());
    }
    let mut pages: Vec<Vec<Controlled>> = Vec::new();
    let recorded = shared.store.control_many(select, asked, |page| pages.push(page)).await;
    let count = recorded.map_err(|error| {
        // What the database does not take now it takes later; a selection that it never takes must not come again.
        if error.is_transient() { Refusal::Database(error) } else { Refusal::Unusable(error.to_string()) }
    })?;
    info!(verb = asked.verb.verb(), count, "a broadcast from outside is recorded");
    for row in pages.into_iter().flatten() {
        follow(shared, row).await;
    }
    for (pid, desired, urgent) in shared.store.desired_of(shared.me, None).await.map_err(Refusal::Database)? {
        shared.held.order(pid, desired, urgent);
    }
    Ok(())
}

/// Does what follows a request that was applied in the database.
async fn follow(shared: &Shared, row: Controlled) {
    if let Some((queue, told)) = row.told {
        shared.tell(row.pid, queue, told.told_at).await;
    }
    if row.place == Place::Ended {
        sweeps::ended(shared, row.pid, row.state, row.reply_to).await;
    } else if row.place != Place::Held {
        shared.announce(row.pid, row.state, None);
    }
}

/// Reads the rows and tells the processes.
async fn obey(shared: &Shared, verb: Desired, select: &Select, is_recorded: bool, asked: &Request) -> Reply {
    let [pid] = select.pids[..] else {
        // A broadcast: whatever is desired of what is held here.
        return match shared.store.desired_of(shared.me, None).await {
            Ok(rows) => {
                for (pid, desired, urgent) in &rows {
                    shared.held.order(*pid, *desired, *urgent);
                }
                if verb == Desired::Run {
                    for entry in
                        shared.held.entries().iter().filter(|entry| entry.orders.borrow().desired == Desired::Pause)
                    {
                        shared.held.order(entry.fence.pid, Desired::Run, false);
                    }
                }
                Reply { outcome: Some("read".into()), ..Reply::default() }
            }
            Err(error) => Reply::refusal(error.to_string()),
        };
    };
    if !is_recorded {
        match shared.store.control(pid, asked).await {
            Ok(Answer::Recorded(row)) => follow(shared, row).await,
            Ok(Answer::Ended(state)) => return outcome(pid, state.word()),
            Ok(Answer::Dying) => return outcome(pid, "killing"),
            Ok(Answer::Absent) => return Reply::refusal(format!("there is no process {pid}")),
            Err(error) => return Reply::refusal(error.to_string()),
        }
    }
    let Some(entry) = shared.held.get(pid) else { return outcome(pid, "not_held") };
    match shared.store.desired_of(shared.me, Some(pid)).await {
        Ok(rows) => {
            for (pid, desired, urgent) in rows {
                shared.held.order(pid, desired, urgent);
            }
        }
        Err(error) => return Reply::refusal(error.to_string()),
    }
    let has_left = verb != Desired::Run && shared.held.left(entry.fence, APPLY_LIMIT).await;
    outcome(
        pid,
        match (verb, has_left) {
            (Desired::Run, _) => "playing",
            (Desired::Pause, true) => "paused",
            (Desired::Pause, false) => "pausing",
            (Desired::Kill, true) => "killed",
            (Desired::Kill, false) => "killing",
        },
    )
}

fn outcome(pid: Pid, word: &str) -> Reply {
    Reply { pid: Some(pid), outcome: Some(word.to_owned()), ..Reply::default() }
}

fn status(shared: &Shared, threads: &[Thread], pid: Pid) -> Reply {
    let Some(entry) = shared.held.get(pid) else { return outcome(pid, "not_held") };
    let mut status = entry.live.status(&shared.name, entry.fence.epoch);
    let blocked = threads.iter().filter_map(Thread::blocked).find(|(other, _)| *other == pid);
    status.blocked_ms = blocked.map(|(_, elapsed)| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    Reply { pid: Some(pid), status: Some(status), ..Reply::default() }
}

/// What a held program has written from these offsets on.
async fn written(shared: &Shared, pid: Pid, stdout_offset: u64, stderr_offset: u64) -> Reply {
    let Some(entry) = shared.held.get(pid) else { return outcome(pid, "not_held") };
    let Some(sandbox) = entry.live.sandbox() else { return outcome(pid, "not_started") };
    let read = shared.blocking.spawn_blocking(move || {
        let stdout = output::read_from(&sandbox.stdout(), stdout_offset, CHUNK_BYTES_MAX)?;
        let stderr = output::read_from(&sandbox.stderr(), stderr_offset, CHUNK_BYTES_MAX)?;
        Ok::<_, std::io::Error>((stdout, stderr))
    });
    match read.await {
        Ok(Ok((stdout, stderr))) => {
            let chunk = OutputChunk { stdout, stderr, epoch: entry.fence.epoch };
            Reply { pid: Some(pid), output: Some(chunk), ..Reply::default() }
        }
        Ok(Err(error)) => Reply::refusal(format!("its output cannot be read: {error}")),
        Err(error) => Reply::refusal(format!("its output cannot be read: {error}")),
    }
}
