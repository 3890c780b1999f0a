//! Readers of maps that detect a duplicate key.
//!
//! `serde_json` keeps the last value of a duplicate key. A sender that writes a key twice has made a mistake, and the
//! value that is dropped may be the intended one.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::{Map, Number, Value};

/// A map has this key twice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("duplicate key `{0}`; remove one of them")]
pub struct DuplicateKey(pub String);

/// A map from text to text. A duplicate key is a deserialization error.
pub(crate) struct UniqueTexts(pub(crate) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueTexts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = UniqueTexts;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a map from text to text")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueTexts, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if entries.contains_key(&key) {
                        return Err(A::Error::custom(DuplicateKey(key)));
                    }
                    entries.insert(key, value);
                }
                Ok(UniqueTexts(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// A JSON value, or the first key that one of its maps has twice.
///
/// A duplicate key is not a deserialization error, so that the rest of the message is still read.
pub(crate) struct UniqueValue(pub(crate) Result<Value, DuplicateKey>);

impl<'de> Deserialize<'de> for UniqueValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let duplicate = OnceCell::new();
        let value = ValueReader { duplicate: &duplicate }.deserialize(deserializer)?;
        Ok(UniqueValue(duplicate.into_inner().map_or(Ok(value), |key| Err(DuplicateKey(key)))))
    }
}

/// Writes the value. A value with a duplicate key is written as `null`: this program only reads such values.
impl Serialize for UniqueValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.as_ref().unwrap_or(&Value::Null).serialize(serializer)
    }
}

/// Reads a value as [`Value`] does, and notes the first duplicate key.
#[derive(Clone, Copy)]
struct ValueReader<'a> {
    duplicate: &'a OnceCell<String>,
}

impl<'de> DeserializeSeed<'de> for ValueReader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueReader<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
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
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self)?;
            if entries.contains_key(&key) {
                // A key that was noted before is kept: one is enough for the sender.
                let _ = self.duplicate.set(key);
            } else {
                entries.insert(key, value);
            }
        }
        Ok(Value::Object(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duplicate_key_is_found_at_any_depth() {
        for (text, expected) in [
            (r#"{"a": 1, "b": 2, "a": 3}"#, Some("a")),
            (r#"{"a": [{"b": {"c": 1, "c": 1}}]}"#, Some("c")),
            (r#"[{"a": 1, "a": 2}, {"b": 1, "b": 2}]"#, Some("a")),
            (r#"{"a": {"a": 1}, "b": {"a": 1}}"#, None),
        ] {
            let UniqueValue(read) = serde_json::from_str(text).unwrap();
            assert_eq!(read.as_ref().err().map(|key| key.0.as_str()), expected, "{text}");
        }
        // {"a": 1, "a": 2} in MessagePack.
        let UniqueValue(read) = rmp_serde::from_slice(b"\x82\xa1a\x01\xa1a\x02").unwrap();
        assert_eq!(read, Err(DuplicateKey("a".into())));
    }

    #[test]
    fn any_other_value_is_read_as_serde_json_reads_it() {
        for text in
            ["null", "true", "-3", "18446744073709551615", "1.5", "1e300", "\"a\"", r#"[{"a": [null]}, {}, []]"#]
        {
            let UniqueValue(read) = serde_json::from_str(text).unwrap();
            assert_eq!(read, Ok(serde_json::from_str::<Value>(text).unwrap()), "{text}");
        }
    }
}
