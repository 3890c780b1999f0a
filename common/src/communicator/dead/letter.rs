//! A dead letter, published by a worker, by RabbitMQ, or by hand.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde_json::{Map, Value};

use super::body::Body;
use super::hex;
use crate::communicator::envelope::{DEAD_AT, DEAD_ID, DEAD_ORIGIN, DEAD_REASON, Envelope};
use crate::id::LetterId;

/// The header that RabbitMQ writes when it dead-letters a message, with the last time first.
const X_DEATH: &str = "x-death";

/// The header with the number of times a broker has requeued a message. Each inspection changes it.
const N_RETURNS: &str = "x-delivery-count";

/// Headers that are not part of the letter itself: counts, and other recipients of the message.
const PASSING: [&str; 4] = [N_RETURNS, "x-acquired-count", "CC", "BCC"];

/// A fetched letter. If it is dropped, it is requeued when the [`super::DeadLetters`] are closed.
#[derive(Debug)]
pub struct Letter {
    /// Its id. Copies of a letter have the same id, and so do equal letters without an id of their own.
    pub id: LetterId,
    /// When it was dead-lettered, in microseconds since 1970 by the clock of the program that did it.
    pub at: Option<i64>,
    /// The reason.
    pub reason: Option<String>,
    /// The AMQP name of the queue that it came from.
    pub origin: Option<String>,
    /// The properties of the dead letter.
    properties: BasicProperties,
    /// The original message.
    pub(super) envelope: Envelope,
    pub(super) acker: lapin::Acker,
    /// The index of its page; `None` if it was fetched singly.
    pub(super) page_idx: Option<usize>,
}

impl Letter {
    pub(super) fn read(delivery: Delivery, page_idx: Option<usize>) -> Self {
        let Delivery { properties, data, acker, .. } = delivery;
        let none = FieldTable::default();
        let table = properties.headers().as_ref().unwrap_or(&none);
        let death = last_death(table);
        let of_death = |name: &str| death.and_then(|death| death.inner().get(name));
        let at = text(table, DEAD_AT).and_then(|at| Some(DateTime::parse_from_rfc3339(&at).ok()?.timestamp_micros()));
        let died_at = || match of_death("time") {
            Some(AMQPValue::Timestamp(seconds)) => i64::try_from(*seconds).ok()?.checked_mul(1_000_000),
            Some(_) | None => None,
        };
        let why = || of_death("reason").map(|reason| format!("dead-lettered by the broker: {}", text_of(reason)));
        Letter {
            id: text(table, DEAD_ID).and_then(|id| id.parse().ok()).unwrap_or_else(|| digest_id(&properties, &data)),
            at: at.or_else(died_at),
            reason: text(table, DEAD_REASON).or_else(why),
            origin: text(table, DEAD_ORIGIN).or_else(|| of_death("queue").map(text_of)),
            envelope: Envelope::from_amqp(&properties, data),
            properties,
            acker,
            page_idx,
        }
    }

    /// The message type: its property, or else the field in its body.
    pub fn kind(&self) -> Option<String> {
        self.envelope.kind.clone().or_else(|| self.body().field("type"))
    }

    /// The pid of its process, or else its message id.
    pub fn about(&self) -> Option<String> {
        // The message id of Baton's own tasks is the pid, so their body is not decoded.
        let id = || self.envelope.message_id.clone();
        if self.envelope.is_own() { id() } else { self.body().field("pid").or_else(id) }
    }

    /// The AMQP properties without the headers.
    pub fn properties(&self) -> Map<String, Value> {
        shown_properties(&self.properties)
    }

    /// The headers.
    pub fn headers(&self) -> Map<String, Value> {
        self.properties.headers().as_ref().map(shown_table).unwrap_or_default()
    }

    /// The body in a readable form.
    pub fn body(&self) -> Body {
        Body::read(&self.envelope.body)
    }

    /// Size of the body in bytes.
    pub fn size_bytes(&self) -> usize {
        self.envelope.body.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.envelope.body
    }

    /// The number of times it was requeued, if the broker reports it.
    pub(super) fn n_returns(&self) -> u64 {
        let count = self.properties.headers().as_ref().and_then(|headers| headers.inner().get(N_RETURNS));
        count.and_then(|count| shown(count).as_u64()).unwrap_or(0)
    }

    /// The properties of the letter without the traces of inspections.
    pub(super) fn fresh(&self) -> BasicProperties {
        fresh(&self.properties)
    }
}

fn fresh(properties: &BasicProperties) -> BasicProperties {
    let headers = properties.headers().as_ref().map(|headers| {
        let stay = headers.inner().iter().filter(|(name, _)| !PASSING.contains(&name.as_str()));
        stay.map(|(name, value)| (name.clone(), value.clone())).collect::<BTreeMap<_, _>>()
    });
    properties.clone().with_headers(headers.unwrap_or_default().into())
}

/// The id of a letter without one: a digest of its constant parts.
fn digest_id(properties: &BasicProperties, body: &[u8]) -> LetterId {
    let properties = rmp_serde::to_vec(&fresh(properties)).expect("properties are plain data");
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(properties.len() as u64).to_le_bytes()).update(&properties).update(body);
    LetterId::of_digest(&hasher.finalize())
}

fn last_death(headers: &FieldTable) -> Option<&FieldTable> {
    let Some(AMQPValue::FieldArray(deaths)) = headers.inner().get(X_DEATH) else { return None };
    match deaths.as_slice().first() {
        Some(AMQPValue::FieldTable(death)) => Some(death),
        Some(_) | None => None,
    }
}

/// A header that is a non-empty text.
fn text(headers: &FieldTable, name: &str) -> Option<String> {
    match headers.inner().get(name) {
        Some(AMQPValue::LongString(text)) if !text.is_empty() => Some(text.to_string()),
        Some(_) | None => None,
    }
}

fn text_of(value: &AMQPValue) -> String {
    match shown(value) {
        Value::String(text) => text,
        value @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            value.to_string()
        }
    }
}

fn shown_properties(properties: &BasicProperties) -> Map<String, Value> {
    let text = |value: &Option<ShortString>| value.as_ref().map(|text| Value::from(text.as_str()));
    let number = |value: &Option<u8>| value.map(Value::from);
    let all = [
        ("type", text(properties.kind())),
        ("message_id", text(properties.message_id())),
        ("content_type", text(properties.content_type())),
        ("content_encoding", text(properties.content_encoding())),
        ("correlation_id", text(properties.correlation_id())),
        ("reply_to", text(properties.reply_to())),
        ("app_id", text(properties.app_id())),
        ("user_id", text(properties.user_id())),
        ("timestamp", properties.timestamp().map(shown_time)),
        ("expiration", text(properties.expiration())),
        ("delivery_mode", number(properties.delivery_mode())),
        ("priority", number(properties.priority())),
        ("cluster_id", text(properties.cluster_id())),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn shown_table(table: &FieldTable) -> Map<String, Value> {
    table.inner().iter().map(|(name, value)| (name.as_str().to_owned(), shown(value))).collect()
}

/// The value of a header as JSON.
fn shown(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(value) => (*value).into(),
        AMQPValue::ShortShortInt(value) => (*value).into(),
        AMQPValue::ShortShortUInt(value) => (*value).into(),
        AMQPValue::ShortInt(value) => (*value).into(),
        AMQPValue::ShortUInt(value) => (*value).into(),
        AMQPValue::LongInt(value) => (*value).into(),
        AMQPValue::LongUInt(value) => (*value).into(),
        AMQPValue::LongLongInt(value) => (*value).into(),
        AMQPValue::Float(value) => (*value).into(),
        AMQPValue::Double(value) => (*value).into(),
        AMQPValue::DecimalValue(value) => format!("{}e-{}", value.value, value.scale).into(),
        AMQPValue::ShortString(text) => text.as_str().into(),
        AMQPValue::LongString(text) => {
            std::str::from_utf8(text.as_bytes()).map_or_else(|_| hex(text.as_bytes()).into(), Value::from)
        }
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(shown).collect(),
        AMQPValue::Timestamp(seconds) => shown_time(*seconds),
        AMQPValue::FieldTable(table) => shown_table(table).into(),
        AMQPValue::ByteArray(bytes) => hex(bytes.as_slice()).into(),
        AMQPValue::Void => Value::Null,
    }
}

fn shown_time(seconds: u64) -> Value {
    let time = i64::try_from(seconds).ok().and_then(|seconds| DateTime::<Utc>::from_timestamp(seconds, 0));
    time.map_or_else(|| seconds.into(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true).into())
}

#[cfg(test)]
mod tests {
    use lapin::protocol::basic::parse_properties;
    use serde_json::json;

    use super::*;
    use crate::communicator::nesting::is_too_deep;
    use crate::fuzz;
    use crate::id::Pid;
    use crate::message::Task;

    fn letter(properties: BasicProperties, body: &[u8]) -> Letter {
        let mut delivery = Delivery::mock(1, "".into(), "baton.dead".into(), false, body.to_vec());
        delivery.properties = properties;
        Letter::read(delivery, None)
    }

    fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
        entries.into_iter().map(|(name, value)| (name.into(), value)).collect::<BTreeMap<_, _>>().into()
    }

    fn long(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    #[test]
    fn a_dead_letter_has_reason_origin_and_time_and_keeps_the_message() {
        let pid = Pid::generate();
        let sent = Envelope {
            reply_to: Some("answers".into()),
            correlation_id: Some("7".into()),
            timestamp: Some(1_700_000_000),
            headers: table([("campaign", long("si")), ("n", AMQPValue::LongInt(3))]),
            ..Envelope::task(&Task::Continue { pid, announced_at: Some(3) }, Some("00-aa-bb-01".into()))
        };
        let buried = sent.clone().buried("no such process", "baton.task.default");
        let (one, two) = (letter(buried.properties(true), &sent.body), letter(buried.properties(true), &sent.body));
        assert_eq!((one.id, one.kind().as_deref()), (two.id, Some("continue")));
        assert_eq!(
            (one.reason.as_deref(), one.origin.as_deref()),
            (Some("no such process"), Some("baton.task.default"))
        );
        assert!(one.at.is_some() && one.about() == Some(pid.to_string()));
        let replayed = Envelope::from_amqp(&one.envelope.properties(true), one.envelope.body.clone());
        assert_eq!(replayed.headers, sent.headers);
        assert_eq!(replayed.traceparent, sent.traceparent);
        let names = |e: Envelope| (e.kind, e.message_id, e.content_type, e.correlation_id, e.reply_to, e.app_id);
        assert_eq!((replayed.timestamp, names(replayed)), (sent.timestamp, names(sent)));
    }

    #[test]
    fn the_origin_of_a_letter_from_the_broker_is_the_queue_of_its_last_death() {
        let death = |queue: &str| {
            AMQPValue::FieldTable(table([
                ("queue", long(queue)),
                ("reason", long("delivery_limit")),
                ("time", AMQPValue::Timestamp(1_700_000_000)),
                ("count", AMQPValue::LongLongInt(1)),
            ]))
        };
        let deaths = AMQPValue::FieldArray(vec![death("baton.task.default.high"), death("earlier")].into());
        let headers = table([("x-death", deaths), ("x-first-death-queue", long("earlier")), ("CC", long("elsewhere"))]);
        let letter = letter(BasicProperties::default().with_headers(headers), b"{}");
        assert_eq!(letter.origin.as_deref(), Some("baton.task.default.high"));
        assert_eq!(letter.reason.as_deref(), Some("dead-lettered by the broker: delivery_limit"));
        assert_eq!(letter.at, Some(1_700_000_000_000_000));
        assert_eq!(letter.headers()["x-death"][0]["time"], "2023-11-14T22:13:20Z");
        assert!(letter.envelope.headers.inner().is_empty(), "no header that changes the routing");
    }

    #[test]
    fn malformed_headers_are_shown_but_not_used() {
        let headers = table([
            (DEAD_ID, long("not an id")),
            (DEAD_AT, AMQPValue::Timestamp(u64::MAX)),
            (DEAD_REASON, AMQPValue::Void),
            (DEAD_ORIGIN, AMQPValue::LongLongInt(4)),
            ("x-death", AMQPValue::FieldArray(vec![AMQPValue::Boolean(true)].into())),
            ("latin", AMQPValue::LongString(b"\xe4".to_vec().into())),
            ("nan", AMQPValue::Double(f64::NAN)),
        ]);
        let letter = letter(BasicProperties::default().with_headers(headers).with_timestamp(u64::MAX), b"\xff");
        assert_eq!((&letter.at, &letter.reason, &letter.origin), (&None, &None, &None));
        assert_eq!((letter.kind(), letter.about()), (None, None));
        assert_eq!(letter.headers()["latin"], "0xe4");
        assert_eq!(letter.headers()["nan"], Value::Null);
        assert_eq!(letter.properties()["timestamp"], json!(u64::MAX));
    }

    fn read(input: &[u8]) {
        if is_too_deep(input) {
            return;
        }
        let Ok((body, properties)) = parse_properties(input) else { return };
        let read = letter(properties, body);
        let fresh = letter(read.fresh(), body);
        assert_eq!((fresh.id, fresh.n_returns()), (read.id, 0));
        assert!(serde_json::to_vec(&(read.headers(), read.properties())).is_ok());
        let _ = (read.body(), read.kind(), read.about());
        let buried = read.envelope.clone().buried("reason", "origin").properties(true);
        assert_eq!(letter(buried, body).reason.as_deref(), Some("reason"));
    }

    #[test]
    fn any_bytes_as_properties_and_body_of_a_letter_are_handled() {
        fuzz::run("letter", read);
    }

    #[test]
    fn the_id_of_a_letter_without_one_depends_on_its_constant_parts() {
        let with = |count: i64, id: &str| {
            let headers = table([("x-delivery-count", AMQPValue::LongLongInt(count)), ("colour", long("red"))]);
            BasicProperties::default().with_headers(headers).with_message_id(id.into())
        };
        let looked_at = letter(with(1, "m"), b"body");
        let id = looked_at.id;
        assert_eq!(id, letter(with(2, "m"), b"body").id);
        assert_eq!((looked_at.n_returns(), letter(looked_at.fresh(), b"body").n_returns()), (1, 0));
        assert_eq!(id, letter(looked_at.fresh(), b"body").id);
        assert_ne!(id, letter(with(1, "n"), b"body").id);
        assert_ne!(id, letter(with(1, "m"), b"other").id);
        assert_eq!(id.to_string().parse::<LetterId>().unwrap(), id);
    }
}
