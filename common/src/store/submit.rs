//! Accepting processes. A process that is committed here is never lost.

use std::collections::HashMap;
use std::sync::LazyLock;

use sea_orm::{ConnectionTrait, FromQueryResult, Value};
use uuid::Uuid;

use super::blob;
use super::connection::begin;
use super::dialect::{Batch, Dialect, Kind};
use super::error::Error;
use super::handle::Store;
use super::row::read;
pub use super::row::{Announced, ByQueue};
use crate::border;
use crate::id::Pid;
use crate::spec::Spec;
use crate::state::{Desired, Live, Place, State};

/// A process to accept.
#[derive(Clone, Debug)]
pub struct NewProcess {
    /// Its id, chosen by the sender, so that a repeated submission is accepted once.
    pub pid: Pid,
    /// The spec.
    pub spec: Spec,
    /// The requester: `user@host`, or the name that an AMQP client gives.
    pub created_by: String,
    /// The W3C trace context of the request.
    pub traceparent: Option<String>,
    /// The reply address for its end, as the communicator wrote it.
    pub reply_to: Option<Vec<u8>>,
    /// The key by which `baton run` finds an unfinished process.
    pub run_key: Option<Vec<u8>>,
}

/// The result of accepting a page of processes.
#[derive(Clone, Debug, Default)]
pub struct Accepted {
    /// Inserted and queued: publish these.
    pub queued: ByQueue,
    /// Inserted on hold: no message before `play`.
    pub held_back: Vec<Pid>,
}

impl Store {
    /// Inserts the processes in one commit. Processes whose id exists are left unchanged.
    ///
    /// # Errors
    /// Nothing is accepted, or (if the answer of the commit was lost) everything is: the same call again is safe.
    pub async fn submit(&self, processes: &[NewProcess]) -> Result<Accepted, Error> {
        border!("submit-begun");
        let inserted = match self.dialect {
            // One statement, which is its own transaction.
            Dialect::Postgres => insert(&self.db, self.dialect, processes).await?,
            Dialect::Sqlite => {
                let transaction = begin(&self.db).await?;
                let inserted = insert(&transaction, self.dialect, processes).await?;
                transaction.commit().await?;
                inserted
            }
        };
        border!("submit-committed");
        let mut accepted = Accepted::default();
        for process in processes {
            match inserted.get(&process.pid) {
                Some((Place::Queued, announced_at)) => {
                    let announced = Announced {
                        pid: process.pid,
                        announced_at: *announced_at,
                        traceparent: process.traceparent.clone(),
                    };
                    accepted.queued.entry(process.spec.task_queue()).or_default().push(announced);
                }
                Some((Place::Held | Place::Parked | Place::Ended, _)) => accepted.held_back.push(process.pid),
                None => {}
            }
        }
        Ok(accepted)
    }
}

/// A row that was inserted.
#[derive(FromQueryResult)]
struct Inserted {
    #[sea_orm(from_alias = "id")]
    pid: Pid,
    place: Place,
    #[sea_orm(from_alias = "told_at")]
    announced_at: i64,
}

/// Inserts the processes that do not exist, and returns their places and the times of their announcements.
pub(super) async fn insert(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    processes: &[NewProcess],
) -> Result<HashMap<Pid, (Place, i64)>, Error> {
    if processes.is_empty() {
        return Ok(HashMap::new());
    }
    let batch = batch_of(processes);
    let rows = match dialect {
        Dialect::Postgres => connection.query_all_raw(dialect.hot_batch(&INSERT_ALL, vec![], batch)).await?,
        Dialect::Sqlite => {
            let hot = format!("WITH {{rows}} {INSERT_HOT}");
            let rows = connection.query_all_raw(dialect.batch(&hot, vec![], batch.clone())).await?;
            let cold = format!("WITH {{rows}} {INSERT_COLD}");
            connection.execute_raw(dialect.batch(&cold, vec![], batch)).await?;
            rows
        }
    };
    let inserted: HashMap<Pid, (Place, i64)> =
        read(&rows)?.into_iter().map(|row: Inserted| (row.pid, (row.place, row.announced_at))).collect();
    if dialect == Dialect::Postgres {
        return Ok(inserted);
    }
    // A different spec under an existing pid must not leave its labels.
    let new = processes.iter().filter(|process| inserted.contains_key(&process.pid));
    insert_labels(connection, dialect, new).await?;
    Ok(inserted)
}

/// Inserts the labels of processes.
async fn insert_labels(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    processes: impl Iterator<Item = &NewProcess>,
) -> Result<(), Error> {
    let labels = processes.flat_map(|process| process.spec.labels.iter().map(|label| (process.pid, label)));
    for page in labels.collect::<Vec<_>>().chunks(LABELS_MAX) {
        let mut batch = Batch::new(LABEL);
        for (pid, (key, value)) in page {
            batch.push([key.as_str().into(), value.as_str().into(), Uuid::from(*pid).into()]);
        }
        connection.execute_raw(dialect.batch(INSERT_LABELS, vec![], batch)).await?;
    }
    Ok(())
}

fn batch_of(processes: &[NewProcess]) -> Batch {
    let mut batch = Batch::new(&[
        ("b_id", Kind::Uuid),
        ("b_place", Kind::SmallInt),
        ("b_state", Kind::SmallInt),
        ("b_desired", Kind::SmallInt),
        ("b_queue", Kind::Text),
        ("b_queue_us", Kind::BigInt),
        ("b_total_us", Kind::BigInt),
        ("b_name", Kind::Text),
        ("b_kind", Kind::Text),
        ("b_body", Kind::Bytes),
        ("b_digest", Kind::Bytes),
        ("b_labels", Kind::Text),
        ("b_session", Kind::Text),
        ("b_created_by", Kind::Text),
        ("b_traceparent", Kind::Text),
        ("b_reply_to", Kind::Bytes),
        ("b_run_key", Kind::Bytes),
    ]);
    for process in processes {
        let spec = &process.spec;
        let (place, state, desired) = if spec.hold {
            (Place::Parked, State::Paused(Live::Created), Desired::Pause)
        } else {
            (Place::Queued, State::Created, Desired::Run)
        };
        let micros = |limit: Option<std::time::Duration>| -> Value {
            i64::try_from(limit.unwrap_or_default().as_micros()).unwrap_or(i64::MAX).into()
        };
        let labels = serde_json::to_string(&spec.labels).expect("a map of strings is JSON");
        batch.push([
            Uuid::from(process.pid).into(),
            place.code().into(),
            state.code().into(),
            desired.code().into(),
            spec.task_queue().into(),
            micros(spec.timeout.queue),
            micros(spec.timeout.total),
            spec.effective_name().to_owned().into(),
            spec.kind().to_owned().into(),
            blob::spec_to_bytes(spec).into(),
            spec.digest().to_vec().into(),
            labels.into(),
            spec.session.clone().unwrap_or_default().into(),
            process.created_by.clone().into(),
            process.traceparent.clone().unwrap_or_default().into(),
            process.reply_to.clone().unwrap_or_default().into(),
            process.run_key.clone().unwrap_or_default().into(),
        ]);
    }
    batch
}

/// Labels in one statement: SQLite accepts 32,766 parameters, and a label takes three.
pub(super) const LABELS_MAX: usize = 10_000;

/// A row of `label`.
pub(super) const LABEL: &[(&str, Kind)] = &[("b_key", Kind::Text), ("b_value", Kind::Text), ("b_id", Kind::Uuid)];

const INSERT_LABELS: &str = "
    WITH {rows}
    INSERT INTO label (key, value, id) SELECT b_key, b_value, b_id FROM b WHERE true
    ON CONFLICT (key, value, id) DO NOTHING";

static INSERT_ALL: LazyLock<String> = LazyLock::new(|| {
    format!(
        "WITH {{rows}},
         p AS ({INSERT_HOT}),
         s AS ({INSERT_COLD}),
         l AS (INSERT INTO label (key, value, id)
               SELECT e.key, e.value, p.id FROM b JOIN p ON p.id = b_id, json_each_text(b_labels::json) e
               WHERE length(b_labels) > 2)
         SELECT id, place, told_at FROM p"
    )
});

// `WHERE true` keeps SQLite from reading ON CONFLICT as a join condition. Zero and the empty string stand for null,
// which a batch cannot carry.
const INSERT_HOT: &str = "
    INSERT INTO process (id, place, state, before, epoch, seq, desired, urgent, control, woken, queue, told_at, try,
                         deaths, queue_deadline, total_deadline, changed_at)
    SELECT b_id, b_place, b_state, {created}, 0, 0, b_desired, false, 0, false, b_queue, {now}, 1,
           0, {now} + NULLIF(b_queue_us, 0), {now} + NULLIF(b_total_us, 0), {now}
    FROM b WHERE true
    ON CONFLICT (id) DO NOTHING
    RETURNING id, place, told_at";

const INSERT_COLD: &str = "
    INSERT INTO spec (id, name, kind, body, digest, labels, session, created_by, created_at, traceparent, reply_to,
                      run_key, queue)
    SELECT b_id, b_name, b_kind, b_body, b_digest, b_labels, NULLIF(b_session, ''), b_created_by, {now},
           NULLIF(b_traceparent, ''), CASE WHEN length(b_reply_to) = 0 THEN NULL ELSE b_reply_to END,
           CASE WHEN length(b_run_key) = 0 THEN NULL ELSE b_run_key END, b_queue
    FROM b WHERE true
    ON CONFLICT (id) DO NOTHING";
