//! The body of a dead letter in a readable form, whatever it contains.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::hex;
use crate::message::SIZE_BYTES_MAX;

/// Most bytes that are shown of a body that is neither JSON nor MessagePack: enough to recognise its origin.
const TEXT_BYTES_MAX: usize = 2048;
const HEX_BYTES_MAX: usize = 512;

/// Deepest nesting of MessagePack that is shown, as in the JSON reader. Each level takes stack space.
const DEPTH_MAX: usize = 128;

/// A body in a readable form.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// JSON.
    Json(Value),
    /// A map in MessagePack. Byte strings of 16 bytes are shown as UUIDs, others in hexadecimal.
    MessagePack(Value),
    /// The beginning of a text.
    Text(String),
    /// The beginning of any other body, in hexadecimal.
    Hex(String),
}

impl Body {
    /// Reads a body as each of these in turn. Of a body above the size limit of messages only the beginning is read.
    pub(super) fn read(bytes: &[u8]) -> Self {
        if bytes.len() <= SIZE_BYTES_MAX {
            if let Ok(value) = serde_json::from_slice(bytes) {
                return Body::Json(value);
            }
            if let Some(value @ Value::Object(_)) = read_message_pack(bytes) {
                return Body::MessagePack(value);
            }
        }
        let head = &bytes[..bytes.len().min(TEXT_BYTES_MAX)];
        match std::str::from_utf8(head) {
            Ok(text) => Body::Text(text.to_owned()),
            // The excerpt may end within a character of a text.
            Err(error) if error.error_len().is_none() && head.len() < bytes.len() => {
                Body::Text(String::from_utf8_lossy(&head[..error.valid_up_to()]).into_owned())
            }
            Err(_) => Body::Hex(hex(&head[..head.len().min(HEX_BYTES_MAX)])),
        }
    }

    /// The form: `json`, `msgpack`, `text` or `hex`.
    pub fn word(&self) -> &'static str {
        match self {
            Body::Json(_) => "json",
            Body::MessagePack(_) => "msgpack",
            Body::Text(_) => "text",
            Body::Hex(_) => "hex",
        }
    }

    /// The text of a field of the message.
    pub(super) fn field(&self, name: &str) -> Option<String> {
        match self {
            Body::Json(value) | Body::MessagePack(value) => Some(value.get(name)?.as_str()?.to_owned()),
            Body::Text(_) | Body::Hex(_) => None,
        }
    }
}

/// Reads MessagePack that takes up all of the bytes, since some texts start like MessagePack.
fn read_message_pack(bytes: &[u8]) -> Option<Value> {
    let mut rest = bytes;
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(DEPTH_MAX);
    let Shown(value) = Shown::deserialize(&mut reader).ok()?;
    rest.is_empty().then_some(value)
}

/// Any MessagePack value as JSON.
struct Shown(Value);

impl<'de> Deserialize<'de> for Shown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ShownVisitor).map(Shown)
    }
}

struct ShownVisitor;

impl<'de> Visitor<'de> for ShownVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        let text = match uuid::Uuid::from_slice(value) {
            Ok(uuid) => uuid.to_string(),
            Err(_) => hex(value),
        };
        Ok(text.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        // An extension: its type and its bytes.
        deserializer.deserialize_any(ShownVisitor)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Shown(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((Shown(key), Shown(value))) = entries.next_entry()? {
            let name = match key {
                Value::String(text) => text,
                Value::Null | Value::Bool(_) | Value::Number(_) => key.to_string(),
                Value::Array(_) | Value::Object(_) => return Err(A::Error::custom("a key is an array or a map")),
            };
            map.insert(name, value);
        }
        Ok(map.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Pid;
    use crate::message::{Encoding, Task};

    #[test]
    fn both_encodings_of_a_message_are_shown_alike() {
        let pid = Pid::generate();
        let spec = serde_json::json!({"run": ["true"], "with": {"x": 1.5, "y": null, "z": -3}});
        let task = Task::Launch { pid, spec: Some(Ok(spec.clone())), wait: true, announced_at: None };
        for encoding in [Encoding::Json, Encoding::MessagePack] {
            let body = Body::read(&task.encode(encoding));
            let (Body::Json(value) | Body::MessagePack(value)) = &body else { panic!("{body:?}") };
            assert_eq!((&value["pid"], &value["spec"]), (&pid.to_string().into(), &spec));
            assert_eq!(body.field("type").as_deref(), Some("launch"));
            assert_eq!(body.word(), if encoding == Encoding::Json { "json" } else { "msgpack" });
        }
    }

    #[test]
    fn any_other_body_is_shown_as_an_excerpt_without_a_panic() {
        let false_length = [0xdf, 0xff, 0xff, 0xff, 0xff];
        let extension = [0x81, 0xa1, b'x', 0xd4, 0x05, 0xaa];
        let number_key = [0x81, 0x07, 0xc4, 0x01, 0xff];
        let umlauts = "ä".repeat(5000).into_bytes();
        let cases: [(&[u8], &str, usize); 9] = [
            (b"hello", "text", 5),
            (b"", "text", 0),
            (b"\xc1\xff\x00", "hex", 8),
            (&false_length, "hex", 12),
            (&[0x91; 100_000], "hex", 2 + 2 * HEX_BYTES_MAX),
            (&umlauts[..4001], "text", TEXT_BYTES_MAX),
            (&extension, "msgpack", 0),
            (&number_key, "msgpack", 0),
            (b"\x81\xa1x\x01trailing", "hex", 26),
        ];
        for (bytes, word, n_bytes) in cases {
            let body = Body::read(bytes);
            assert_eq!(body.word(), word, "{body:?}");
            if let Body::Text(text) | Body::Hex(text) = &body {
                assert_eq!(text.len(), n_bytes, "{text}");
            }
        }
        assert_eq!(Body::read(&extension), Body::MessagePack(serde_json::json!({"x": [5, "0xaa"]})));
        assert_eq!(Body::read(&number_key), Body::MessagePack(serde_json::json!({"7": "0xff"})));
        let huge = [vec![b'['], vec![b' '; SIZE_BYTES_MAX], vec![b']']].concat();
        assert!(matches!(Body::read(&huge), Body::Text(text) if text.len() == TEXT_BYTES_MAX));
    }
}
