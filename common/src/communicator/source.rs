//! A consumed queue: its channel, its consumer, and the delivery at its head.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::time::{sleep, timeout};

use super::envelope::{Envelope, bad_queue_name, short};
use super::health::HealthState;
use super::ledger::{Ledger, Receipt};
use super::link::{ANSWER_LIMIT, reason};
use super::topology::{Item, ensure};

/// Pause before a queue that could not be consumed is tried again. An operator has to fix the cause first.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Everything that is needed to open a source.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The name of the queue on the broker.
    pub(super) queue: String,
    /// The items that must exist first.
    pub(super) items: Vec<Item>,
    pub(super) tag: String,
    pub(super) prefetch: u16,
}

/// A queue that is consumed, or is to be consumed again.
pub(super) struct Source {
    pub(super) plan: Plan,
    state: State,
    head: Option<Head>,
    n_arrived: u64,
    /// Whether its prefetch is smaller than the free slots allow; opening it again would raise the prefetch.
    pub(super) is_narrow: bool,
    /// `n_arrived` at the last look that suspected a stall.
    n_arrived_at_look: Option<u64>,
}

/// The next delivery of a source, not yet decoded.
pub(super) struct Head {
    pub(super) redelivered: bool,
    pub(super) envelope: Envelope,
    pub(super) receipt: Receipt,
}

enum State {
    /// Not consumed. The channel stays open for pending settlements.
    Idle(Option<Line>),
    /// It is being opened.
    Opening,
    Live(Line, Consumer),
}

/// A channel and its unsettled deliveries.
pub(super) struct Line {
    channel: Channel,
    ledger: Arc<Ledger>,
}

/// The outcome of opening: the channel and its consumer. An unusable channel is dropped.
pub(super) type Opened = Result<(Line, Consumer), NotOpened>;

/// Why a queue is not consumed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum NotOpened {
    /// The broker answers, but not for this queue.
    Silent,
    /// The broker refuses; an operator has to fix the cause.
    Refused,
}

impl Source {
    pub(super) fn new(plan: Plan) -> Self {
        Source { plan, state: State::Idle(None), head: None, n_arrived: 0, is_narrow: false, n_arrived_at_look: None }
    }

    /// The source with another plan for the next time it is opened.
    pub(super) fn with_plan(self, plan: Plan) -> Self {
        Source { plan, ..self }
    }

    /// The name without the prefix, if it is a task queue.
    pub(super) fn task_queue(&self) -> Option<&str> {
        match self.plan.items.last() {
            Some(Item::TaskQueue(name)) => Some(name),
            Some(_) | None => None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle(_))
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.state, State::Live(..))
    }

    pub(super) fn has_head(&self) -> bool {
        self.head.is_some()
    }

    pub(super) fn take_head(&mut self) -> Option<Head> {
        self.head.take()
    }

    /// Begins to open it. The caller drives the future and passes its outcome to [`Source::opened`].
    pub(super) fn open(
        &mut self,
        connection: Arc<Connection>,
        health: Arc<HealthState>,
    ) -> impl Future<Output = Opened> + Send + use<> {
        let line = match std::mem::replace(&mut self.state, State::Opening) {
            State::Idle(line) => line,
            State::Opening | State::Live(..) => None,
        };
        let plan = self.plan.clone();
        async move {
            let (why, error) = match open(&connection, &health, &plan, line).await {
                Ok(opened) => return Ok(opened),
                Err(not_opened) => not_opened,
            };
            // After the loss of the connection the error says nothing about the queue.
            if connection.status().connected() {
                health.problem(&plan.queue, Some(error));
            }
            // A silent queue has already taken the time limit.
            if why == NotOpened::Refused {
                sleep(RETRY_PAUSE).await;
            }
            Err(why)
        }
    }

    pub(super) fn opened(&mut self, opened: Opened) {
        self.state = match opened {
            Ok((line, consumer)) => State::Live(line, consumer),
            Err(NotOpened::Silent | NotOpened::Refused) => State::Idle(None),
        };
    }

    /// Becomes ready when the head has arrived (true), or when the consumer has ended (false) and the source is idle.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let State::Live(line, consumer) = &mut self.state else { return Poll::Pending };
        if self.head.is_some() {
            return Poll::Pending;
        }
        match consumer.poll_next_unpin(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(delivery))) => {
                let lapin::message::Delivery { delivery_tag, properties, data, redelivered, acker, .. } = delivery;
                self.n_arrived += 1;
                let receipt = line.ledger.enter(delivery_tag, acker);
                self.head = Some(Head { redelivered, envelope: Envelope::from_amqp(&properties, data), receipt });
                Poll::Ready(true)
            }
            Poll::Ready(ended) => {
                if let Some(Err(error)) = ended {
                    tracing::warn!(queue = self.plan.queue, "consumer ended: {}", reason(&error));
                } else {
                    tracing::warn!(queue = self.plan.queue, "the broker cancelled the consumer");
                }
                // A new channel replaces it, since the broker's state of this queue on this channel may be stale.
                self.state = State::Idle(None);
                Poll::Ready(false)
            }
        }
    }

    /// Ends a stalled consumer: one that receives nothing although messages are ready, or that the queue does not know.
    ///
    /// RabbitMQ silently moves the consumers of a quorum queue that was deleted and declared again to the new queue,
    /// and delivers nothing to them. A node that is partitioned from the queue's leader keeps its consumers, and
    /// reports an empty queue without consumers.
    pub(super) fn end_if_stalled(&mut self, Seen { n_ready, n_consumers, .. }: &Seen) {
        let has_room = match &self.state {
            State::Live(line, _) => line.ledger.len() < usize::from(self.plan.prefetch) && self.head.is_none(),
            State::Idle(_) | State::Opening => false,
        };
        if (*n_ready == 0 && *n_consumers > 0) || !has_room {
            self.n_arrived_at_look = None;
            return;
        }
        let is_stalled = self.n_arrived_at_look == Some(self.n_arrived);
        self.n_arrived_at_look = Some(self.n_arrived);
        if is_stalled {
            tracing::warn!(queue = self.plan.queue, n_ready, n_consumers, "stalled consumer replaced");
            self.state = State::Idle(None);
            self.n_arrived_at_look = None;
        }
    }

    /// Cancels the consumer, and gives back the deliveries that were not handed over.
    pub(super) async fn pause(&mut self) {
        self.is_narrow = false;
        let state = std::mem::replace(&mut self.state, State::Idle(None));
        let State::Live(line, mut consumer) = state else {
            self.state = state;
            return;
        };
        let cancel = line.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        let is_cancelled = matches!(timeout(ANSWER_LIMIT, cancel).await, Ok(Ok(())));
        if let Some(head) = self.head.take() {
            head.receipt.give_back().await;
        }
        if is_cancelled {
            // After the broker's answer no more deliveries arrive, so the stream ends soon.
            while let Ok(Some(Ok(delivery))) = timeout(ANSWER_LIMIT, consumer.next()).await {
                line.ledger.enter(delivery.delivery_tag, delivery.acker).give_back().await;
            }
            self.state = State::Idle(Some(line));
        }
    }
}

/// The state of a queue on the broker.
pub(super) struct Seen {
    pub(super) queue: String,
    /// Number of ready messages.
    pub(super) n_ready: u32,
    n_consumers: u32,
}

/// Asks for the state of these queues. Skips queues without an answer.
pub(super) async fn look(connection: Arc<Connection>, queues: Vec<String>) -> Vec<Seen> {
    let mut seen = Vec::new();
    let Ok(Ok(channel)) = timeout(ANSWER_LIMIT, connection.create_channel()).await else { return seen };
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for queue in queues {
        let declare = channel.queue_declare(short(&queue), options, FieldTable::default());
        match timeout(ANSWER_LIMIT, declare).await {
            Ok(Ok(answer)) => {
                seen.push(Seen { queue, n_ready: answer.message_count(), n_consumers: answer.consumer_count() });
            }
            // An absent queue has closed the channel. Its consumer has ended, too.
            Ok(Err(_)) | Err(_) => break,
        }
    }
    seen
}

async fn open(
    connection: &Connection,
    health: &HealthState,
    plan: &Plan,
    line: Option<Line>,
) -> Result<(Line, Consumer), (NotOpened, String)> {
    let queue = &plan.queue;
    if let Some(Item::TaskQueue(name)) = plan.items.last()
        && let Some(reason) = bad_queue_name(name)
    {
        return Err((NotOpened::Refused, format!("queue {queue}: {reason}")));
    }
    ensure(connection, health, &plan.items).await.map_err(|error| (NotOpened::Refused, error))?;
    let consume = async {
        let line = match line {
            Some(line) if line.channel.status().connected() => line,
            Some(_) | None => {
                Line { channel: connection.create_channel().await?, ledger: Arc::new(Ledger::new(plan.prefetch)) }
            }
        };
        let channel = &line.channel;
        channel.basic_qos(plan.prefetch, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(short(queue), short(&plan.tag), options, FieldTable::default()).await?;
        Ok::<_, lapin::Error>((line, consumer))
    };
    // A quorum queue without a leader blocks the channel for half a minute, even after it has elected one. A new
    // channel is served at once. The dropped channel closes with its last handle.
    match timeout(ANSWER_LIMIT, consume).await {
        Ok(Ok(opened)) => {
            health.problem(queue, None);
            Ok(opened)
        }
        Ok(Err(error)) => Err((NotOpened::Refused, format!("queue {queue}: {}", reason(&error)))),
        Err(_) => {
            let text = format!(
                "queue {queue}: no answer for this queue, though the broker answers; to see if it has a leader, run \
                 `rabbitmq-queues quorum_status {queue}`"
            );
            Err((NotOpened::Silent, text))
        }
    }
}
