//! Selections: which processes a request or a list applies to.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::by_name::{self, by_name_only};
use crate::duration;
use crate::id::Pid;
use crate::state;
use crate::unique_keys::UniqueTexts;

/// A selection. Conditions are ANDed. A selection without a condition matches every process.
///
/// A condition that is present and empty matches no process, so that a value that is lost on its way never widens a
/// selection. For the same reason a selection must be written as a map, and `null` is not a condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Select {
    /// The process is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub pids: Option<Vec<Pid>>,
    /// The process has all of these labels.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given_once")]
    pub labels: Option<BTreeMap<String, String>>,
    /// The process belongs to this session.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub session: Option<String>,
    /// The process is in one of these states.
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
    /// The process was created at least this long ago.
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

/// Reads labels. A duplicate key is an error, since one of its values would be lost.
fn given_once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    UniqueTexts::deserialize(deserializer).map(|labels| Some(labels.0))
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

    /// The labels that a process must have.
    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.labels.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The states, one of which a process must be in; empty if there is no such condition.
    pub fn states(&self) -> impl Iterator<Item = &str> {
        self.states.iter().flatten().map(String::as_str)
    }

    /// Checks the words of states.
    ///
    /// # Errors
    /// The first word that is not a state.
    pub fn check(&self) -> Result<(), String> {
        match self.states().find(|word| !state::WORDS.contains(word)) {
            Some(word) => Err(format!("`{word}` is not a state; the states are {}", state::WORDS.join(", "))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_read_from_json() {
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
            // It stays the same in messages.
            assert_eq!(serde_json::from_str::<Select>(&serde_json::to_string(&select).unwrap()).unwrap(), select);
            let bytes = rmp_serde::to_vec_named(&select).unwrap();
            assert_eq!(rmp_serde::from_slice::<Select>(&bytes).unwrap(), select);
        }
    }

    #[test]
    fn anything_but_a_map_of_conditions_is_rejected() {
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
    fn an_unknown_state_is_named() {
        let select = Select { states: Some(vec!["runing".into()]), ..Select::default() };
        assert!(select.check().unwrap_err().contains("`runing`"));
    }
}
