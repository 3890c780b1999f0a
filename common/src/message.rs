//! The messages that travel over the broker: a versioned envelope, in MessagePack with named fields or in JSON.
//!
//! A reader ignores unknown fields, and every field but `version` and `type` may be absent, so older and newer programs
//! read each other's messages. A message that cannot be used is an [`Error`] that gives the reason to a person.

mod control;
mod event;
mod reply;
mod task;
mod wire;

use serde::{Deserialize, Serialize};

use crate::message_pack;

pub use control::Control;
pub use event::{Event, Events};
pub use reply::{Effect, OutputChunk, Reply, Status, Traffic};
pub use task::Task;

/// Version of the envelope that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// Largest body that is published or read.
///
/// Messages carry ids. Only a launch from outside carries a spec, and a spec has at most 1 MiB. RabbitMQ 4 rejects
/// bodies above 16 MiB by default, and a rejected publish closes its channel with every unconfirmed message on it.
pub const SIZE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// The encoding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// MessagePack with named fields. Baton writes it.
    MessagePack,
    /// JSON. People and scripts write it.
    Json,
}

impl Encoding {
    /// The encoding that a `content_type` property names; MessagePack if it is absent or unknown.
    pub fn of_content_type(content_type: Option<&str>) -> Self {
        match content_type {
            Some(text) if text.to_ascii_lowercase().contains("json") => Encoding::Json,
            Some(_) | None => Encoding::MessagePack,
        }
    }

    /// The `content_type` property.
    pub fn content_type(self) -> &'static str {
        match self {
            Encoding::MessagePack => "application/msgpack",
            Encoding::Json => "application/json",
        }
    }
}

/// Why a message cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The body does not match its content type, or a field has the wrong type.
    #[error("malformed {encoding}: {reason}")]
    Malformed {
        /// The encoding that was assumed.
        encoding: &'static str,
        /// The reader's error.
        reason: String,
    },
    /// A newer Baton wrote the message.
    #[error("version {0} is newer than this program reads ({VERSION})")]
    Newer(u32),
    /// There is no message of this type.
    #[error("unknown type `{0}`")]
    UnknownType(String),
    /// A required field is absent.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// Two fields exclude each other.
    #[error("`{0}` and `{1}` exclude each other")]
    Both(&'static str, &'static str),
    /// The selection names an unknown state.
    #[error("`select`: {0}")]
    Select(String),
    /// The body is larger than any valid message.
    #[error("{0} bytes exceed the limit of {SIZE_BYTES_MAX}")]
    TooLarge(usize),
}

fn encode<T: Serialize>(value: &T, encoding: Encoding) -> Vec<u8> {
    match encoding {
        Encoding::MessagePack => rmp_serde::to_vec_named(value).expect("messages have only string keys and plain data"),
        Encoding::Json => serde_json::to_vec(value).expect("messages have only string keys and plain data"),
    }
}

fn decode<'a, T: Deserialize<'a>>(body: &'a [u8], encoding: Encoding) -> Result<T, Error> {
    if body.len() > SIZE_BYTES_MAX {
        return Err(Error::TooLarge(body.len()));
    }
    match encoding {
        Encoding::MessagePack => message_pack::read(body)
            .map_err(|error| Error::Malformed { encoding: "MessagePack", reason: error.to_string() }),
        Encoding::Json => serde_json::from_slice(body)
            .map_err(|error| Error::Malformed { encoding: "JSON", reason: error.to_string() }),
    }
}

/// Both encodings, for tests.
#[cfg(test)]
const ENCODINGS: [Encoding; 2] = [Encoding::MessagePack, Encoding::Json];
