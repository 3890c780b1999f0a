//! Control messages: to one process by the worker's own queue, to many by broadcast, from Baton's programs and from
//! outside.
//!
//! A control message carries no decision. Baton's programs write the request into the row before they send the message; a
//! request from outside is written here first. Then the worker reads the row and passes the request to the process.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::{Communicator, ControlRequest, ReplyTo};
use baton_common::id::{Pid, RequestId};
use baton_common::message::{Control, Effect, OutputChunk, Reply};
use baton_common::select::Select;
use baton_common::state::{Desired, Place};
use baton_common::store::control::{Answer, Controlled, Request};
use baton_common::store::worker::Wish;
use baton_common::store::writer::Fence;
use baton_common::store::{self, Store};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::author::facilities::Identity;
use crate::execution::lease_table::{Entry, LeaseTable};
use crate::execution::thread::Thread;
use crate::intake::backoff::Backoff;
use crate::local::output;
use crate::outbox::Outbox;

/// Messages that are handled at a time. Each waits for the database or for a moment; others wait in the channel.
const REQUESTS_MAX: usize = 64;

/// How long a reply waits for the request to be applied before it reports the request as pending.
const APPLY_LIMIT: Duration = Duration::from_millis(50);

/// The same for a broadcast: a worker that holds thousands commits them in a few batches.
const BROADCAST_LIMIT: Duration = Duration::from_secs(1);

/// Most bytes of a stream in one reply.
const CHUNK_BYTES_MAX: u64 = 256 * 1024;

/// The parts of a worker that handle control messages.
pub(crate) struct Handler {
    pub(crate) identity: Arc<Identity>,
    pub(crate) store: Store,
    pub(crate) communicator: Communicator,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) leases: Arc<LeaseTable>,
    pub(crate) threads: Arc<Vec<Thread>>,
    pub(crate) backoff: Arc<Backoff>,
    pub(crate) blocking: Handle,
    pub(crate) drain: CancellationToken,
    /// Notified when the next beat should come at once.
    pub(crate) beat_now: Arc<Notify>,
}

/// Handles control messages until the communicator stops.
pub(crate) async fn run(handler: Arc<Handler>, mut requests: mpsc::Receiver<ControlRequest>) {
    let mut answers = JoinSet::new();
    while let Some(request) = requests.recv().await {
        while answers.len() >= REQUESTS_MAX || answers.try_join_next().is_some() {
            if answers.len() >= REQUESTS_MAX {
                answers.join_next().await;
            }
        }
        answers.spawn(handle(Arc::clone(&handler), request));
    }
}

async fn handle(handler: Arc<Handler>, request: ControlRequest) {
    let ControlRequest { control, from_broadcast, from_baton, message_id, user, reply_to, durable } = request;
    let asked = |verb, reason| Request {
        login: Some(user.map_or_else(|| "amqp".to_owned(), |user| format!("amqp:{user}"))),
        reason,
        ..Request::new(verb, "amqp")
    };
    if let Some(settle) = durable {
        // Baton's programs have already written the rows.
        let recorded =
            if from_baton { Ok(None) } else { record(&handler, control, message_id.as_deref(), asked).await };
        match recorded {
            Ok(reply) => {
                handler.backoff.end(None);
                settle.ack().await;
                answer(&handler, reply_to.filter(|_| !from_baton), reply).await;
            }
            Err(Refusal::Unusable(reason)) => {
                answer(&handler, reply_to, Some(Reply::refusal(&reason))).await;
                settle.dead(&reason).await;
            }
            Err(Refusal::Database(error)) => {
                let pause = handler.backoff.next_pause(None);
                warn!(%error, pause_ms = pause.as_millis(), "a broadcast could not be recorded; giving it back after a pause");
                handler.drain.run_until_cancelled(tokio::time::sleep(pause)).await;
                settle.give_back().await;
            }
        }
        return;
    }
    let reply = match control {
        // From outside, the rows are not written yet: the worker that takes the durable copy writes them and repeats it.
        Control::Obey { .. } | Control::Fleet { .. } | Control::Drain if from_broadcast && !from_baton => return,
        Control::Obey { verb, .. } if from_broadcast => obey_broadcast(&handler, verb).await,
        Control::Obey { verb, select, reason } => match select.pids.as_deref() {
            Some(&[pid]) if select == Select::one(pid) => {
                let asked = (!from_baton).then(|| asked(verb, reason));
                obey_one(&handler, verb, pid, asked).await
            }
            Some(_) | None => {
                Reply::refusal("the queue of a worker takes requests to one process only; broadcast requests to many")
            }
        },
        Control::Fleet { .. } => {
            // The beat reads the request from the database.
            handler.beat_now.notify_one();
            named(&handler, Reply { outcome: Some(Effect::Recorded), ..Reply::default() })
        }
        Control::Status(pid) => status(&handler, pid),
        Control::Output { pid, stdout_offset, stderr_offset } => {
            written(&handler, pid, stdout_offset, stderr_offset).await
        }
        Control::Ping => {
            Reply { outcome: Some(Effect::Alive), traffic: Some(handler.communicator.traffic()), ..Reply::default() }
        }
        Control::Drain => {
            info!("asked to drain");
            handler.drain.cancel();
            Reply { outcome: Some(Effect::Draining), ..Reply::default() }
        }
    };
    answer(&handler, reply_to, Some(reply)).await;
}

async fn answer(handler: &Handler, to: Option<ReplyTo>, reply: Option<Reply>) {
    if let (Some(to), Some(reply)) = (to, reply)
        && let Err(error) = handler.communicator.reply(&to, &reply).await
    {
        debug!(%error, "the reply to a control message was not sent");
    }
}

/// Adds the worker to a reply to a broadcast.
fn named(handler: &Handler, reply: Reply) -> Reply {
    Reply { worker: Some(handler.identity.name.clone()), incarnation: Some(handler.identity.me), ..reply }
}

/// Why a broadcast from outside was not recorded.
enum Refusal {
    Unusable(String),
    Database(store::Error),
}

/// Writes a broadcast from outside into the rows, once in the fleet. If this worker dies meanwhile, the broker delivers
/// the message to another worker, which resumes.
async fn record(
    handler: &Handler,
    control: Control,
    message_id: Option<&str>,
    asked: impl FnOnce(Desired, Option<String>) -> Request,
) -> Result<Option<Reply>, Refusal> {
    // Copies of a message without an id are recorded again, which affects only the history.
    let id = message_id.map_or_else(RequestId::generate, RequestId::of_message);
    let recorded = match &control {
        Control::Obey { verb, select, reason } => {
            let asked = asked(*verb, reason.clone());
            record_many(handler, id, select, &asked).await
        }
        Control::Fleet { verb, reason } => {
            let written = handler.store.control_fleet(id, &asked(*verb, reason.clone())).await;
            written.map(|is_new| is_new.then_some(0))
        }
        Control::Status(_) | Control::Output { .. } | Control::Ping | Control::Drain => {
            return Err(Refusal::Unusable("only `pause`, `play` and `kill` can be broadcast".to_owned()));
        }
    };
    let count = recorded.map_err(|error| {
        // A transient error is retried; a selection that the database always rejects must not be.
        if error.is_transient() { Refusal::Database(error) } else { Refusal::Unusable(error.to_string()) }
    })?;
    let Some(count) = count else { return Ok(None) };
    info!(count, %id, "recorded a broadcast from outside");
    if let Err(error) = handler.communicator.broadcast(control).await {
        debug!(%error, "not broadcast; the other workers learn it at their next beat");
    }
    let counts = BTreeMap::from([(Effect::Recorded.word().to_owned(), count)]);
    Ok(Some(named(handler, Reply { outcome: Some(Effect::Recorded), counts: Some(counts), ..Reply::default() })))
}

/// Records the request for every process of a selection. Returns their number, or `None` if it was recorded before.
async fn record_many(
    handler: &Handler,
    id: RequestId,
    select: &Select,
    asked: &Request,
) -> Result<Option<u64>, store::Error> {
    let Some(mut many) = handler.store.control_many(id, select, asked).await? else { return Ok(None) };
    let mut count = 0;
    while let Some(page) = many.next().await? {
        count += page.len() as u64;
        for row in page {
            follow(handler, row).await;
        }
    }
    Ok(Some(count))
}

/// Publishes the messages that follow a request that was applied in the database.
async fn follow(handler: &Handler, row: Controlled) {
    if let Some((queue, told)) = row.announced {
        handler.outbox.announce(row.pid, queue, told.announced_at).await;
    }
    if row.place == Place::Ended {
        handler.outbox.ended(row.pid, row.state, row.reply_to).await;
    } else if row.place != Place::Held {
        handler.outbox.publish_event(row.pid, row.state, None);
    }
}

/// Reads the rows of all held processes and passes each its request.
async fn reread(handler: &Handler) -> Result<Vec<Wish>, store::Error> {
    // A later claim reads the request itself.
    let before = handler.leases.entries();
    let wishes = handler.store.desired_of(handler.identity.me, true).await?;
    let ours: HashSet<Fence> = wishes.iter().map(|wish| wish.fence).collect();
    for wish in &wishes {
        handler.leases.order(*wish);
    }
    for entry in before.iter().filter(|entry| !ours.contains(&entry.fence)) {
        // It has just left by its own last write, or it was killed by force.
        handler.leases.abandon(entry.fence);
    }
    Ok(wishes)
}

/// Obeys a broadcast, whose requests are in the rows already or are being written.
async fn obey_broadcast(handler: &Handler, verb: Desired) -> Reply {
    let entries = handler.leases.entries();
    let wishes = match reread(handler).await {
        Ok(wishes) => wishes,
        Err(error) => return named(handler, Reply::refusal(error.to_string())),
    };
    let wanted: HashSet<Fence> = wishes.iter().filter(|wish| wish.desired == verb).map(|wish| wish.fence).collect();
    let wanted: Vec<Entry> = entries.into_iter().filter(|entry| wanted.contains(&entry.fence)).collect();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    if verb != Desired::Run {
        handler.leases.all_left(&wanted, BROADCAST_LIMIT).await;
    }
    for entry in &wanted {
        let effect = if handler.leases.holds(entry.fence) { Effect::pending(verb) } else { entry.live.effect(verb) };
        *counts.entry(effect.word().to_owned()).or_default() += 1;
    }
    info!(verb = verb.verb(), ?counts, "obeyed a broadcast");
    named(handler, Reply { counts: Some(counts), ..Reply::default() })
}

/// Obeys a request to one process. `asked` is written into its row first.
async fn obey_one(handler: &Handler, verb: Desired, pid: Pid, asked: Option<Request>) -> Reply {
    if let Some(asked) = asked {
        match handler.store.control(pid, &asked).await {
            Ok(Answer::Recorded(row)) => {
                let (place, effect) = (row.place, row.effect);
                follow(handler, row).await;
                if place != Place::Held {
                    return outcome(pid, effect);
                }
            }
            Ok(Answer::Ended(state)) => return outcome(pid, Effect::ended(state)),
            Ok(Answer::Dying) => return outcome(pid, Effect::Killing),
            Ok(Answer::Absent) => {
                let reply = Reply::refusal(format!("there is no process {pid}"));
                return Reply { outcome: Some(Effect::Absent), ..reply };
            }
            Err(error) => return Reply::refusal(error.to_string()),
        }
    }
    let Some(entry) = handler.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    match handler.store.desired_of_one(handler.identity.me, pid).await {
        Ok(Some(wish)) => handler.leases.order(wish),
        Ok(None) => {
            handler.leases.abandon(entry.fence);
            return outcome(pid, Effect::NotHeld);
        }
        Err(error) => return Reply::refusal(error.to_string()),
    }
    // A pause waits for the end of the advance, however long that takes; everything else takes a commit.
    let is_quick = verb == Desired::Kill || entry.live.orders().interrupts() || !entry.live.is_advancing();
    let has_left = verb != Desired::Run && is_quick && handler.leases.left(entry.fence, APPLY_LIMIT).await;
    outcome(pid, if has_left { entry.live.effect(verb) } else { Effect::pending(verb) })
}

fn outcome(pid: Pid, effect: Effect) -> Reply {
    Reply { pid: Some(pid), outcome: Some(effect), ..Reply::default() }
}

fn status(handler: &Handler, pid: Pid) -> Reply {
    let Some(entry) = handler.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    let mut status = entry.live.status(&handler.identity.name, entry.fence.epoch);
    let blocked = handler.threads.iter().filter_map(Thread::blocked).find(|(other, _)| *other == pid);
    status.blocked_ms = blocked.map(|(_, elapsed)| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    Reply { pid: Some(pid), status: Some(status), ..Reply::default() }
}

/// Returns the output of a held program from these offsets.
async fn written(handler: &Handler, pid: Pid, stdout_offset: u64, stderr_offset: u64) -> Reply {
    let Some(entry) = handler.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    let Some(streams) = entry.live.streams() else { return outcome(pid, Effect::NotStarted) };
    let read = handler.blocking.spawn_blocking(move || {
        let stdout = output::read_from(&streams.stdout, stdout_offset, CHUNK_BYTES_MAX)?;
        let stderr = output::read_from(&streams.stderr, stderr_offset, CHUNK_BYTES_MAX)?;
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
