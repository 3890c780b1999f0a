//! The database: PostgreSQL or SQLite, from the same statements.
//!
//! The database decides and the broker only tells. Every rule of the protocol (claim only what is queued, fence every
//! write, clear `woken`, apply what is desired when a row leaves its holder) is in the SQL of one file here:
//! [`submit`], [`writer`] (claims and fenced writes, group-committed), [`control`], [`sweep`], [`worker`], [`prune`];
//! [`query`], [`explain`] and [`needed`] only read.

pub mod blob;
pub mod control;
mod dedicated_connection;
mod dialect;
mod error;
pub mod explain;
mod fenced;
pub mod fleet;
pub mod gc_roots;
pub mod measure;
mod migration;
mod objects;
pub mod prune;
pub mod query;
mod select;
pub mod site;
pub mod statements;
pub mod submit;
pub mod sweep;
pub mod worker;
pub mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::sqlx::{self, Connection};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbErr, QueryResult, RuntimeErr,
    SqliteTransactionMode, TransactionOptions, TransactionTrait, Value,
};
use sea_orm_migration::MigratorTrait;
use uuid::Uuid;

use dedicated_connection::DedicatedConnection;
use dialect::Dialect;
pub use error::Error;

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
const LANE_IDLE: Duration = Duration::from_secs(10);

/// The same for all other connections, which workers use every second.
const POOL_IDLE: Duration = Duration::from_secs(600);

/// Connections of a worker that have one purpose: its beat, and the lanes of its writer.
const CONNECTIONS_OF_ONE_PURPOSE: u32 = 3;

/// Connections of a worker unless it is configured. A default PostgreSQL takes 97 beside those of superusers, which are
/// 24 workers.
pub const WORKER_CONNECTIONS: u32 = 4;

/// Those of a worker that has nothing to do.
const WORKER_CONNECTIONS_IDLE: u32 = 2;

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

/// Key of the advisory lock under which migrations run, so that programs that start together do not migrate twice.
const MIGRATION_LOCK: i64 = 0x0062_6174_6f6e;

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
const WORKER_PROGRAM: &str = "baton-worker";

/// A database with Baton's schema. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    location: Location,
    access: Access,
    db: DatabaseConnection,
    /// No other statement waits before a beat, so that a worker that is busy keeps its lease.
    beats: Arc<DedicatedConnection>,
    dialect: Dialect,
}

impl Store {
    /// Connects, and brings the schema to this program's version if it is older or absent. One that is newer stays.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::SchemaNewer`] means that the schema is of no use to this program, which must be updated.
    pub async fn open(location: Location) -> Result<Self, Error> {
        Self::open_as(location, Access::default()).await
    }

    /// The same, with other connections.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open_as(location: Location, access: Access) -> Result<Self, Error> {
        if let Location::Sqlite(path) = &location
            && let Some(folder) = path.parent()
        {
            std::fs::create_dir_all(folder).map_err(|source| Error::Folder { path: folder.to_owned(), source })?;
        }
        let dialect = match location {
            Location::Postgres(_) => Dialect::Postgres,
            Location::Sqlite(_) => Dialect::Sqlite,
        };
        // Boxed, because the futures are large and every caller would carry them.
        let db = Box::pin(connect(&location, &access, Use::Pool)).await?;
        let beats = DedicatedConnection::open(&location, &access, Use::Beat, Some(db.clone()));
        let beats = Arc::new(Box::pin(beats).await?);
        let store = Self { location, access, db, beats, dialect };
        Box::pin(store.migrate()).await?;
        Ok(store)
    }

    /// Whether this is SQLite, of which only one program at a time may hold processes.
    pub fn is_embedded(&self) -> bool {
        self.dialect == Dialect::Sqlite
    }

    /// What the server says of its version.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when it does not answer.
    pub async fn server_version(&self) -> Result<String, Error> {
        let sql = match self.dialect {
            Dialect::Postgres => "SELECT 'PostgreSQL ' || current_setting('server_version') AS version",
            Dialect::Sqlite => "SELECT 'SQLite ' || sqlite_version() AS version",
        };
        let row = self.query(sql, vec![]).await?.into_iter().next().ok_or(Error::NoRow)?;
        Ok(row.try_get("", "version")?)
    }

    /// The database's time, in microseconds since 1970.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when it does not answer.
    pub async fn now(&self) -> Result<i64, Error> {
        let row = self.query("SELECT {now} AS now", vec![]).await?.into_iter().next().ok_or(Error::NoRow)?;
        Ok(row.try_get("", "now")?)
    }

    /// What tells this database, which may be a schema of many, from all others; a copy of it has the same.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when it does not answer.
    pub async fn identity(&self) -> Result<Uuid, Error> {
        let row = self.query("SELECT id FROM identity", vec![]).await?.into_iter().next().ok_or(Error::NoRow)?;
        Ok(row.try_get("", "id")?)
    }

    /// A connection that stays with its user, and the pool's while the server has none left for it.
    async fn dedicated_connection(&self) -> Result<DedicatedConnection, Error> {
        DedicatedConnection::open(&self.location, &self.access, Use::Lane, Some(self.db.clone())).await
    }

    async fn migrate(&self) -> Result<(), Error> {
        if self.schema_is_current().await? {
            return Ok(());
        }
        let transaction = begin(&self.db).await?;
        if self.dialect == Dialect::Postgres {
            let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
            transaction.execute_unprepared(&lock).await?;
        }
        migration::Migrator::up(&transaction, None).await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn schema_is_current(&self) -> Result<bool, Error> {
        let known: Vec<String> =
            migration::Migrator::migrations().iter().map(|migration| migration.name().to_owned()).collect();
        let Ok(rows) = self.query("SELECT version FROM seaql_migrations", vec![]).await else {
            // No such table: a new database. Anything else shows up again in the migration itself.
            return Ok(false);
        };
        let applied = rows.iter().map(|row| row.try_get("", "version")).collect::<Result<Vec<String>, _>>()?;
        let is_breaking = |version: &&String| version.contains(migration::BREAKING) && !known.contains(version);
        if let Some(newer) = applied.iter().find(is_breaking) {
            return Err(Error::SchemaNewer { migration: newer.clone() });
        }
        Ok(known.iter().all(|version| applied.contains(version)))
    }

    async fn query(&self, template: &str, values: Vec<Value>) -> Result<Vec<QueryResult>, Error> {
        Ok(self.db.query_all_raw(self.dialect.statement(template, values)).await?)
    }

    async fn execute(&self, template: &str, values: Vec<Value>) -> Result<u64, Error> {
        Ok(self.db.execute_raw(self.dialect.statement(template, values)).await?.rows_affected())
    }
}

/// What connections are for.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    /// Everything but the hot path.
    Pool,
    /// One lane of the writer.
    Lane,
    /// The beat of a worker.
    Beat,
}

async fn connect(location: &Location, access: &Access, purpose: Use) -> Result<DatabaseConnection, Error> {
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
async fn begin(db: &DatabaseConnection) -> Result<DatabaseTransaction, Error> {
    let options =
        TransactionOptions { sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate), ..Default::default() };
    Ok(db.begin_with_options(options).await?)
}
