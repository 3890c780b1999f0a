//! The location of the database, connections to it, and transactions.

use std::path::PathBuf;
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::sqlx::{self, Connection};
use sea_orm::{
    ConnectOptions, Database, DatabaseConnection, DatabaseTransaction, DbErr, RuntimeErr, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};

use super::error::Error;

/// The time limit for getting a connection from the pool. After it the database counts as unreachable; callers retry.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The same limit for a lane, which falls back to the pool's connections afterwards.
const LANE_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// The same limit for a beat, which has three seconds in total.
const BEAT_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);

/// The time limit of a statement. No statement of Baton touches more than a page of rows.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long PostgreSQL lets a transaction stay idle, in milliseconds. A worker that is cut off or frozen within a
/// transaction keeps its row locks, and other workers could not free its processes after the lease. Half a lease is
/// long enough for any running worker.
const IDLE_TRANSACTION_TIMEOUT_MS: &str = "5000";

/// How long SQLite waits for another process's transaction.
const SQLITE_BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle time after which a lane's connection is closed. A server has few connections, and a worker has nothing to
/// commit most of the time.
pub(super) const LANE_IDLE: Duration = Duration::from_secs(10);

/// The same idle time for all other connections, which workers use every second.
const POOL_IDLE: Duration = Duration::from_secs(600);

/// Connections that a worker reserves: one for its beat and two for the lanes of its writer.
const CONNECTIONS_OF_ONE_PURPOSE: u32 = 3;

/// The default number of connections of a worker. PostgreSQL by default accepts 97 connections of ordinary users, which
/// is enough for 24 workers.
pub const WORKER_CONNECTIONS: u32 = 4;

/// The number of connections of an idle worker.
pub(super) const WORKER_CONNECTIONS_IDLE: u32 = 2;

/// Planner settings of a lane. They make PostgreSQL go through the rows of the batch in order and find each row by its
/// primary key. The right plan never depends on the size of a table, so it must not depend on statistics: those of a
/// table that has grown within minutes are wrong, and one scan of the whole table costs more than all other work.
/// `{id_of_b}` and the conditions of the other indexes rule out the plans that these settings still allow.
const LANE_PLANS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// The location of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A PostgreSQL URL, including any credentials.
    Postgres(String),
    /// A SQLite file. It is created if it does not exist.
    Sqlite(PathBuf),
}

impl Location {
    /// Parses a URL: `postgres://…`, or `sqlite:PATH` for a file.
    ///
    /// # Errors
    /// [`Error::Url`] if it is neither.
    pub fn parse(url: &str) -> Result<Self, Error> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Location::Postgres(url.to_owned()));
        }
        match url.strip_prefix("sqlite://").or_else(|| url.strip_prefix("sqlite:")) {
            Some(path) if !path.is_empty() => Ok(Location::Sqlite(PathBuf::from(path))),
            Some(_) | None => Err(Error::Url),
        }
    }
}

/// How a program uses the database's connections.
#[derive(Clone, Debug)]
pub struct Access {
    /// The `application_name` of its sessions, unless the URL names another.
    pub name: String,
    /// The largest number of connections in the pool, at least 1. The connections of the beat and of the writer's lanes
    /// are not part of it.
    pub pool: u32,
}

impl Default for Access {
    /// Four connections, for a program that runs several statements at once.
    fn default() -> Self {
        Self { name: "baton".to_owned(), pool: 4 }
    }
}

impl Access {
    /// The access of a worker with this total number of connections: one for its beat, two for its writer, and the rest
    /// for all other statements.
    pub fn of_worker(name: &str, connections: u32) -> Self {
        let pool = connections.saturating_sub(CONNECTIONS_OF_ONE_PURPOSE).max(1);
        Self { name: format!("{WORKER_PROGRAM} {name}"), pool }
    }
}

/// The start of a worker's `application_name`.
pub(super) const WORKER_PROGRAM: &str = "baton-worker";

/// The purpose of a connection.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Use {
    /// Everything except the hot path.
    Pool,
    /// A lane of the writer.
    Lane,
    /// The beat of a worker.
    Beat,
}

pub(super) async fn connect(location: &Location, access: &Access, purpose: Use) -> Result<DatabaseConnection, Error> {
    let mut options = match location {
        Location::Postgres(url) => {
            let mut options = ConnectOptions::new(url);
            options.statement_timeout(STATEMENT_TIMEOUT);
            let name = access.name.clone();
            options.map_sqlx_postgres_opts(move |options| {
                let options =
                    if options.get_application_name().is_none() { options.application_name(&name) } else { options };
                // Compiling a statement takes longer than running any of Baton's statements.
                let settings = [("idle_in_transaction_session_timeout", IDLE_TRANSACTION_TIMEOUT_MS), ("jit", "off")];
                let options = options.options(settings);
                if purpose == Use::Lane { options.options(LANE_PLANS) } else { options }
            });
            options
        }
        Location::Sqlite(path) => {
            // A path is not part of a URL: `%20` in it is three literal characters. The closure below sets the real
            // path.
            let mut options = ConnectOptions::new("sqlite:replaced");
            let path = path.clone();
            options.map_sqlx_sqlite_opts(move |options| {
                options
                    .filename(&path)
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .synchronous(SqliteSynchronous::Full)
                    .busy_timeout(SQLITE_BUSY_TIMEOUT)
            });
            options
        }
    };
    options
        .max_connections(if purpose == Use::Pool { access.pool.max(1) } else { 1 })
        // The first statement opens the connection: most programs commit nothing, and only workers beat.
        .connect_lazy(purpose != Use::Pool)
        .idle_timeout(if purpose == Use::Lane { LANE_IDLE } else { POOL_IDLE })
        .connect_timeout(ACQUIRE_TIMEOUT)
        .acquire_timeout(match purpose {
            Use::Pool => ACQUIRE_TIMEOUT,
            Use::Lane => LANE_ACQUIRE_TIMEOUT,
            Use::Beat => BEAT_ACQUIRE_TIMEOUT,
        })
        .test_before_acquire_if_idle_for(Duration::from_secs(30))
        .sqlx_logging(false);
    match Database::connect(options).await {
        Ok(db) => Ok(db),
        // The pool reports only a timeout; a single connection reports the reason.
        Err(error) => Err(refusal(location).await.unwrap_or_else(|| error.into())),
    }
}

/// Returns the reason why PostgreSQL rejects a connection, if it names one.
async fn refusal(location: &Location) -> Option<Error> {
    let Location::Postgres(url) = location else { return None };
    let connecting = tokio::time::timeout(ACQUIRE_TIMEOUT, sqlx::PgConnection::connect(url)).await.ok()?;
    connecting.err().map(|error| DbErr::Conn(RuntimeErr::SqlxError(error.into())).into())
}

/// Begins a transaction. On SQLite it takes the write lock at once: a transaction that takes it later fails if another
/// program has written in between.
pub(super) async fn begin(db: &DatabaseConnection) -> Result<DatabaseTransaction, Error> {
    let options =
        TransactionOptions { sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate), ..Default::default() };
    Ok(db.begin_with_options(options).await?)
}
