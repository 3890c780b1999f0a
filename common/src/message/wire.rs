//! The fields of every task and control message.

use serde::{Deserialize, Serialize, Serializer};

use super::{Encoding, Error, VERSION, decode};
use crate::by_name::{self, by_name_only};
use crate::id::Pid;
use crate::select::Select;
use crate::unique_keys::UniqueValue;

/// The fields of every envelope: one flat map, so that a person can type it into the form of the management UI. The
/// fields that say which processes a request selects are never `null`: a sender that has lost its target must not reach
/// more of them.
#[derive(Default, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub(super) struct Wire {
    pub(super) version: u32,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub(super) pid: Option<Pid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) spec: Option<UniqueValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) wait: Option<bool>,
    #[serde(rename = "told_at", default, skip_serializing_if = "Option::is_none")]
    pub(super) announced_at: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub(super) select: Option<Select>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pub(super) fleet: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stdout_offset: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stderr_offset: Option<u64>,
}

by_name_only!(Wire, "a map with `version` and `type`");

impl Serialize for Wire {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Wire::serialize(self, serializer)
    }
}

impl Wire {
    pub(super) fn new(kind: &str) -> Self {
        Wire { version: VERSION, kind: kind.to_owned(), ..Wire::default() }
    }

    pub(super) fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        // The version is read alone first, since a newer envelope may have other fields.
        let Version { version } = decode(body, encoding)?;
        if version > VERSION {
            return Err(Error::Newer(version));
        }
        decode(body, encoding)
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}
