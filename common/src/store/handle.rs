//! [`Store`], the handle on the database. Each operation is one of its methods, in the file of its topic.

use std::sync::Arc;

use sea_orm::{ConnectionTrait, DatabaseConnection, FromQueryResult, QueryResult, TryGetable, Value};
use sea_orm_migration::MigratorTrait;
use uuid::Uuid;

use super::connection::{Access, Location, Use, begin, connect};
use super::dedicated_connection::DedicatedConnection;
use super::dialect::Dialect;
use super::error::Error;
use super::migration;
use super::row::read;

/// The key of the advisory lock under which migrations run, so that programs that start at the same time migrate once.
const MIGRATION_LOCK: i64 = 0x0062_6174_6f6e;

/// A database with Baton's schema. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pub(super) location: Location,
    pub(super) access: Access,
    pub(super) db: DatabaseConnection,
    /// A dedicated connection, so that a beat never waits for another statement and a busy worker keeps its lease.
    pub(super) beats: Arc<DedicatedConnection>,
    pub(super) dialect: Dialect,
}

impl Store {
    /// Connects, and migrates the schema if it is older than this program or absent. A newer schema is left as it is.
    ///
    /// # Errors
    /// See [`Error`]. [`Error::SchemaNewer`] means that this program cannot use the schema and must be updated.
    pub async fn open(location: Location) -> Result<Self, Error> {
        Self::open_as(location, Access::default()).await
    }

    /// Like [`Store::open`], with the given connections.
    ///
    /// # Errors
    /// See [`Store::open`].
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
        // Boxed because the futures are large and would enlarge those of all callers.
        let db = Box::pin(connect(&location, &access, Use::Pool)).await?;
        let beats = DedicatedConnection::open(&location, &access, Use::Beat, Some(db.clone()));
        let beats = Arc::new(Box::pin(beats).await?);
        let store = Self { location, access, db, beats, dialect };
        Box::pin(store.migrate()).await?;
        Ok(store)
    }

    /// Whether this is SQLite, where only one program at a time may hold processes.
    pub fn is_embedded(&self) -> bool {
        self.dialect == Dialect::Sqlite
    }

    /// Returns the name and version of the database server.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if the database does not answer.
    pub async fn server_version(&self) -> Result<String, Error> {
        let sql = match self.dialect {
            Dialect::Postgres => "SELECT 'PostgreSQL ' || current_setting('server_version') AS version",
            Dialect::Sqlite => "SELECT 'SQLite ' || sqlite_version() AS version",
        };
        self.value(sql, vec![]).await
    }

    /// Returns the database's time, in microseconds since 1970.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if the database does not answer.
    pub async fn now(&self) -> Result<i64, Error> {
        self.value("SELECT {now} AS now", vec![]).await
    }

    /// Returns the id of this database (on PostgreSQL: of this schema). A copy of the database has the same id.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if the database does not answer.
    pub async fn identity(&self) -> Result<Uuid, Error> {
        self.value("SELECT id FROM identity", vec![]).await
    }

    /// Opens a connection for one user, which falls back to the pool while the server has no connection left.
    pub(super) async fn dedicated_connection(&self) -> Result<DedicatedConnection, Error> {
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
        let Ok(applied) = self.column::<String>("SELECT version FROM seaql_migrations", vec![]).await else {
            // The table does not exist: a new database. Any other error shows up again in the migration.
            return Ok(false);
        };
        let is_breaking = |version: &&String| version.contains(migration::BREAKING) && !known.contains(version);
        if let Some(newer) = applied.iter().find(is_breaking) {
            return Err(Error::SchemaNewer { migration: newer.clone() });
        }
        Ok(known.iter().all(|version| applied.contains(version)))
    }

    pub(super) async fn query(&self, template: &str, values: Vec<Value>) -> Result<Vec<QueryResult>, Error> {
        Ok(self.db.query_all_raw(self.dialect.statement(template, values)).await?)
    }

    /// Returns the rows that a statement returns.
    pub(super) async fn all<T: FromQueryResult>(&self, template: &str, values: Vec<Value>) -> Result<Vec<T>, Error> {
        read(&self.query(template, values).await?)
    }

    /// Returns the first row that a statement returns, if it returns any.
    pub(super) async fn first<T: FromQueryResult>(
        &self,
        template: &str,
        values: Vec<Value>,
    ) -> Result<Option<T>, Error> {
        let rows = self.query(template, values).await?;
        Ok(rows.first().map(|row| T::from_query_result(row, "")).transpose()?)
    }

    /// Returns the first column of each row that a statement returns.
    pub(super) async fn column<T: TryGetable>(&self, template: &str, values: Vec<Value>) -> Result<Vec<T>, Error> {
        let rows = self.query(template, values).await?;
        Ok(rows.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?)
    }

    /// Returns the first column of the only row that a statement returns.
    ///
    /// # Errors
    /// [`Error::NoRow`] when it returns none.
    pub(super) async fn value<T: TryGetable>(&self, template: &str, values: Vec<Value>) -> Result<T, Error> {
        self.column(template, values).await?.into_iter().next().ok_or(Error::NoRow)
    }

    pub(super) async fn execute(&self, template: &str, values: Vec<Value>) -> Result<u64, Error> {
        Ok(self.db.execute_raw(self.dialect.statement(template, values)).await?.rows_affected())
    }
}
