//! Sites: jobs, the limits that the whole fleet keeps to, and what only one worker at a time may have.
//!
//! A job's row is committed before anything is submitted, and stays open until the job is known to be gone; whatever
//! happens to its process, an open row says that somebody has to look after a job.

use sea_orm::{ConnectionTrait, QueryResult};
use uuid::Uuid;

use super::control::state;
use super::dialect::{Batch, Kind, storable};
use super::submit::ByQueue;
use super::writer::Fence;
use super::{Error, Store, begin};
use crate::config::SiteLimits;
use crate::id::{Incarnation, Pid};
use crate::state::State;

/// The longest time between two looks at a site that does not answer, in microseconds.
const RETRY_MAX_US: i64 = 300_000_000;

/// The first of them; each is twice the one before.
const RETRY_MIN_US: i64 = 5_000_000;

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

/// How the last error of a site begins whose list of jobs cannot be had.
pub const UNLISTED: &str = "no list of its jobs: ";

/// What a process waits for whose job the scheduler of a site has refused for now: this, the site, `/`, and the reason.
pub const REFUSED: &str = "refused/";

/// The status of what was never submitted, and never can be.
pub const NEVER: &str = "NEVER";

/// What is seen of a job at its site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

/// What is known of a site.
#[derive(Clone, Debug, Default)]
pub struct SiteFacts {
    /// Whether a live worker serves it.
    pub is_served: bool,
    /// Its name.
    pub name: String,
    /// Its launcher's word.
    pub launcher: String,
    /// Its folder.
    pub root: String,
    /// Sessions that the fleet may have.
    pub slots: i64,
    /// Sessions that workers have.
    pub slots_taken: i64,
    /// Open jobs.
    pub jobs: i64,
    /// Processes that wait for a session.
    pub waiting_for_slot: i64,
    /// Processes that wait until there is room for a job.
    pub waiting_for_room: i64,
    /// Failures to reach it in a row.
    pub failures: i64,
    /// In how many microseconds it is tried again; `None` when it can be reached.
    pub retry_in: Option<i64>,
    /// The last failure.
    pub last_error: Option<String>,
    /// When that was, in microseconds.
    pub last_error_at: Option<i64>,
    /// When its jobs were last looked at, in microseconds.
    pub polled_at: Option<i64>,
    /// The worker that looks at its jobs.
    pub watcher: Option<String>,
}

/// What there is to do for a site.
#[derive(Clone, Copy, Debug, Default)]
pub struct SiteWork {
    /// It cannot be reached, and it is not yet the time to try again.
    pub is_down: bool,
    /// It has open jobs.
    pub has_jobs: bool,
    /// Processes wait for a session.
    pub waits_for_slot: bool,
    /// Processes wait until there is room for a job.
    pub waits_for_room: bool,
}

/// May a session be opened now?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Yes, by whoever got this.
    Open,
    /// Not yet: another was opened just now.
    TooSoon,
    /// The site cannot be reached, and it is not yet the time to try again.
    Down,
}

impl Store {
    /// Tells of a site that this worker serves.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn announce_site(&self, name: &str, launcher: &str, root: &str, slots: i64) -> Result<(), Error> {
        let sql = "INSERT INTO site (name, launcher, root, slots) VALUES ($1, $2, $3, $4)
                   ON CONFLICT (name) DO UPDATE SET launcher = $2, root = $3, slots = $4";
        self.execute(sql, vec![name.into(), launcher.into(), root.into(), slots.into()]).await?;
        Ok(())
    }

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
        let now: i64 = row.ok_or(Error::NoRow)?.try_get("", "now")?;
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
        let n_open: i64 = row.ok_or(Error::NoRow)?.try_get("", "n")?;
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
                let oldest: i64 = row.try_get("", "intent_at")?;
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
        let rows = self.query(&sql, vec![token(pid, try_number).into()]).await?;
        rows.first().map(job).transpose()
    }

    /// Every job of a process, the latest last.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn jobs_of(&self, pid: Pid) -> Result<Vec<Job>, Error> {
        let sql = format!("{JOB} WHERE j.pid = $1 ORDER BY j.try");
        self.query(&sql, vec![Uuid::from(pid).into()]).await?.iter().map(job).collect()
    }

    /// Every open job of a site.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn open_jobs(&self, site: &str) -> Result<Vec<Job>, Error> {
        let sql = format!("{JOB} WHERE j.site = $1 AND j.ended_at IS NULL ORDER BY j.intent_at");
        self.query(&sql, vec![site.into()]).await?.iter().map(job).collect()
    }

    /// Of jobs by their names, those that are known to be gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn ended_jobs(&self, tokens: impl Iterator<Item = &str>) -> Result<Vec<String>, Error> {
        let mut batch = Batch::new(&[("b_token", Kind::Text)]);
        tokens.for_each(|token| batch.push([token.into()]));
        let rows = self.db.query_all_raw(self.dialect.batch(ENDED_JOBS, vec![], batch)).await?;
        rows.iter().map(|row| Ok(row.try_get("", "token")?)).collect()
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
        let mut queued = ByQueue::new();
        if !ended.is_empty() {
            let ids = Batch::ids(gone.iter().map(|seen| seen.pid.into()));
            transaction.query_all_raw(self.dialect.batch(LOCK_PROCESSES, vec![], ids)).await?;
            for row in transaction.query_all_raw(self.dialect.batch(WAKE_ENDED, vec![], ended)).await? {
                if row.try_get::<i64>("", "was_woken")? == 1 && state(&row)? == State::Running {
                    let (queue, told) = super::sweep::told(&row)?;
                    queued.entry(queue).or_default().push(told);
                }
            }
        }
        transaction.commit().await?;
        Ok(queued)
    }

    /// Takes what one worker at a time may have; true also for who has it already. What a dead worker had is free.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn take_permit(&self, name: &str, me: Incarnation) -> Result<bool, Error> {
        let sql = "INSERT INTO permit (name, owner, taken_at) VALUES ($1, $2, {clock})
                   ON CONFLICT (name) DO UPDATE SET owner = $2, taken_at = {clock}
                   WHERE permit.owner = $2
                      OR NOT EXISTS (SELECT 1 FROM worker w WHERE w.id = permit.owner AND w.gone_at IS NULL)
                   RETURNING name";
        Ok(!self.query(sql, vec![name.into(), Uuid::from(me).into()]).await?.is_empty())
    }

    /// Gives back what [`Store::take_permit`] took.
    ///
    /// # Errors
    /// The database does not answer; it is free when this worker is gone.
    pub async fn give_permit(&self, name: &str, me: Incarnation) -> Result<(), Error> {
        let sql = "DELETE FROM permit WHERE name = $1 AND owner = $2";
        self.execute(sql, vec![name.into(), Uuid::from(me).into()]).await?;
        Ok(())
    }

    /// Asks for leave to open a session with a site, for the whole fleet.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn knock(&self, site: &str, min_reconnect_us: i64) -> Result<Door, Error> {
        let sql = "UPDATE site SET connect_at = {now}
                   WHERE name = $1 AND connect_at <= {now} - $2 AND (retry_at IS NULL OR retry_at <= {now})
                   RETURNING name";
        if !self.query(sql, vec![site.into(), min_reconnect_us.into()]).await?.is_empty() {
            return Ok(Door::Open);
        }
        let sql = "SELECT COUNT(*) AS n FROM site WHERE name = $1 AND retry_at > {now}";
        let rows = self.query(sql, vec![site.into()]).await?;
        let n: i64 = rows.first().ok_or(Error::NoRow)?.try_get("", "n")?;
        Ok(if n > 0 { Door::Down } else { Door::TooSoon })
    }

    /// Records that a site could not be reached, or that it answers again (`None`). It is tried again after a pause that
    /// doubles with each failure in a row.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn note_site(&self, site: &str, failure: Option<&str>) -> Result<(), Error> {
        let Some(failure) = failure else {
            let sql = "UPDATE site SET failures = 0, retry_at = NULL
                       WHERE name = $1 AND (failures > 0 OR retry_at IS NOT NULL)";
            self.execute(sql, vec![site.into()]).await?;
            return Ok(());
        };
        // Failures that come together, of several sessions or workers, count as one.
        let sql = "UPDATE site
                   SET last_error = $2, last_error_at = {now},
                       retry_at = CASE WHEN retry_at > {now} THEN retry_at
                                       WHEN failures >= 6 THEN {now} + $4
                                       ELSE {now} + $3 * (1 << CAST(failures AS int)) END,
                       failures = CASE WHEN retry_at > {now} THEN failures ELSE failures + 1 END
                   WHERE name = $1";
        self.execute(
            sql,
            vec![site.into(), storable(failure.to_owned()).into(), RETRY_MIN_US.into(), RETRY_MAX_US.into()],
        )
        .await?;
        Ok(())
    }

    /// Asks for leave to look at the jobs of a site: true once in an interval, for the whole fleet.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn begin_poll(&self, site: &str, interval_us: i64) -> Result<bool, Error> {
        // A tenth less, so that a look that is late does not put off the next.
        let sql = "UPDATE site SET polled_at = {now}
                   WHERE name = $1 AND (polled_at IS NULL OR polled_at <= {now} - $2 * 9 / 10) RETURNING name";
        Ok(!self.query(sql, vec![site.into(), interval_us.into()]).await?.is_empty())
    }

    /// Records why the list of a site's jobs cannot be had, or that it can (`None`); the way there is well.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn note_launcher(&self, site: &str, complaint: Option<&str>) -> Result<(), Error> {
        let (sql, text) = match complaint {
            Some(complaint) => (
                "UPDATE site SET last_error = $2, last_error_at = {now} WHERE name = $1",
                format!("{UNLISTED}{}", storable(complaint.to_owned())),
            ),
            None => (
                "UPDATE site SET last_error = NULL, last_error_at = NULL WHERE name = $1 AND last_error LIKE $2",
                format!("{UNLISTED}%"),
            ),
        };
        self.execute(sql, vec![site.into(), text.into()]).await?;
        Ok(())
    }

    /// Queues those that have waited longest for something, at most `most`, for whoever asks to claim them: their time to
    /// look again says when they began. No message
    /// stands for them; if they are not claimed, the head rule finds them.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn wake_waiting(&self, waits_for: &str, queues: &[String], most: u32) -> Result<ByQueue, Error> {
        if most == 0 {
            return Ok(ByQueue::new());
        }
        let mut batch = Batch::new(&[("b_queue", Kind::Text)]);
        for queue in queues {
            batch.push([queue.clone().into()]);
        }
        let sql = format!(
            "WITH {{rows}}
             UPDATE process
             SET woken = true, place = {{queued}}, state = {{running}}, wake_at = NULL, told_at = {{now}},
                 changed_at = {{now}}
             WHERE id IN (SELECT id FROM process
                          WHERE waits_for = $1 AND place = {{parked}} AND state = {{waiting}}
                            AND queue IN (SELECT b_queue FROM b)
                          ORDER BY wake_at LIMIT {most} {{skip_locked}})
             RETURNING id, queue, told_at,
                       (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent"
        );
        let rows = self.db.query_all_raw(self.dialect.batch(&sql, vec![waits_for.into()], batch)).await?;
        let mut queued = ByQueue::new();
        for row in rows {
            let (queue, told) = super::sweep::told(&row)?;
            queued.entry(queue).or_default().push(told);
        }
        Ok(queued)
    }

    /// What there is to do for a site: cheap, since every worker asks once a second.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn site_work(&self, site: &str) -> Result<SiteWork, Error> {
        let sql = "SELECT
              CAST(EXISTS (SELECT 1 FROM site WHERE name = $1 AND retry_at > {now}) AS int) AS is_down,
              CAST(EXISTS (SELECT 1 FROM job WHERE site = $1 AND ended_at IS NULL) AS int) AS has_jobs,
              CAST(EXISTS (SELECT 1 FROM process WHERE waits_for = $2 AND place = {parked} AND state = {waiting}) AS int)
                AS for_slot,
              CAST(EXISTS (SELECT 1 FROM process WHERE waits_for = $3 AND place = {parked} AND state = {waiting}) AS int)
                AS for_room";
        let values = vec![site.into(), format!("slot/{site}").into(), format!("room/{site}").into()];
        let rows = self.query(sql, values).await?;
        let row = rows.first().ok_or(Error::NoRow)?;
        let is = |column: &str| row.try_get::<i32>("", column).map(|is| is == 1);
        Ok(SiteWork {
            is_down: is("is_down")?,
            has_jobs: is("has_jobs")?,
            waits_for_slot: is("for_slot")?,
            waits_for_room: is("for_room")?,
        })
    }

    /// How many more jobs may be submitted now.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn room(&self, site: &str, limits: SiteLimits) -> Result<u32, Error> {
        let mut room = i64::from(u32::MAX);
        if let Some(most) = limits.queued.into_iter().chain(limits.running).min() {
            let sql = "SELECT COUNT(*) AS n FROM job WHERE site = $1 AND ended_at IS NULL";
            let rows = self.query(sql, vec![site.into()]).await?;
            room = room.min(i64::from(most) - rows.first().ok_or(Error::NoRow)?.try_get::<i64>("", "n")?);
        }
        if let Some(most) = limits.submit_per_min {
            let sql = "SELECT COUNT(*) AS n FROM job WHERE site = $1 AND intent_at > {now} - $2";
            let rows = self.query(sql, vec![site.into(), MINUTE_US.into()]).await?;
            room = room.min(i64::from(most) - rows.first().ok_or(Error::NoRow)?.try_get::<i64>("", "n")?);
        }
        Ok(u32::try_from(room.max(0)).unwrap_or(u32::MAX))
    }

    /// What is known of every site, or of one.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn sites(&self, name: Option<&str>) -> Result<Vec<SiteFacts>, Error> {
        let sql = "SELECT s.name, s.launcher, s.root, s.slots, s.failures, s.last_error, s.last_error_at, s.polled_at,
                          s.retry_at - {now} AS retry_in,
                          (SELECT COUNT(*) FROM permit t JOIN worker w ON w.id = t.owner AND w.gone_at IS NULL
                           WHERE substr(t.name, 1, length(s.name) + 6) = 'slot/' || s.name || '/') AS slots_taken,
                          (SELECT COUNT(*) FROM job j WHERE j.site = s.name AND j.ended_at IS NULL) AS jobs,
                          (SELECT COUNT(*) FROM process p
                           WHERE p.waits_for = 'slot/' || s.name AND p.place = {parked}) AS waiting_for_slot,
                          (SELECT COUNT(*) FROM process p
                           WHERE p.waits_for = 'room/' || s.name AND p.place = {parked}) AS waiting_for_room,
                          (SELECT w.name FROM permit t JOIN worker w ON w.id = t.owner AND w.gone_at IS NULL
                           WHERE t.name = 'watch/' || s.name) AS watcher
                   FROM site s WHERE $1 = '' OR s.name = $1 ORDER BY s.name";
        let rows = self.query(sql, vec![name.unwrap_or_default().into()]).await?;
        let serving = self.query("SELECT sites FROM worker WHERE gone_at IS NULL", vec![]).await?;
        let serving = serving.iter().map(served_sites).collect::<Result<Vec<_>, Error>>()?;
        rows.iter()
            .map(|row| {
                let name: String = row.try_get("", "name")?;
                Ok(SiteFacts {
                    // A worker of an older version does not say which sites it serves.
                    is_served: serving.iter().any(|sites| sites.as_ref().is_none_or(|sites| sites.contains(&name))),
                    name,
                    launcher: row.try_get("", "launcher")?,
                    root: row.try_get("", "root")?,
                    slots: row.try_get("", "slots")?,
                    slots_taken: row.try_get("", "slots_taken")?,
                    jobs: row.try_get("", "jobs")?,
                    waiting_for_slot: row.try_get("", "waiting_for_slot")?,
                    waiting_for_room: row.try_get("", "waiting_for_room")?,
                    failures: row.try_get("", "failures")?,
                    retry_in: row.try_get::<Option<i64>>("", "retry_in")?.filter(|micros| *micros > 0),
                    last_error: row.try_get("", "last_error")?,
                    last_error_at: row.try_get("", "last_error_at")?,
                    polled_at: row.try_get("", "polled_at")?,
                    watcher: row.try_get("", "watcher")?,
                })
            })
            .collect()
    }
}

/// The sites that a worker says it serves; `None` if it does not say so.
fn served_sites(row: &QueryResult) -> Result<Option<Vec<String>>, Error> {
    let text: Option<String> = row.try_get("", "sites")?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| Error::Unreadable(error.to_string()))).transpose()
}

fn job(row: &QueryResult) -> Result<Job, Error> {
    Ok(Job {
        pid: row.try_get::<Uuid>("", "pid")?.into(),
        try_number: row.try_get("", "try")?,
        intent_at: row.try_get("", "intent_at")?,
        external_id: row.try_get("", "external_id")?,
        look: Look {
            status: row.try_get("", "status")?,
            reason: row.try_get("", "reason")?,
            position: row.try_get("", "position")?,
            starts_at: row.try_get("", "starts_at")?,
            absent: row.try_get("", "absent")?,
        },
        ended_at: row.try_get("", "ended_at")?,
        is_doomed: row.try_get::<i64>("", "is_doomed")? == 1,
    })
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
