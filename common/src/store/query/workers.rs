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

/// A worker.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerRow {
    /// Its incarnation.
    pub id: Incarnation,
    /// The name.
    pub name: String,
    /// The host.
    pub host: String,
    /// Its process id there.
    pub os_pid: i64,
    /// The version of its program.
    pub version: String,
    /// The queues that it serves.
    pub queues: String,
    /// The number of processes that it may hold.
    pub slots: i64,
    /// The number of processes that it holds.
    pub held: i64,
    /// Processes that block their thread.
    pub blocked: Option<String>,
    /// The shortage of its machine, according to its last beat.
    pub lacks: Option<Lacks>,
    /// Whether it was asked to give back what it holds and to stop.
    pub drain: bool,
    /// The counter of its lease.
    pub beat: i64,
    /// The time of the last beat, for people. Liveness depends on the counter alone.
    pub beat_at: i64,
    /// The time of its start.
    pub started_at: i64,
    /// The time when it stopped or was declared gone.
    pub gone_at: Option<i64>,
    /// The name of its control queue.
    pub control_queue: String,
    /// The time of the query, by the database's clock.
    #[serde(skip)]
    pub now: i64,
}

/// The state of a worker, from its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// It beats.
    Live,
    /// It beats, claims nothing more, and gives back what it holds.
    Draining,
    /// It has missed a beat and is not declared gone yet.
    Silent,
    /// It has stopped, or was declared gone.
    Gone,
}

/// A beat older than this was missed; beats come every second.
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
    /// The time since its last beat.
    pub fn silence(&self) -> Duration {
        Duration::from_micros((self.now - self.beat_at).max(0).cast_unsigned())
    }

    /// The state.
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

    /// Whether it is expected to claim processes: it is not draining, its machine has no shortage that stops it, and it
    /// has beaten within its lease. If the only worker dies, no other worker marks its row as gone.
    pub fn takes_work(&self) -> bool {
        self.gone_at.is_none() && !self.drain && !self.is_short() && self.silence() < LEASE
    }

    /// Whether its machine has a shortage that stops it from claiming.
    pub fn is_short(&self) -> bool {
        self.lacks.as_ref().is_some_and(Lacks::stops_taking)
    }

    /// Whether it serves a task queue, whose name may include a class.
    pub fn serves(&self, task_queue: &str) -> bool {
        let name = queue_name(task_queue);
        self.queues.split(',').any(|queue| queue == name)
    }
}

/// The queue of a task queue: `default` for `default.high`.
pub fn queue_name(task_queue: &str) -> &str {
    task_queue.split('.').next().unwrap_or(task_queue)
}

impl Store {
    /// Lists workers, live ones first, and gone ones only on request. `names` are names or incarnations; an empty list
    /// selects all.
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

    /// Returns the name of the control queue of a live incarnation.
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
