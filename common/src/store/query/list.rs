//! Lists of processes, page by page, and their numbers.

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

/// Which processes a list is about.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The selection.
    pub select: Select,
    /// Those that come after this one in the list's order.
    pub after: Option<Cursor>,
    /// At most so many, the newest first.
    pub limit: u32,
}

/// A list that is read page by page. A process that is there all the time is in exactly one page.
pub struct Listing {
    walk: Walk,
}

/// Counts for people go no further: this number means that there are at least so many.
pub const COUNT_MAX: i64 = 10_000;

impl Filter {
    /// These processes, each once, in no order that matters.
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
    /// Its name.
    pub name: String,
    /// What it runs: `program`, or the name of a process written in Rust.
    pub kind: String,
    /// Where it is.
    pub place: Place,
    /// Its state.
    pub state: State,
    /// What the operators want of it.
    pub desired: Desired,
    /// Its task queue.
    pub queue: String,
    /// The name of the worker that holds it.
    pub worker: Option<String>,
    /// The holder's incarnation.
    pub owner: Option<Incarnation>,
    /// How often it has been claimed.
    pub epoch: i64,
    /// The number of its try, from 1.
    pub try_number: i64,
    /// Committed advances.
    pub advances: i64,
    /// When it was accepted; this and all times here are microseconds since 1970 by the database's clock.
    pub created_at: i64,
    /// When its place or state last changed.
    pub changed_at: i64,
    /// When it ended.
    pub ended_at: Option<i64>,
    /// When it wakes by itself.
    pub wake_at: Option<i64>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// Why its last try failed, if it has been tried again.
    pub last_error: Option<String>,
    /// Whether what it waits for is its next try.
    pub waits_for_retry: bool,
    /// Why the last worker that took it could not go on with it although another build may, and since when that has been
    /// so.
    pub refusal: Option<Refusal>,
    /// Whether it has, or may have, a job at a site.
    pub has_outside: bool,
    /// What it waits for at a site: `slot/SITE`, `room/SITE` or `sent/SITE/DIGEST`.
    pub waits_for: Option<String>,
    /// Who has paused it, if it is paused and somebody has: one that was accepted on hold has nobody.
    pub paused: Option<Paused>,
    /// The time of the query.
    pub now: i64,
}

/// No worker that has taken a process could go on with it; one of another build may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Since when.
    pub since: i64,
    /// What the last one said.
    pub reason: String,
}

/// Who has paused a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paused {
    /// Who asked, as they say themselves: user and host.
    pub by: String,
    /// When it was applied.
    pub at: i64,
    /// Why.
    pub reason: Option<String>,
}

impl Listing {
    /// The processes of a selection that come after a place in it, or all.
    pub fn new(select: &Select, after: Option<Cursor>) -> Self {
        Self { walk: Walk::new(select, Order::NewestFirst, after) }
    }

    /// The next page of at most `limit` processes; empty at the end, and only there.
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

    /// Where a process is in lists; `None` when there is no such process.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn cursor(&self, pid: Pid) -> Result<Option<Cursor>, Error> {
        let sql = "SELECT created_at FROM spec WHERE id = $1";
        let created_at = self.column(sql, vec![Uuid::from(pid).into()]).await?.into_iter().next();
        Ok(created_at.map(|created_at| Cursor { pid, created_at }))
    }

    /// How many processes there are by the word of their state, each counted up to [`COUNT_MAX`].
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

    /// The task queues of everything that has not ended.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn queues_in_use(&self) -> Result<Vec<String>, Error> {
        self.column("SELECT DISTINCT queue FROM process WHERE place <> {ended}", vec![]).await
    }

    /// What an incarnation holds, the longest held first, at most `limit`.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn list_held(&self, owner: Incarnation, limit: u32) -> Result<Vec<Summary>, Error> {
        let sql =
            format!("{SUMMARY} WHERE p.owner = $1 AND p.place = {{held}} ORDER BY p.claimed_at, p.id LIMIT {limit}");
        summaries(&self.query(&sql, vec![Uuid::from(owner).into()]).await?)
    }

    /// The newest unfinished process of `baton run` with this key.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn unfinished_run(&self, run_key: &[u8]) -> Result<Option<Pid>, Error> {
        let sql = "SELECT p.id FROM process p JOIN spec s ON s.id = p.id
                   WHERE s.run_key = $1 AND p.place <> {ended} ORDER BY p.id DESC LIMIT 1";
        Ok(self.column(sql, vec![run_key.to_vec().into()]).await?.into_iter().next())
    }
}

// An error is that of the last attempt that ended with one. The one of the last holding is what a retry waits for, since
// a holding that ends in an ordinary wait leaves no attempt. Each sub-select is one look into an index, and only for rows
// that can have what it looks for; who has paused a process is one value for the same reason.
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

/// A list does not end at a row that a newer program has written.
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
