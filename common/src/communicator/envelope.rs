//! A message as it is in a queue: its body and the properties that Baton uses. Also the names of queues and exchanges.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};

use super::ReplyTo;
use crate::id::LetterId;
use crate::message::{Control, Encoding, Task};

/// The exchange of tasks; the routing key is the queue's name without its prefix.
pub(super) const TASK_EXCHANGE: &str = "baton.task";
/// The queue of dead letters.
pub(super) const DEAD_QUEUE: &str = "baton.dead";
/// The exchange of broadcasts.
pub(super) const BROADCAST_EXCHANGE: &str = "baton.broadcast";
/// The durable copy of broadcasts.
pub(super) const CONTROL_QUEUE: &str = "baton.control";
/// The exchange of events.
pub(super) const EVENT_EXCHANGE: &str = "baton.event";
/// RabbitMQ's pseudo-queue for direct replies.
pub(super) const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

/// Longest name of a task queue. AMQP allows 255 bytes, which also include the prefix, a class and a consumer's name.
const QUEUE_NAME_BYTES_MAX: usize = 120;

const APP_ID: &str = "baton";
const TRACEPARENT: &str = "traceparent";

/// Longest trace context that is read. A valid one has 55 bytes.
const TRACEPARENT_BYTES_MAX: usize = 255;

/// Header of a dead letter: its id.
pub(super) const DEAD_ID: &str = "x-baton-dead-id";
/// Header of a dead letter: the reason.
pub(super) const DEAD_REASON: &str = "x-baton-reason";
/// Header of a dead letter: the queue that it came from.
pub(super) const DEAD_ORIGIN: &str = "x-baton-origin";
/// Header of a dead letter: when it was dead-lettered.
pub(super) const DEAD_AT: &str = "x-baton-at";

/// Longest reason of a dead letter, and largest size of the sender's headers that it keeps. All properties of a message
/// are in one frame of at most 128 KiB, and a larger one closes the connection.
const REASON_BYTES_MAX: usize = 8 * 1024;
const HEADERS_BYTES_MAX: usize = 32 * 1024;

/// Headers, and prefixes of headers, that would change how a broker treats a message that is published again: it would
/// send copies elsewhere, continue a count, or detect a cycle.
const BROKER_HEADERS: [&str; 6] = ["CC", "BCC", "x-death", "x-opt-deaths", "x-delivery-count", "x-acquired-count"];
const BROKER_PREFIXES: [&str; 3] = ["x-baton-", "x-first-death-", "x-last-death-"];

/// A message's body and properties.
#[derive(Clone, Debug, Default)]
pub(super) struct Envelope {
    pub(super) kind: Option<String>,
    pub(super) message_id: Option<String>,
    pub(super) content_type: Option<String>,
    pub(super) correlation_id: Option<String>,
    pub(super) reply_to: Option<String>,
    pub(super) app_id: Option<String>,
    /// The sender's user name. The broker rejects a false one.
    pub(super) user_id: Option<String>,
    pub(super) traceparent: Option<String>,
    /// When the message was sent, in seconds since 1970; `None` for a new message, which is sent now.
    pub(super) timestamp: Option<u64>,
    /// The sender's own headers.
    pub(super) headers: FieldTable,
    pub(super) epitaph: Option<Epitaph>,
    pub(super) body: Vec<u8>,
}

/// The additional headers of a message in `baton.dead`.
#[derive(Clone, Debug)]
pub(super) struct Epitaph {
    id: LetterId,
    reason: String,
    origin: String,
}

impl Envelope {
    /// A message from Baton.
    pub(super) fn new(kind: &str, encoding: Encoding, body: Vec<u8>) -> Self {
        Envelope {
            kind: Some(kind.to_owned()),
            content_type: Some(encoding.content_type().to_owned()),
            app_id: Some(APP_ID.to_owned()),
            body,
            ..Envelope::default()
        }
    }

    /// The message of a task. Its id is the pid.
    pub(super) fn task(task: &Task, traceparent: Option<String>) -> Self {
        let encoding = Encoding::MessagePack;
        Envelope {
            message_id: Some(task.pid().to_string()),
            traceparent,
            ..Envelope::new(task.word(), encoding, task.encode(encoding))
        }
    }

    /// A control message with a new id.
    pub(super) fn control(control: &Control) -> Self {
        let encoding = Encoding::MessagePack;
        Envelope {
            message_id: Some(uuid::Uuid::now_v7().to_string()),
            ..Envelope::new(control.word(), encoding, control.encode(encoding))
        }
    }

    /// The message as a dead letter. Copies of it are the same letter.
    pub(super) fn buried(mut self, reason: &str, origin: &str) -> Self {
        let n_bytes = rmp_serde::to_vec(&self.headers).map_or(usize::MAX, |bytes| bytes.len());
        if n_bytes > HEADERS_BYTES_MAX {
            self.headers = FieldTable::default();
        }
        let reason = cut(reason, REASON_BYTES_MAX).to_owned();
        self.epitaph = Some(Epitaph { id: LetterId::generate(), reason, origin: origin.to_owned() });
        self
    }

    /// Whether a program of Baton sent it.
    pub(super) fn is_own(&self) -> bool {
        self.app_id.as_deref() == Some(APP_ID)
    }

    /// The encoding of the body. Unless the content type is MessagePack, a body that starts with `{` is JSON: no usable
    /// MessagePack starts with it, and people forget the content type in the form of the management UI.
    pub(super) fn encoding(&self) -> Encoding {
        let named = self.content_type.as_deref();
        let known = named.is_some_and(|text| text.to_ascii_lowercase().contains("msgpack"));
        let first = self.body.iter().find(|byte| !byte.is_ascii_whitespace());
        if !known && first == Some(&b'{') { Encoding::Json } else { Encoding::of_content_type(named) }
    }

    /// The address for a reply.
    pub(super) fn reply_to(&self) -> Option<ReplyTo> {
        let reply_to = self.reply_to.clone()?;
        let json = self.encoding() == Encoding::Json;
        Some(ReplyTo { reply_to, correlation_id: self.correlation_id.clone(), json })
    }

    /// Decodes the message as a task.
    pub(super) fn read_task(&self) -> Result<Task, String> {
        Task::decode(&self.body, self.encoding()).map_err(|error| error.to_string())
    }

    /// Decodes the message as a control message.
    pub(super) fn read_control(&self) -> Result<Control, String> {
        Control::decode(&self.body, self.encoding()).map_err(|error| error.to_string())
    }

    /// The AMQP properties.
    pub(super) fn properties(&self, persistent: bool) -> BasicProperties {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut headers = self.headers.clone();
        let mut header = |name: &str, text: &str| {
            headers.insert(name.into(), AMQPValue::LongString(LongString::from(text.as_bytes())));
        };
        if let Some(traceparent) = &self.traceparent {
            header(TRACEPARENT, traceparent);
        }
        if let Some(epitaph) = &self.epitaph {
            header(DEAD_ID, &epitaph.id.to_string());
            header(DEAD_REASON, &epitaph.reason);
            header(DEAD_ORIGIN, &epitaph.origin);
            header(DEAD_AT, &chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
        }
        let mut properties = BasicProperties::default()
            .with_delivery_mode(if persistent { 2 } else { 1 })
            .with_timestamp(self.timestamp.unwrap_or(now))
            .with_headers(headers);
        for (text, set) in [
            (&self.kind, BasicProperties::with_type as fn(BasicProperties, ShortString) -> BasicProperties),
            (&self.message_id, BasicProperties::with_message_id),
            (&self.content_type, BasicProperties::with_content_type),
            (&self.correlation_id, BasicProperties::with_correlation_id),
            (&self.reply_to, BasicProperties::with_reply_to),
            (&self.app_id, BasicProperties::with_app_id),
        ] {
            if let Some(text) = text {
                properties = set(properties, short(text));
            }
        }
        properties
    }

    /// The envelope of a delivered message.
    pub(super) fn from_amqp(properties: &BasicProperties, body: Vec<u8>) -> Self {
        let text = |value: &Option<ShortString>| value.as_ref().map(|text| text.as_str().to_owned());
        let headers = properties.headers().as_ref();
        let traceparent = headers.and_then(|headers| match headers.inner().get(TRACEPARENT) {
            Some(AMQPValue::LongString(text)) if text.len() <= TRACEPARENT_BYTES_MAX => Some(text.to_string()),
            Some(_) | None => None,
        });
        // A trace context has hexadecimal digits and dashes; anything else is dropped.
        let traceparent = traceparent.filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
        Envelope {
            kind: text(properties.kind()),
            message_id: text(properties.message_id()),
            content_type: text(properties.content_type()),
            correlation_id: text(properties.correlation_id()),
            reply_to: text(properties.reply_to()),
            app_id: text(properties.app_id()),
            user_id: text(properties.user_id()),
            traceparent,
            timestamp: *properties.timestamp(),
            headers: headers.map(own_headers).unwrap_or_default(),
            epitaph: None,
            body,
        }
    }
}

/// The sender's own headers, without those of Baton and of the broker.
fn own_headers(headers: &FieldTable) -> FieldTable {
    let is_own = |name: &str| {
        name != TRACEPARENT
            && !BROKER_HEADERS.contains(&name)
            && !BROKER_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    };
    let own = headers.inner().iter().filter(|(name, _)| is_own(name.as_str()));
    own.map(|(name, value)| (name.clone(), value.clone())).collect::<BTreeMap<_, _>>().into()
}

/// The three classes of a queue, high first. The name of a class stands for itself.
pub(super) fn classes(queue: &str) -> Vec<String> {
    if queue.ends_with(".high") || queue.ends_with(".low") {
        vec![queue.to_owned()]
    } else {
        vec![format!("{queue}.high"), queue.to_owned(), format!("{queue}.low")]
    }
}

/// The AMQP name of a task queue.
pub(super) fn task_queue(queue: &str) -> String {
    format!("{TASK_EXCHANGE}.{queue}")
}

/// The reason why this is not a valid name of a task queue.
pub(super) fn bad_queue_name(queue: &str) -> Option<String> {
    if queue.is_empty() {
        Some("the name is empty".to_owned())
    } else if queue.len() > QUEUE_NAME_BYTES_MAX {
        Some(format!("the name has {} bytes, which exceeds the limit of {QUEUE_NAME_BYTES_MAX}", queue.len()))
    } else {
        None
    }
}

/// Converts a text to AMQP's short string, cut to its limit of 255 bytes.
pub(super) fn short(text: &str) -> ShortString {
    cut(text, 255).into()
}

/// The beginning of a text, cut at a character boundary.
fn cut(text: &str, n_bytes_max: usize) -> &str {
    let end = (0..=text.len().min(n_bytes_max)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Pid;

    #[test]
    fn json_without_a_content_type_is_read_as_json() {
        let body = format!(r#" {{"version": 1, "type": "continue", "pid": "{}"}}"#, Pid::generate()).into_bytes();
        for content_type in [None, Some("text/plain".to_owned()), Some("application/json".to_owned())] {
            let envelope = Envelope { content_type, body: body.clone(), ..Envelope::default() };
            assert!(envelope.read_task().is_ok());
        }
        let false_claim = Envelope { content_type: Some("application/msgpack".into()), body, ..Envelope::default() };
        assert!(false_claim.read_task().unwrap_err().contains("MessagePack"));
    }

    #[test]
    fn properties_round_trip_through_amqp() {
        let pid = Pid::generate();
        let sent = Envelope::task(&Task::Continue { pid, announced_at: Some(3) }, Some("00-aa-bb-01".into()));
        let arrived = Envelope::from_amqp(&sent.properties(true), sent.body.clone());
        assert_eq!(arrived.message_id, Some(pid.to_string()));
        assert_eq!(arrived.kind.as_deref(), Some("continue"));
        assert_eq!(arrived.traceparent.as_deref(), Some("00-aa-bb-01"));
        assert!(arrived.is_own());
        assert_eq!(arrived.read_task().unwrap().pid(), pid);
    }

    #[test]
    fn a_dead_letter_fits_into_a_frame_and_keeps_no_routing_headers() {
        let text = |n_bytes: usize| AMQPValue::LongString("x".repeat(n_bytes).into());
        let headers = |entries: [(&str, AMQPValue); 3]| -> FieldTable {
            entries.into_iter().map(|(name, value)| (name.into(), value)).collect::<BTreeMap<_, _>>().into()
        };
        let arrived = |n_bytes| {
            let headers = headers([("mine", text(n_bytes)), ("CC", text(1)), ("x-baton-reason", text(1))]);
            Envelope::from_amqp(&BasicProperties::default().with_headers(headers), Vec::new())
        };
        let small = arrived(100).buried(&"ä".repeat(1_000_000), "baton.task.default").properties(true);
        let small = small.headers().as_ref().unwrap().inner();
        assert!(small.contains_key("mine") && !small.contains_key("CC"));
        let reason = small[DEAD_REASON].as_long_string().unwrap();
        assert!(reason.len() == REASON_BYTES_MAX && reason.to_string().ends_with('ä'));
        let large = arrived(100_000).buried("too bad", "baton.task.default").properties(true);
        let large = large.headers().as_ref().unwrap().inner();
        assert!(!large.contains_key("mine") && large.contains_key(DEAD_ID));
    }

    #[test]
    fn a_text_that_is_too_long_for_amqp_is_cut_at_a_character_boundary() {
        assert_eq!(short(&"ä".repeat(200)).as_str().len(), 254);
        assert_eq!(short("x").as_str(), "x");
    }

    #[test]
    fn a_queue_stands_for_its_three_classes() {
        assert_eq!(classes("default"), ["default.high", "default", "default.low"]);
        assert_eq!(classes("default.low"), ["default.low"]);
    }
}
