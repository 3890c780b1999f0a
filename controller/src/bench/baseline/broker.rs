//! The broker alone: messages of the same size on a queue of the same type, published, delivered and acknowledged in plain
//! loops.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_common::communicator::TaskMessage;
use baton_common::id::Pid;
use baton_common::message::{Encoding, Task};
use futures_util::future::try_join_all;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::uri::AMQPUri;
use lapin::{Acker, BasicProperties, Channel, Connection, ConnectionProperties, Consumer, PublisherConfirm};
use tokio::time::timeout;

use crate::failure::Failure;

/// Time limit for an answer of the broker, as in the communicator.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The delivery mode of a persistent message.
const PERSISTENT: u8 = 2;

/// A quorum queue, which [`BaselineQueue::delete`] deletes.
pub(in super::super) struct BaselineQueue {
    url: String,
    name: String,
    connection: Connection,
}

/// Publishes to a [`BaselineQueue`].
pub(in super::super) struct BaselinePublisher {
    channel: Channel,
    queue: String,
    n_unconfirmed_max: usize,
    _connection: Connection,
}

/// An encoded task.
#[derive(Clone)]
pub(in super::super) struct BaselineMessage {
    properties: BasicProperties,
    body: Vec<u8>,
}

/// A delivered message that is not decoded yet.
pub(in super::super) struct BaselineDelivery(Delivery);

/// Consumes from a [`BaselineQueue`].
pub(in super::super) struct BaselineConsumer {
    consumer: Consumer,
    last: Option<Acker>,
    _connection: Connection,
}

impl BaselineQueue {
    /// Declares the queue on the first broker that answers.
    pub(in super::super) async fn declare(urls: &[String], name: &str) -> Result<Self, Failure> {
        let mut failure = Failure::usage("no broker is configured");
        for url in urls {
            let connection = match connect(url).await {
                Ok(connection) => connection,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            let mut arguments = FieldTable::default();
            arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
            let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            answer(async {
                let channel = connection.create_channel().await?;
                channel.queue_declare(name.into(), options, arguments).await
            })
            .await?;
            return Ok(Self { url: url.clone(), name: name.to_owned(), connection });
        }
        Err(failure)
    }

    /// Opens a publisher on its own connection. At most `n_unconfirmed_max` messages are unconfirmed, in two pages: the
    /// confirms of one page are awaited after the next page is written.
    pub(in super::super) async fn publisher(&self, n_unconfirmed_max: usize) -> Result<BaselinePublisher, Failure> {
        let connection = connect(&self.url).await?;
        let channel = answer(async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        })
        .await?;
        Ok(BaselinePublisher { channel, queue: self.name.clone(), n_unconfirmed_max, _connection: connection })
    }

    /// Opens a consumer on its own connection, with at most `prefetch` unacknowledged deliveries.
    pub(in super::super) async fn consumer(&self, prefetch: u16) -> Result<BaselineConsumer, Failure> {
        let connection = connect(&self.url).await?;
        let consumer = answer(async {
            let channel = connection.create_channel().await?;
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(self.name.as_str().into(), "bench".into(), options, FieldTable::default()).await
        })
        .await?;
        Ok(BaselineConsumer { consumer, last: None, _connection: connection })
    }

    /// Deletes the queue.
    pub(in super::super) async fn delete(self) -> Result<(), Failure> {
        answer(async {
            let channel = self.connection.create_channel().await?;
            channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default()).await
        })
        .await
        .map(drop)
    }
}

impl From<TaskMessage> for BaselineMessage {
    /// Encodes a task with the properties that Baton sets.
    fn from(message: TaskMessage) -> Self {
        let TaskMessage { task, traceparent } = message;
        let encoding = Encoding::MessagePack;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut headers = FieldTable::default();
        if let Some(traceparent) = traceparent {
            headers.insert("traceparent".into(), AMQPValue::LongString(LongString::from(traceparent)));
        }
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_timestamp(now)
            .with_headers(headers)
            .with_type(task.word().into())
            .with_message_id(task.pid().to_string().into())
            .with_content_type(encoding.content_type().into())
            .with_app_id("baton".into());
        Self { properties, body: task.encode(encoding) }
    }
}

impl BaselineDelivery {
    /// Decodes the task and returns its process.
    pub(in super::super) fn pid(self) -> Result<Pid, Failure> {
        let task = Task::decode(&self.0.data, Encoding::MessagePack);
        task.map(|task| task.pid()).map_err(|error| Failure::failed(error.to_string()))
    }
}

impl BaselinePublisher {
    /// Publishes all messages and waits until the last one is confirmed.
    ///
    /// # Errors
    /// The broker rejects a message or is unreachable.
    pub(in super::super) async fn publish(
        &self,
        messages: impl IntoIterator<Item = BaselineMessage>,
    ) -> Result<(), Failure> {
        let publish = async |message: BaselineMessage| {
            let BaselineMessage { properties, body } = message;
            let options = BasicPublishOptions::default();
            self.channel.basic_publish("".into(), self.queue.as_str().into(), options, &body, properties).await
        };
        let n_page = self.n_unconfirmed_max.div_ceil(2);
        let mut messages = messages.into_iter();
        let mut unconfirmed = Vec::new();
        loop {
            // Messages that are published together are written together.
            let page = try_join_all(messages.by_ref().take(n_page).map(&publish)).await.map_err(unreachable)?;
            let is_last = page.is_empty();
            confirmed(std::mem::replace(&mut unconfirmed, page)).await?;
            if is_last {
                return Ok(());
            }
        }
    }
}

/// Waits for the confirms of a page. The youngest comes first, because it usually arrives last and wakes the task once.
async fn confirmed(page: Vec<PublisherConfirm>) -> Result<(), Failure> {
    for confirm in page.into_iter().rev() {
        if confirm.await.map_err(unreachable)?.is_nack() {
            return Err(Failure::unreachable("the broker rejected a message".to_owned()));
        }
    }
    Ok(())
}

impl BaselineConsumer {
    /// Waits for a delivery and takes what has arrived, at most `max` deliveries.
    ///
    /// # Errors
    /// The broker cancelled the consumer.
    pub(in super::super) async fn take(&mut self, max: usize) -> Result<Vec<BaselineDelivery>, Failure> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let next = if taken.is_empty() {
                self.consumer.next().await
            } else {
                self.consumer.next().now_or_never().flatten()
            };
            let Some(delivery) = next else { break };
            taken.push(BaselineDelivery(delivery.map_err(unreachable)?));
        }
        let Some(BaselineDelivery(last)) = taken.last() else {
            return Err(Failure::unreachable("the broker cancelled the consumer".to_owned()));
        };
        self.last = Some(last.acker.clone());
        Ok(taken)
    }

    /// Acknowledges everything that was taken, in one frame.
    pub(in super::super) async fn acknowledge(&mut self) -> Result<(), Failure> {
        let Some(last) = self.last.take() else { return Ok(()) };
        last.ack(BasicAckOptions { multiple: true }).await.map(drop).map_err(unreachable)
    }
}

/// Opens a connection. The benchmark has a communicator that is connected already, so the TLS provider is installed.
async fn connect(url: &str) -> Result<Connection, Failure> {
    let mut uri: AMQPUri = url.parse().map_err(|_| Failure::usage("a broker URL is not an AMQP URL"))?;
    if uri.vhost.is_empty() {
        uri.vhost = "/".to_owned();
    }
    let properties = ConnectionProperties::default().with_connection_name("baton bench".into());
    answer(Connection::connect_uri(uri, properties)).await
}

async fn answer<T>(asked: impl Future<Output = lapin::Result<T>>) -> Result<T, Failure> {
    match timeout(ANSWER_LIMIT, asked).await {
        Ok(answer) => answer.map_err(unreachable),
        Err(_) => Err(Failure::unreachable(format!("the broker did not answer within {} s", ANSWER_LIMIT.as_secs()))),
    }
}

fn unreachable(error: lapin::Error) -> Failure {
    Failure::unreachable(error.to_string())
}
