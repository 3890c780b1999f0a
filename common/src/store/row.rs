//! The ground of the store's rows: how ids, codes and states are decoded, and the types that several operations share.

use std::collections::BTreeMap;

use sea_orm::{ColIdx, DbErr, FromQueryResult, QueryResult, TryGetError, TryGetable};
use uuid::Uuid;

use super::error::Error;
use super::lease::Stream;
use crate::id::{Incarnation, Pid, RequestId};
use crate::state::{Desired, Place, State};

/// A position in a list. Lists are sorted by id, newest first, or by acceptance if the selection has an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Cursor {
    /// The process.
    #[sea_orm(from_alias = "id")]
    pub pid: Pid,
    /// The time of its acceptance, in microseconds since 1970 by the database's clock.
    pub created_at: i64,
}

/// A queued row whose message must be published.
#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Announced {
    /// The process.
    #[sea_orm(from_alias = "id")]
    pub pid: Pid,
    /// The time of the announcement, by the database's clock.
    #[sea_orm(from_alias = "told_at")]
    pub announced_at: i64,
    /// The W3C trace context of its launch.
    pub traceparent: Option<String>,
}

/// Announced rows by task queue.
pub type ByQueue = BTreeMap<String, Vec<Announced>>;

/// An announced row and its task queue.
#[derive(FromQueryResult)]
pub(super) struct Queued {
    pub(super) queue: String,
    #[sea_orm(nested)]
    pub(super) announced: Announced,
}

/// Decodes rows.
pub(super) fn read<T: FromQueryResult>(rows: &[QueryResult]) -> Result<Vec<T>, Error> {
    Ok(rows.iter().map(|row| T::from_query_result(row, "")).collect::<Result<_, _>>()?)
}

/// Groups announced rows by task queue.
pub(super) fn by_queue(rows: Vec<Queued>) -> ByQueue {
    let mut by_queue = ByQueue::new();
    for Queued { queue, announced } in rows {
        by_queue.entry(queue).or_default().push(announced);
    }
    by_queue
}

macro_rules! decode_ids {
    ($($id:ty)*) => {
        $(impl TryGetable for $id {
            fn try_get_by<I: ColIdx>(row: &QueryResult, column: I) -> Result<Self, TryGetError> {
                Uuid::try_get_by(row, column).map(Self::from)
            }
        })*
    };
}

macro_rules! decode_codes {
    ($($of:ty)*) => {
        $(impl TryGetable for $of {
            fn try_get_by<I: ColIdx>(row: &QueryResult, column: I) -> Result<Self, TryGetError> {
                let code = i16::try_get_by(row, column)?;
                Self::from_code(code).ok_or_else(|| unreadable(format!("code {code} in column {column:?}")))
            }
        })*
    };
}

decode_ids!(Pid Incarnation RequestId);
decode_codes!(Place Desired Stream);

/// Decodes the columns `state` and `before`.
impl FromQueryResult for State {
    fn from_query_result(row: &QueryResult, prefix: &str) -> Result<Self, DbErr> {
        Ok(Self::from_query_result_nullable(row, prefix)?)
    }

    fn from_query_result_nullable(row: &QueryResult, prefix: &str) -> Result<Self, TryGetError> {
        let (state, before) = (i16::try_get(row, prefix, "state")?, i16::try_get(row, prefix, "before")?);
        State::from_codes(state, Some(before)).ok_or_else(|| unreadable(format!("state {state} before {before}")))
    }
}

/// The error for a value that no version writes; it becomes [`Error::Unreadable`].
pub(super) fn unreadable(value: String) -> TryGetError {
    TryGetError::DbErr(DbErr::Type(value))
}
