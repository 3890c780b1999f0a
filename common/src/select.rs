//! Which processes a request or a list is about.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::duration;
use crate::id::Pid;
use crate::state;

/// A selection: a process is in it if it meets every condition that is given; an empty selection is all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Select {
    /// It is one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pids: Vec<Pid>,
    /// It bears every one of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// It belongs to this session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Its state is one of these, by their words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<String>,
    /// Its task queue, with its class: `default`, `default.high`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// What it runs: `program`, or the name of a process written in Rust.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The name of the worker that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// It was accepted at least so long ago.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "duration::optional_text")]
    pub older_than: Option<Duration>,
}

impl Select {
    /// The selection of one process.
    pub fn one(pid: Pid) -> Self {
        Select { pids: vec![pid], ..Select::default() }
    }

    /// Whether it has no condition, and so means every process.
    pub fn is_all(&self) -> bool {
        *self == Select::default()
    }

    /// Whether every condition can be met at all.
    ///
    /// # Errors
    /// The word that is no state.
    pub fn check(&self) -> Result<(), String> {
        match self.states.iter().find(|word| !state::WORDS.contains(&word.as_str())) {
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
    fn what_is_no_state_is_named() {
        let select = Select { states: vec!["runing".into()], ..Select::default() };
        assert!(select.check().unwrap_err().contains("`runing`"));
    }
}
