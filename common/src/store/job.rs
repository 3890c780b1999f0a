//! Jobs at sites. The row of a job is committed before anything is submitted, and stays open until the job is known to
//! be gone. Whatever happens to its process, an open row means that a job may have to be ended.

use sea_orm::{ConnectionTrait, FromQueryResult, Value};
use uuid::Uuid;

use super::connection::begin;
use super::dialect::{Batch, Kind};
use super::error::Error;
use super::handle::Store;
use super::lease::Fence;
use super::row::{ByQueue, Queued, by_queue, read};
use crate::config::SiteLimits;
use crate::id::Pid;
use crate::state::State;

/// A minute, for the submission rate.
const MINUTE_US: i64 = 60_000_000;

/// The outcome of recording an intent to submit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// The intent is recorded; submit.
    Recorded,
    /// The intent was recorded before; find out whether it has led to a job.
    Known,
    /// The site has as many jobs as its limits allow.
    Full,
    /// The submission rate is reached; the next submission is allowed in this many microseconds.
    TooSoon(i64),
    /// The lease is lost.
    Lost,
}

/// The status of a job that was not submitted and never will be.
pub const NEVER: &str = "NEVER";

/// The state of a job as seen at its site.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromQueryResult)]
pub struct Look {
    /// The launcher's word for its state; empty until the launcher has reported one.
    pub status: String,
    /// The launcher's reason for the state.
    pub reason: String,
    /// Its position among the waiting jobs, from 1.
    pub position: Option<i64>,
    /// Its expected start, in microseconds.
    pub starts_at: Option<i64>,
    /// The number of consecutive polls that did not find it.
    pub absent: i64,
}

/// A job, or an intent that may become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The process.
    pub pid: Pid,
    /// The number of the try.
    pub try_number: i64,
    /// The time of the intent, in microseconds.
    pub intent_at: i64,
    /// The launcher's id; `None` until it is known.
    pub external_id: Option<String>,
    /// Its last known state.
    pub look: Look,
    /// The time when it was found gone, in microseconds.
    pub ended_at: Option<i64>,
    /// Whether it must be ended: its process has ended or begun another try.
    pub is_doomed: bool,
}

impl Job {
    /// The job's name at the launcher.
    pub fn token(&self) -> String {
        token(self.pid, self.try_number)
    }
}

/// The name of a try's job at the launcher.
pub fn token(pid: Pid, try_number: i64) -> String {
    format!("baton-{pid}-{try_number}")
}

/// The result of polling a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The process.
    pub pid: Pid,
    /// The number of the try.
    pub try_number: i64,
    /// The launcher's id, if it was unknown.
    pub external_id: Option<String>,
    /// The state.
    pub look: Look,
    /// Whether the job is gone.
    pub is_ended: bool,
}

impl Seen {
    /// The result for a job that is gone.
    pub fn ended(job: &Job, status: &str) -> Self {
        Seen {
            pid: job.pid,
            try_number: job.try_number,
            external_id: None,
            look: Look { status: status.to_owned(), ..Look::default() },
            is_ended: true,
        }
    }
}

impl Store {
    /// Records the intent to submit the job of a try, if the limits of the site allow it: the row of the job, and that
    /// the process has something outside.
    ///
    /// # Errors
    /// Nothing is recorded, or (if the answer of the commit was lost) the intent is: the next call returns
    /// [`Intent::Known`].
    pub async fn intend(&self, fence: Fence, try_number: i64, site: &str, limits: SiteLimits) -> Result<Intent, Error> {
        let transaction = begin(&self.db).await?;
        // One intent at a time per site, so that the counts are exact.
        let sql = "SELECT {now} AS now FROM site WHERE name = $1 {for_update}";
        let row = transaction.query_one_raw(self.dialect.statement(sql, vec![site.into()])).await?;
        let now: i64 = row.ok_or(Error::NoRow)?.try_get_by_index(0)?;
        let sql = "UPDATE process SET outside = true WHERE id = $1 AND epoch = $2 AND place = {held} RETURNING id";
        let values = vec![Uuid::from(fence.pid).into(), fence.epoch.into()];
        if transaction.query_one_raw(self.dialect.statement(sql, values)).await?.is_none() {
            return Ok(Intent::Lost);
        }
        let name = token(fence.pid, try_number);
        let sql = "SELECT 1 AS one FROM job WHERE token = $1";
        if transaction.query_one_raw(self.dialect.statement(sql, vec![name.clone().into()])).await?.is_some() {
            return Ok(Intent::Known);
        }
        let sql = "SELECT COUNT(*) AS n FROM job WHERE site = $1 AND ended_at IS NULL";
        let row = transaction.query_one_raw(self.dialect.statement(sql, vec![site.into()])).await?;
        let n_open: i64 = row.ok_or(Error::NoRow)?.try_get_by_index(0)?;
        let most = limits.queued.into_iter().chain(limits.running).min();
        if most.is_some_and(|most| n_open >= i64::from(most)) {
            return Ok(Intent::Full);
        }
        if let Some(most) = limits.submit_per_min {
            let sql = format!(
                "SELECT intent_at FROM job WHERE site = $1 AND intent_at > $2
                 ORDER BY intent_at DESC LIMIT 1 OFFSET {}",
                most.saturating_sub(1)
            );
            let values = vec![site.into(), (now - MINUTE_US).into()];
            if let Some(row) = transaction.query_one_raw(self.dialect.statement(&sql, values)).await? {
                let oldest: i64 = row.try_get_by_index(0)?;
                return Ok(Intent::TooSoon((oldest + MINUTE_US - now).max(1)));
            }
        }
        let sql = "INSERT INTO job (token, pid, try, site, intent_at) VALUES ($1, $2, $3, $4, {clock})";
        let values = vec![name.into(), Uuid::from(fence.pid).into(), try_number.into(), site.into()];
        transaction.execute_raw(self.dialect.statement(sql, values)).await?;
        transaction.commit().await?;
        Ok(Intent::Recorded)
    }

    /// Withdraws the intent of a try if its holder knows that nothing was sent to the site. Has no effect without the
    /// lease; the new holder then finds out.
    ///
    /// # Errors
    /// The intent stays, or (if the answer of the commit was lost) is gone; the process can continue from both.
    pub async fn withdraw(&self, fence: Fence, try_number: i64) -> Result<(), Error> {
        let holder = [Uuid::from(fence.pid).into(), fence.epoch.into()];
        let transaction = begin(&self.db).await?;
        // The job first: every transaction locks jobs before processes.
        let sql = "DELETE FROM job WHERE token = $3 AND external_id IS NULL AND ended_at IS NULL
                   AND EXISTS (SELECT 1 FROM process WHERE id = $1 AND epoch = $2 AND place = {held})";
        let values = holder.iter().cloned().chain([token(fence.pid, try_number).into()]).collect();
        transaction.execute_raw(self.dialect.statement(sql, values)).await?;
        let sql = "UPDATE process SET outside = EXISTS (SELECT 1 FROM job WHERE pid = $1 AND ended_at IS NULL)
                   WHERE id = $1 AND epoch = $2 AND place = {held}";
        transaction.execute_raw(self.dialect.statement(sql, holder.to_vec())).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Records the launcher's id of a job. It is a fact, which needs no lease.
    ///
    /// # Errors
    /// The database does not answer; a query of the launcher by token finds the job again.
    pub async fn submitted(&self, pid: Pid, try_number: i64, external_id: &str) -> Result<(), Error> {
        let sql = "UPDATE job SET external_id = $2, submitted_at = {clock} WHERE token = $1 AND external_id IS NULL";
        self.execute(sql, vec![token(pid, try_number).into(), external_id.into()]).await?;
        Ok(())
    }

    /// Returns the job of a try.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn job(&self, pid: Pid, try_number: i64) -> Result<Option<Job>, Error> {
        let sql = format!("{JOB} WHERE j.token = $1");
        Ok(self.first::<JobRow>(&sql, vec![token(pid, try_number).into()]).await?.map(Job::from))
    }

    /// Returns every job of a process, latest last.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn jobs_of(&self, pid: Pid) -> Result<Vec<Job>, Error> {
        let sql = format!("{JOB} WHERE j.pid = $1 ORDER BY j.try");
        self.jobs(&sql, Uuid::from(pid).into()).await
    }

    /// Returns every open job of a site.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn open_jobs(&self, site: &str) -> Result<Vec<Job>, Error> {
        let sql = format!("{JOB} WHERE j.site = $1 AND j.ended_at IS NULL ORDER BY j.intent_at");
        self.jobs(&sql, site.into()).await
    }

    async fn jobs(&self, sql: &str, of: Value) -> Result<Vec<Job>, Error> {
        Ok(self.all::<JobRow>(sql, vec![of]).await?.into_iter().map(Job::from).collect())
    }

    /// Returns the tokens among these whose jobs are known to be gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn ended_jobs(&self, tokens: impl Iterator<Item = &str>) -> Result<Vec<String>, Error> {
        let mut batch = Batch::new(&[("b_token", Kind::Text)]);
        tokens.for_each(|token| batch.push([token.into()]));
        let rows = self.db.query_all_raw(self.dialect.batch(ENDED_JOBS, vec![], batch)).await?;
        Ok(rows.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?)
    }

    /// Records the results of a poll, and wakes the processes whose jobs are gone. Publish what it returns.
    ///
    /// # Errors
    /// Nothing is recorded.
    pub async fn record_seen(&self, seen: &[Seen]) -> Result<ByQueue, Error> {
        if seen.is_empty() {
            return Ok(ByQueue::new());
        }
        let mut jobs = Batch::new(&[
            ("b_token", Kind::Text),
            ("b_external_id", Kind::Text),
            ("b_status", Kind::Text),
            ("b_reason", Kind::Text),
            ("b_position", Kind::BigInt),
            ("b_starts_at", Kind::BigInt),
            ("b_absent", Kind::BigInt),
            ("b_ended", Kind::SmallInt),
        ]);
        for seen in seen {
            jobs.push([
                token(seen.pid, seen.try_number).into(),
                seen.external_id.clone().unwrap_or_default().into(),
                seen.look.status.clone().into(),
                seen.look.reason.clone().into(),
                seen.look.position.unwrap_or(0).into(),
                seen.look.starts_at.unwrap_or(0).into(),
                seen.look.absent.into(),
                i16::from(seen.is_ended).into(),
            ]);
        }
        let mut gone: Vec<&Seen> = seen.iter().filter(|seen| seen.is_ended).collect();
        gone.sort_by_key(|seen| (seen.pid, std::cmp::Reverse(seen.try_number)));
        gone.dedup_by_key(|seen| seen.pid);
        let mut ended = Batch::new(&[("b_id", Kind::Uuid), ("b_try", Kind::BigInt)]);
        for seen in &gone {
            ended.push([Uuid::from(seen.pid).into(), seen.try_number.into()]);
        }
        // All transactions lock rows in this order.
        let mut tokens = Batch::new(&[("b_token", Kind::Text)]);
        seen.iter().for_each(|seen| tokens.push([token(seen.pid, seen.try_number).into()]));
        let transaction = begin(&self.db).await?;
        transaction.query_all_raw(self.dialect.batch(LOCK_JOBS, vec![], tokens)).await?;
        transaction.execute_raw(self.dialect.batch(RECORD_SEEN, vec![], jobs)).await?;
        let mut woken = Vec::new();
        if !ended.is_empty() {
            let ids = Batch::ids(gone.iter().map(|seen| seen.pid.into()));
            transaction.query_all_raw(self.dialect.batch(LOCK_PROCESSES, vec![], ids)).await?;
            let rows = transaction.query_all_raw(self.dialect.batch(WAKE_ENDED, vec![], ended)).await?;
            woken = read(&rows)?;
        }
        transaction.commit().await?;
        let woken = woken.into_iter().filter(|row: &Woken| row.was_woken == 1 && row.state == State::Running);
        Ok(by_queue(woken.map(|row| row.queued).collect()))
    }

    /// Returns how many more jobs may be submitted now.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn room(&self, site: &str, limits: SiteLimits) -> Result<u32, Error> {
        let mut room = i64::from(u32::MAX);
        if let Some(most) = limits.queued.into_iter().chain(limits.running).min() {
            let sql = "SELECT COUNT(*) AS n FROM job WHERE site = $1 AND ended_at IS NULL";
            room = room.min(i64::from(most) - self.value::<i64>(sql, vec![site.into()]).await?);
        }
        if let Some(most) = limits.submit_per_min {
            let sql = "SELECT COUNT(*) AS n FROM job WHERE site = $1 AND intent_at > {now} - $2";
            room = room.min(i64::from(most) - self.value::<i64>(sql, vec![site.into(), MINUTE_US.into()]).await?);
        }
        Ok(u32::try_from(room.max(0)).unwrap_or(u32::MAX))
    }
}

/// A row of [`JOB`].
#[derive(FromQueryResult)]
struct JobRow {
    pid: Pid,
    #[sea_orm(from_alias = "try")]
    try_number: i64,
    intent_at: i64,
    external_id: Option<String>,
    #[sea_orm(nested)]
    look: Look,
    ended_at: Option<i64>,
    is_doomed: i64,
}

impl From<JobRow> for Job {
    fn from(row: JobRow) -> Self {
        let JobRow { pid, try_number, intent_at, external_id, look, ended_at, is_doomed } = row;
        Job { pid, try_number, intent_at, external_id, look, ended_at, is_doomed: is_doomed == 1 }
    }
}

/// A row of [`WAKE_ENDED`].
#[derive(FromQueryResult)]
struct Woken {
    #[sea_orm(nested)]
    queued: Queued,
    #[sea_orm(nested)]
    state: State,
    was_woken: i64,
}

const JOB: &str = "
    SELECT j.pid, j.try, j.intent_at, j.external_id, j.status, j.reason, j.position, j.starts_at, j.absent, j.ended_at,
           CAST(CASE WHEN p.id IS NULL OR p.place = {ended} OR p.try > j.try THEN 1 ELSE 0 END AS bigint) AS is_doomed
    FROM job j LEFT JOIN process p ON p.id = j.pid";

const ENDED_JOBS: &str = "
    WITH {rows}
    SELECT token FROM b JOIN job ON token = b_token WHERE ended_at IS NOT NULL";

const LOCK_JOBS: &str = "
    WITH {rows}
    SELECT token FROM job WHERE token IN (SELECT b_token FROM b) ORDER BY token {for_update}";

const LOCK_PROCESSES: &str = "
    WITH {rows}
    SELECT id FROM process WHERE id IN (SELECT b_id FROM b) AND place <> {ended} ORDER BY id {for_update}";

const RECORD_SEEN: &str = "
    WITH {rows}
    UPDATE job
    SET external_id = COALESCE(external_id, NULLIF(b_external_id, '')), status = b_status, reason = b_reason,
        position = NULLIF(b_position, 0), starts_at = NULLIF(b_starts_at, 0), absent = b_absent,
        ended_at = CASE WHEN b_ended = 1 THEN COALESCE(ended_at, {clock}) ELSE ended_at END
    FROM b WHERE token = b_token AND ended_at IS NULL";

// The end of the job and the wake-up are one transaction. Nothing is outside any more, unless an older try has left a
// job, which the watcher ends. A kill that waited for the job is still a worker's to finish.
const WAKE_ENDED: &str = "
    WITH {rows}
    UPDATE process
    SET outside = (desired = {kill}), woken = true,
        place = CASE WHEN place = {parked} AND state = {waiting} THEN {queued} ELSE place END,
        state = CASE WHEN place = {parked} AND state = {waiting} THEN {running} ELSE state END,
        told_at = CASE WHEN place = {parked} AND state = {waiting} THEN {now} ELSE told_at END,
        changed_at = CASE WHEN place = {parked} AND state = {waiting} THEN {clock} ELSE changed_at END,
        wake_at = CASE WHEN place = {parked} AND state = {waiting} THEN NULL ELSE wake_at END
    FROM b
    WHERE id = b_id AND try = b_try AND place <> {ended}
    RETURNING id, queue, told_at, state, before, CAST(CASE WHEN place = {queued} THEN 1 ELSE 0 END AS bigint) AS was_woken,
              (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent";
