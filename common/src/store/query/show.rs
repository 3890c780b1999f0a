//! The details of one process.

use sea_orm::{ColumnTrait, EntityTrait, FromQueryResult, QueryFilter, QueryOrder};
use serde::Serialize;
use uuid::Uuid;

use super::list::{Filter, Summary};
use crate::id::Pid;
use crate::spec::Spec;
use crate::store::blob::{self, Checkpoint};
use crate::store::entity::{attempt, event};
use crate::store::error::Error;
use crate::store::handle::Store;
use crate::store::job::Job;
use crate::store::lease::{Output, Stream};

/// The details of one process.
#[derive(Clone, Debug)]
pub struct Details {
    /// The summary, as in lists.
    pub summary: Summary,
    /// The spec, if this program can read it.
    pub spec: Option<Spec>,
    /// The requester.
    pub created_by: String,
    /// The checkpoint, if there is one that this program can read.
    pub checkpoint: Option<Checkpoint>,
    /// Which of the two is unreadable, and why.
    pub unreadable: Option<String>,
    /// Its attempts, oldest first.
    pub attempts: Vec<AttemptRow>,
    /// Requests to it, oldest first.
    pub events: Vec<EventRow>,
    /// Its jobs at sites, latest last.
    pub jobs: Vec<Job>,
}

/// One attempt of a process.
#[derive(Clone, Debug, Serialize)]
pub struct AttemptRow {
    /// The epoch of its lease.
    pub epoch: i64,
    /// The number of the try.
    #[serde(rename = "try")]
    pub try_number: i64,
    /// The worker's name, or its incarnation if the name is unknown.
    pub worker: String,
    /// The time of its claim.
    pub started_at: i64,
    /// The time of its end.
    pub ended_at: i64,
    /// `ok`, `error`, `lost`, `drained`, `paused` or `killed`.
    pub how: String,
    /// The reason, in words.
    pub reason: Option<String>,
}

/// One request of an operator.
#[derive(Clone, Debug, Serialize)]
pub struct EventRow {
    /// The time when it was recorded.
    pub at: i64,
    /// `pause`, `play` or `kill`.
    pub what: String,
    /// The requester's name, as given: user and host.
    pub by: String,
    /// The login that the database or the broker verified.
    pub login: String,
    /// The reason.
    pub reason: Option<String>,
    /// The request to many processes that it belongs to.
    pub request: Option<Uuid>,
    /// `applied`, `superseded` by a later request, or `ended` if the process ended first; absent while the holder has
    /// yet to obey.
    pub outcome: Option<String>,
    /// The time of the outcome.
    pub settled_at: Option<i64>,
}

impl Store {
    /// Returns the details of a process; `None` if there is no such process.
    ///
    /// # Errors
    /// The database does not answer, or a row cannot be read.
    pub async fn show(&self, pid: Pid) -> Result<Option<Details>, Error> {
        let Some(summary) = self.list(&Filter::of(vec![pid])).await?.into_iter().next() else { return Ok(None) };
        let id = Uuid::from(pid);
        let sql = "SELECT s.body, s.created_by, p.checkpoint FROM process p JOIN spec s ON s.id = p.id WHERE p.id = $1";
        let row: BlobsRow = self.first(sql, vec![id.into()]).await?.ok_or(Error::NoRow)?;
        let attempts = attempt::Entity::find().filter(attempt::Column::Pid.eq(id));
        let attempts = attempts.order_by_asc(attempt::Column::Epoch).all(&self.db).await?;
        let events = event::Entity::find().filter(event::Column::Pid.eq(id)).order_by_asc(event::Column::At);
        let events = events.order_by_asc(event::Column::Id).all(&self.db).await?;
        let spec = blob::spec_from_bytes(&row.body);
        let checkpoint = row.checkpoint.map(|bytes| Checkpoint::from_bytes(&bytes)).transpose();
        let unreadable = [("spec", spec.as_ref().err()), ("checkpoint", checkpoint.as_ref().err())];
        let unreadable = unreadable.into_iter().find_map(|(what, why)| Some(format!("its {what}: {}", why?)));
        Ok(Some(Details {
            summary,
            spec: spec.ok(),
            unreadable,
            created_by: row.created_by,
            checkpoint: checkpoint.ok().flatten(),
            attempts: attempts.into_iter().map(AttemptRow::from).collect(),
            events: events.into_iter().map(EventRow::from).collect(),
            jobs: self.jobs_of(pid).await?,
        }))
    }

    /// Returns the stored output of the last attempt that has any, with its epoch.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn output(&self, pid: Pid) -> Result<Option<(i64, Vec<Output>)>, Error> {
        let sql = "SELECT epoch, stream, head, tail, total_bytes FROM output
                   WHERE pid = $1 AND epoch = (SELECT MAX(epoch) FROM output WHERE pid = $1) ORDER BY stream";
        let rows: Vec<OutputRow> = self.all(sql, vec![Uuid::from(pid).into()]).await?;
        let Some(epoch) = rows.first().map(|row| row.epoch) else { return Ok(None) };
        let output = |row: OutputRow| Output {
            stream: row.stream,
            head: row.head,
            tail: row.tail,
            total_bytes: row.total_bytes.cast_unsigned(),
        };
        let outputs = rows.into_iter().map(output).collect();
        Ok(Some((epoch, outputs)))
    }
}

/// The encoded columns of a process, and its requester.
#[derive(FromQueryResult)]
struct BlobsRow {
    body: Vec<u8>,
    created_by: String,
    checkpoint: Option<Vec<u8>>,
}

#[derive(FromQueryResult)]
struct OutputRow {
    epoch: i64,
    stream: Stream,
    head: Vec<u8>,
    tail: Vec<u8>,
    total_bytes: i64,
}

impl From<attempt::Model> for AttemptRow {
    fn from(row: attempt::Model) -> Self {
        AttemptRow {
            epoch: row.epoch,
            try_number: row.try_number,
            worker: row.worker_name.unwrap_or_else(|| row.worker.to_string()),
            started_at: row.started_at,
            ended_at: row.ended_at,
            how: row.how,
            reason: row.reason,
        }
    }
}

impl From<event::Model> for EventRow {
    fn from(row: event::Model) -> Self {
        EventRow {
            at: row.at,
            what: row.what,
            by: row.by_whom,
            login: row.login,
            reason: row.reason,
            request: row.request,
            outcome: row.outcome,
            settled_at: row.settled_at,
        }
    }
}
