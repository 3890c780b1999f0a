//! Lists of processes, page by page, and counts.

use std::collections::BTreeMap;

use sea_orm::{ConnectionTrait, FromQueryResult, QueryResult};
use uuid::Uuid;

use crate::id::{Incarnation, Pid};
use crate::select::Select;
use crate::state::{self, Desired, Place, State};
use crate::store::blob::Outcome;
use crate::store::error::Error;
use crate::store::handle::Store;
use crate::store::lease::How;
use crate::store::row::{Cursor, read};
use crate::store::select::{Order, Walk};

/// A query for a list of processes.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The selection.
    pub select: Select,
    /// Only processes after this position of the list.
    pub after: Option<Cursor>,
    /// The largest number of processes, newest first.
    pub limit: u32,
}

/// A list that is read page by page. A process that exists during the whole time is in exactly one page.
pub struct Listing {
    walk: Walk,
}

/// Counts for people stop here: this value means "at least this many".
pub const COUNT_MAX: i64 = 10_000;

impl Filter {
    /// A query for these processes, each once, in any order.
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
    /// The name.
    pub name: String,
    /// Its kind: `program`, or the name of a process written in Rust.
    pub kind: String,
    /// The place.
    pub place: Place,
    /// The state.
    pub state: State,
    /// The state that operators want.
    pub desired: Desired,
    /// The task queue.
    pub queue: String,
    /// The name of the worker that holds it.
    pub worker: Option<String>,
    /// The holder's incarnation.
    pub owner: Option<Incarnation>,
    /// The number of claims.
    pub epoch: i64,
    /// The number of the try, from 1.
    pub try_number: i64,
    /// The number of committed advances.
    pub advances: i64,
    /// The time of its acceptance. All times here are microseconds since 1970 by the database's clock.
    pub created_at: i64,
    /// The time of the last change of place or state.
    pub changed_at: i64,
    /// The time of its end.
    pub ended_at: Option<i64>,
    /// The time when it wakes by itself.
    pub wake_at: Option<i64>,
    /// The outcome.
    pub outcome: Option<Outcome>,
    /// The error of the last failed try, if it was tried again.
    pub last_error: Option<String>,
    /// Whether it waits for its next try.
    pub waits_for_retry: bool,
    /// The refusal by its last worker, if another build may be able to run it.
    pub refusal: Option<Refusal>,
    /// Whether it has, or may have, a job at a site.
    pub has_outside: bool,
    /// The resource of a site that it waits for: `slot/SITE`, `room/SITE` or `sent/SITE/DIGEST`.
    pub waits_for: Option<String>,
    /// The request that paused it, if it is paused by one; a process that was accepted on hold has none.
    pub paused: Option<Paused>,
    /// The time of the query, by the database's clock.
    pub now: i64,
}

/// A refusal: no worker that claimed the process could run it, but another build may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The time of the first refusal.
    pub since: i64,
    /// The last worker's reason.
    pub reason: String,
}

/// The request that paused a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paused {
    /// The requester's name, as given: user and host.
    pub by: String,
    /// The time when it was applied.
    pub at: i64,
    /// The reason.
    pub reason: Option<String>,
}

impl Listing {
    /// A list of the processes of a selection, from the beginning or after a position.
    pub fn new(select: &Select, after: Option<Cursor>) -> Self {
        Self { walk: Walk::new(select, Order::NewestFirst, after) }
    }

    /// Returns the next page of at most `limit` processes. Only the page at the end is empty.
    ///
    /// # Errors
    /// The database does not answer, or a row cannot be read.
    pub async fn next(&mut self, store: &Store, limit: u32) -> Result<Vec<Summary>, Error> {
        let template =
            format!("WITH {{page}} {SUMMARY} JOIN page ON page.id = p.id ORDER BY page.created_at DESC, p.id DESC");
        while let Some(statement) = self.walk.next(store.dialect, &template, limit) {
            let rows = store.db.query_all_raw(statement).await?;
            let rows = summaries(&rows)?;
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

    /// Returns the position of a process in lists; `None` if there is no such process.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn cursor(&self, pid: Pid) -> Result<Option<Cursor>, Error> {
        let sql = "SELECT created_at FROM spec WHERE id = $1";
        let created_at = self.column(sql, vec![Uuid::from(pid).into()]).await?.into_iter().next();
        Ok(created_at.map(|created_at| Cursor { pid, created_at }))
    }

    /// Counts processes by the words of their states, each up to [`COUNT_MAX`].
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
        let mut counts = BTreeMap::new();
        for row in self.query(&sql, vec![]).await? {
            let (word, n) = row.try_get_many_by_index()?;
            counts.insert(word, n);
        }
        counts.retain(|_, n| *n > 0);
        Ok(counts)
    }

    /// Returns the task queues of all processes that have not ended.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn queues_in_use(&self) -> Result<Vec<String>, Error> {
        self.column("SELECT DISTINCT queue FROM process WHERE place <> {ended}", vec![]).await
    }

    /// Lists the processes that an incarnation holds, the longest held first, at most `limit`.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn list_held(&self, owner: Incarnation, limit: u32) -> Result<Vec<Summary>, Error> {
        let sql =
            format!("{SUMMARY} WHERE p.owner = $1 AND p.place = {{held}} ORDER BY p.claimed_at, p.id LIMIT {limit}");
        summaries(&self.query(&sql, vec![Uuid::from(owner).into()]).await?)
    }

    /// Returns the newest unfinished process of `baton run` with this key.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn unfinished_run(&self, run_key: &[u8]) -> Result<Option<Pid>, Error> {
        let sql = "SELECT p.id FROM process p JOIN spec s ON s.id = p.id
                   WHERE s.run_key = $1 AND p.place <> {ended} ORDER BY p.id DESC LIMIT 1";
        Ok(self.column(sql, vec![run_key.to_vec().into()]).await?.into_iter().next())
    }
}

// `last_error` is the error of the last attempt that ended with one. `last_how` is that of the last attempt if it left
// a row, which an attempt that ends in an ordinary wait does not. Each subquery is one index lookup, and runs only for
// rows that can have a result; `paused` is one value for the same reason.
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

/// A row of [`SUMMARY`].
#[derive(FromQueryResult)]
struct SummaryRow {
    id: Pid,
    name: String,
    kind: String,
    place: Place,
    #[sea_orm(nested)]
    state: State,
    desired: Desired,
    queue: String,
    worker: Option<String>,
    owner: Option<Incarnation>,
    epoch: i64,
    #[sea_orm(from_alias = "try")]
    try_number: i64,
    seq: i64,
    created_at: i64,
    changed_at: i64,
    ended_at: Option<i64>,
    wake_at: Option<i64>,
    outcome: Option<Vec<u8>>,
    last_error: Option<String>,
    last_how: Option<String>,
    refused_at: Option<i64>,
    refusal: Option<String>,
    outside: bool,
    waits_for: Option<String>,
    paused: Option<String>,
    now: i64,
}

impl TryFrom<SummaryRow> for Summary {
    type Error = Error;

    fn try_from(row: SummaryRow) -> Result<Self, Error> {
        Ok(Summary {
            pid: row.id,
            name: row.name,
            kind: row.kind,
            place: row.place,
            state: row.state,
            desired: row.desired,
            queue: row.queue,
            worker: row.worker,
            owner: row.owner,
            epoch: row.epoch,
            try_number: row.try_number,
            advances: row.seq,
            created_at: row.created_at,
            changed_at: row.changed_at,
            ended_at: row.ended_at,
            wake_at: row.wake_at,
            outcome: row.outcome.map(|bytes| outcome_of(&bytes)).transpose()?,
            last_error: row.last_error,
            waits_for_retry: row.last_how.is_some_and(|how| how == How::Error.word()),
            refusal: row.refused_at.zip(row.refusal).map(|(since, reason)| Refusal { since, reason }),
            has_outside: row.outside,
            waits_for: row.waits_for,
            paused: row.paused.map(|text| paused_by(&text)).transpose()?,
            now: row.now,
        })
    }
}

fn summaries(rows: &[QueryResult]) -> Result<Vec<Summary>, Error> {
    read::<SummaryRow>(rows)?.into_iter().map(Summary::try_from).collect()
}

/// A list continues past a row that a newer program wrote.
fn outcome_of(bytes: &[u8]) -> Result<Outcome, Error> {
    match Outcome::from_bytes(bytes) {
        Err(error @ Error::Newer { .. }) => Ok(Outcome::because(format!("its outcome: {error}"))),
        outcome => outcome,
    }
}

fn paused_by(text: &str) -> Result<Paused, Error> {
    let (by, at, reason) = serde_json::from_str(text).map_err(|error| Error::Unreadable(format!("event: {error}")))?;
    Ok(Paused { by, at, reason })
}
