//! Everything about one process.

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

/// Everything about one process.
#[derive(Clone, Debug)]
pub struct Details {
    /// What a list shows.
    pub summary: Summary,
    /// What it runs, if this program can read it.
    pub spec: Option<Spec>,
    /// Who asked for it.
    pub created_by: String,
    /// Its progress, if there is any that this program can read.
    pub checkpoint: Option<Checkpoint>,
    /// What of these two it cannot read, and why.
    pub unreadable: Option<String>,
    /// Its attempts, oldest first.
    pub attempts: Vec<AttemptRow>,
    /// Requests about it, oldest first.
    pub events: Vec<EventRow>,
    /// Its jobs at sites, the latest last.
    pub jobs: Vec<Job>,
}

/// One attempt at a process.
#[derive(Clone, Debug, Serialize)]
pub struct AttemptRow {
    /// The number of the lease.
    pub epoch: i64,
    /// The number of the try.
    #[serde(rename = "try")]
    pub try_number: i64,
    /// The worker's name, or its incarnation where that row is gone.
    pub worker: String,
    /// Its first moment.
    pub started_at: i64,
    /// Its last moment.
    pub ended_at: i64,
    /// ok, error, lost, drained, paused or killed.
    pub how: String,
    /// Why, in words.
    pub reason: Option<String>,
}

/// One request of an operator.
#[derive(Clone, Debug, Serialize)]
pub struct EventRow {
    /// When it was recorded.
    pub at: i64,
    /// `pause`, `play` or `kill`.
    pub what: String,
    /// Who asked, as they say themselves: user and host.
    pub by: String,
    /// Whom the database or the broker knows it from.
    pub login: String,
    /// Why.
    pub reason: Option<String>,
    /// The request to many that it was part of.
    pub request: Option<Uuid>,
    /// `applied`, `superseded` by a later request, or `ended` when the process came to its end before; absent while its
    /// holder has yet to obey.
    pub outcome: Option<String>,
    /// When that was.
    pub settled_at: Option<i64>,
}

impl Store {
    /// Everything about one process; `None` when there is no such process.
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

    /// What is kept of a process's streams, of its last attempt that has written any; with that attempt's epoch.
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

/// What of a process is stored as MessagePack, and who asked for it.
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
