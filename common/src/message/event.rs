//! Events: changes of state, as they are announced to listeners.

use serde::{Deserialize, Serialize};

use super::{Encoding, encode};
use crate::id::Pid;

/// A change of a process's state, for listeners on `baton.event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The process.
    pub pid: Pid,
    /// The word of its new state.
    pub state: String,
    /// Time of the change, in microseconds since 1970 by the sender's clock.
    pub at: i64,
    /// The name of the sending worker or program.
    pub by: String,
    /// The exit code, if the process has ended with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
}

/// Several events of one state, as they are published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Events {
    /// See [`VERSION`](super::VERSION).
    pub version: u32,
    /// The events in the order in which they happened on the sender.
    pub events: Vec<Event>,
}

impl Events {
    /// Encodes the message body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        encode(self, encoding)
    }
}
