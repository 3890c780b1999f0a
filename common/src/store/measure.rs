//! Measurements of the database, for benchmarks.

use sea_orm::{ConnectionTrait, FromQueryResult, QueryResult, Value};

use super::connection::{WORKER_CONNECTIONS, WORKER_CONNECTIONS_IDLE, WORKER_PROGRAM};
use super::dedicated_connection::DedicatedConnection;
use super::dialect::Dialect;
use super::error::Error;
use super::handle::Store;
use super::row::read;
use crate::id::Pid;

/// Counters of PostgreSQL that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meters {
    /// Transactions of the whole server that have written, each of which costs a flush to disk.
    pub commits: u64,
    /// Bytes of its write-ahead log.
    pub wal_bytes: u64,
    /// Rows of this database that were inserted, updated or deleted, according to the server's statistics. A session
    /// reports when it ends, and occasionally before.
    pub rows: u64,
}

/// A connection for repeated queries about many processes.
///
/// The statistics of a server may not include a session that was just accepted, or say that emptied tables are still
/// empty. So these queries find rows by indexes, with subqueries, which no planner reorders.
pub struct Watcher {
    connection: DedicatedConnection,
    dialect: Dialect,
}

impl Watcher {
    /// Returns whether a process has ended.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn has_ended(&self, pid: Pid) -> Result<bool, Error> {
        let sql = "SELECT place = {ended} AS ended FROM process WHERE id = $1";
        let statement = self.dialect.statement(sql, vec![uuid::Uuid::from(pid).into()]);
        let row = self.connection.query_one_raw(statement).await?;
        Ok(row.map(|row| row.try_get_by_index(0)).transpose()?.unwrap_or(false))
    }

    /// Counts the processes of a session in a place.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn count_in(&self, session: &str, place: crate::state::Place) -> Result<u64, Error> {
        let sql = "SELECT COUNT(*) AS n FROM spec s
                   WHERE s.session = $1 AND (SELECT p.place FROM process p WHERE p.id = s.id) = $2";
        let values: Vec<Value> = vec![session.to_owned().into(), place.code().into()];
        let row = self.query(sql, values).await?.into_iter().next().ok_or(Error::NoRow)?;
        Ok(row.try_get_by_index::<i64>(0)?.cast_unsigned())
    }

    /// Returns the times of the processes of a session.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn sums(&self, session: &str) -> Result<Sums, Error> {
        let sql = "SELECT s.created_at,
                          (SELECT a.started_at FROM attempt a WHERE a.pid = s.id AND a.epoch = 1 AND a.how = 'ok')
                          AS started_at,
                          (SELECT p.ended_at FROM process p WHERE p.id = s.id AND p.epoch = 1
                              AND p.place + 0 = {ended} AND p.state + 0 = {finished}) AS ended_at
                   FROM spec s WHERE s.session = $1";
        let mut sums = Sums::default();
        let (mut first, mut last) = (i64::MAX, i64::MIN);
        let rows = self.query(sql, vec![session.to_owned().into()]).await?;
        for Life { created_at, started_at, ended_at } in read(&rows)? {
            let (Some(claimed_at), Some(ended_at)) = (started_at, ended_at) else { continue };
            sums.good += 1;
            (first, last) = (first.min(created_at), last.max(ended_at));
            sums.waits_us.push(claimed_at - created_at);
            sums.works_us.push(ended_at - claimed_at);
        }
        sums.span_us = last.saturating_sub(first).max(0);
        Ok(sums)
    }

    async fn query(&self, sql: &str, values: Vec<Value>) -> Result<Vec<QueryResult>, Error> {
        Ok(self.connection.query_all_raw(self.dialect.statement(sql, values)).await?)
    }
}

/// A process of [`Watcher::sums`].
#[derive(FromQueryResult)]
struct Life {
    created_at: i64,
    started_at: Option<i64>,
    ended_at: Option<i64>,
}

/// A row of [`Store::meters`].
#[derive(FromQueryResult)]
struct MetersRow {
    commits: i64,
    wal_bytes: i64,
    n_rows: i64,
}

/// The times of a set of processes.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    /// The number of processes that succeeded in their first attempt and have its row.
    pub good: u64,
    /// The time from the first acceptance to the last end, in microseconds.
    pub span_us: i64,
    /// The times from acceptance to claim, in microseconds.
    pub waits_us: Vec<i64>,
    /// The times from claim to end, in microseconds.
    pub works_us: Vec<i64>,
}

/// The connections of a PostgreSQL server.
#[derive(Clone, Copy, Debug, FromQueryResult)]
pub struct Connections {
    /// The number that it accepts from ordinary users.
    pub usable: i64,
    /// The number of open connections, except those of workers and the one that asks.
    pub others: i64,
    /// The number of workers that have a connection.
    pub n_workers: i64,
}

impl Store {
    /// Reads the counters.
    ///
    /// # Errors
    /// The database does not answer, or is not PostgreSQL.
    pub async fn meters(&self) -> Result<Meters, Error> {
        if self.dialect == Dialect::Sqlite {
            return Err(Error::Url);
        }
        let sql = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS commits,
                          (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS wal_bytes,
                          (SELECT tup_inserted + tup_updated + tup_deleted FROM pg_stat_database
                           WHERE datname = current_database()) AS n_rows";
        let MetersRow { commits, wal_bytes, n_rows } = self.first(sql, vec![]).await?.ok_or(Error::NoRow)?;
        let [commits, wal_bytes, rows] = [commits, wal_bytes, n_rows].map(i64::cast_unsigned);
        Ok(Meters { commits, wal_bytes, rows })
    }

    /// Returns whether a task queue has queued or held processes.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn is_busy(&self, queue: &str) -> Result<bool, Error> {
        let sql = "SELECT EXISTS (SELECT 1 FROM process WHERE place = {queued} AND queue = $1)
                       OR EXISTS (SELECT 1 FROM process WHERE place = {held} AND queue = $1) AS busy";
        self.value(sql, vec![queue.to_owned().into()]).await
    }

    /// Counts the connections of the server, which all its databases share; `None` on SQLite.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn connections(&self) -> Result<Option<Connections>, Error> {
        if self.is_embedded() {
            return Ok(None);
        }
        // PostgreSQL 16 and later reserve some for other roles as well. Those of superusers are not counted.
        let sql = "SELECT (SELECT SUM(CASE name WHEN 'max_connections' THEN 1 ELSE -1 END * setting::bigint)::bigint
                           FROM pg_settings
                           WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')) AS usable,
                          COUNT(*) FILTER (WHERE application_name NOT LIKE $1 AND pid <> pg_backend_pid()) AS others,
                          COUNT(DISTINCT application_name) FILTER (WHERE application_name LIKE $1) AS n_workers
                   FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let connections = self.first(sql, vec![format!("{WORKER_PROGRAM} %").into()]).await?;
        Ok(Some(connections.ok_or(Error::NoRow)?))
    }

    /// Checks whether a PostgreSQL server has connections for this store's worker. A worker with more connections than
    /// an idle one counts with all that it may open, so that no worker joins a busy fleet and finds no connection a
    /// moment later.
    ///
    /// # Errors
    /// [`Error::Full`] if there are not enough connections; the database does not answer.
    pub async fn room_for_worker(&self) -> Result<(), Error> {
        if self.is_embedded() {
            return Ok(());
        }
        let sql = "WITH others AS (SELECT COUNT(*) AS n FROM pg_stat_activity
                                   WHERE backend_type = 'client backend' AND application_name LIKE $1
                                     AND application_name <> $2
                                   GROUP BY application_name)
                   SELECT COUNT(*) AS n_workers,
                          COALESCE(SUM(CASE WHEN n > $3 THEN GREATEST(n, $4) ELSE n END), 0)::bigint AS n_connections
                   FROM others";
        let [idle, busy] = [WORKER_CONNECTIONS_IDLE, WORKER_CONNECTIONS].map(i64::from);
        let values =
            vec![format!("{WORKER_PROGRAM} %").into(), self.access.name.clone().into(), idle.into(), busy.into()];
        let row = self.query(sql, values).await?.into_iter().next().ok_or(Error::NoRow)?;
        let (n_workers, n_connections): (i64, i64) = row.try_get_many_by_index()?;
        let Some(Connections { usable, others, .. }) = self.connections().await? else { return Ok(()) };
        if n_workers == 0 || n_connections + others + busy <= usable {
            return Ok(());
        }
        let mut text = format!("{usable} are usable, {n_workers} workers need {n_connections} of them");
        if others > 0 {
            text.push_str(&format!(", other programs have {others}"));
        }
        Err(Error::Full(format!("{text}, and one more worker needs {busy}")))
    }

    /// Opens a connection for repeated queries.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn watcher(&self) -> Result<Watcher, Error> {
        Ok(Watcher { connection: self.dedicated_connection().await?, dialect: self.dialect })
    }

    /// Closes this store's connections, so that their work is included in the server's statistics.
    pub async fn close(self) {
        // The server closes what is left when the program ends.
        let _ = self.db.close().await;
    }
}
