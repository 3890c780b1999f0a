//! The connection that publishes: tasks, dead letters and state changes.

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

/// Jobs that publish at the same time, each on a channel of its own, so that a returned message can only belong to the
/// job on whose channel it came back, and a queue without a majority holds up no other.
const N_LANES: usize = 8;

/// Messages of one job that are written together; twice as many are unconfirmed. Confirms come in batches of a disk write;
/// beyond some hundreds nothing is gained.
const N_PAGE: usize = 250;

/// Pause before messages that the broker refused are sent again. A queue finds its leader within some 100 ms.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Pause before a queue that does not exist is declared. If it was deleted just now, its consumers have to be cancelled
/// first (which takes RabbitMQ some 50 ms): consumers that find a new queue of the same name are moved to it in silence
/// and then get nothing.
const DELETED_PAUSE: Duration = Duration::from_millis(250);

/// Pause between two messages about state changes, in which the next ones gather. Whoever only looks does not see it, and
/// a busy worker costs the broker some hundred messages a second and not thousands.
const EVENT_PAUSE: Duration = Duration::from_millis(10);

/// State changes in one message: some 100 bytes each, so a message stays far below the limit.
const N_EVENTS_MAX: usize = 512;

/// Messages to publish.
pub(super) struct Job {
    pub(super) target: Target,
    pub(super) messages: Vec<Envelope>,
    pub(super) deadline: Instant,
    pub(super) done: oneshot::Sender<Result<(), PublishError>>,
}

/// A page of messages that are published and not yet confirmed.
///
/// The library says of each message when it is written. Whoever waits for that before giving it the next pays a system
/// call and two changes of threads for each; what is given together is written together. The broker confirms in the same
/// order, nearly always: whoever waits for the youngest is woken once, and not once for each.
pub(super) struct Window<T> {
    unconfirmed: Vec<(T, PublisherConfirm)>,
}

impl<T> Window<T> {
    pub(super) fn new() -> Self {
        Self { unconfirmed: Vec::new() }
    }

    /// Publishes a page, and waits for the confirms of the page before it. Each publish gives back what its confirmation is
    /// given with.
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

/// Where a job's messages go.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A task queue, by its name without the prefix.
    Task(String),
    /// `baton.dead`.
    Dead,
    /// Any other queue, by its name; it is not declared if it is absent.
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

    /// What is declared if nothing takes the messages.
    fn item(&self) -> Option<Item> {
        match self {
            Target::Task(queue) => Some(Item::TaskQueue(queue.clone())),
            Target::Dead => Some(Item::DeadQueue),
            Target::Queue(_) => None,
        }
    }
}

/// Puts a letter into `baton.dead`.
pub(super) async fn bury(publish_tx: &mpsc::Sender<Job>, letter: Envelope) -> Result<(), PublishError> {
    let (done, answer) = oneshot::channel();
    let job = Job { target: Target::Dead, messages: vec![letter], deadline: Instant::now() + ANSWER_LIMIT, done };
    publish_tx.send(job).await.map_err(|_| Down("the communicator has ended".to_owned()))?;
    answer.await.unwrap_or_else(|_| Err(PublishError::Unknown("the communicator has ended".to_owned())))
}

/// Keeps the connection for ever, until it shall be closed.
pub(super) async fn run(dial: Arc<Dial>, mut jobs: mpsc::Receiver<Job>, mut events: mpsc::Receiver<Event>) {
    let mut backoff = Backoff::new();
    let mut has_failed = false;
    loop {
        let connection = tokio::select! {
            connection = dial.connect(Link::Publish) => connection,
            () = dial.close.cancelled() => break,
            // Whoever asks before the first attempt has ended waits for that; afterwards nobody waits.
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

/// Answers that the broker is not there, for as long as it is not; returns when nobody can ask any more.
async fn refuse(jobs: &mut mpsc::Receiver<Job>, health: &HealthState) {
    while let Some(job) = jobs.recv().await {
        let down = health.refusal(Link::Publish).unwrap_or_else(|| Down("not connected".to_owned()));
        let _ = job.done.send(Err(down.into()));
    }
}

/// Publishes until the connection is gone (and says why) or shall be closed.
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
                // Nothing else was confirmed meanwhile; another host may do better.
                Worked::Silent { since } if dial.has_others() && confirmed_at < since => {
                    return Some("the host confirms nothing; trying another".to_owned());
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
    // What was asked before the end is still done: jobs under way, jobs that wait, and the last announcements.
    while let Ok(job) = jobs.try_recv() {
        running.push(Box::pin(work(dial, connection, idle.pop(), job)));
    }
    let flush = async {
        while let Some(channel) = running.next().await {
            drop(channel);
        }
        // It may have ended in the loop above, and a fused future that has ended never comes back again.
        if !announcing.is_terminated() {
            announcing.await;
        }
    };
    let _ = timeout(ANSWER_LIMIT, flush).await;
    None
}

/// What became of a job.
enum Worked {
    /// All of it is stored; the lane's channel can be used again.
    Confirmed(Channel),
    /// There was no confirm in time.
    Silent {
        since: Instant,
    },
    Failed,
}

/// One job on one lane.
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
        // A queue without a leader answers nothing, while everything else on the broker does.
        dial.health.mute(&task_queue(queue), matches!(outcome, Err(PublishError::Unknown(_))));
    }
    let (outcome, worked) = match outcome {
        Ok(channel) => (Ok(()), Worked::Confirmed(channel)),
        Err(error) => (Err(error), if is_silent { Worked::Silent { since } } else { Worked::Failed }),
    };
    let _ = done.send(outcome);
    worked
}

/// A publish under an alarm is neither refused nor confirmed: it lies in the socket until the alarm ends.
fn blocked(dial: &Dial) -> PublishError {
    let reason =
        dial.health.refusal(Link::Publish).map_or_else(|| "broker blocks publishers".to_owned(), |down| down.0);
    PublishError::Unknown(reason)
}

/// Publishes until everything is confirmed, on a lane that can be used again afterwards.
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
            // A quorum queue that has no leader yet, or is full. Only the deadline ends this.
            tracing::debug!(key, "the broker refused {} messages, they are sent again", refused.len());
            sleep(REFUSED_PAUSE).await;
        } else if was_declared {
            return Err(unroutable("it is declared but takes no messages; is its binding gone?".to_owned()));
        } else if let Some(item) = target.item() {
            sleep(DELETED_PAUSE).await;
            ensure(connection, &dial.health, &[item]).await.map_err(unroutable)?;
            was_declared = true;
        } else {
            return Err(unroutable("it does not exist".to_owned()));
        }
        // A return that carries no id of ours says only that something came back: then everything is sent again.
        let is_ours = |id: &Option<String>| rest.iter().any(|message| message.message_id == *id);
        if returned.iter().all(is_ours) {
            rest.retain(|message| returned.contains(&message.message_id) || refused.contains(&message.message_id));
        }
    }
}

/// A channel with confirms, and what is published to declared.
pub(super) async fn open_lane(dial: &Dial, connection: &Connection) -> Result<Channel, Down> {
    // Here and not once per connection: a lane is opened anew when its exchange was deleted, too.
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

/// Publishes all and waits for every confirm.
///
/// lapin may attach a returned message to the wrong confirm, but never to that of a message which is published when all of
/// these are confirmed: a return precedes its own confirm. So the ids are gathered over all of them, and only then anything
/// is decided.
async fn publish_all<'a>(
    dial: &Dial,
    channel: &Channel,
    target: &Target,
    messages: &[&'a Envelope],
) -> Result<Answer, PublishError> {
    let (exchange, key) = target.address();
    // Without `mandatory` the broker confirms messages that it discards.
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
        let is_told = |id| !answer.returned.contains(id) && !answer.refused.contains(id);
        let told = messages.iter().filter(|message| is_told(&message.message_id));
        told.for_each(|message| dial.health.meter.told(message.body.len()));
    }
    Ok(answer)
}

/// Publishes state changes as they gather; returns when the communicator has ended and all are said.
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
                        tracing::debug!("state changes were not announced: {}", reason(&error));
                        None
                    }
                    Err(_) => None,
                };
        }
        // Not when it ends: then the rest is said at once.
        let _ = timeout(EVENT_PAUSE, dial.close.cancelled()).await;
    }
}

/// One message. While its confirm is under way, the next events gather; nobody's work waits for it. Without a confirm the
/// last events were lost at a shutdown: the library sends publishes after everything else, a close included.
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
