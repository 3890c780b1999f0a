//! The facts that explain why a process does not move, gathered by a few statements. Nothing is decided here.

use sea_orm::{FromQueryResult, Value};
use uuid::Uuid;

use super::error::Error;
use super::fleet::FleetPause;
use super::handle::Store;
use super::query::{COUNT_MAX, Details, WorkerRow};
use super::site::SiteFacts;
use crate::id::Pid;

/// A process and everything that it may wait for. The statements run one after the other, so a process that moves in
/// between may appear in two places.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The process.
    pub details: Details,
    /// The number of holders that died in a row without a checkpoint.
    pub deaths: i64,
    /// The number of processes queued before it in its task queue, up to [`COUNT_MAX`]; zero unless it is queued.
    pub n_before: i64,
    /// The worker that holds it, which may be gone.
    pub holder: Option<WorkerRow>,
    /// Every worker that is not gone.
    pub workers: Vec<WorkerRow>,
    /// Its site, if a worker has recorded it.
    pub site: Option<SiteFacts>,
    /// The pause of the fleet.
    pub fleet_pause: Option<FleetPause>,
}

/// A task queue with queued processes.
#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Backlog {
    /// The task queue's name, with its class.
    pub queue: String,
    /// Their number, up to [`COUNT_MAX`].
    #[sea_orm(from_alias = "n")]
    pub count: i64,
    /// The time since which the oldest of the first announced ones is queued, in microseconds since 1970 by the
    /// database's clock.
    pub oldest_at: i64,
}

/// A row of [`standing_sql`].
#[derive(FromQueryResult)]
struct Standing {
    deaths: i64,
    n_before: i64,
}

impl Store {
    /// Returns everything that may keep a process from moving; `None` if there is no such process.
    ///
    /// # Errors
    /// The database does not answer, or a row cannot be read.
    pub async fn facts(&self, pid: Pid) -> Result<Option<Facts>, Error> {
        let Some(details) = self.show(pid).await? else { return Ok(None) };
        let holder = match details.summary.owner {
            Some(owner) => self.workers(&[owner.to_string()], true).await?.pop(),
            None => None,
        };
        let id: Vec<Value> = vec![Uuid::from(pid).into()];
        let standing: Standing = self.first(&standing_sql(), id).await?.ok_or(Error::NoRow)?;
        let on_site = details.spec.as_ref().and_then(|spec| spec.on_site.as_ref());
        // A process written in Rust names a site only when it waits for one.
        let waits_at = details.summary.waits_for.as_deref().and_then(|waits_for| waits_for.split('/').nth(1));
        let site = match on_site.map(|on_site| on_site.at.as_str()).or(waits_at) {
            Some(site) => self.sites(Some(site)).await?.pop(),
            None => None,
        };
        Ok(Some(Facts {
            details,
            site,
            deaths: standing.deaths,
            n_before: standing.n_before,
            holder,
            workers: self.workers(&[], false).await?,
            fleet_pause: self.fleet_pause().await?,
        }))
    }

    /// Returns the task queues with queued processes, sorted by name.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn backlogs(&self) -> Result<Vec<Backlog>, Error> {
        self.all(&backlogs_sql(), vec![]).await
    }
}

/// The number of rows of a queue among which the oldest is searched.
const OLDEST_ROWS: u32 = 1_000;

/// Steps from queue to queue through the index of queued rows, with a bounded scan in each.
fn backlogs_sql() -> String {
    format!(
        "WITH RECURSIVE backlog(queue) AS (
             SELECT MIN(queue) FROM process WHERE place = {{queued}}
             UNION ALL
             SELECT (SELECT MIN(p.queue) FROM process p WHERE p.place = {{queued}} AND p.queue > backlog.queue)
             FROM backlog WHERE backlog.queue IS NOT NULL
         )
         SELECT backlog.queue,
                (SELECT COUNT(*) FROM (SELECT 1 FROM process p WHERE p.place = {{queued}} AND p.queue = backlog.queue
                                       LIMIT {COUNT_MAX}) AS c) AS n,
                (SELECT MIN(c.changed_at)
                 FROM (SELECT p.changed_at FROM process p WHERE p.place = {{queued}} AND p.queue = backlog.queue
                       ORDER BY p.told_at LIMIT {OLDEST_ROWS}) AS c) AS oldest_at
         FROM backlog WHERE backlog.queue IS NOT NULL ORDER BY backlog.queue"
    )
}

fn standing_sql() -> String {
    format!(
        "SELECT p.deaths,
                (SELECT COUNT(*) FROM (
                     SELECT 1 FROM process q
                     WHERE q.place = {{queued}} AND p.place = {{queued}} AND q.queue = p.queue AND q.told_at <= p.told_at
                       AND (q.told_at < p.told_at OR q.id < p.id)
                     LIMIT {COUNT_MAX}) AS c) AS n_before
         FROM process p WHERE p.id = $1"
    )
}
