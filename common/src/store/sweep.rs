//! Sweeps, which keep every process moving after losses: dead holders, due timers, lost messages, overdue processes.
//!
//! Any worker may run any sweep at any time; sweeps exclude each other row by row.

use sea_orm::{ConnectionTrait, FromQueryResult};
use uuid::Uuid;

use super::blob::Outcome;
use super::connection::begin;
use super::control::{Answer, Controlled};
use super::dialect::{Batch, Kind};
use super::error::Error;
use super::handle::Store;
use super::request::{Request, killed_because, settle};
use super::row::{ByQueue, Queued, by_queue, read};
use crate::id::{Incarnation, Pid};
use crate::state::{Desired, Place, State};

/// Rows that one sweep changes in one transaction.
pub const PAGE_ROWS: u32 = 1_000;

/// The number of consecutive deaths of holders, without a checkpoint, after which a process is excepted.
pub const DEATHS_MAX: i64 = 5;

/// The result of freeing the processes of dead workers.
#[derive(Debug, Default)]
pub struct Freed {
    /// Queued again: publish these.
    pub queued: ByQueue,
    /// Parked, since a pause was desired.
    pub paused: Vec<Pid>,
    /// Ended, with reply addresses: excepted after too many deaths of holders, or killed on request.
    pub ended: Vec<(Pid, State, Option<Vec<u8>>)>,
}

impl Freed {
    /// The number of freed processes.
    pub fn count(&self) -> usize {
        self.queued.values().map(Vec::len).sum::<usize>() + self.paused.len() + self.ended.len()
    }
}

/// A row of [`ORPHANS`].
#[derive(FromQueryResult)]
struct Orphan {
    #[sea_orm(from_alias = "id")]
    pid: Pid,
    epoch: i64,
    owner: Incarnation,
    #[sea_orm(from_alias = "try")]
    try_number: i64,
    claimed_at: i64,
    desired: Desired,
}

/// A row of [`FREE`].
#[derive(FromQueryResult)]
struct FreedRow {
    #[sea_orm(nested)]
    queued: Queued,
    place: Place,
    #[sea_orm(nested)]
    state: State,
    control: i64,
    reply_to: Option<Vec<u8>>,
}

impl Store {
    /// Frees a page of processes whose holder is gone, and writes a `lost` attempt for each.
    ///
    /// # Errors
    /// Nothing is freed; the next sweep tries again.
    pub async fn free(&self) -> Result<Freed, Error> {
        let transaction = begin(&self.db).await?;
        let rows = transaction.query_all_raw(self.dialect.statement(ORPHANS, vec![])).await?;
        if rows.is_empty() {
            return Ok(Freed::default());
        }
        let mut orphans = Batch::new(&[
            ("b_id", Kind::Uuid),
            ("b_epoch", Kind::BigInt),
            ("b_worker", Kind::Uuid),
            ("b_try", Kind::BigInt),
            ("b_started_at", Kind::BigInt),
        ]);
        let mut frees = Batch::new(&[("b_id", Kind::Uuid), ("b_outcome", Kind::Bytes)]);
        let excepted =
            Outcome::because(format!("its worker died {DEATHS_MAX} times in a row without a checkpoint in between"));
        for row in read::<Orphan>(&rows)? {
            // A local program has ended with its worker, so a kill can be obeyed here. A job at a site has not ended; a
            // worker ends it first.
            let outcome = if row.desired == Desired::Kill {
                let why = killed_because(&transaction, self.dialect, row.pid).await?;
                Outcome::because(why.unwrap_or_else(|| "killed".into()))
            } else {
                excepted.clone()
            };
            let id = Uuid::from(row.pid);
            frees.push([id.into(), outcome.to_bytes().into()]);
            orphans.push([
                id.into(),
                row.epoch.into(),
                Uuid::from(row.owner).into(),
                row.try_number.into(),
                row.claimed_at.into(),
            ]);
        }
        transaction.execute_raw(self.dialect.batch(INSERT_LOST, vec![], orphans)).await?;
        let rows = transaction.query_all_raw(self.dialect.batch(FREE, vec![DEATHS_MAX.into()], frees)).await?;
        let rows: Vec<FreedRow> = read(&rows)?;
        let obeyed = rows.iter().filter(|row| row.control > 0).map(|row| (row.queued.announced.pid, row.state));
        let obeyed = obeyed.collect::<Vec<_>>();
        settle(&transaction, self.dialect, &obeyed).await?;
        transaction.commit().await?;
        let mut freed = Freed::default();
        for FreedRow { queued: Queued { queue, announced }, place, state, reply_to, .. } in rows {
            match place {
                Place::Queued => freed.queued.entry(queue).or_default().push(announced),
                Place::Ended => freed.ended.push((announced.pid, state, reply_to)),
                Place::Parked | Place::Held => freed.paused.push(announced.pid),
            }
        }
        Ok(freed)
    }

    /// Wakes a page of processes that are due.
    ///
    /// # Errors
    /// No process is woken; the next sweep tries again.
    pub async fn wake_due(&self) -> Result<ByQueue, Error> {
        Ok(by_queue(self.all(WAKE_DUE, vec![]).await?))
    }

    /// Returns the time until the next parked process is due, in microseconds by the database's clock; zero or less if
    /// one is due.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn next_wake_us(&self) -> Result<Option<i64>, Error> {
        let sql = "SELECT MIN(wake_at) - {now} AS due FROM process
                   WHERE place = {parked} AND state = {waiting} AND wake_at IS NOT NULL";
        self.value(sql, vec![]).await
    }

    /// Applies the head rule: announces a page of this queue's rows that were last announced before `before`. Their
    /// messages are lost; publish new ones.
    ///
    /// # Errors
    /// No row is changed; the next sweep tries again.
    pub async fn announce_lost(&self, queue: &str, before: i64) -> Result<ByQueue, Error> {
        Ok(by_queue(self.all(ANNOUNCE_LOST, vec![queue.to_owned().into(), before.into()]).await?))
    }

    /// Returns the oldest processes that have been in a task queue for at least a second, at most `limit`.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn queued_in(&self, queue: &str, limit: usize) -> Result<Vec<Pid>, Error> {
        let sql = format!(
            "SELECT id FROM process WHERE place = {{queued}} AND queue = $1 AND told_at < {{now}} - 1000000
             ORDER BY told_at LIMIT {limit}"
        );
        self.column(&sql, vec![queue.to_owned().into()]).await
    }

    /// Kills processes that have exceeded their `timeout`.
    ///
    /// # Errors
    /// The database does not answer; the next sweep tries again.
    pub async fn end_overdue(&self) -> Result<Vec<Controlled>, Error> {
        let mut ended = Vec::new();
        for (sql, reason) in [
            (QUEUE_OVERDUE, "`timeout.queue` expired before a worker claimed it"),
            (TOTAL_OVERDUE, "`timeout.total` expired"),
        ] {
            for pid in self.column(sql, vec![]).await? {
                let request = Request { reason: Some(reason.into()), ..Request::new(Desired::Kill, "baton") };
                match self.control(pid, &request).await? {
                    Answer::Recorded(controlled) => ended.push(controlled),
                    Answer::Ended(_) | Answer::Dying | Answer::Absent => {}
                }
            }
        }
        Ok(ended)
    }
}

const ORPHANS: &str = "
    SELECT p.id, p.epoch, p.owner, p.try, p.claimed_at, p.desired
    FROM process p JOIN worker w ON w.id = p.owner
    WHERE p.place = {held} AND w.gone_at IS NOT NULL
    ORDER BY p.id LIMIT 1000 {of_p_skip_locked}";

const INSERT_LOST: &str = "
    WITH {rows}
    INSERT INTO attempt (pid, epoch, worker, worker_name, try, started_at, ended_at, how, reason)
    SELECT b_id, b_epoch, b_worker, (SELECT name FROM worker WHERE id = b_worker), b_try, b_started_at, {clock}, 'lost',
           'its worker died'
    FROM b WHERE true
    ON CONFLICT (pid, epoch) DO NOTHING";

const FREE: &str = "
    WITH {rows}
    UPDATE process
    SET owner = NULL, deaths = deaths + 1, before = {running}, told_at = {now}, changed_at = {clock}, wake_at = NULL,
        place = CASE WHEN deaths + 1 >= $1 OR (desired = {kill} AND NOT outside) THEN {ended}
                     WHEN desired = {pause} THEN {parked}
                     ELSE {queued} END,
        state = CASE WHEN desired = {kill} AND (NOT outside OR deaths + 1 >= $1) THEN {killed}
                     WHEN deaths + 1 >= $1 THEN {excepted}
                     WHEN desired = {pause} THEN {paused}
                     ELSE {running} END,
        ended_at = CASE WHEN deaths + 1 >= $1 OR (desired = {kill} AND NOT outside) THEN {clock} ELSE NULL END,
        outcome = CASE WHEN deaths + 1 >= $1 OR (desired = {kill} AND NOT outside) THEN b_outcome ELSE NULL END
    FROM b
    WHERE id = b_id AND place = {held}
    RETURNING id, place, state, before, control, queue, told_at,
              (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent,
              (SELECT s.reply_to FROM spec s WHERE s.id = process.id) AS reply_to";

const WAKE_DUE: &str = "
    UPDATE process
    SET woken = true, place = {queued}, state = {running}, wake_at = NULL, told_at = {now}, changed_at = {now}
    WHERE id IN (SELECT id FROM process
                 WHERE place = {parked} AND state = {waiting} AND wake_at IS NOT NULL AND wake_at <= {now}
                 ORDER BY wake_at LIMIT 1000 {skip_locked})
    RETURNING id, queue, told_at, (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent";

const ANNOUNCE_LOST: &str = "
    UPDATE process
    SET told_at = {now}
    WHERE id IN (SELECT id FROM process
                 WHERE place = {queued} AND queue = $1 AND told_at < $2
                 ORDER BY told_at LIMIT 1000 {skip_locked})
    RETURNING id, queue, told_at, (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent";

const QUEUE_OVERDUE: &str = "
    SELECT id FROM process
    WHERE place = {queued} AND place <> {ended} AND queue_deadline IS NOT NULL AND queue_deadline <= {now}
      AND desired <> {kill}
    ORDER BY queue_deadline LIMIT 1000";

const TOTAL_OVERDUE: &str = "
    SELECT id FROM process
    WHERE place <> {ended} AND total_deadline IS NOT NULL AND total_deadline <= {now} AND desired <> {kill}
    ORDER BY total_deadline LIMIT 1000";
