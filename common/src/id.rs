//! Identifiers of processes, incarnations, requests and dead letters.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The id of a process: a UUIDv7, so that ids sort by their creation time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pid(Uuid);

/// The id of an incarnation, which is one start of a worker. The worker's name is only a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(Uuid);

/// The id of a request to several processes. The request is recorded once per id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(Uuid);

/// The id of a dead letter: a UUIDv7, or a UUIDv8 from the digest of a letter that was published without an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LetterId(Uuid);

/// The text is not a valid id.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not a {what} id (a UUID such as 01940000-0000-7000-8000-000000000000)")]
pub struct ParseError {
    text: String,
    what: &'static str,
}

impl Pid {
    /// A new id, later than every earlier id of this host.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// The creation time, in microseconds since 1970 by the creator's clock; `None` if it is not a UUIDv7.
    pub fn made_at(self) -> Option<i64> {
        if self.0.get_version_num() != 7 {
            return None;
        }
        let (seconds, nanos) = self.0.get_timestamp()?.to_unix();
        i64::try_from(seconds).ok()?.checked_mul(1_000_000)?.checked_add(i64::from(nanos / 1_000))
    }
}

impl Incarnation {
    /// A new id for a start of a worker.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// Eight hexadecimal digits of the random end. They distinguish the incarnations of one name.
    pub fn short(self) -> String {
        let text = self.0.simple().to_string();
        text[text.len() - 8..].to_owned()
    }
}

impl RequestId {
    /// A new id.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id for a message from outside: its message id if that is a UUID, or else a digest of the message id.
    pub fn of_message(message_id: &str) -> Self {
        Self(message_id.parse().unwrap_or_else(|_| digested(&blake3::hash(message_id.as_bytes()))))
    }
}

impl LetterId {
    /// A new id for a message that is dead-lettered now.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id for a letter without one. Equal letters have equal ids.
    pub fn of_digest(digest: &blake3::Hash) -> Self {
        Self(digested(digest))
    }
}

/// A UUIDv8 from the first bytes of a digest.
fn digested(digest: &blake3::Hash) -> Uuid {
    let (head, _) = digest.as_bytes().split_first_chunk().expect("a digest has 32 bytes");
    uuid::Builder::from_custom_bytes(*head).into_uuid()
}

impl FromStr for Pid {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.parse().map(Self).map_err(|_| ParseError { text: text.to_owned(), what: "process" })
    }
}

impl FromStr for LetterId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.parse().map(Self).map_err(|_| ParseError { text: text.to_owned(), what: "dead letter's" })
    }
}

macro_rules! wrapped_uuid {
    ($name:ident) => {
        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

wrapped_uuid!(Pid);
wrapped_uuid!(Incarnation);
wrapped_uuid!(RequestId);
wrapped_uuid!(LetterId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_sort_by_their_creation_time() {
        let pids: Vec<Pid> = (0..1000).map(|_| Pid::generate()).collect();
        assert!(pids.is_sorted());
    }

    #[test]
    fn a_message_has_the_same_request_id_each_time() {
        let id = RequestId::of_message("maintenance of tuesday");
        assert_eq!(id, RequestId::of_message("maintenance of tuesday"));
        assert_ne!(id, RequestId::of_message("maintenance of wednesday"));
        let own = RequestId::generate();
        assert_eq!(RequestId::of_message(&own.to_string()), own);
    }

    #[test]
    fn an_invalid_id_is_rejected_with_its_text() {
        let error = "42".parse::<Pid>().unwrap_err();
        assert!(error.to_string().contains("`42`"), "{error}");
    }
}
