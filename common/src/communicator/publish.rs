//! The publish connection: tasks, dead letters and events.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures_util::future::{BoxFuture, FusedFuture, try_join_all};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Connection, PublisherConfirm};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Duration, Instant, sleep, timeout, timeout_at};

use super::envelope::{DEAD_QUEUE, EVENT_EXCHANGE, Envelope, TASK_EXCHANGE, bad_queue_name, short, task_queue};
use super::health::{HealthState, Link};
use super::link::{ANSWER_LIMIT, Backoff, Dial, close, reason};
use super::topology::{Item, ensure};
use super::{Down, PublishError};
use crate::border;
use crate::message::{Encoding, Event, Events, VERSION};

/// Most jobs that publish at the same time, each on its own channel. A returned message then belongs to the job of its
/// channel, and a queue without a quorum does not delay other queues.
const N_LANES: usize = 8;

/// Messages of one job that are written together; up to twice as many are unconfirmed. Confirms arrive in batches, one
/// for each disk write; more than some hundreds gain nothing.
const N_PAGE: usize = 250;

/// Pause before messages that the broker rejected are sent again. A queue elects a leader within some 100 ms.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Pause before an absent queue is declared. If it was just deleted, its consumers must be cancelled first, which takes
/// RabbitMQ some 50 ms: it silently moves consumers to a new queue of the same name, and then delivers nothing to them.
const DELETED_PAUSE: Duration = Duration::from_millis(250);

/// Pause between two messages with events, during which the next events gather. It is too short for observers to
/// notice, and a busy worker publishes some hundred messages per second instead of thousands.
const EVENT_PAUSE: Duration = Duration::from_millis(10);

/// Most events in one message. An event has some 100 bytes, so a message stays far below the size limit.
const N_EVENTS_MAX: usize = 512;

/// A batch of messages to publish.
pub(super) struct Job {
    pub(super) target: Target,
    pub(super) messages: Vec<Envelope>,
    pub(super) deadline: Instant,
    pub(super) done: oneshot::Sender<Result<(), PublishError>>,
}

/// The page of messages that is published and not yet confirmed.
///
/// Waiting for each message to be written costs a system call and two thread switches per message; messages of a page
/// are written together. The broker confirms almost always in order, so the wait for the youngest message wakes once
/// per page.
pub(super) struct Window<T> {
    unconfirmed: Vec<(T, PublisherConfirm)>,
}

impl<T> Window<T> {
    pub(super) fn new() -> Self {
        Self { unconfirmed: Vec::new() }
    }

    /// Publishes a page, and waits for the confirms of the previous page. Each publish returns a value that is returned
    /// with its confirmation.
    pub(super) async fn push(
        &mut self,
        page: impl IntoIterator<Item = impl Future<Output = lapin::Result<(T, PublisherConfirm)>>>,
    ) -> lapin::Result<Vec<(T, Confirmation)>> {
        let published = try_join_all(page).await?;
        published.iter().for_each(|_| border!("publish-sent"));
        confirmed(std::mem::replace(&mut self.unconfirmed, published)).await
    }

    /// Waits for the last page.
    pub(super) async fn rest(self) -> lapin::Result<Vec<(T, Confirmation)>> {
        confirmed(self.unconfirmed).await
    }
}

async fn confirmed<T>(page: Vec<(T, PublisherConfirm)>) -> lapin::Result<Vec<(T, Confirmation)>> {
    let mut confirmed = Vec::with_capacity(page.len());
    for (of, confirm) in page.into_iter().rev() {
        confirmed.push((of, confirm.await?));
        border!("publish-confirmed");
    }
    Ok(confirmed)
}

/// The target of a job.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A task queue, by its name without the prefix.
    Task(String),
    /// `baton.dead`.
    Dead,
    /// Any other queue, by its name. It is not declared if it is absent.
    Queue(String),
}

impl Target {
    fn address(&self) -> (&str, &str) {
        match self {
            Target::Task(queue) => (TASK_EXCHANGE, queue),
            Target::Dead => ("", DEAD_QUEUE),
            Target::Queue(queue) => ("", queue),
        }
    }

    /// The item to declare if the messages are returned.
    fn item(&self) -> Option<Item> {
        match self {
            Target::Task(queue) => Some(Item::TaskQueue(queue.clone())),
            Target::Dead => Some(Item::DeadQueue),
            Target::Queue(_) => None,
        }
    }
}

/// Publishes a letter to `baton.dead`.
pub(super) async fn bury(publish_tx: &mpsc::Sender<Job>, letter: Envelope) -> Result<(), PublishError> {
    let (done, answer) = oneshot::channel();
    let job = Job { target: Target::Dead, messages: vec![letter], deadline: Instant::now() + ANSWER_LIMIT, done };
    publish_tx.send(job).await.map_err(|_| Down("the communicator has ended".to_owned()))?;
    answer.await.unwrap_or_else(|_| Err(PublishError::Unknown("the communicator has ended".to_owned())))
}

/// Keeps the connection open, and reopens it, until it is to be closed.
pub(super) async fn run(dial: Arc<Dial>, mut jobs: mpsc::Receiver<Job>, mut events: mpsc::Receiver<Event>) {
    let mut backoff = Backoff::new();
    let mut has_failed = false;
    loop {
        let connection = tokio::select! {
            connection = dial.connect(Link::Publish) => connection,
            () = dial.close.cancelled() => break,
            // Jobs wait for the first result of connecting. Later jobs are refused at once.
            () = refuse(&mut jobs, &dial.health), if has_failed => break,
        };
        let error = match connection {
            Ok(connection) => {
                let since = Instant::now();
                let outcome = session(&dial, &connection, &mut jobs, &mut events).await;
                close(&connection).await;
                backoff.lasted(since);
                match outcome {
                    Some(error) => dial.ended(Link::Publish, error),
                    None => break,
                }
            }
            Err(error) => error.to_string(),
        };
        has_failed = true;
        dial.health.down(Link::Publish, Some(error));
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            () = dial.close.cancelled() => break,
            () = refuse(&mut jobs, &dial.health) => break,
        }
    }
    dial.health.down(Link::Publish, None);
}

/// Answers jobs with [`Down`] while there is no connection. Returns when no sender is left.
async fn refuse(jobs: &mut mpsc::Receiver<Job>, health: &HealthState) {
    while let Some(job) = jobs.recv().await {
        let down = health.refusal(Link::Publish).unwrap_or_else(|| Down("not connected".to_owned()));
        let _ = job.done.send(Err(down.into()));
    }
}

/// Publishes until the connection is lost (and returns the reason) or is to be closed.
async fn session(
    dial: &Dial,
    connection: &Connection,
    jobs: &mut mpsc::Receiver<Job>,
    events: &mut mpsc::Receiver<Event>,
) -> Option<String> {
    let mut ended = std::pin::pin!(dial.watch(Link::Publish, connection, connection.events_listener()));
    let mut announcing = std::pin::pin!(announce(dial, connection, events).fuse());
    let mut idle: Vec<Channel> = Vec::new();
    let mut running: FuturesUnordered<BoxFuture<'_, Worked>> = FuturesUnordered::new();
    let mut confirmed_at = Instant::now();
    dial.health.unmute();
    dial.health.up(Link::Publish);
    loop {
        tokio::select! {
            error = &mut ended => return Some(error),
            Some(worked) = running.next() => match worked {
                Worked::Confirmed(channel) => {
                    confirmed_at = Instant::now();
                    idle.push(channel);
                }
                // No other job was confirmed meanwhile; another node may be healthy.
                Worked::Silent { since } if dial.has_others() && confirmed_at < since => {
                    return Some("the node confirms nothing; trying another".to_owned());
                }
                Worked::Silent { .. } | Worked::Failed => {}
            },
            job = jobs.recv(), if running.len() < N_LANES => match job {
                Some(job) => running.push(Box::pin(work(dial, connection, idle.pop(), job))),
                None => break,
            },
            () = &mut announcing => {}
            () = dial.close.cancelled() => break,
        }
    }
    // Jobs in progress, jobs that wait and the last events are still published.
    while let Ok(job) = jobs.try_recv() {
        running.push(Box::pin(work(dial, connection, idle.pop(), job)));
    }
    let flush = async {
        while let Some(channel) = running.next().await {
            drop(channel);
        }
        // A fused future that has ended in the loop above never completes again.
        if !announcing.is_terminated() {
            announcing.await;
        }
    };
    let _ = timeout(ANSWER_LIMIT, flush).await;
    None
}

/// The outcome of a job.
enum Worked {
    /// All messages are stored. The channel can be reused.
    Confirmed(Channel),
    /// No confirm arrived in time.
    Silent {
        since: Instant,
    },
    Failed,
}

/// Runs one job on one lane.
async fn work(dial: &Dial, connection: &Connection, lane: Option<Channel>, job: Job) -> Worked {
    let Job { target, messages, deadline, done } = job;
    let since = Instant::now();
    let mut health = dial.health.watch();
    let publish = timeout_at(deadline, job_on_lane(dial, connection, lane.as_ref(), deadline, &target, &messages));
    let (outcome, is_silent) = tokio::select! {
        biased;
        outcome = publish => match outcome {
            Ok(outcome) => (outcome, false),
            Err(_) => (Err(PublishError::Unknown("no confirm in time".to_owned())), true),
        },
        _ = health.wait_for(|health| health.blocked) => (Err(blocked(dial)), false),
    };
    if let Target::Task(queue) = &target {
        // A queue without a leader confirms nothing, while other queues do.
        dial.health.mute(&task_queue(queue), matches!(outcome, Err(PublishError::Unknown(_))));
    }
    let (outcome, worked) = match outcome {
        Ok(channel) => (Ok(()), Worked::Confirmed(channel)),
        Err(error) => (Err(error), if is_silent { Worked::Silent { since } } else { Worked::Failed }),
    };
    let _ = done.send(outcome);
    worked
}

/// The error of a publish during an alarm: it is neither rejected nor confirmed, since the broker does not read the
/// socket.
fn blocked(dial: &Dial) -> PublishError {
    let reason =
        dial.health.refusal(Link::Publish).map_or_else(|| "the broker blocks publishers".to_owned(), |down| down.0);
    PublishError::Unknown(reason)
}

/// Publishes until all messages are confirmed. Returns the lane's channel for the next job.
pub(super) async fn job_on_lane(
    dial: &Dial,
    connection: &Connection,
    lane: Option<&Channel>,
    deadline: Instant,
    target: &Target,
    messages: &[Envelope],
) -> Result<Channel, PublishError> {
    if let Some(down) = dial.health.refusal(Link::Publish) {
        return Err(down.into());
    }
    if Instant::now() >= deadline {
        return Err(Down("the publish connection is busy".to_owned()).into());
    }
    if let Target::Task(queue) = target
        && let Some(reason) = bad_queue_name(queue)
    {
        return Err(PublishError::Unroutable { queue: queue.clone(), reason });
    }
    let channel = match lane {
        Some(channel) if channel.status().connected() => channel.clone(),
        Some(_) | None => open_lane(dial, connection).await?,
    };
    let (_, key) = target.address();
    let unroutable = |reason| PublishError::Unroutable { queue: key.to_owned(), reason };
    let mut rest: Vec<&Envelope> = messages.iter().collect();
    let mut was_declared = false;
    loop {
        let Answer { returned, refused } = publish_all(dial, &channel, target, &rest).await?;
        if returned.is_empty() && refused.is_empty() {
            return Ok(channel);
        }
        if returned.is_empty() {
            // The quorum queue has no leader yet, or is full. Only the deadline ends the retries.
            tracing::debug!(key, "the broker rejected {} messages; sending them again", refused.len());
            sleep(REFUSED_PAUSE).await;
        } else if was_declared {
            return Err(unroutable("it is declared, but messages are returned; is its binding missing?".to_owned()));
        } else if let Some(item) = target.item() {
            sleep(DELETED_PAUSE).await;
            ensure(connection, &dial.health, &[item]).await.map_err(unroutable)?;
            was_declared = true;
        } else {
            return Err(unroutable("it does not exist".to_owned()));
        }
        // A returned message without one of our ids cannot be matched; then all messages are sent again.
        let is_ours = |id: &Option<String>| rest.iter().any(|message| message.message_id == *id);
        if returned.iter().all(is_ours) {
            rest.retain(|message| returned.contains(&message.message_id) || refused.contains(&message.message_id));
        }
    }
}

/// Opens a channel with confirms, and declares the exchange and the dead-letter queue.
pub(super) async fn open_lane(dial: &Dial, connection: &Connection) -> Result<Channel, Down> {
    // Not once per connection, since a lane is also reopened after its exchange was deleted.
    let _ = ensure(connection, &dial.health, &[Item::TaskExchange, Item::DeadQueue]).await;
    let open = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    };
    open.await.map_err(|error: lapin::Error| Down(reason(&error)))
}

/// The ids of the messages that were not stored.
#[derive(Debug, Default)]
struct Answer {
    returned: HashSet<Option<String>>,
    refused: HashSet<Option<String>>,
}

impl Answer {
    fn add(&mut self, confirmed: Vec<(&Envelope, Confirmation)>) {
        for (message, confirmation) in confirmed {
            if confirmation.is_nack() {
                self.refused.insert(message.message_id.clone());
            }
            if let Some(message) = confirmation.take_message() {
                let id = message.delivery.properties.message_id();
                self.returned.insert(id.as_ref().map(|id| id.as_str().to_owned()));
            }
        }
    }
}

/// Publishes all messages and waits for every confirm.
///
/// lapin may attach a returned message to the confirm of another message of this batch, but not of a later batch, since
/// a return precedes its own confirm. So the ids are collected over the whole batch before they are evaluated.
async fn publish_all<'a>(
    dial: &Dial,
    channel: &Channel,
    target: &Target,
    messages: &[&'a Envelope],
) -> Result<Answer, PublishError> {
    let (exchange, key) = target.address();
    // Without `mandatory` the broker confirms unroutable messages and discards them.
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let publish = async |message: &'a Envelope| {
        let properties = message.properties(true);
        let publish = channel.basic_publish(short(exchange), short(key), options, &message.body, properties);
        Ok((message, publish.await?))
    };
    let lost = |error: lapin::Error| PublishError::Unknown(reason(&error));
    let mut answer = Answer::default();
    let mut window = Window::new();
    for page in messages.chunks(N_PAGE) {
        let publishes: Vec<_> = page.iter().map(|message| publish(message)).collect();
        answer.add(window.push(publishes).await.map_err(lost)?);
    }
    answer.add(window.rest().await.map_err(lost)?);
    if let Target::Task(_) = target {
        let is_stored = |id| !answer.returned.contains(id) && !answer.refused.contains(id);
        let stored = messages.iter().filter(|message| is_stored(&message.message_id));
        stored.for_each(|message| dial.health.meter.published(message.body.len()));
    }
    Ok(answer)
}

/// Publishes events as they gather. Returns when the communicator has ended and all are published.
async fn announce(dial: &Dial, connection: &Connection, events: &mut mpsc::Receiver<Event>) {
    let mut channel: Option<Channel> = None;
    loop {
        let mut gathered = Vec::new();
        tokio::select! {
            biased;
            n_events = events.recv_many(&mut gathered, N_EVENTS_MAX) => if n_events == 0 {
                break;
            },
            () = dial.close.cancelled() => break,
        }
        if dial.health.refusal(Link::Publish).is_some() {
            continue;
        }
        let mut by_state: BTreeMap<String, Vec<Event>> = BTreeMap::new();
        for event in gathered {
            by_state.entry(event.state.clone()).or_default().push(event);
        }
        for (state, events) in by_state {
            channel =
                match timeout(ANSWER_LIMIT, announce_state(dial, connection, channel.take(), &state, events)).await {
                    Ok(Ok(channel)) => Some(channel),
                    Ok(Err(error)) => {
                        tracing::debug!("events not announced: {}", reason(&error));
                        None
                    }
                    Err(_) => None,
                };
        }
        // At the end the rest is published at once.
        let _ = timeout(EVENT_PAUSE, dial.close.cancelled()).await;
    }
}

/// Publishes one message with events, and waits for its confirm while the next events gather. No process waits for
/// this. Without the confirm the last events would be lost at a shutdown, since the library sends publishes last, even
/// after a close.
async fn announce_state(
    dial: &Dial,
    connection: &Connection,
    channel: Option<Channel>,
    state: &str,
    events: Vec<Event>,
) -> lapin::Result<Channel> {
    let channel = match channel {
        Some(channel) => channel,
        None => {
            let _ = ensure(connection, &dial.health, &[Item::EventExchange]).await;
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            channel
        }
    };
    let encoding = Encoding::MessagePack;
    let body = Events { version: VERSION, events }.encode(encoding);
    let envelope = Envelope::new("events", encoding, body);
    let key = short(&format!("process.{state}"));
    let options = BasicPublishOptions::default();
    let confirm =
        channel.basic_publish(short(EVENT_EXCHANGE), key, options, &envelope.body, envelope.properties(false)).await?;
    confirm.await?;
    dial.health.meter.event_message();
    Ok(channel)
}
