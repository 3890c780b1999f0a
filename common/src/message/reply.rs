//! Replies to launches and control messages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Encoding, Error, decode, encode};
use crate::id::{Incarnation, Pid};
use crate::state::{Desired, State};

/// A reply to a launch or to a control message. The request determines which fields are present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<Pid>,
    /// To a launch: whether its row is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<bool>,
    /// The word of the process's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// The process's exit code, if it has ended with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    /// The values of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Value>,
    /// To a request: its effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Effect>,
    /// To a broadcast: the number of the worker's processes by the word of the effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<BTreeMap<String, u64>>,
    /// To a broadcast: the name of the replying worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// To a broadcast: the incarnation of the replying worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// To `status`: what the process is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// To `output`: the output of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputChunk>,
    /// To `ping`: the traffic of the worker's connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// The reason why the message was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Reply {
    /// A reply that refuses the message for this reason.
    pub fn refusal(error: impl Into<String>) -> Self {
        Reply { error: Some(error.into()), ..Reply::default() }
    }

    /// Encodes the message body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        encode(self, encoding)
    }

    /// Decodes a message body.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the body is not a reply.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        decode(body, encoding)
    }
}

/// The traffic of a program's connections to the broker since the program started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Tasks published and confirmed.
    #[serde(rename = "told")]
    pub published: u64,
    /// Size of their bodies in bytes.
    #[serde(rename = "told_bytes")]
    pub published_bytes: u64,
    /// Tasks delivered.
    pub delivered: u64,
    /// Frames that acknowledged deliveries; a frame can acknowledge several.
    pub ack_frames: u64,
    /// Messages with events; a message can carry several.
    pub event_messages: u64,
    /// Replies to launches and control messages.
    pub replies: u64,
}

/// The effect of a request on a process. On the wire it is its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// The process is paused now.
    Paused,
    /// Its holder pauses it before its next advance.
    Pausing,
    /// It was already paused.
    AlreadyPaused,
    /// It resumes.
    Playing,
    /// It was not paused.
    AlreadyRunning,
    /// This kill or an earlier one has ended it.
    Killed,
    /// Its holder is ending its program.
    Killing,
    /// It had already finished.
    Finished,
    /// It had already excepted.
    Excepted,
    /// A later request supersedes this one.
    Superseded,
    /// There is no such process.
    Absent,
    /// The worker does not hold it.
    NotHeld,
    /// It has not started its program.
    NotStarted,
    /// The reply to a ping.
    Alive,
    /// The worker gives back its processes and stops.
    Draining,
    /// The request is recorded in the rows of the selected processes.
    Recorded,
    /// A newer Baton wrote this effect.
    Unknown,
}

impl Effect {
    const ALL: [Effect; 16] = [
        Effect::Paused,
        Effect::Pausing,
        Effect::AlreadyPaused,
        Effect::Playing,
        Effect::AlreadyRunning,
        Effect::Killed,
        Effect::Killing,
        Effect::Finished,
        Effect::Excepted,
        Effect::Superseded,
        Effect::Absent,
        Effect::NotHeld,
        Effect::NotStarted,
        Effect::Alive,
        Effect::Draining,
        Effect::Recorded,
    ];

    /// The word on the wire and in tables.
    pub fn word(self) -> &'static str {
        match self {
            Effect::Paused => "paused",
            Effect::Pausing => "pausing",
            Effect::AlreadyPaused => "already_paused",
            Effect::Playing => "playing",
            Effect::AlreadyRunning => "already_running",
            Effect::Killed => "killed",
            Effect::Killing => "killing",
            Effect::Finished => "finished",
            Effect::Excepted => "excepted",
            Effect::Superseded => "superseded",
            Effect::Absent => "absent",
            Effect::NotHeld => "not_held",
            Effect::NotStarted => "not_started",
            Effect::Alive => "alive",
            Effect::Draining => "draining",
            Effect::Recorded => "recorded",
            Effect::Unknown => "unknown",
        }
    }

    /// The effect of a request that the holder has yet to obey.
    pub fn pending(verb: Desired) -> Self {
        match verb {
            Desired::Run => Effect::Playing,
            Desired::Pause => Effect::Pausing,
            Desired::Kill => Effect::Killing,
        }
    }

    /// The effect of a request that was obeyed.
    pub fn applied(verb: Desired) -> Self {
        match verb {
            Desired::Run => Effect::Playing,
            Desired::Pause => Effect::Paused,
            Desired::Kill => Effect::Killed,
        }
    }

    /// The effect of a request for a process that has ended in this state.
    pub fn ended(state: State) -> Self {
        match state {
            State::Finished => Effect::Finished,
            State::Excepted => Effect::Excepted,
            State::Killed => Effect::Killed,
            State::Created | State::Running | State::Waiting | State::Paused(_) => Effect::Unknown,
        }
    }
}

impl Serialize for Effect {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

impl<'de> Deserialize<'de> for Effect {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        Ok(Effect::ALL.into_iter().find(|effect| effect.word() == word).unwrap_or(Effect::Unknown))
    }
}

/// What a held process is doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its stage: `advancing`, `submit`, `monitor`…
    pub stage: String,
    /// Milliseconds since it entered the stage.
    pub stage_ms: u64,
    /// Number of committed advances.
    pub advances: u64,
    /// The name of its worker.
    pub worker: String,
    /// The epoch of its lease.
    pub epoch: i64,
    /// Its last line of output or log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_line: Option<String>,
    /// The operating system's pid of its program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<u32>,
    /// Memory of its program and the descendants of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// How long its advance has blocked a thread, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked_ms: Option<u64>,
}

/// A part of a running program's output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OutputChunk {
    /// Standard output from the requested offset.
    #[serde(with = "serde_bytes")]
    pub stdout: Vec<u8>,
    /// Standard error from the requested offset.
    #[serde(with = "serde_bytes")]
    pub stderr: Vec<u8>,
    /// The epoch in which it was written. The offsets of each epoch start at 0.
    pub epoch: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_round_trip_and_unknown_words_are_read_as_unknown() {
        for effect in Effect::ALL {
            let text = serde_json::to_string(&effect).unwrap();
            assert_eq!(serde_json::from_str::<Effect>(&text).unwrap(), effect);
        }
        assert_eq!(serde_json::from_str::<Effect>("\"teleported\"").unwrap(), Effect::Unknown);
    }
}
