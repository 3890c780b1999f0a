//! A plain AMQP client, independent of Baton's own.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::Value;

/// A connection with one channel.
pub struct Amqp {
    channel: Channel,
    _connection: Connection,
}

impl Amqp {
    /// Connects.
    pub async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.expect("the broker answers");
        let channel = connection.create_channel().await.expect("a channel");
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        Self { channel, _connection: connection }
    }

    /// Publishes a body and waits for the broker's confirm. A queue for it must exist: a worker that has just become
    /// ready may not have declared its queue yet, and the broker confirms unroutable messages.
    pub async fn publish(&self, exchange: &str, key: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let published = self.channel.basic_publish(exchange.into(), key.into(), options, body, properties).await;
        let confirmed = published.expect("the channel is open").await.expect("confirmed");
        assert!(confirmed.take_message().is_none(), "unroutable: exchange {exchange:?}, key {key:?}");
    }

    /// Publishes JSON.
    pub async fn publish_json(&self, exchange: &str, key: &str, body: &Value) {
        let properties = BasicProperties::default().with_content_type("application/json".into());
        self.publish(exchange, key, body.to_string().as_bytes(), properties).await;
    }

    /// Takes a message from a queue: its body and the text of a header.
    pub async fn get(&self, queue: &str, header: &str) -> Option<(Vec<u8>, Option<String>)> {
        let options = BasicGetOptions { no_ack: true };
        let message = self.channel.basic_get(queue.into(), options).await.expect("the queue exists")?;
        let header = message.properties.headers().as_ref().and_then(|headers| {
            headers.inner().get(header).and_then(|value| value.as_long_string()).map(ToString::to_string)
        });
        Some((message.data.clone(), header))
    }

    /// Returns the number of ready messages in a queue.
    pub async fn depth(&self, queue: &str) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = self.channel.queue_declare(queue.into(), options, FieldTable::default()).await;
        queue.expect("the queue exists").message_count()
    }

    /// Publishes JSON with a reply queue, and returns this many answers.
    pub async fn request(&self, exchange: &str, key: &str, body: &Value, answers: usize) -> Vec<Value> {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let mut replies = self
            .channel
            .basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default())
            .await
            .expect("direct reply-to");
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_reply_to("amq.rabbitmq.reply-to".into())
            .with_correlation_id("7".into());
        self.publish(exchange, key, body.to_string().as_bytes(), properties).await;
        let mut values = Vec::new();
        while values.len() < answers {
            let reply = tokio::time::timeout(Duration::from_secs(20), replies.next()).await;
            let reply = reply.expect("an answer in time").expect("the stream is open").expect("a delivery");
            assert_eq!(reply.properties.correlation_id().as_ref().map(|id| id.as_str()), Some("7"));
            values.push(serde_json::from_slice(&reply.data).expect("JSON, since the request was"));
        }
        values
    }
}
