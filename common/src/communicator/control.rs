//! The control connection: requests and their replies, pings, broadcasts, and the worker's control queue.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::ask::{Ask, Asker, answer, control_request};
use super::envelope::{BROADCAST_EXCHANGE, DIRECT_REPLY, Envelope, bad_queue_name, short, task_queue};
use super::health::{HealthState, Link};
use super::link::{ANSWER_LIMIT, Backoff, Dial, close, is_absent, reason};
use super::publish::{Job, bury};
use super::topology::{BASE, Item, ensure};
use super::{ControlRequest, Down, RequestError};
use crate::message::Reply;

/// Prefetched control messages. More wait in the worker's queue on the broker, and are lost with it.
const PREFETCH: u16 = 64;

/// Most publishes, pings and depths in progress. More wait in the channel, and its senders wait for capacity.
const N_UNDER_WAY_MAX: usize = 256;

/// From this number of open requests on, abandoned ones are removed before the next one.
const N_REQUESTS_BEFORE_SWEEP: usize = 64;

/// The channel ends of this connection.
pub(super) struct Ends {
    pub(super) own_queue: Option<String>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) controls_tx: mpsc::Sender<ControlRequest>,
    pub(super) publish_tx: mpsc::Sender<Job>,
}

/// Keeps the connection open, and reopens it, until it is to be closed.
pub(super) async fn run(dial: Arc<Dial>, mut ends: Ends) {
    let mut backoff = Backoff::new();
    let mut has_failed = false;
    loop {
        let connection = tokio::select! {
            connection = dial.connect(Link::Control) => connection,
            () = dial.close.cancelled() => break,
            () = refuse(&mut ends.asks, &dial.health), if has_failed => break,
        };
        let error = match connection {
            Ok(connection) => {
                let since = Instant::now();
                let outcome = session(&dial, &connection, &mut ends).await;
                close(&connection).await;
                backoff.lasted(since);
                match outcome {
                    Ok(()) => break,
                    Err(error) => dial.ended(Link::Control, error),
                }
            }
            Err(error) => error.to_string(),
        };
        has_failed = true;
        dial.health.down(Link::Control, Some(error));
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            () = dial.close.cancelled() => break,
            () = refuse(&mut ends.asks, &dial.health) => break,
        }
    }
    dial.health.down(Link::Control, None);
}

/// Answers commands with [`Down`] while there is no connection. Returns when no sender is left.
async fn refuse(asks: &mut mpsc::Receiver<Ask>, health: &HealthState) {
    while let Some(ask) = asks.recv().await {
        ask.refuse(health.refusal(Link::Control).unwrap_or_else(|| Down("not connected".to_owned())));
    }
}

/// The end of an operation. A publish returns the id of a message that could not be routed.
enum Step {
    Nothing,
    Published { request: Option<String>, outcome: Result<Option<String>, String> },
}

/// A control message that waits for the worker to take it.
type Arrived = (ControlRequest, lapin::Acker);

struct Session<'a> {
    dial: &'a Dial,
    connection: &'a Connection,
    channel: Channel,
    /// The open requests by their ids, which are also the correlation ids.
    requests: HashMap<String, Asker>,
    steps: FuturesUnordered<BoxFuture<'a, Step>>,
    publish_tx: mpsc::Sender<Job>,
    /// The worker's control queue; empty for a program without one.
    own_queue: String,
}

async fn session(dial: &Dial, connection: &Connection, ends: &mut Ends) -> Result<(), String> {
    let mut ended = std::pin::pin!(dial.watch(Link::Control, connection, connection.events_listener()));
    let prepare = prepare(dial, connection, ends.own_queue.as_deref());
    let prepared = tokio::select! {
        prepared = timeout(ANSWER_LIMIT, prepare) => prepared,
        error = &mut ended => return Err(error),
        () = dial.close.cancelled() => return Ok(()),
    };
    let (channel, mut replies, mut own) = match prepared {
        Ok(prepared) => prepared?,
        Err(_) => return Err(format!("no answer within {} s", ANSWER_LIMIT.as_secs())),
    };
    let publish_tx = ends.publish_tx.clone();
    let steps = FuturesUnordered::new();
    let own_queue = ends.own_queue.clone().unwrap_or_default();
    let mut session = Session { dial, connection, channel, requests: HashMap::new(), steps, publish_tx, own_queue };
    let mut arrived: Option<Arrived> = None;
    dial.health.up(Link::Control);
    let outcome = loop {
        tokio::select! {
            error = &mut ended => break Err(error),
            Some(step) = session.steps.next() => if let Err(error) = session.on_step(step) {
                break Err(error);
            },
            ask = ends.asks.recv(), if session.steps.len() < N_UNDER_WAY_MAX => match ask {
                Some(ask) => session.on_ask(ask),
                None => break Ok(()),
            },
            reply = replies.next() => match reply {
                Some(Ok(reply)) => session.on_reply(reply),
                Some(Err(error)) => break Err(reason(&error)),
                None => break Err("the broker cancelled the consumer of replies".to_owned()),
            },
            request = next(&mut own), if arrived.is_none() => match request {
                Some(Ok(delivery)) => arrived = session.on_arrival(delivery),
                Some(Err(error)) => break Err(reason(&error)),
                None => break Err("the worker's control queue was deleted".to_owned()),
            },
            room = ends.controls_tx.reserve(), if arrived.is_some() => {
                if let (Ok(room), Some((request, acker))) = (room, arrived.take()) {
                    room.send(request);
                    session.ack(acker);
                }
            }
            () = dial.close.cancelled() => break Ok(()),
        }
    };
    if outcome.is_ok() {
        // Replies that wait are still sent.
        while let Ok(ask) = ends.asks.try_recv() {
            session.on_ask(ask);
        }
        let flush = async { while session.steps.next().await.is_some() {} };
        let _ = timeout(ANSWER_LIMIT, flush).await;
    }
    session.fail_requests(outcome.as_ref().err().cloned().unwrap_or_else(|| "the communicator has ended".to_owned()));
    outcome
}

/// The next control message. Never completes for a program without a control queue.
async fn next(own: &mut Option<Consumer>) -> Option<lapin::Result<lapin::message::Delivery>> {
    match own {
        Some(consumer) => consumer.next().await,
        None => std::future::pending().await,
    }
}

async fn prepare(
    dial: &Dial,
    connection: &Connection,
    own_queue: Option<&str>,
) -> Result<(Channel, Consumer, Option<Consumer>), String> {
    let fail = |error: lapin::Error| reason(&error);
    // A failed declaration is recorded in the health; replies work without it.
    let _ = ensure(connection, &dial.health, &BASE).await;
    let channel = connection.create_channel().await.map_err(fail)?;
    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(fail)?;
    let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let tag = short(&format!("{} replies", dial.name));
    let replies = channel.basic_consume(DIRECT_REPLY.into(), tag, no_ack, FieldTable::default()).await.map_err(fail)?;
    let Some(queue) = own_queue else {
        return Ok((channel, replies, None));
    };
    ensure(connection, &dial.health, &[Item::OwnQueue(queue.to_owned())]).await?;
    let intake = connection.create_channel().await.map_err(fail)?;
    intake.basic_qos(PREFETCH, BasicQosOptions::default()).await.map_err(fail)?;
    let options = BasicConsumeOptions { exclusive: true, ..BasicConsumeOptions::default() };
    let tag = short(&format!("{} control", dial.name));
    let own = intake.basic_consume(short(queue), tag, options, FieldTable::default()).await.map_err(fail)?;
    Ok((channel, replies, Some(own)))
}

impl<'a> Session<'a> {
    fn on_ask(&mut self, ask: Ask) {
        if let Some(down) = self.dial.health.refusal(Link::Control) {
            return ask.refuse(down);
        }
        let connection = self.connection;
        match ask {
            Ask::Request { queue, envelope, done } => {
                let (id, envelope) = self.with_answer(envelope);
                let publish = publish(self.channel.clone(), "", queue.clone(), true, envelope);
                self.requests.insert(id.clone(), Asker::Of { queue, done });
                let step = async move { Step::Published { request: Some(id), outcome: publish.await } };
                self.steps.push(step.boxed());
            }
            Ask::Ping { queue, envelope, done } => self.steps.push(
                async move {
                    let _ = done.send(limited(ping(connection, queue, envelope)).await);
                    Step::Nothing
                }
                .boxed(),
            ),
            Ask::Reply { to, body, done } => {
                self.dial.health.meter.reply();
                let envelope = Envelope {
                    correlation_id: to.correlation_id.clone(),
                    ..Envelope::new("reply", to.encoding(), body)
                };
                self.publish_and_answer("", to.reply_to, envelope, done);
            }
            Ask::Broadcast { envelope, replies, done } => {
                let (id, envelope) = self.with_answer(envelope);
                self.requests.insert(id, Asker::OfAll(replies));
                self.publish_and_answer(BROADCAST_EXCHANGE, String::new(), envelope, done);
            }
            Ask::Depth { queue, done } => self.steps.push(
                async move {
                    let _ = done.send(limited(depth(connection, queue)).await);
                    Step::Nothing
                }
                .boxed(),
            ),
        }
    }

    /// Adds the reply address to a message, and returns it with the correlation id of its replies.
    fn with_answer(&mut self, envelope: Envelope) -> (String, Envelope) {
        if self.requests.len() >= N_REQUESTS_BEFORE_SWEEP {
            self.requests.retain(|_, asker| !asker.has_given_up());
        }
        let id = envelope.message_id.clone().expect("control messages have an id");
        let reply_to = Some(DIRECT_REPLY.to_owned());
        let envelope = Envelope { reply_to, correlation_id: Some(id.clone()), ..envelope };
        (id, envelope)
    }

    fn publish_and_answer(
        &mut self,
        exchange: &'static str,
        key: String,
        envelope: Envelope,
        done: oneshot::Sender<Result<(), Down>>,
    ) {
        let publish = publish(self.channel.clone(), exchange, key, false, envelope);
        let step = async move {
            let outcome = publish.await;
            let _ = done.send(outcome.as_ref().map(drop).map_err(|error| Down(error.clone())));
            Step::Published { request: None, outcome }
        };
        self.steps.push(step.boxed());
    }

    /// Finds a returned message by its own id: lapin may have attached it to the confirm of another one.
    fn on_step(&mut self, step: Step) -> Result<(), String> {
        let Step::Published { request, outcome } = step else { return Ok(()) };
        match outcome {
            Ok(None) => Ok(()),
            Ok(Some(returned)) => {
                if let Some(Asker::Of { queue, done }) = self.requests.remove(&returned) {
                    let _ = done.send(Err(RequestError::Unroutable(queue)));
                }
                Ok(())
            }
            Err(error) => {
                if let Some(asker) = request.and_then(|id| self.requests.remove(&id)) {
                    asker.fail(Down(error.clone()).into());
                }
                // Every request on a failed channel fails; a new connection is the simple remedy.
                if self.channel.status().connected() { Ok(()) } else { Err(error) }
            }
        }
    }

    fn on_reply(&mut self, delivery: lapin::message::Delivery) {
        let envelope = Envelope::from_amqp(&delivery.properties, delivery.data);
        let Some(id) = &envelope.correlation_id else { return };
        let reply = Reply::decode(&envelope.body, envelope.encoding())
            .unwrap_or_else(|error| Reply::refusal(format!("unreadable reply: {error}")));
        answer(&mut self.requests, id, reply);
    }

    fn on_arrival(&mut self, delivery: lapin::message::Delivery) -> Option<Arrived> {
        let from_broadcast = delivery.exchange.as_str() == BROADCAST_EXCHANGE;
        let envelope = Envelope::from_amqp(&delivery.properties, delivery.data);
        match envelope.read_control() {
            Ok(control) => Some((control_request(control, from_broadcast, &envelope), delivery.acker)),
            Err(error) if from_broadcast => {
                // The worker that takes the copy in `baton.control` dead-letters it.
                tracing::warn!("unreadable broadcast: {error}");
                self.ack(delivery.acker);
                None
            }
            Err(error) => {
                self.refuse(envelope, error, delivery.acker);
                None
            }
        }
    }

    /// Dead-letters an unreadable control message, and replies with the error.
    fn refuse(&mut self, envelope: Envelope, error: String, acker: lapin::Acker) {
        tracing::warn!("unreadable control message dead-lettered: {error}");
        let answer = envelope.reply_to().map(|to| {
            let body = Reply::refusal(error.clone()).encode(to.encoding());
            let answer =
                Envelope { correlation_id: to.correlation_id.clone(), ..Envelope::new("reply", to.encoding(), body) };
            publish(self.channel.clone(), "", to.reply_to, false, answer)
        });
        let publish_tx = self.publish_tx.clone();
        let letter = envelope.buried(&error, &self.own_queue);
        let step = async move {
            if bury(&publish_tx, letter).await.is_ok() {
                let _ = acker.ack(BasicAckOptions::default()).await;
            }
            match answer {
                Some(answer) => Step::Published { request: None, outcome: answer.await },
                None => Step::Nothing,
            }
        };
        self.steps.push(step.boxed());
    }

    fn ack(&mut self, acker: lapin::Acker) {
        let step = async move {
            let _ = acker.ack(BasicAckOptions::default()).await;
            Step::Nothing
        };
        self.steps.push(step.boxed());
    }

    fn fail_requests(&mut self, error: String) {
        for (_, asker) in self.requests.drain() {
            asker.fail(Down(error.clone()).into());
        }
    }
}

async fn limited<T>(work: impl Future<Output = lapin::Result<T>>) -> Result<T, Down> {
    match timeout(ANSWER_LIMIT, work).await {
        Ok(outcome) => outcome.map_err(|error| Down(reason(&error))),
        Err(_) => Err(Down(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))),
    }
}

/// Publishes and waits for the confirm. Returns the id of a message that was returned with it.
async fn publish(
    channel: Channel,
    exchange: &'static str,
    key: String,
    mandatory: bool,
    envelope: Envelope,
) -> Result<Option<String>, String> {
    let work = async {
        let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
        let properties = envelope.properties(false);
        channel.basic_publish(short(exchange), short(&key), options, &envelope.body, properties).await?.await
    };
    let confirmation = limited(work).await.map_err(|down| down.0)?;
    let returned = confirmation.take_message();
    Ok(returned.and_then(|message| message.delivery.properties.message_id().as_ref().map(ToString::to_string)))
}

/// Whether a ping is routed. It has its own channel, so that a returned message can only be this ping.
async fn ping(connection: &Connection, queue: String, envelope: Envelope) -> lapin::Result<bool> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let properties = envelope.properties(false);
    let confirm = channel.basic_publish("".into(), short(&queue), options, &envelope.body, properties).await?;
    Ok(confirm.await?.take_message().is_none())
}

/// The number of ready messages. It has its own channel, since a passive declaration of an absent queue closes the
/// channel.
async fn depth(connection: &Connection, queue: String) -> lapin::Result<u64> {
    if bad_queue_name(&queue).is_some() {
        return Ok(0);
    }
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(short(&task_queue(&queue)), options, FieldTable::default()).await {
        Ok(queue) => Ok(u64::from(queue.message_count())),
        Err(error) if is_absent(&error) => Ok(0),
        Err(error) => Err(error),
    }
}
