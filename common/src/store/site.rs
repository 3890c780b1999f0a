//! Sites: the limits that the whole fleet keeps, and permits that one worker at a time may hold.

use sea_orm::sea_query::OnConflict;
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, FromQueryResult, QueryFilter, QuerySelect, Set};
use uuid::Uuid;

use super::dialect::{Batch, Kind, storable};
use super::entity::{site, worker};
use super::error::Error;
use super::handle::Store;
pub use super::job::{Intent, Job, Look, NEVER, Seen, token};
use super::row::{ByQueue, by_queue, read};
use crate::id::Incarnation;

/// The longest pause before another attempt to reach a site that does not answer, in microseconds.
const RETRY_MAX_US: i64 = 300_000_000;

/// The first such pause; each further one is twice as long.
const RETRY_MIN_US: i64 = 5_000_000;

/// The start of a site's last error if its jobs cannot be listed.
pub const UNLISTED: &str = "no list of its jobs: ";

/// The start of `waits_for` of a process whose job was rejected by the scheduler for now; the site, `/`, and the reason
/// follow.
pub const REFUSED: &str = "refused/";

/// The known facts about a site.
#[derive(Clone, Debug, Default, FromQueryResult)]
pub struct SiteFacts {
    /// Whether a live worker serves it.
    #[sea_orm(skip)]
    pub is_served: bool,
    /// Its name.
    pub name: String,
    /// The launcher's word.
    pub launcher: String,
    /// Its root folder.
    pub root: String,
    /// The number of sessions that the fleet may open.
    pub slots: i64,
    /// The number of sessions in use.
    pub slots_taken: i64,
    /// The number of open jobs.
    pub jobs: i64,
    /// The number of processes that wait for a session.
    pub waiting_for_slot: i64,
    /// The number of processes that wait for room for a job.
    pub waiting_for_room: i64,
    /// The number of consecutive failures to reach it.
    pub failures: i64,
    /// The time until the next attempt, in microseconds; `None` if the site is reachable.
    pub retry_in: Option<i64>,
    /// The last error.
    pub last_error: Option<String>,
    /// The time of the last error, in microseconds.
    pub last_error_at: Option<i64>,
    /// The time of the last poll of its jobs, in microseconds.
    pub polled_at: Option<i64>,
    /// The worker that polls its jobs.
    pub watcher: Option<String>,
}

/// The work that a site has for workers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SiteWork {
    /// The site is unreachable, and the next attempt is not due.
    pub is_down: bool,
    /// The site has open jobs.
    pub has_jobs: bool,
    /// Processes wait for a session.
    pub waits_for_slot: bool,
    /// Processes wait for room for a job.
    pub waits_for_room: bool,
}

/// The answer of the connect rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A session may be opened, by this caller only.
    Open,
    /// Not yet: another session was opened a moment ago.
    TooSoon,
    /// The site is unreachable, and the next attempt is not due.
    Down,
}

/// A row of [`Store::site_work`], whose columns are 0 or 1.
#[derive(FromQueryResult)]
struct SiteWorkRow {
    is_down: i32,
    has_jobs: i32,
    for_slot: i32,
    for_room: i32,
}

impl Store {
    /// Records a site that this worker serves.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn announce_site(&self, name: &str, launcher: &str, root: &str, slots: i64) -> Result<(), Error> {
        let [name, launcher, root] = [name, launcher, root].map(|text| Set(text.to_owned()));
        let row = site::ActiveModel { name, launcher, root, slots: Set(slots) };
        let described = [site::Column::Launcher, site::Column::Root, site::Column::Slots];
        let known = OnConflict::column(site::Column::Name).update_columns(described).to_owned();
        site::Entity::insert(row).on_conflict(known).exec_without_returning(&self.db).await?;
        Ok(())
    }

    /// Takes a permit that one worker at a time may hold. Returns `true` also if this worker holds it already. The
    /// permits of dead workers are free.
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

    /// Releases a permit.
    ///
    /// # Errors
    /// The database does not answer; the permit becomes free when this worker is gone.
    pub async fn give_permit(&self, name: &str, me: Incarnation) -> Result<(), Error> {
        let sql = "DELETE FROM permit WHERE name = $1 AND owner = $2";
        self.execute(sql, vec![name.into(), Uuid::from(me).into()]).await?;
        Ok(())
    }

    /// Asks the fleet's connect rate limit whether a session with a site may be opened.
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
        let n: i64 = self.value(sql, vec![site.into()]).await?;
        Ok(if n > 0 { Door::Down } else { Door::TooSoon })
    }

    /// Records that a site is unreachable, or that it answers again (`None`). The pause before the next attempt doubles
    /// with each consecutive failure.
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
        // Simultaneous failures of several sessions or workers count as one.
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

    /// Returns whether the jobs of a site are due for a poll: true once per interval in the whole fleet.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn begin_poll(&self, site: &str, interval_us: i64) -> Result<bool, Error> {
        // A tenth less, so that a late poll does not delay the next one.
        let sql = "UPDATE site SET polled_at = {now}
                   WHERE name = $1 AND (polled_at IS NULL OR polled_at <= {now} - $2 * 9 / 10) RETURNING name";
        Ok(!self.query(sql, vec![site.into(), interval_us.into()]).await?.is_empty())
    }

    /// Records why the jobs of a reachable site cannot be listed, or that they can (`None`).
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

    /// Queues the processes that have waited longest for a resource, at most `most`, for the caller to claim. Their
    /// `wake_at` says how long they have waited. No message is published; if they are not claimed, the head rule finds
    /// them.
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
        Ok(by_queue(read(&rows)?))
    }

    /// Returns the work that a site has. Cheap, since every worker asks once a second.
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
        let row: SiteWorkRow = self.first(sql, values).await?.ok_or(Error::NoRow)?;
        Ok(SiteWork {
            is_down: row.is_down == 1,
            has_jobs: row.has_jobs == 1,
            waits_for_slot: row.for_slot == 1,
            waits_for_room: row.for_room == 1,
        })
    }

    /// Returns the facts about every site, or about one.
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
        let mut sites: Vec<SiteFacts> = self.all(sql, vec![name.unwrap_or_default().into()]).await?;
        let alive = worker::Entity::find().filter(worker::Column::GoneAt.is_null());
        let serving = alive.select_only().column(worker::Column::Sites).into_tuple().all(&self.db).await?;
        let serving = serving.into_iter().map(served_sites).collect::<Result<Vec<_>, Error>>()?;
        for site in &mut sites {
            // Workers of older versions do not say which sites they serve.
            site.is_served = serving.iter().any(|sites| sites.as_ref().is_none_or(|sites| sites.contains(&site.name)));
            site.retry_in = site.retry_in.filter(|micros| *micros > 0);
        }
        Ok(sites)
    }
}
/// Decodes the sites that a worker serves; `None` if it does not name them.
fn served_sites(text: Option<String>) -> Result<Option<Vec<String>>, Error> {
    text.map(|text| serde_json::from_str(&text).map_err(|error| Error::Unreadable(error.to_string()))).transpose()
}
