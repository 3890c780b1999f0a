//! Where the database is, and how connections to it are opened and transactions begun.

use std::path::PathBuf;
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::sqlx::{self, Connection};
use sea_orm::{
    ConnectOptions, Database, DatabaseConnection, DatabaseTransaction, DbErr, RuntimeErr, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};

use super::error::Error;

/// How long a statement may wait for a connection. Longer means that the database is away; callers try again.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The same for a lane, which uses the pool's connections after that.
const LANE_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// The same for a beat, which has three seconds in all.
const BEAT_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a statement may run. No statement of Baton touches more than a page of rows.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long PostgreSQL lets a transaction wait for its program, in milliseconds. A worker that is cut off or frozen in the
/// middle of one holds the locks of its rows, and nobody could free them after its lease: half a lease is long enough for
/// any program that is there.
const IDLE_TRANSACTION_TIMEOUT_MS: &str = "5000";

/// How long SQLite waits for another process's transaction.
const SQLITE_BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection of a lane that was not used for this long is closed: a server has few of them, and a worker has nothing to
/// commit for most of its life.
pub(super) const LANE_IDLE: Duration = Duration::from_secs(10);

/// The same for all other connections, which workers use every second.
const POOL_IDLE: Duration = Duration::from_secs(600);

/// Connections of a worker that have one purpose: its beat, and the lanes of its writer.
const CONNECTIONS_OF_ONE_PURPOSE: u32 = 3;

/// Connections of a worker unless it is configured. A default PostgreSQL takes 97 beside those of superusers, which are
/// 24 workers.
pub const WORKER_CONNECTIONS: u32 = 4;

/// Those of a worker that has nothing to do.
pub(super) const WORKER_CONNECTIONS_IDLE: u32 = 2;

/// How a lane's statements are planned: over the rows of the batch, in their order, each found by the key. Which plan is
/// right never depends on how large a table is, so it is not left to its statistics: those of a table that has grown
/// within minutes are wrong, and a plan that reads the whole table costs more than all the rest. What the settings leave
/// open, `{id_of_b}` decides, and that no other index than the key can be searched by the id alone.
const LANE_PLANS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// Where the database is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A PostgreSQL URL, with whatever credentials it carries.
    Postgres(String),
    /// A SQLite file, made when it is absent.
    Sqlite(PathBuf),
}

impl Location {
    /// Reads a URL: `postgres://…`, or `sqlite:PATH` for a file.
    ///
    /// # Errors
    /// [`Error::Url`] when it is neither.
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

/// What a program uses of the database's connections.
#[derive(Clone, Debug)]
pub struct Access {
    /// What the server calls them, as `application_name`; that of the URL goes first.
    pub name: String,
    /// Connections at most, but for those of the beat and of the writer's lanes; at least 1.
    pub pool: u32,
}

impl Default for Access {
    /// Four, for a program that asks several things at once.
    fn default() -> Self {
        Self { name: "baton".to_owned(), pool: 4 }
    }
}

impl Access {
    /// That of a worker which has this many connections in all: one for its beat, two for what it commits, and the rest for
    /// everything else.
    pub fn of_worker(name: &str, connections: u32) -> Self {
        let pool = connections.saturating_sub(CONNECTIONS_OF_ONE_PURPOSE).max(1);
        Self { name: format!("{WORKER_PROGRAM} {name}"), pool }
    }
}

/// How the `application_name` of a worker begins.
pub(super) const WORKER_PROGRAM: &str = "baton-worker";

/// What connections are for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Use {
    /// Everything but the hot path.
    Pool,
    /// One lane of the writer.
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
                // Compiling a statement takes longer than any of Baton's statements runs.
                let settings = [("idle_in_transaction_session_timeout", IDLE_TRANSACTION_TIMEOUT_MS), ("jit", "off")];
                let options = options.options(settings);
                if purpose == Use::Lane { options.options(LANE_PLANS) } else { options }
            });
            options
        }
        Location::Sqlite(path) => {
            // A path is not part of a URL: `%20` in it is three characters. What the URL names is replaced.
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
        // The first statement opens it: most programs have nothing to commit, and only workers beat.
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
        // The pool says only that it got no connection in time; one connection by itself says why.
        Err(error) => Err(refusal(location).await.unwrap_or_else(|| error.into())),
    }
}

/// Why PostgreSQL gives no connection, if it says so.
async fn refusal(location: &Location) -> Option<Error> {
    let Location::Postgres(url) = location else { return None };
    let connecting = tokio::time::timeout(ACQUIRE_TIMEOUT, sqlx::PgConnection::connect(url)).await.ok()?;
    connecting.err().map(|error| DbErr::Conn(RuntimeErr::SqlxError(error.into())).into())
}

/// Begins a transaction that, on SQLite, is the writing one from its start: one that only becomes it later is refused
/// when another program has written in between.
pub(super) async fn begin(db: &DatabaseConnection) -> Result<DatabaseTransaction, Error> {
    let options =
        TransactionOptions { sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate), ..Default::default() };
    Ok(db.begin_with_options(options).await?)
}
