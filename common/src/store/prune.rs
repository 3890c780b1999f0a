//! Pruning: deletes processes that ended long ago, with all their rows, page by page while the fleet works.
//!
//! A launch that is repeated after its process was pruned would run again. So each page records the prune horizon, and
//! an older launch from outside without a row is refused.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseTransaction, FromQueryResult, QueryResult, Value};
use uuid::Uuid;

use super::connection::begin;
use super::dialect::{Batch, Dialect};
use super::error::Error;
use super::handle::Store;
use super::row::read;
use super::select::{self, Order, Walk};
use super::submit::{LABEL, LABELS_MAX};
use crate::id::Pid;
use crate::select::Select;
use crate::state::State;

/// Processes in one transaction, which takes some tenths of a second. No worker waits for these rows, since they have
/// ended.
const PAGE_ROWS: u32 = 2_000;

/// A pruning in progress. It may be dropped at any time; another one continues with the rest.
pub struct Pruning {
    store: Store,
    ended_before: i64,
    walk: Walk,
}

impl Store {
    /// Counts the processes of a selection that ended at least this long ago, by the words of their states.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn count_prunable(&self, select: &Select, age: Duration) -> Result<BTreeMap<String, u64>, Error> {
        let before = self.now().await? - micros(age);
        let condition = "p.place = {ended} AND p.ended_at <= $1";
        let counts = select::count(self, &final_ones(select), "state", condition, vec![before.into()]).await?;
        counts
            .into_iter()
            .map(|(code, count)| {
                let state = State::from_codes(code, None).ok_or_else(|| Error::Unreadable("no such state".into()))?;
                Ok((state.word().to_owned(), count))
            })
            .collect()
    }

    /// Begins to delete the processes of a selection that ended at least this long ago; [`Pruning::next`] deletes them.
    ///
    /// From the first page on, an older launch from outside without a row is refused.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn prune(&self, select: &Select, age: Duration) -> Result<Pruning, Error> {
        let ended_before = self.now().await? - micros(age);
        let walk = Walk::new(&final_ones(select), Order::OldestFirst, None);
        Ok(Pruning { store: self.clone(), ended_before, walk })
    }

    /// Deletes those of these processes that have ended, at any time, and returns their number. The caller knows that
    /// their launches are not repeated; the prune horizon stays.
    ///
    /// # Errors
    /// The database does not answer; deleted rows stay deleted.
    pub async fn erase(&self, pids: &[Pid]) -> Result<u64, Error> {
        let mut walk = Walk::new(&Select::of(pids.to_vec()), Order::OldestFirst, None);
        let mut count = 0;
        while let Some(ids) = walk.next_ids(&self.db, self.dialect, PAGE_ROWS).await? {
            count += self.remove_ended(ids, i64::MAX, None).await?;
        }
        Ok(count)
    }

    /// Deletes those of these rows that ended before a time, in one transaction that records the horizon.
    async fn remove_ended(&self, ids: Vec<Uuid>, ended_before: i64, horizon: Option<i64>) -> Result<u64, Error> {
        let transaction = begin(&self.db).await?;
        let statement = self.dialect.batch(ENDED, vec![ended_before.into()], Batch::ids(ids));
        let rows = transaction.query_all_raw(statement).await?;
        if rows.is_empty() {
            return Ok(0);
        }
        remove(&transaction, self.dialect, &rows).await?;
        if let Some(horizon) = horizon {
            transaction.execute_raw(self.dialect.statement(RAISE_HORIZON, vec![horizon.into()])).await?;
        }
        transaction.commit().await?;
        Ok(rows.len() as u64)
    }
}

impl Pruning {
    /// Prunes the next page and returns the number of deleted processes; `None` at the end.
    ///
    /// # Errors
    /// The database does not answer; deleted rows stay deleted.
    pub async fn next(&mut self) -> Result<Option<u64>, Error> {
        let Some(ids) = self.walk.next_ids(&self.store.db, self.store.dialect, PAGE_ROWS).await? else {
            return Ok(None);
        };
        Ok(Some(self.store.remove_ended(ids, self.ended_before, Some(self.ended_before)).await?))
    }
}

/// Deletes rows that launches from outside have just inserted if they are older than the prune horizon, since these
/// processes may have run before. Returns their ids.
///
/// It must read the horizon after the insertion: an insertion that conflicts with a row that is being pruned waits for
/// that transaction, which sets the horizon.
pub(super) async fn take_back_pruned(
    transaction: &DatabaseTransaction,
    dialect: Dialect,
    inserted: impl Iterator<Item = Pid>,
) -> Result<HashSet<Pid>, Error> {
    // An id that is no UUIDv7 has no time.
    let made: Vec<(Pid, i64)> = inserted.filter_map(|pid| Some((pid, pid.made_at()?))).collect();
    if made.is_empty() {
        return Ok(HashSet::new());
    }
    let row = transaction.query_one_raw(dialect.statement("SELECT before FROM pruned", vec![])).await?;
    let Some(row) = row else { return Ok(HashSet::new()) };
    let horizon: i64 = row.try_get_by_index(0)?;
    let pruned: HashSet<Pid> = made.into_iter().filter(|(_, at)| *at < horizon).map(|(pid, _)| pid).collect();
    if !pruned.is_empty() {
        let batch = Batch::ids(pruned.iter().copied().map(Uuid::from));
        let rows = transaction.query_all_raw(dialect.batch(THESE, vec![], batch)).await?;
        remove(transaction, dialect, &rows).await?;
    }
    Ok(pruned)
}

/// A row of [`ENDED`] or [`THESE`].
#[derive(FromQueryResult)]
struct Labelled {
    id: Uuid,
    labels: String,
}

/// Deletes processes with all their rows; `rows` are rows of [`Labelled`].
async fn remove(transaction: &DatabaseTransaction, dialect: Dialect, rows: &[QueryResult]) -> Result<(), Error> {
    let mut ids: Vec<Uuid> = Vec::with_capacity(rows.len());
    let mut labels: Vec<[Value; 3]> = Vec::new();
    for Labelled { id, labels: text } in read(rows)? {
        let of_row: BTreeMap<String, String> =
            serde_json::from_str(&text).map_err(|error| Error::Unreadable(format!("labels of {id}: {error}")))?;
        labels.extend(of_row.into_iter().map(|(key, value)| [key.into(), value.into(), id.into()]));
        ids.push(id);
    }
    for page in labels.chunks(LABELS_MAX) {
        let mut batch = Batch::new(LABEL);
        page.iter().for_each(|label| batch.push(label.clone()));
        let sql = "WITH {rows} DELETE FROM label WHERE (key, value, id) IN (SELECT b_key, b_value, b_id FROM b)";
        transaction.execute_raw(dialect.batch(sql, vec![], batch)).await?;
    }
    // A job that may still run must still be ended.
    let sql = "WITH {rows} DELETE FROM job WHERE pid IN (SELECT b_id FROM b) AND ended_at IS NOT NULL";
    transaction.execute_raw(dialect.batch(sql, vec![], Batch::ids(ids.iter().copied()))).await?;
    let tables = [("output", "pid"), ("attempt", "pid"), ("event", "pid"), ("spec", "id"), ("process", "id")];
    for (table, column) in tables {
        let sql = format!("WITH {{rows}} DELETE FROM {table} WHERE {column} IN (SELECT b_id FROM b)");
        transaction.execute_raw(dialect.batch(&sql, vec![], Batch::ids(ids.iter().copied()))).await?;
    }
    Ok(())
}

fn micros(age: Duration) -> i64 {
    i64::try_from(age.as_micros()).unwrap_or(i64::MAX / 2)
}

/// The selection, restricted to final states unless it names states. Processes in other states are not deleted anyway.
fn final_ones(select: &Select) -> Select {
    let finals = || [State::Finished, State::Excepted, State::Killed].map(|state| state.word().to_owned()).to_vec();
    Select { states: Some(select.states.clone().unwrap_or_else(finals)), ..select.clone() }
}

// Rows that another pruning has locked are left to it.
const ENDED: &str = "
    WITH {rows}
    SELECT p.id, s.labels FROM process p JOIN spec s ON s.id = p.id
    WHERE p.id IN (SELECT b_id FROM b) AND p.place = {ended} AND p.ended_at <= $1
    ORDER BY p.id {of_p_skip_locked}";

const THESE: &str = "
    WITH {rows} SELECT p.id, s.labels FROM process p JOIN spec s ON s.id = p.id WHERE p.id IN (SELECT b_id FROM b)";

const RAISE_HORIZON: &str = "
    INSERT INTO pruned (id, before) VALUES (1, $1)
    ON CONFLICT (id) DO UPDATE
    SET before = CASE WHEN excluded.before > pruned.before THEN excluded.before ELSE pruned.before END";
