//! A broker with nothing behind it: the messages of tasks on a queue of the same kind, published, delivered and
//! acknowledged in plain loops. What Baton's own rates are compared with.

use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{Acker, BasicProperties, Channel, Confirmation, Connection, Consumer};
use tokio::time::timeout;

use super::envelope::{Envelope, classes, short, task_queue};
use super::link::{ANSWER_LIMIT, open, reason};
use super::publish::Window;
use super::topology::quorum_queue;
use super::{CheckError, Down, TaskMessage};
use crate::id::Pid;

/// A queue of its own, which goes with [`BaselineQueue::delete`].
pub struct BaselineQueue {
    url: String,
    name: String,
    connection: Connection,
}

/// Publishes to a [`BaselineQueue`].
pub struct BaselinePublisher {
    channel: Channel,
    queue: String,
    n_unconfirmed_max: usize,
    _connection: Connection,
}

/// A task as it goes over the wire.
#[derive(Clone)]
pub struct BaselineMessage {
    properties: BasicProperties,
    body: Vec<u8>,
}

/// A message that was taken, and not read yet.
pub struct BaselineDelivery(Delivery);

/// Takes from a [`BaselineQueue`].
pub struct BaselineConsumer {
    consumer: Consumer,
    last: Option<Acker>,
    _connection: Connection,
}

impl BaselineQueue {
    /// Declares the queue on the first broker that answers.
    ///
    /// # Errors
    /// See [`CheckError`].
    pub async fn declare(urls: &[String], name: &str) -> Result<Self, CheckError> {
        let mut errors = Vec::new();
        for url in urls {
            let connection = match open(url, "baton bench", None).await {
                Ok(connection) => connection,
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            };
            let declare = async {
                let channel = connection.create_channel().await?;
                quorum_queue(&channel, name).await
            };
            return match timeout(ANSWER_LIMIT, declare).await {
                Ok(Ok(())) => Ok(Self { url: url.clone(), name: name.to_owned(), connection }),
                Ok(Err(error)) => Err(CheckError::Refused { url: String::new(), reason: reason(&error) }),
                Err(_) => Err(CheckError::Refused { url: String::new(), reason: "no answer".to_owned() }),
            };
        }
        Err(CheckError::of_all(errors))
    }

    /// A publisher on a connection of its own, with so many unconfirmed messages in two pages: it waits for the confirms of
    /// one when the next is written.
    ///
    /// # Errors
    /// The broker does not take it.
    pub async fn publisher(&self, n_unconfirmed_max: usize) -> Result<BaselinePublisher, Down> {
        let connection = self.connect().await?;
        let channel = answer(async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        })
        .await?;
        Ok(BaselinePublisher { channel, queue: self.name.clone(), n_unconfirmed_max, _connection: connection })
    }

    /// A consumer on a connection of its own, with so many deliveries that are not acknowledged yet.
    ///
    /// # Errors
    /// The broker does not take it.
    pub async fn consumer(&self, prefetch: u16) -> Result<BaselineConsumer, Down> {
        let connection = self.connect().await?;
        let consumer = answer(async {
            let channel = connection.create_channel().await?;
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(short(&self.name), short("bench"), options, FieldTable::default()).await
        })
        .await?;
        Ok(BaselineConsumer { consumer, last: None, _connection: connection })
    }

    /// Removes the queue.
    ///
    /// # Errors
    /// The broker does not answer; the queue is left behind.
    pub async fn delete(self) -> Result<(), Down> {
        answer(async {
            let channel = self.connection.create_channel().await?;
            channel.queue_delete(short(&self.name), QueueDeleteOptions::default()).await
        })
        .await
        .map(drop)
    }

    async fn connect(&self) -> Result<Connection, Down> {
        open(&self.url, "baton bench", None).await.map_err(|error| Down(error.to_string()))
    }
}

impl From<TaskMessage> for BaselineMessage {
    fn from(told: TaskMessage) -> Self {
        let envelope = Envelope::task(&told.task, told.traceparent);
        Self { properties: envelope.properties(true), body: envelope.body }
    }
}

impl BaselineDelivery {
    /// The process that it is about.
    ///
    /// # Errors
    /// It is none of Baton's.
    pub fn pid(self) -> Result<Pid, Down> {
        let task = Envelope::from_amqp(&self.0.properties, self.0.data).read_task().map_err(Down)?;
        Ok(task.pid())
    }
}

impl BaselinePublisher {
    /// Publishes all, persistent, and waits until the last is confirmed.
    ///
    /// # Errors
    /// The broker refuses one, or is gone.
    pub async fn publish(&self, messages: impl IntoIterator<Item = BaselineMessage>) -> Result<(), Down> {
        let publish = async |message: BaselineMessage| {
            let BaselineMessage { properties, body } = message;
            let options = BasicPublishOptions::default();
            let publish = self.channel.basic_publish("".into(), short(&self.queue), options, &body, properties);
            Ok(((), publish.await?))
        };
        let n_page = self.n_unconfirmed_max.div_ceil(2);
        let mut messages = messages.into_iter();
        let mut window = Window::new();
        loop {
            let page: Vec<_> = messages.by_ref().take(n_page).map(&publish).collect();
            if page.is_empty() {
                return all_stored(&window.rest().await.map_err(down)?);
            }
            all_stored(&window.push(page).await.map_err(down)?)?;
        }
    }
}

fn down(error: lapin::Error) -> Down {
    Down(reason(&error))
}

fn all_stored(confirmed: &[((), Confirmation)]) -> Result<(), Down> {
    if confirmed.iter().any(|((), confirmation)| confirmation.is_nack()) {
        return Err(Down("the broker refuses a message".to_owned()));
    }
    Ok(())
}

impl BaselineConsumer {
    /// Waits for a delivery, and takes what has arrived, at most `max`.
    ///
    /// # Errors
    /// The consumer was cancelled.
    pub async fn take(&mut self, max: usize) -> Result<Vec<BaselineDelivery>, Down> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let next = if taken.is_empty() {
                self.consumer.next().await
            } else {
                self.consumer.next().now_or_never().flatten()
            };
            let Some(delivery) = next else { break };
            taken.push(BaselineDelivery(delivery.map_err(|error| Down(reason(&error)))?));
        }
        let Some(BaselineDelivery(last)) = taken.last() else { return Err(Down("the consumer has ended".to_owned())) };
        self.last = Some(last.acker.clone());
        Ok(taken)
    }

    /// Acknowledges everything that was taken, in one frame.
    ///
    /// # Errors
    /// The channel is gone.
    pub async fn acknowledge(&mut self) -> Result<(), Down> {
        let Some(last) = self.last.take() else { return Ok(()) };
        last.ack(BasicAckOptions { multiple: true }).await.map(drop).map_err(|error| Down(reason(&error)))
    }
}

async fn answer<T>(asked: impl Future<Output = lapin::Result<T>>) -> Result<T, Down> {
    match timeout(ANSWER_LIMIT, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Down(reason(&error))),
        Err(_) => Err(Down(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))),
    }
}

/// Removes a task queue with all its classes, whatever lies in it.
///
/// # Errors
/// The broker does not answer; some of them may be left.
pub async fn remove_task_queues(urls: &[String], queue: &str) -> Result<(), CheckError> {
    for class in classes(queue) {
        BaselineQueue::declare(urls, &task_queue(&class))
            .await?
            .delete()
            .await
            .map_err(|down| CheckError::Refused { url: String::new(), reason: down.0 })?;
    }
    Ok(())
}
