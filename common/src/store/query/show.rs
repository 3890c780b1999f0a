//! Everything about one process.

use sea_orm::{QueryResult, Value};
use serde::Serialize;
use uuid::Uuid;

use super::list::{Filter, Summary};
use crate::id::Pid;
use crate::spec::Spec;
use crate::store::blob::{self, Checkpoint};
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
        let id = || vec![Value::from(Uuid::from(pid))];
        let sql = "SELECT s.body, s.created_by, p.checkpoint FROM process p JOIN spec s ON s.id = p.id WHERE p.id = $1";
        let row = self.query(sql, id()).await?.into_iter().next().ok_or(Error::NoRow)?;
        let checkpoint: Option<Vec<u8>> = row.try_get("", "checkpoint")?;
        let attempts = "SELECT epoch, try, started_at, ended_at, how, reason, worker, worker_name FROM attempt
                        WHERE pid = $1 ORDER BY epoch";
        let events = "SELECT at, what, by_whom, login, reason, request, outcome, settled_at FROM event
                      WHERE pid = $1 ORDER BY at, id";
        let spec = blob::spec_from_bytes(&row.try_get::<Vec<u8>>("", "body")?);
        let checkpoint = checkpoint.map(|bytes| Checkpoint::from_bytes(&bytes)).transpose();
        let unreadable = [("spec", spec.as_ref().err()), ("checkpoint", checkpoint.as_ref().err())];
        let unreadable = unreadable.into_iter().find_map(|(what, why)| Some(format!("its {what}: {}", why?)));
        Ok(Some(Details {
            summary,
            spec: spec.ok(),
            unreadable,
            created_by: row.try_get("", "created_by")?,
            checkpoint: checkpoint.ok().flatten(),
            attempts: self.query(attempts, id()).await?.iter().map(attempt).collect::<Result<_, _>>()?,
            events: self.query(events, id()).await?.iter().map(event).collect::<Result<_, _>>()?,
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
        let rows = self.query(sql, vec![Uuid::from(pid).into()]).await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let epoch = first.try_get("", "epoch")?;
        let outputs = rows
            .iter()
            .map(|row| {
                let stream = match row.try_get::<i16>("", "stream")? {
                    1 => Stream::Stdout,
                    2 => Stream::Stderr,
                    other => return Err(Error::Unreadable(format!("no stream {other}"))),
                };
                Ok(Output {
                    stream,
                    head: row.try_get("", "head")?,
                    tail: row.try_get("", "tail")?,
                    total_bytes: row.try_get::<i64>("", "total_bytes")?.cast_unsigned(),
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Some((epoch, outputs)))
    }
}

fn attempt(row: &QueryResult) -> Result<AttemptRow, Error> {
    let worker: Uuid = row.try_get("", "worker")?;
    let name: Option<String> = row.try_get("", "worker_name")?;
    Ok(AttemptRow {
        epoch: row.try_get("", "epoch")?,
        try_number: row.try_get("", "try")?,
        worker: name.unwrap_or_else(|| worker.to_string()),
        started_at: row.try_get("", "started_at")?,
        ended_at: row.try_get("", "ended_at")?,
        how: row.try_get("", "how")?,
        reason: row.try_get("", "reason")?,
    })
}

fn event(row: &QueryResult) -> Result<EventRow, Error> {
    Ok(EventRow {
        at: row.try_get("", "at")?,
        what: row.try_get("", "what")?,
        by: row.try_get("", "by_whom")?,
        login: row.try_get("", "login")?,
        reason: row.try_get("", "reason")?,
        request: row.try_get("", "request")?,
        outcome: row.try_get("", "outcome")?,
        settled_at: row.try_get("", "settled_at")?,
    })
}
