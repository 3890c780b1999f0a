//! Which processes a request or a list is about.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::by_name::{self, by_name_only};
use crate::duration;
use crate::id::Pid;
use crate::state;

/// A selection. Conditions are ANDed. A selection without a condition matches every process.
///
/// A condition that is present and empty matches no process: what gets lost on the way to a selection must not widen it. For
/// the same reason a text form must be a map, and `null` is not a condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Select {
    /// The process is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub pids: Option<Vec<Pid>>,
    /// The process bears every one of these labels.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given_once")]
    pub labels: Option<BTreeMap<String, String>>,
    /// The process belongs to this session.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub session: Option<String>,
    /// The process is in one of these states, by their words.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub states: Option<Vec<String>>,
    /// The task queue of the process, with its class: `default`, `default.high`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub queue: Option<String>,
    /// What the process runs: `program`, or the name of a process written in Rust.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub kind: Option<String>,
    /// The name of the worker that holds the process.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub worker: Option<String>,
    /// The process was accepted at least this long ago.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "duration::optional_text::serialize",
        deserialize_with = "given_duration"
    )]
    pub older_than: Option<Duration>,
}

by_name_only!(Select, "a selection: a map of conditions");

impl Serialize for Select {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Select::serialize(self, serializer)
    }
}

/// Reads labels. A key that comes twice is an error, since one of its two values would be lost.
fn given_once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    by_name::Unique::deserialize(deserializer).map(|labels| Some(labels.0))
}

fn given_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration::text::deserialize(deserializer).map(Some)
}

impl Select {
    /// The selection of one process.
    pub fn one(pid: Pid) -> Self {
        Select::of(vec![pid])
    }

    /// The selection of these processes. An empty list selects no process.
    pub fn of(pids: Vec<Pid>) -> Self {
        Select { pids: Some(pids), ..Select::default() }
    }

    /// Whether it has no condition, and so matches every process.
    pub fn is_all(&self) -> bool {
        *self == Select::default()
    }

    /// Whether one of its conditions is empty, so that it matches no process.
    pub fn is_none(&self) -> bool {
        let Select { pids, labels, session, states, queue, kind, worker, older_than: _ } = self;
        let is_empty = |text: &Option<String>| text.as_ref().is_some_and(String::is_empty);
        pids.as_ref().is_some_and(Vec::is_empty)
            || labels.as_ref().is_some_and(BTreeMap::is_empty)
            || states.as_ref().is_some_and(Vec::is_empty)
            || [session, queue, kind, worker].into_iter().any(is_empty)
    }

    /// The labels that a process must bear.
    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.labels.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The states of which a process must be in one; none if its state does not matter.
    pub fn states(&self) -> impl Iterator<Item = &str> {
        self.states.iter().flatten().map(String::as_str)
    }

    /// Whether its words mean something.
    ///
    /// # Errors
    /// The word that is not a state.
    pub fn check(&self) -> Result<(), String> {
        match self.states().find(|word| !state::WORDS.contains(word)) {
            Some(word) => Err(format!("`{word}` is no state; there are {}", state::WORDS.join(", "))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_writes_a_selection_in_json() {
        let text = r#"{"labels": {"campaign": "si"}, "states": ["running"], "older_than": "2h"}"#;
        let select: Select = serde_json::from_str(text).unwrap();
        assert_eq!(select.older_than, Some(Duration::from_secs(7200)));
        assert!(select.check().is_ok() && !select.is_all());
        assert!(serde_json::from_str::<Select>("{}").unwrap().is_all());
        assert!(serde_json::from_str::<Select>(r#"{"label": {}}"#).is_err());
    }

    #[test]
    fn a_condition_that_is_empty_selects_no_process() {
        for text in [
            r#"{"pids": []}"#,
            r#"{"labels": {}}"#,
            r#"{"states": []}"#,
            r#"{"session": ""}"#,
            r#"{"worker": "", "kind": "x"}"#,
        ] {
            let select: Select = serde_json::from_str(text).unwrap();
            assert!(select.is_none() && !select.is_all(), "{text}");
            // It stays what it is on the way to others.
            assert_eq!(serde_json::from_str::<Select>(&serde_json::to_string(&select).unwrap()).unwrap(), select);
            let bytes = rmp_serde::to_vec_named(&select).unwrap();
            assert_eq!(rmp_serde::from_slice::<Select>(&bytes).unwrap(), select);
        }
    }

    #[test]
    fn what_is_not_a_map_of_conditions_is_no_selection() {
        for text in [
            "[]",
            "[[]]",
            "null",
            r#""""#,
            r#"{"pids": null}"#,
            r#"{"labels": null}"#,
            r#"{"labels": []}"#,
            r#"{"session": null}"#,
            r#"{"older_than": null}"#,
            r#"{"labels": {"a": "1", "a": "2"}}"#,
            r#"{"pids": [], "pids": []}"#,
        ] {
            assert!(serde_json::from_str::<Select>(text).is_err(), "{text}");
        }
        // An array without elements, and nil, in MessagePack.
        for bytes in [&[0x90][..], &[0xc0], &[0x91, 0x90], &[0x81, 0xa4, b'p', b'i', b'd', b's', 0xc0]] {
            assert!(rmp_serde::from_slice::<Select>(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_no_state_is_named() {
        let select = Select { states: Some(vec!["runing".into()]), ..Select::default() };
        assert!(select.check().unwrap_err().contains("`runing`"));
    }
}
