//! Removes what has ended long ago, with everything that belongs to it, page by page while the fleet works.
//!
//! A launch that comes again after its process was pruned would run again, so the time up to which things are pruned is
//! recorded with each page: a launch from outside that is older and has no row is refused.

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

/// Processes in one transaction: some tenths of a second, in which nobody else waits for them, since they have ended.
const PAGE_ROWS: u32 = 2_000;

/// A pruning that is under way. It may be dropped at any time; another one goes on with what is left.
pub struct Pruning {
    store: Store,
    ended_before: i64,
    walk: Walk,
}

impl Store {
    /// How many processes of a selection have ended at least this long ago, by the words of their states.
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

    /// Begins to remove those processes of a selection that have ended at least this long ago; [`Pruning::next`] does it.
    ///
    /// From its first page on, a launch from outside that is older than this and has no row is refused.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn prune(&self, select: &Select, age: Duration) -> Result<Pruning, Error> {
        let ended_before = self.now().await? - micros(age);
        let walk = Walk::new(&final_ones(select), Order::OldestFirst, None);
        Ok(Pruning { store: self.clone(), ended_before, walk })
    }

    /// Removes those of these processes that have ended, whenever that was, and gives their number. Their caller knows
    /// that no launch of theirs comes again; older launches are not refused for it.
    ///
    /// # Errors
    /// The database does not answer; what was removed stays so.
    pub async fn erase(&self, pids: &[Pid]) -> Result<u64, Error> {
        let mut walk = Walk::new(&Select::of(pids.to_vec()), Order::OldestFirst, None);
        let mut count = 0;
        while let Some(ids) = walk.next_ids(&self.db, self.dialect, PAGE_ROWS).await? {
            count += self.remove_ended(ids, i64::MAX, None).await?;
        }
        Ok(count)
    }

    /// Removes those of these rows that had ended by a time, in one transaction that records the horizon.
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
    /// Looks at the next page and gives how many processes of it were removed; `None` at the end.
    ///
    /// # Errors
    /// The database does not answer; what was removed stays so.
    pub async fn next(&mut self) -> Result<Option<u64>, Error> {
        let Some(ids) = self.walk.next_ids(&self.store.db, self.store.dialect, PAGE_ROWS).await? else {
            return Ok(None);
        };
        Ok(Some(self.store.remove_ended(ids, self.ended_before, Some(self.ended_before)).await?))
    }
}

/// Takes back rows that launches from outside have just inserted, if they are older than what is kept: these processes
/// may have been here before. Gives their ids.
///
/// It must read the horizon after the rows were inserted: an insertion that met the row of a process that was just being
/// pruned has waited for the end of that, and only then the horizon stands.
pub(super) async fn take_back_pruned(
    transaction: &DatabaseTransaction,
    dialect: Dialect,
    inserted: impl Iterator<Item = Pid>,
) -> Result<HashSet<Pid>, Error> {
    // The time of an id that is no UUIDv7 is not known.
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

/// Removes processes with everything that belongs to them; `rows` are those of [`Labelled`].
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
    // A job that is not known to have ended is still somebody's to end.
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

/// The selection in the states that it asks for, or in every final one. What is in another state is not touched anyway.
fn final_ones(select: &Select) -> Select {
    let finals = || [State::Finished, State::Excepted, State::Killed].map(|state| state.word().to_owned()).to_vec();
    Select { states: Some(select.states.clone().unwrap_or_else(finals)), ..select.clone() }
}

// What another pruning has in hand is left to it.
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
