//! What rows have in common: the place in lists, the message that a row is announced by, and codes of places and states.

use std::collections::BTreeMap;

use sea_orm::QueryResult;
use uuid::Uuid;

use super::error::Error;
use crate::id::Pid;
use crate::state::{Desired, Place, State};

/// A place in a list: lists are in the order of ids, the newest first, or in that of acceptance where a selection asks for
/// an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The process.
    pub pid: Pid,
    /// When it was accepted, in microseconds since 1970 by the database's clock.
    pub created_at: i64,
}

/// A row that a message should now stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The process.
    pub pid: Pid,
    /// When its row was told, in database time.
    pub announced_at: i64,
    /// W3C trace context of its launch.
    pub traceparent: Option<String>,
}

/// Rows by the task queue that their messages go to.
pub type ByQueue = BTreeMap<String, Vec<Announced>>;

pub(super) fn told(row: &QueryResult) -> Result<(String, Announced), Error> {
    let told = Announced {
        pid: row.try_get::<Uuid>("", "id")?.into(),
        announced_at: row.try_get("", "told_at")?,
        traceparent: row.try_get("", "traceparent")?,
    };
    Ok((row.try_get("", "queue")?, told))
}

pub(super) fn place(row: &QueryResult) -> Result<Place, Error> {
    Place::from_code(row.try_get("", "place")?).ok_or_else(|| Error::Unreadable("no such place".into()))
}

pub(super) fn state(row: &QueryResult) -> Result<State, Error> {
    State::from_codes(row.try_get("", "state")?, Some(row.try_get("", "before")?))
        .ok_or_else(|| Error::Unreadable("no such state".into()))
}

pub(super) fn desired(row: &QueryResult) -> Result<Desired, Error> {
    Desired::from_code(row.try_get("", "desired")?).ok_or_else(|| Error::Unreadable("no such desire".into()))
}
