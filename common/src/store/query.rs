//! What people ask of the database. Nothing here changes a row.

use std::collections::BTreeMap;
use std::time::Duration;

use sea_orm::{ConnectionTrait, QueryResult, Value};
use serde::Serialize;
use uuid::Uuid;

use super::blob::{self, Checkpoint, Outcome};
use super::dialect::Dialect;
use super::select::{Order, Walk};
use super::site::Job;
use super::worker::LEASE;
use super::writer::{How, Output, Stream};
use super::{Error, Store};
use crate::communicator::control_queue;
use crate::id::{Incarnation, Pid};
use crate::lack::Lacks;
use crate::select::Select;
use crate::spec::Spec;
use crate::state::{self, Desired, Place, State};

/// Which processes a list is about.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The selection.
    pub select: Select,
    /// Those that come after this one in the list's order.
    pub after: Option<Cursor>,
    /// At most so many, the newest first.
    pub limit: u32,
}

/// A place in a list: lists are in the order of ids, the newest first, or in that of acceptance where a selection asks for
/// an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The process.
    pub pid: Pid,
    /// When it was accepted, in microseconds since 1970 by the database's clock.
    pub created_at: i64,
}

/// A list that is read page by page. A process that is there all the time is in exactly one page.
pub struct Listing {
    walk: Walk,
}

/// Counts for people go no further: this number means that there are at least so many.
pub const COUNT_MAX: i64 = 10_000;

impl Filter {
    /// These processes, each once, in no order that matters.
    pub fn of(pids: Vec<Pid>) -> Self {
        let limit = u32::try_from(pids.len()).unwrap_or(u32::MAX);
        Filter { select: Select::of(pids), after: None, limit }
    }
}

/// A process in a list.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its id.
    pub pid: Pid,
    /// Its name.
    pub name: String,
    /// What it runs: `program`, or the name of a process written in Rust.
    pub kind: String,
    /// Where it is.
    pub place: Place,
    /// Its state.
    pub state: State,
    /// What the operators want of it.
    pub desired: Desired,
    /// Its task queue.
    pub queue: String,
    /// The name of the worker that holds it.
    pub worker: Option<String>,
    /// The holder's incarnation.
    pub owner: Option<Incarnation>,
    /// How often it has been claimed.
    pub epoch: i64,
    /// The number of its try, from 1.
    pub try_number: i64,
    /// Committed advances.
    pub advances: i64,
    /// When it was accepted; this and all times here are microseconds since 1970 by the database's clock.
    pub created_at: i64,
    /// When its place or state last changed.
    pub changed_at: i64,
    /// When it ended.
    pub ended_at: Option<i64>,
    /// When it wakes by itself.
    pub wake_at: Option<i64>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// Why its last try failed, if it has been tried again.
    pub last_error: Option<String>,
    /// Whether what it waits for is its next try.
    pub waits_for_retry: bool,
    /// Why the last worker that took it could not go on with it although another build may, and since when that has been
    /// so.
    pub refusal: Option<Refusal>,
    /// Whether it has, or may have, a job at a site.
    pub has_outside: bool,
    /// What it waits for at a site: `slot/SITE`, `room/SITE` or `sent/SITE/DIGEST`.
    pub waits_for: Option<String>,
    /// Who has paused it, if it is paused and somebody has: one that was accepted on hold has nobody.
    pub paused: Option<Paused>,
    /// The time of the query.
    pub now: i64,
}

/// No worker that has taken a process could go on with it; one of another build may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Since when.
    pub since: i64,
    /// What the last one said.
    pub reason: String,
}

/// Who has paused a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paused {
    /// Who asked, as they say themselves: user and host.
    pub by: String,
    /// When it was applied.
    pub at: i64,
    /// Why.
    pub reason: Option<String>,
}

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

/// One worker.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerRow {
    /// Its incarnation.
    pub id: Incarnation,
    /// Its label.
    pub name: String,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub os_pid: i64,
    /// Its program's version.
    pub version: String,
    /// The queues that it serves.
    pub queues: String,
    /// How many processes it may hold.
    pub slots: i64,
    /// How many it holds.
    pub held: i64,
    /// Processes that block their thread.
    pub blocked: Option<String>,
    /// What its machine lacks, as it said with its last beat.
    pub lacks: Option<Lacks>,
    /// Whether somebody wants it to give back what it holds and to stop.
    pub drain: bool,
    /// The number that grows while it lives.
    pub beat: i64,
    /// When that number last grew. People read it; who is dead is decided by the number alone.
    pub beat_at: i64,
    /// When it started.
    pub started_at: i64,
    /// When it stopped or was declared gone.
    pub gone_at: Option<i64>,
    /// The name of its control queue.
    pub control_queue: String,
    /// The time of the query.
    #[serde(skip)]
    pub now: i64,
}

/// What a worker's row says of it, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// It beats.
    Live,
    /// It beats, takes nothing more, and gives back what it holds.
    Draining,
    /// It has missed a beat, and nobody has declared it gone yet.
    Silent,
    /// It has stopped, or was declared gone.
    Gone,
}

/// A beat that is older than this was missed; they come every second.
const SILENT_AFTER: Duration = Duration::from_millis(1_500);

impl WorkerState {
    /// The word for tables.
    pub fn word(self) -> &'static str {
        match self {
            WorkerState::Live => "live",
            WorkerState::Draining => "draining",
            WorkerState::Silent => "silent",
            WorkerState::Gone => "gone",
        }
    }
}

impl WorkerRow {
    /// How long ago it beat.
    pub fn silence(&self) -> Duration {
        Duration::from_micros((self.now - self.beat_at).max(0).cast_unsigned())
    }

    /// How it is.
    pub fn state(&self) -> WorkerState {
        if self.gone_at.is_some() {
            WorkerState::Gone
        } else if self.silence() > SILENT_AFTER {
            WorkerState::Silent
        } else if self.drain {
            WorkerState::Draining
        } else {
            WorkerState::Live
        }
    }

    /// Whether it is expected to take work: nobody drains it, its machine lacks nothing that it needs, and it has beaten
    /// within its lease. A worker that died alone has a row that nobody marks.
    pub fn takes_work(&self) -> bool {
        self.gone_at.is_none() && !self.drain && !self.is_short() && self.silence() < LEASE
    }

    /// Whether its machine lacks something without which it takes no work.
    pub fn is_short(&self) -> bool {
        self.lacks.as_ref().is_some_and(Lacks::stops_taking)
    }

    /// Whether it serves a task queue, whose name may have a class.
    pub fn serves(&self, task_queue: &str) -> bool {
        let name = queue_name(task_queue);
        self.queues.split(',').any(|queue| queue == name)
    }
}

/// The queue that a task queue's name stands for: `default` for `default.high`.
pub fn queue_name(task_queue: &str) -> &str {
    task_queue.split('.').next().unwrap_or(task_queue)
}

impl Listing {
    /// The processes of a selection that come after a place in it, or all.
    pub fn new(select: &Select, after: Option<Cursor>) -> Self {
        Self { walk: Walk::new(select, Order::NewestFirst, after) }
    }

    /// The next page of at most `limit` processes; empty at the end, and only there.
    ///
    /// # Errors
    /// The database does not answer, or a row cannot be read.
    pub async fn next(&mut self, store: &Store, limit: u32) -> Result<Vec<Summary>, Error> {
        let template =
            format!("WITH {{page}} {SUMMARY} JOIN page ON page.id = p.id ORDER BY page.created_at DESC, p.id DESC");
        while let Some(statement) = self.walk.next(store.dialect, &template, limit) {
            let rows = store.db.query_all_raw(statement).await?;
            let rows = rows.iter().map(summary).collect::<Result<Vec<_>, _>>()?;
            let last = rows.last().map(|row| Cursor { pid: row.pid, created_at: row.created_at });
            self.walk.walked(rows.len(), last, limit);
            if !rows.is_empty() {
                return Ok(rows);
            }
        }
        Ok(vec![])
    }
}

impl Store {
    /// Lists processes, newest first.
    ///
    /// # Errors
    /// The database does not answer, or a row cannot be read.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<Summary>, Error> {
        let mut listing = Listing::new(&filter.select, filter.after);
        let mut rows = Vec::new();
        loop {
            let n_missing = filter.limit - u32::try_from(rows.len()).unwrap_or(filter.limit);
            let page = if n_missing > 0 { listing.next(self, n_missing).await? } else { vec![] };
            if page.is_empty() {
                return Ok(rows);
            }
            rows.extend(page);
        }
    }

    /// Where a process is in lists; `None` when there is no such process.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn cursor(&self, pid: Pid) -> Result<Option<Cursor>, Error> {
        let rows = self.query("SELECT created_at FROM spec WHERE id = $1", vec![Uuid::from(pid).into()]).await?;
        rows.first().map(|row| Ok(Cursor { pid, created_at: row.try_get("", "created_at")? })).transpose()
    }

    /// How many processes there are by the word of their state, each counted up to [`COUNT_MAX`].
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn count_by_state(&self) -> Result<BTreeMap<String, i64>, Error> {
        let of = |word: &&str| {
            format!(
                "SELECT '{word}' AS word, COUNT(*) AS n
                 FROM (SELECT 1 FROM process WHERE state = {{{word}}} LIMIT {COUNT_MAX}) AS c"
            )
        };
        let sql = state::WORDS.iter().map(of).collect::<Vec<_>>().join(" UNION ALL ");
        let rows = self.query(&sql, vec![]).await?;
        let counts = rows.iter().map(|row| Ok((row.try_get("", "word")?, row.try_get("", "n")?)));
        counts.filter(|count| count.as_ref().map_or(true, |(_, n)| *n > 0)).collect()
    }

    /// The task queues of everything that has not ended.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn queues_in_use(&self) -> Result<Vec<String>, Error> {
        let rows = self.query("SELECT DISTINCT queue FROM process WHERE place <> {ended}", vec![]).await?;
        rows.iter().map(|row| Ok(row.try_get("", "queue")?)).collect()
    }

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

    /// Workers, live ones first; gone ones only if asked for. `names` are names or incarnations; none means all.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn workers(&self, names: &[String], with_gone: bool) -> Result<Vec<WorkerRow>, Error> {
        let mut values: Vec<Value> = Vec::new();
        let mut conditions = Vec::new();
        for name in names {
            values.push(name.clone().into());
            conditions.push(format!("w.name = ${}", values.len()));
            if let Ok(id) = name.parse::<Uuid>() {
                values.push(id.into());
                conditions.push(format!("w.id = ${}", values.len()));
            }
        }
        let named = if names.is_empty() { "true".to_owned() } else { format!("({})", conditions.join(" OR ")) };
        let which = if with_gone { "true" } else { "w.gone_at IS NULL" };
        let sql = format!(
            "SELECT w.id, w.name, w.host, w.os_pid, w.version, w.queues, w.slots, w.blocked, w.lacks, w.lacks_text, w.drain, w.beat, w.beat_at,
                    w.started_at, w.gone_at, {{now}} AS now,
                    (SELECT COUNT(*) FROM process p WHERE p.owner = w.id AND p.place = {{held}}) AS held
             FROM worker w WHERE {named} AND {which} ORDER BY w.gone_at IS NOT NULL, w.name, w.started_at"
        );
        self.query(&sql, values).await?.iter().map(worker).collect()
    }

    /// What an incarnation holds, the longest held first, at most `limit`.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn list_held(&self, owner: Incarnation, limit: u32) -> Result<Vec<Summary>, Error> {
        let sql =
            format!("{SUMMARY} WHERE p.owner = $1 AND p.place = {{held}} ORDER BY p.claimed_at, p.id LIMIT {limit}");
        self.query(&sql, vec![Uuid::from(owner).into()]).await?.iter().map(summary).collect()
    }

    /// The name of the control queue of a live incarnation.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn control_queue_of(&self, owner: Incarnation) -> Result<Option<String>, Error> {
        let sql = "SELECT name FROM worker WHERE id = $1 AND gone_at IS NULL";
        let rows = self.query(sql, vec![Uuid::from(owner).into()]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let name: String = row.try_get("", "name")?;
        Ok(Some(control_queue(&name, owner)))
    }

    /// Who asked for a process's end, and why; `None` when nobody did.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn killed_because(&self, pid: Pid) -> Result<Option<String>, Error> {
        killed_because(&self.db, self.dialect, pid).await
    }

    /// The newest unfinished process of `baton run` with this key.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn unfinished_run(&self, run_key: &[u8]) -> Result<Option<Pid>, Error> {
        let sql = "SELECT p.id FROM process p JOIN spec s ON s.id = p.id
                   WHERE s.run_key = $1 AND p.place <> {ended} ORDER BY p.id DESC LIMIT 1";
        let rows = self.query(sql, vec![run_key.to_vec().into()]).await?;
        rows.first().map(|row| Ok(row.try_get::<Uuid>("", "id")?.into())).transpose()
    }
}

/// [`Store::killed_because`], within a transaction: a program may have no second connection beside it.
pub(super) async fn killed_because(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    pid: Pid,
) -> Result<Option<String>, Error> {
    let sql = "SELECT by_whom, reason FROM event WHERE pid = $1 AND what = 'kill' ORDER BY at, id LIMIT 1";
    let rows = connection.query_all_raw(dialect.statement(sql, vec![Uuid::from(pid).into()])).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let reason: Option<String> = row.try_get("", "reason")?;
    Ok(Some(super::control::kill_reason(&row.try_get::<String>("", "by_whom")?, reason.as_deref())))
}

// An error is that of the last attempt that ended with one. The one of the last holding is what a retry waits for, since
// a holding that ends in an ordinary wait leaves no attempt. Each sub-select is one look into an index, and only for rows
// that can have what it looks for; who has paused a process is one value for the same reason.
const SUMMARY: &str = "
    SELECT p.id, s.name, s.kind, p.place, p.state, p.before, p.desired, p.queue, p.owner, w.name AS worker, p.epoch,
           p.try, p.seq, s.created_at, p.changed_at, p.ended_at, p.wake_at, p.outcome, p.refused_at,
           p.refusal, p.outside, p.waits_for, {now} AS now,
           CASE WHEN p.try > 1
                THEN (SELECT a.reason FROM attempt a WHERE a.pid = p.id AND a.how = 'error'
                      ORDER BY a.epoch DESC LIMIT 1) END AS last_error,
           CASE WHEN p.try > 1 AND p.state = {waiting}
                THEN (SELECT a.how FROM attempt a WHERE a.pid = p.id AND a.epoch = p.epoch) END AS last_how,
           CASE WHEN p.state = {paused}
                THEN (SELECT CAST({json_array}(e.by_whom, e.settled_at, e.reason) AS text) FROM event e
                      WHERE e.pid = p.id AND e.what = 'pause' AND e.outcome = 'applied'
                      ORDER BY e.at DESC, e.id DESC LIMIT 1) END AS paused
    FROM process p JOIN spec s ON s.id = p.id LEFT JOIN worker w ON w.id = p.owner";

fn summary(row: &QueryResult) -> Result<Summary, Error> {
    let outcome: Option<Vec<u8>> = row.try_get("", "outcome")?;
    Ok(Summary {
        pid: row.try_get::<Uuid>("", "id")?.into(),
        name: row.try_get("", "name")?,
        kind: row.try_get("", "kind")?,
        place: Place::from_code(row.try_get("", "place")?).ok_or_else(|| Error::Unreadable("no such place".into()))?,
        state: State::from_codes(row.try_get("", "state")?, Some(row.try_get("", "before")?))
            .ok_or_else(|| Error::Unreadable("no such state".into()))?,
        desired: Desired::from_code(row.try_get("", "desired")?)
            .ok_or_else(|| Error::Unreadable("no such desire".into()))?,
        queue: row.try_get("", "queue")?,
        worker: row.try_get("", "worker")?,
        owner: row.try_get::<Option<Uuid>>("", "owner")?.map(Incarnation::from),
        epoch: row.try_get("", "epoch")?,
        try_number: row.try_get("", "try")?,
        advances: row.try_get("", "seq")?,
        created_at: row.try_get("", "created_at")?,
        changed_at: row.try_get("", "changed_at")?,
        ended_at: row.try_get("", "ended_at")?,
        wake_at: row.try_get("", "wake_at")?,
        outcome: outcome.map(|bytes| outcome_of(&bytes)).transpose()?,
        last_error: row.try_get("", "last_error")?,
        waits_for_retry: row.try_get::<Option<String>>("", "last_how")?.is_some_and(|how| how == How::Error.word()),
        refusal: refusal(row)?,
        has_outside: row.try_get("", "outside")?,
        waits_for: row.try_get("", "waits_for")?,
        paused: paused(row)?,
        now: row.try_get("", "now")?,
    })
}

/// A list does not end at a row that a newer program has written.
fn outcome_of(bytes: &[u8]) -> Result<Outcome, Error> {
    match Outcome::from_bytes(bytes) {
        Err(error @ Error::Newer { .. }) => Ok(Outcome::because(format!("its outcome: {error}"))),
        outcome => outcome,
    }
}

fn refusal(row: &QueryResult) -> Result<Option<Refusal>, Error> {
    let (since, reason): (Option<i64>, Option<String>) = (row.try_get("", "refused_at")?, row.try_get("", "refusal")?);
    Ok(since.zip(reason).map(|(since, reason)| Refusal { since, reason }))
}

fn paused(row: &QueryResult) -> Result<Option<Paused>, Error> {
    let Some(text) = row.try_get::<Option<String>>("", "paused")? else { return Ok(None) };
    let (by, at, reason) = serde_json::from_str(&text).map_err(|error| Error::Unreadable(format!("event: {error}")))?;
    Ok(Some(Paused { by, at, reason }))
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

fn worker(row: &QueryResult) -> Result<WorkerRow, Error> {
    let id = Incarnation::from(row.try_get::<Uuid>("", "id")?);
    let name: String = row.try_get("", "name")?;
    let text = row.try_get::<Option<String>>("", "lacks_text")?.unwrap_or_default();
    Ok(WorkerRow {
        id,
        control_queue: control_queue(&name, id),
        name,
        host: row.try_get("", "host")?,
        os_pid: row.try_get("", "os_pid")?,
        version: row.try_get("", "version")?,
        queues: row.try_get("", "queues")?,
        slots: row.try_get("", "slots")?,
        held: row.try_get("", "held")?,
        blocked: row.try_get("", "blocked")?,
        lacks: row.try_get::<Option<String>>("", "lacks")?.map(|what| Lacks { what, text }),
        drain: row.try_get("", "drain")?,
        beat: row.try_get("", "beat")?,
        beat_at: row.try_get("", "beat_at")?,
        started_at: row.try_get("", "started_at")?,
        gone_at: row.try_get("", "gone_at")?,
        now: row.try_get("", "now")?,
    })
}
