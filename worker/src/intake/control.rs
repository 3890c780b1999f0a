//! Control requests come in: to one process by the worker's own queue, to many by broadcast, from inside and outside.
//!
//! A request carries no decision: Baton's own programs have written it into the row before they send it, and one from
//! outside is written here first. Then the row is read and the process is told.

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
use crate::intake::setbacks::Setbacks;
use crate::local::output;
use crate::outbox::Outbox;

/// Requests that are dealt with at a time. Each waits for the database or for a moment; more of them wait in the channel.
const REQUESTS_MAX: usize = 64;

/// How long an answer waits for the request to be applied before it says that it will be.
const APPLY_LIMIT: Duration = Duration::from_millis(50);

/// The same for a broadcast: a worker that holds thousands commits them in a few batches.
const BROADCAST_LIMIT: Duration = Duration::from_secs(1);

/// Most of a stream that one answer carries.
const CHUNK_BYTES_MAX: u64 = 256 * 1024;

/// What it takes to answer requests.
pub(crate) struct Desk {
    pub(crate) identity: Arc<Identity>,
    pub(crate) store: Store,
    pub(crate) communicator: Communicator,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) leases: Arc<LeaseTable>,
    pub(crate) threads: Arc<Vec<Thread>>,
    pub(crate) setbacks: Arc<Setbacks>,
    pub(crate) blocking: Handle,
    pub(crate) drain: CancellationToken,
    /// Notified when a beat has something to learn.
    pub(crate) beat_now: Arc<Notify>,
}

/// Answers requests until the communicator has none any more.
pub(crate) async fn run(desk: Arc<Desk>, mut requests: mpsc::Receiver<ControlRequest>) {
    let mut answers = JoinSet::new();
    while let Some(request) = requests.recv().await {
        while answers.len() >= REQUESTS_MAX || answers.try_join_next().is_some() {
            if answers.len() >= REQUESTS_MAX {
                answers.join_next().await;
            }
        }
        answers.spawn(handle(Arc::clone(&desk), request));
    }
}

async fn handle(desk: Arc<Desk>, request: ControlRequest) {
    let ControlRequest { control, from_broadcast, from_baton, message_id, user, reply_to, durable } = request;
    let asked = |verb, reason| Request {
        login: Some(user.map_or_else(|| "amqp".to_owned(), |user| format!("amqp:{user}"))),
        reason,
        ..Request::new(verb, "amqp")
    };
    if let Some(settle) = durable {
        // Baton's own programs have written the rows themselves.
        let recorded = if from_baton { Ok(None) } else { record(&desk, control, message_id.as_deref(), asked).await };
        match recorded {
            Ok(reply) => {
                desk.setbacks.end(None);
                settle.ack().await;
                answer(&desk, reply_to.filter(|_| !from_baton), reply).await;
            }
            Err(Refusal::Unusable(reason)) => {
                answer(&desk, reply_to, Some(Reply::refusal(&reason))).await;
                settle.dead(&reason).await;
            }
            Err(Refusal::Database(error)) => {
                let pause = desk.setbacks.next_pause(None);
                warn!(%error, pause_ms = pause.as_millis(), "a broadcast could not be recorded; it comes again after a pause");
                desk.drain.run_until_cancelled(tokio::time::sleep(pause)).await;
                settle.give_back().await;
            }
        }
        return;
    }
    let reply = match control {
        // From outside, it says nothing yet: whoever takes its durable copy writes it into the rows, and says it again.
        Control::Obey { .. } | Control::Fleet { .. } | Control::Drain if from_broadcast && !from_baton => return,
        Control::Obey { verb, .. } if from_broadcast => obey_broadcast(&desk, verb).await,
        Control::Obey { verb, select, reason } => match select.pids.as_deref() {
            Some(&[pid]) if select == Select::one(pid) => {
                let asked = (!from_baton).then(|| asked(verb, reason));
                obey_one(&desk, verb, pid, asked).await
            }
            Some(_) | None => {
                Reply::refusal("a worker's own queue takes requests to one process; broadcast those to many")
            }
        },
        Control::Fleet { .. } => {
            // What it says stands in the database, and the beat reads it.
            desk.beat_now.notify_one();
            named(&desk, Reply { outcome: Some(Effect::Recorded), ..Reply::default() })
        }
        Control::Status(pid) => status(&desk, pid),
        Control::Output { pid, stdout_offset, stderr_offset } => {
            written(&desk, pid, stdout_offset, stderr_offset).await
        }
        Control::Ping => {
            Reply { outcome: Some(Effect::Alive), traffic: Some(desk.communicator.traffic()), ..Reply::default() }
        }
        Control::Drain => {
            info!("asked to drain");
            desk.drain.cancel();
            Reply { outcome: Some(Effect::Draining), ..Reply::default() }
        }
    };
    answer(&desk, reply_to, Some(reply)).await;
}

async fn answer(desk: &Desk, to: Option<ReplyTo>, reply: Option<Reply>) {
    if let (Some(to), Some(reply)) = (to, reply)
        && let Err(error) = desk.communicator.reply(&to, &reply).await
    {
        debug!(%error, "the answer to a control request was not sent");
    }
}

/// An answer to a broadcast says whose it is.
fn named(desk: &Desk, reply: Reply) -> Reply {
    Reply { worker: Some(desk.identity.name.clone()), incarnation: Some(desk.identity.me), ..reply }
}

/// Why a broadcast from outside is not recorded.
enum Refusal {
    Unusable(String),
    Database(store::Error),
}

/// Writes a broadcast from outside into the rows, once, whoever takes it. A worker that dies meanwhile leaves the message
/// to another, who goes on where it was.
async fn record(
    desk: &Desk,
    control: Control,
    message_id: Option<&str>,
    asked: impl FnOnce(Desired, Option<String>) -> Request,
) -> Result<Option<Reply>, Refusal> {
    // A message without an id cannot be told from its copy, so a copy is recorded again; that harms only the history.
    let id = message_id.map_or_else(RequestId::generate, RequestId::of_message);
    let recorded = match &control {
        Control::Obey { verb, select, reason } => {
            let asked = asked(*verb, reason.clone());
            record_many(desk, id, select, &asked).await
        }
        Control::Fleet { verb, reason } => {
            let written = desk.store.control_fleet(id, &asked(*verb, reason.clone())).await;
            written.map(|is_new| is_new.then_some(0))
        }
        Control::Status(_) | Control::Output { .. } | Control::Ping | Control::Drain => {
            return Err(Refusal::Unusable("only `pause`, `play` and `kill` can be broadcast".to_owned()));
        }
    };
    let count = recorded.map_err(|error| {
        // What the database does not take now it takes later; a selection that it never takes must not come again.
        if error.is_transient() { Refusal::Database(error) } else { Refusal::Unusable(error.to_string()) }
    })?;
    let Some(count) = count else { return Ok(None) };
    info!(count, %id, "a broadcast from outside is recorded");
    if let Err(error) = desk.communicator.broadcast(control).await {
        debug!(%error, "the other workers find out at their next beat");
    }
    let counts = BTreeMap::from([(Effect::Recorded.word().to_owned(), count)]);
    Ok(Some(named(desk, Reply { outcome: Some(Effect::Recorded), counts: Some(counts), ..Reply::default() })))
}

/// Asks every process of a selection; gives their number, or `None` when all have been asked before.
async fn record_many(
    desk: &Desk,
    id: RequestId,
    select: &Select,
    asked: &Request,
) -> Result<Option<u64>, store::Error> {
    let Some(mut many) = desk.store.control_many(id, select, asked).await? else { return Ok(None) };
    let mut count = 0;
    while let Some(page) = many.next().await? {
        count += page.len() as u64;
        for row in page {
            follow(desk, row).await;
        }
    }
    Ok(Some(count))
}

/// Does what follows a request that was applied in the database.
async fn follow(desk: &Desk, row: Controlled) {
    if let Some((queue, told)) = row.announced {
        desk.outbox.publish(row.pid, queue, told.announced_at).await;
    }
    if row.place == Place::Ended {
        desk.outbox.ended(row.pid, row.state, row.reply_to).await;
    } else if row.place != Place::Held {
        desk.outbox.announce(row.pid, row.state, None);
    }
}

/// Reads the row of everything that is held, and tells every process what its own says.
async fn reread(desk: &Desk) -> Result<Vec<Wish>, store::Error> {
    // What is claimed after this was claimed with its row's wish.
    let before = desk.leases.entries();
    let wishes = desk.store.desired_of(desk.identity.me, true).await?;
    let ours: HashSet<Fence> = wishes.iter().map(|wish| wish.fence).collect();
    for wish in &wishes {
        desk.leases.order(*wish);
    }
    for entry in before.iter().filter(|entry| !ours.contains(&entry.fence)) {
        // It has left just now, by its own last write, or somebody has ended it by force.
        desk.leases.abandon(entry.fence);
    }
    Ok(wishes)
}

/// A broadcast to many, which is written into the rows already or will be by whoever takes its copy.
async fn obey_broadcast(desk: &Desk, verb: Desired) -> Reply {
    let entries = desk.leases.entries();
    let wishes = match reread(desk).await {
        Ok(wishes) => wishes,
        Err(error) => return named(desk, Reply::refusal(error.to_string())),
    };
    let wanted: HashSet<Fence> = wishes.iter().filter(|wish| wish.desired == verb).map(|wish| wish.fence).collect();
    let wanted: Vec<Entry> = entries.into_iter().filter(|entry| wanted.contains(&entry.fence)).collect();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    if verb != Desired::Run {
        desk.leases.all_left(&wanted, BROADCAST_LIMIT).await;
    }
    for entry in &wanted {
        let effect = if desk.leases.holds(entry.fence) { Effect::pending(verb) } else { entry.live.effect(verb) };
        *counts.entry(effect.word().to_owned()).or_default() += 1;
    }
    info!(verb = verb.verb(), ?counts, "a broadcast is obeyed");
    named(desk, Reply { counts: Some(counts), ..Reply::default() })
}

/// A request to one process. `asked` is what has to be written into its row first.
async fn obey_one(desk: &Desk, verb: Desired, pid: Pid, asked: Option<Request>) -> Reply {
    if let Some(asked) = asked {
        match desk.store.control(pid, &asked).await {
            Ok(Answer::Recorded(row)) => {
                let (place, effect) = (row.place, row.effect);
                follow(desk, row).await;
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
    let Some(entry) = desk.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    match desk.store.desired_of_one(desk.identity.me, pid).await {
        Ok(Some(wish)) => desk.leases.order(wish),
        Ok(None) => {
            desk.leases.abandon(entry.fence);
            return outcome(pid, Effect::NotHeld);
        }
        Err(error) => return Reply::refusal(error.to_string()),
    }
    // A pause waits for the advance, however long that takes; everything else is a matter of a commit.
    let is_quick = verb == Desired::Kill || entry.live.orders().interrupts() || !entry.live.is_advancing();
    let has_left = verb != Desired::Run && is_quick && desk.leases.left(entry.fence, APPLY_LIMIT).await;
    outcome(pid, if has_left { entry.live.effect(verb) } else { Effect::pending(verb) })
}

fn outcome(pid: Pid, effect: Effect) -> Reply {
    Reply { pid: Some(pid), outcome: Some(effect), ..Reply::default() }
}

fn status(desk: &Desk, pid: Pid) -> Reply {
    let Some(entry) = desk.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    let mut status = entry.live.status(&desk.identity.name, entry.fence.epoch);
    let blocked = desk.threads.iter().filter_map(Thread::blocked).find(|(other, _)| *other == pid);
    status.blocked_ms = blocked.map(|(_, elapsed)| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    Reply { pid: Some(pid), status: Some(status), ..Reply::default() }
}

/// What a held program has written from these offsets on.
async fn written(desk: &Desk, pid: Pid, stdout_offset: u64, stderr_offset: u64) -> Reply {
    let Some(entry) = desk.leases.get(pid) else { return outcome(pid, Effect::NotHeld) };
    let Some(streams) = entry.live.streams() else { return outcome(pid, Effect::NotStarted) };
    let read = desk.blocking.spawn_blocking(move || {
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
