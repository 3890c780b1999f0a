//! Jobs at sites. A job's row is committed before anything is submitted, and stays open until the job is known to be gone;
//! whatever happens to its process, an open row says that somebody has to look after a job.

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

/// A minute, for the rate of submissions.
const MINUTE_US: i64 = 60_000_000;

/// What became of the intent to submit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// It is recorded; submit.
    Recorded,
    /// It was recorded before; whether a job has come of it has to be found out.
    Known,
    /// As many jobs are at the site as may be.
    Full,
    /// As many were submitted within a minute as may be; in so many microseconds there is room again.
    TooSoon(i64),
    /// The lease is lost.
    Lost,
}

/// The status of what was never submitted, and never can be.
pub const NEVER: &str = "NEVER";

/// What is seen of a job at its site.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromQueryResult)]
pub struct Look {
    /// The launcher's word for where it is; empty until it has said one.
    pub status: String,
    /// Why it is so, in the launcher's words.
    pub reason: String,
    /// Its place among those that wait, from 1.
    pub position: Option<i64>,
    /// When it is expected to start, in microseconds.
    pub starts_at: Option<i64>,
    /// How many looks in a row did not find it.
    pub absent: i64,
}

/// A job, or what may become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its process.
    pub pid: Pid,
    /// The try that it is of.
    pub try_number: i64,
    /// When it was intended, in microseconds.
    pub intent_at: i64,
    /// What the launcher calls it; `None` until that is known.
    pub external_id: Option<String>,
    /// What was last seen of it.
    pub look: Look,
    /// When it was known to be gone, in microseconds.
    pub ended_at: Option<i64>,
    /// Nobody wants it any more: its process has ended, or has begun another try, or is to be killed.
    pub is_doomed: bool,
}

impl Job {
    /// The name under which the launcher knows it.
    pub fn token(&self) -> String {
        token(self.pid, self.try_number)
    }
}

/// The name under which the launcher knows the job of a try.
pub fn token(pid: Pid, try_number: i64) -> String {
    format!("baton-{pid}-{try_number}")
}

/// What a look at a site has found of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its process.
    pub pid: Pid,
    /// The try that it is of.
    pub try_number: i64,
    /// The launcher's name for it, if that was not known.
    pub external_id: Option<String>,
    /// All else.
    pub look: Look,
    /// Whether it is gone.
    pub is_ended: bool,
}

impl Seen {
    /// That a job is gone.
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
    /// Records the intent to submit the job of a try, if the limits of the site let it: the row of the job, and that its
    /// process has something outside.
    ///
    /// # Errors
    /// Nothing is recorded, or (when the commit's answer was lost) it is: the next call says [`Intent::Known`].
    pub async fn intend(&self, fence: Fence, try_number: i64, site: &str, limits: SiteLimits) -> Result<Intent, Error> {
        let transaction = begin(&self.db).await?;
        // One at a time for each site, so that the counts are true.
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

    /// Takes back the intent of a try of which nothing has gone to the site, as its holder knows; without the lease, whoever
    /// has it finds out.
    ///
    /// # Errors
    /// The intent stays, or (when the commit's answer was lost) it does not: both can be gone on from.
    pub async fn withdraw(&self, fence: Fence, try_number: i64) -> Result<(), Error> {
        let holder = [Uuid::from(fence.pid).into(), fence.epoch.into()];
        let transaction = begin(&self.db).await?;
        // The job first, as everybody locks them.
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

    /// Records what the launcher calls a job. This is a fact, which needs no lease.
    ///
    /// # Errors
    /// The database does not answer; who asks the launcher by the token finds it again.
    pub async fn submitted(&self, pid: Pid, try_number: i64, external_id: &str) -> Result<(), Error> {
        let sql = "UPDATE job SET external_id = $2, submitted_at = {clock} WHERE token = $1 AND external_id IS NULL";
        self.execute(sql, vec![token(pid, try_number).into(), external_id.into()]).await?;
        Ok(())
    }

    /// The job of a try.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn job(&self, pid: Pid, try_number: i64) -> Result<Option<Job>, Error> {
        let sql = format!("{JOB} WHERE j.token = $1");
        Ok(self.first::<JobRow>(&sql, vec![token(pid, try_number).into()]).await?.map(Job::from))
    }

    /// Every job of a process, the latest last.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn jobs_of(&self, pid: Pid) -> Result<Vec<Job>, Error> {
        let sql = format!("{JOB} WHERE j.pid = $1 ORDER BY j.try");
        self.jobs(&sql, Uuid::from(pid).into()).await
    }

    /// Every open job of a site.
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

    /// Of jobs by their names, those that are known to be gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn ended_jobs(&self, tokens: impl Iterator<Item = &str>) -> Result<Vec<String>, Error> {
        let mut batch = Batch::new(&[("b_token", Kind::Text)]);
        tokens.for_each(|token| batch.push([token.into()]));
        let rows = self.db.query_all_raw(self.dialect.batch(ENDED_JOBS, vec![], batch)).await?;
        Ok(rows.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?)
    }

    /// Records what was found at a site, and wakes the processes whose jobs are gone: publish what is returned.
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
        // Rows are locked in the order in which everybody locks them.
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

    /// How many more jobs may be submitted now.
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

// The end of the job and the wake-up are one transaction. Nothing is outside any more unless an older try left something,
// which the watcher ends by itself; but a kill that waited for it is still a worker's to finish.
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
