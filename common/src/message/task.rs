//! Tasks: the messages of the task queues.

use serde_json::Value;

use super::wire::Wire;
use super::{Encoding, Error, encode};
use crate::id::Pid;
use crate::unique_keys::{DuplicateKey, UniqueValue};

/// A message of a task queue.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// A process that no worker has claimed yet.
    Launch {
        /// The process.
        pid: Pid,
        /// Its spec, if the sender has not inserted the row itself. A spec with a duplicate key is an error,
        /// which is reported to the sender like any other error of a spec.
        spec: Option<Result<Value, DuplicateKey>>,
        /// Whether the sender asks for a second reply when the process has ended.
        wait: bool,
        /// When the row was announced, in database time (microseconds since 1970); absent in messages from outside.
        announced_at: Option<i64>,
    },
    /// A process that can resume.
    Continue {
        /// The process.
        pid: Pid,
        /// As in [`Task::Launch`].
        announced_at: Option<i64>,
    },
}

impl Task {
    /// The process.
    pub fn pid(&self) -> Pid {
        match self {
            Task::Launch { pid, .. } | Task::Continue { pid, .. } => *pid,
        }
    }

    /// When the row was announced, if the sender was Baton.
    pub fn announced_at(&self) -> Option<i64> {
        match self {
            Task::Launch { announced_at, .. } | Task::Continue { announced_at, .. } => *announced_at,
        }
    }

    /// The `type` property and field.
    pub fn word(&self) -> &'static str {
        match self {
            Task::Launch { .. } => "launch",
            Task::Continue { .. } => "continue",
        }
    }

    /// Encodes the message body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        let wire = match self.clone() {
            Task::Launch { pid, spec, wait, announced_at } => Wire {
                pid: Some(pid),
                spec: spec.map(UniqueValue),
                wait: wait.then_some(true),
                announced_at,
                ..Wire::new("launch")
            },
            Task::Continue { pid, announced_at } => Wire { pid: Some(pid), announced_at, ..Wire::new("continue") },
        };
        encode(&wire, encoding)
    }

    /// Decodes a message body.
    ///
    /// # Errors
    /// The reason why the message is unusable; it is to be dead-lettered.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        let wire = Wire::decode(body, encoding)?;
        match wire.kind.as_str() {
            "launch" => Ok(Task::Launch {
                pid: wire.pid.ok_or(Error::Missing("pid"))?,
                spec: wire.spec.map(|spec| spec.0),
                wait: wire.wait.unwrap_or(false),
                announced_at: wire.announced_at,
            }),
            "continue" => {
                Ok(Task::Continue { pid: wire.pid.ok_or(Error::Missing("pid"))?, announced_at: wire.announced_at })
            }
            _ => Err(Error::UnknownType(wire.kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ENCODINGS;
    use super::*;

    #[test]
    fn tasks_round_trip_in_both_encodings() {
        let pid = Pid::generate();
        let tasks = [
            Task::Launch { pid, spec: Some(Ok(serde_json::json!({"run": ["true"]}))), wait: true, announced_at: None },
            Task::Launch { pid, spec: None, wait: false, announced_at: Some(7) },
            Task::Continue { pid, announced_at: Some(1_700_000_000_000_000) },
        ];
        for encoding in ENCODINGS {
            for task in &tasks {
                assert_eq!(Task::decode(&task.encode(encoding), encoding).unwrap(), *task);
            }
        }
    }

    #[test]
    fn an_unusable_message_gives_the_reason() {
        let cases: [(&str, &str); 8] = [
            ("", "malformed JSON"),
            ("[]", "malformed JSON"),
            (r#"{"type": "launch"}"#, "missing field `version`"),
            (r#"{"version": 2, "type": "launch"}"#, "version 2 is newer"),
            (r#"{"version": 1, "type": "dance"}"#, "unknown type `dance`"),
            (r#"{"version": 1, "type": "launch"}"#, "`pid` is missing"),
            (r#"{"version": 1, "type": "launch", "pid": "x"}"#, "malformed JSON"),
            (r#"{"version": 1, "type": "continue", "pid": 7}"#, "malformed JSON"),
        ];
        for (body, reason) in cases {
            let error = Task::decode(body.as_bytes(), Encoding::Json).unwrap_err().to_string();
            assert!(error.contains(reason), "{body}: {error}");
        }
    }

    #[test]
    fn a_duplicate_key_in_a_spec_is_an_error_of_the_spec_and_not_of_the_message() {
        let pid = Pid::generate();
        let launch =
            |spec: &str| format!(r#"{{"version": 1, "type": "launch", "pid": "{pid}", "spec": {spec}, "wait": true}}"#);
        let task = Task::decode(launch(r#"{"run": ["true"], "run": ["false"]}"#).as_bytes(), Encoding::Json).unwrap();
        let spec = Some(Err(DuplicateKey("run".into())));
        assert_eq!(task, Task::Launch { pid, spec, wait: true, announced_at: None });
        let task = Task::decode(launch("null").as_bytes(), Encoding::Json).unwrap();
        assert_eq!(task, Task::Launch { pid, spec: None, wait: true, announced_at: None });
        // Outside of the spec it is an error of the message.
        let body = launch(r#"null, "wait": false"#);
        assert!(Task::decode(body.as_bytes(), Encoding::Json).unwrap_err().to_string().contains("duplicate field"));
    }

    #[test]
    fn deep_nesting_and_false_lengths_are_errors_and_not_crashes() {
        let deep = "[".repeat(100_000);
        assert!(Task::decode(deep.as_bytes(), Encoding::Json).is_err());
        assert!(Task::decode(&[0x91; 100_000], Encoding::MessagePack).is_err());
        let pid = rmp_serde::to_vec(&Pid::generate()).unwrap();
        let launch =
            |spec: &[u8]| [b"\x84\xa7version\x01\xa4type\xa6launch\xa3pid", &pid[..], b"\xa4spec", spec].concat();
        assert!(Task::decode(&launch(&[&[0x91; 100][..], &[0xc0]].concat()), Encoding::MessagePack).is_ok());
        assert!(Task::decode(&launch(&[&[0x91; 1_000][..], &[0xc0]].concat()), Encoding::MessagePack).is_err());
        // A map that claims four billion entries.
        assert!(Task::decode(&[0xdf, 0xff, 0xff, 0xff, 0xff], Encoding::MessagePack).is_err());
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let pid = Pid::generate();
        let body = format!(r#"{{"version": 1, "type": "continue", "pid": "{pid}", "colour": "red"}}"#);
        assert!(Task::decode(body.as_bytes(), Encoding::Json).is_ok());
    }
}
