//! The handle that every operation on the database is a method of.

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

/// Key of the advisory lock under which migrations run, so that programs that start together do not migrate twice.
const MIGRATION_LOCK: i64 = 0x0062_6174_6f6e;

/// A database with Baton's schema. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pub(super) location: Location,
    pub(super) access: Access,
    pub(super) db: DatabaseConnection,
    /// No other statement waits before a beat, so that a worker that is busy keeps its lease.
    pub(super) beats: Arc<DedicatedConnection>,
    pub(super) dialect: Dialect,
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
        self.value(sql, vec![]).await
    }

    /// The database's time, in microseconds since 1970.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when it does not answer.
    pub async fn now(&self) -> Result<i64, Error> {
        self.value("SELECT {now} AS now", vec![]).await
    }

    /// What tells this database, which may be a schema of many, from all others; a copy of it has the same.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when it does not answer.
    pub async fn identity(&self) -> Result<Uuid, Error> {
        self.value("SELECT id FROM identity", vec![]).await
    }

    /// A connection that stays with its user, and the pool's while the server has none left for it.
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
            // No such table: a new database. Anything else shows up again in the migration itself.
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
