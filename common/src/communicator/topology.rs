//! Declares the exchanges and queues of Baton. A queue has its type as the only argument, since arguments cannot be
//! changed later; limits belong in policies.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};
use tokio::time::timeout;

use super::envelope::{
    BROADCAST_EXCHANGE, CONTROL_QUEUE, DEAD_QUEUE, EVENT_EXCHANGE, TASK_EXCHANGE, short, task_queue,
};
use super::health::HealthState;
use super::link::{ANSWER_LIMIT, is_other_kind, reason};

/// An exchange or queue that must exist on the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// `baton.task`.
    TaskExchange,
    /// `baton.broadcast`.
    BroadcastExchange,
    /// `baton.event`.
    EventExchange,
    /// `baton.dead`.
    DeadQueue,
    /// `baton.control`, bound to the broadcasts.
    ControlQueue,
    /// A task queue, by its name without the prefix, bound to `baton.task`.
    TaskQueue(String),
    /// A worker's control queue, which is deleted with its connection.
    OwnQueue(String),
}

/// The items that other programs also rely on. Every program of Baton declares them.
pub(super) const BASE: [Item; 5] =
    [Item::TaskExchange, Item::BroadcastExchange, Item::EventExchange, Item::DeadQueue, Item::ControlQueue];

impl Item {
    fn name(&self) -> String {
        match self {
            Item::TaskExchange => format!("exchange {TASK_EXCHANGE}"),
            Item::BroadcastExchange => format!("exchange {BROADCAST_EXCHANGE}"),
            Item::EventExchange => format!("exchange {EVENT_EXCHANGE}"),
            Item::DeadQueue => format!("queue {DEAD_QUEUE}"),
            Item::ControlQueue => format!("queue {CONTROL_QUEUE}"),
            Item::TaskQueue(queue) => format!("queue {}", task_queue(queue)),
            Item::OwnQueue(queue) => format!("queue {queue}"),
        }
    }

    async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        match self {
            Item::TaskExchange => exchange(channel, TASK_EXCHANGE, ExchangeKind::Direct).await,
            Item::BroadcastExchange => exchange(channel, BROADCAST_EXCHANGE, ExchangeKind::Fanout).await,
            Item::EventExchange => exchange(channel, EVENT_EXCHANGE, ExchangeKind::Topic).await,
            Item::DeadQueue => quorum_queue(channel, DEAD_QUEUE).await,
            Item::ControlQueue => {
                quorum_queue(channel, CONTROL_QUEUE).await?;
                bind(channel, CONTROL_QUEUE, BROADCAST_EXCHANGE, "").await
            }
            Item::TaskQueue(queue) => {
                let name = task_queue(queue);
                quorum_queue(channel, &name).await?;
                bind(channel, &name, TASK_EXCHANGE, queue).await
            }
            Item::OwnQueue(queue) => {
                let options =
                    QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
                channel.queue_declare(short(queue), options, FieldTable::default()).await?;
                bind(channel, queue, BROADCAST_EXCHANGE, "").await
            }
        }
    }
}

/// Declares these items. A failure is recorded in the health with its remedy, and does not prevent the others.
///
/// # Errors
/// The problem of the last item that could not be declared.
pub(super) async fn ensure(connection: &Connection, health: &HealthState, items: &[Item]) -> Result<(), String> {
    let mut outcome = Ok(());
    let mut channel = None;
    for item in items {
        // A rejected declaration closes its channel, so declarations never share a channel with messages.
        let declared = async {
            let usable = match channel.take() {
                Some(channel) => channel,
                None => connection.create_channel().await?,
            };
            item.declare(&usable).await?;
            channel = Some(usable);
            Ok(())
        };
        let problem = match timeout(ANSWER_LIMIT, declared).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(explain(item, &error)),
            Err(_) => Some(format!("{}: no answer within {} s", item.name(), ANSWER_LIMIT.as_secs())),
        };
        if let Some(problem) = &problem {
            outcome = Err(problem.clone());
        }
        // After the loss of the connection the error says nothing about the item.
        if problem.is_none() || connection.status().connected() {
            health.problem(&item.name(), problem);
        }
    }
    if let Some(channel) = channel {
        let _ = timeout(Duration::from_secs(1), channel.close(200, "OK".into())).await;
    }
    outcome
}

fn explain(item: &Item, error: &lapin::Error) -> String {
    let (name, text) = (item.name(), reason(error));
    if is_other_kind(error) {
        format!(
            "{name} exists with other properties ({text}); delete it once it is empty, then Baton declares it again"
        )
    } else {
        format!("{name} cannot be declared: {text}")
    }
}

async fn exchange(channel: &Channel, name: &str, kind: ExchangeKind) -> lapin::Result<()> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(short(name), kind, options, FieldTable::default()).await
}

pub(super) async fn quorum_queue(channel: &Channel, name: &str) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(short(name), options, arguments).await.map(drop)
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    let (queue, exchange, key) = (short(queue), short(exchange), short(key));
    channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await
}
