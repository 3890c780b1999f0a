//! Workers as people see them.

use std::time::Duration;

use sea_orm::{ColumnTrait, EntityTrait, FromQueryResult, QueryFilter, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::communicator::control_queue;
use crate::id::Incarnation;
use crate::lack::Lacks;
use crate::store::entity::worker;
use crate::store::error::Error;
use crate::store::handle::Store;
use crate::store::worker::LEASE;

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

impl Store {
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
        Ok(self.all::<RawWorker>(&sql, values).await?.into_iter().map(WorkerRow::from).collect())
    }

    /// The name of the control queue of a live incarnation.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn control_queue_of(&self, owner: Incarnation) -> Result<Option<String>, Error> {
        let row = worker::Entity::find_by_id(Uuid::from(owner)).filter(worker::Column::GoneAt.is_null());
        let row = row.one(&self.db).await?;
        Ok(row.map(|row| control_queue(&row.name, owner)))
    }
}

/// A row of [`Store::workers`].
#[derive(FromQueryResult)]
struct RawWorker {
    id: Incarnation,
    name: String,
    host: String,
    os_pid: i64,
    version: String,
    queues: String,
    slots: i64,
    held: i64,
    blocked: Option<String>,
    lacks: Option<String>,
    lacks_text: Option<String>,
    drain: bool,
    beat: i64,
    beat_at: i64,
    started_at: i64,
    gone_at: Option<i64>,
    now: i64,
}

impl From<RawWorker> for WorkerRow {
    fn from(row: RawWorker) -> Self {
        let text = row.lacks_text.unwrap_or_default();
        WorkerRow {
            id: row.id,
            control_queue: control_queue(&row.name, row.id),
            name: row.name,
            host: row.host,
            os_pid: row.os_pid,
            version: row.version,
            queues: row.queues,
            slots: row.slots,
            held: row.held,
            blocked: row.blocked,
            lacks: row.lacks.map(|what| Lacks { what, text }),
            drain: row.drain,
            beat: row.beat,
            beat_at: row.beat_at,
            started_at: row.started_at,
            gone_at: row.gone_at,
            now: row.now,
        }
    }
}
