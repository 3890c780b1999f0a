//! A connection that stays with its user. A pool pings the server whenever a connection is returned to it: one more
//! round trip, which costs as much as a small statement, after each statement.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sea_orm::prelude::async_trait::async_trait;
use sea_orm::sqlx::pool::PoolConnection;
use sea_orm::sqlx::{self, AssertSqlSafe, Connection, PgConnection, Postgres};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr,
    Statement, Values,
};
use sea_query_sqlx::SqlxValues;

use super::connection::{Access, Location, Use, begin, connect};
use super::error::Error;

/// Idle time after which the connection is pinged before its next use.
const FRESH: Duration = Duration::from_secs(30);

/// How long the fallback is used after the server had no connection left.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// The time limit of a ping.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// One connection, used by one task at a time. On SQLite, which is embedded, statements go through the pool.
pub(super) struct DedicatedConnection {
    /// A pool of one connection, which opens and reopens it.
    db: DatabaseConnection,
    /// The pool that serves while the server has no connection left.
    fallback: Option<DatabaseConnection>,
    /// The time of the last failed attempt to connect.
    refused_at: Mutex<Option<Instant>>,
    is_postgres: bool,
    /// The idle connection and the time of its last use; `None` while it is in use and after an error.
    kept: Mutex<Option<(PoolConnection<Postgres>, Instant)>>,
}

impl DedicatedConnection {
    pub(super) async fn open(
        location: &Location,
        access: &Access,
        purpose: Use,
        fallback: Option<DatabaseConnection>,
    ) -> Result<Self, Error> {
        let db = connect(location, access, purpose).await?;
        let is_postgres = matches!(location, Location::Postgres(_));
        Ok(Self { db, fallback, refused_at: Mutex::new(None), is_postgres, kept: Mutex::new(None) })
    }

    /// Begins a transaction on this connection.
    pub(super) async fn begin(&self) -> Result<DatabaseTransaction, Error> {
        self.give_back();
        if let Some(fallback) = self.fallback() {
            return begin(fallback).await;
        }
        match begin(&self.db).await {
            Err(Error::Unreachable(_) | Error::Full(_)) if self.refuse() => begin(self.fallback_or_own()).await,
            begun => begun,
        }
    }

    /// Closes the connection; the next statement opens it again.
    pub(super) async fn close_idle(&self) {
        if let Some((connection, _)) = self.kept() {
            // If closing fails, the connection is gone anyway.
            let _ = tokio::time::timeout(PING_LIMIT, connection.close()).await;
        }
    }

    /// Opens the connection if it is not open.
    pub(super) async fn warm(&self) -> Result<(), Error> {
        if self.is_postgres {
            let connection = self.take().await?;
            self.keep(connection);
        }
        Ok(())
    }

    /// Returns the fallback for a while after the server had no connection left.
    fn fallback(&self) -> Option<&DatabaseConnection> {
        let refused_at = *self.refused_at.lock().unwrap_or_else(PoisonError::into_inner);
        self.fallback.as_ref().filter(|_| refused_at.is_some_and(|at| at.elapsed() < REFUSED_FOR))
    }

    fn fallback_or_own(&self) -> &DatabaseConnection {
        self.fallback.as_ref().unwrap_or(&self.db)
    }

    /// Records that there is no connection, and returns whether there is a fallback.
    fn refuse(&self) -> bool {
        *self.refused_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.fallback.is_some()
    }

    fn kept(&self) -> Option<(PoolConnection<Postgres>, Instant)> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn give_back(&self) {
        if let Some((connection, used_at)) = self.kept()
            && used_at.elapsed() >= FRESH
        {
            // The pool would ping the server, and wait for as long as that takes.
            drop(connection.detach());
        }
    }

    async fn take(&self) -> Result<PoolConnection<Postgres>, DbErr> {
        if let Some((mut connection, used_at)) = self.kept() {
            if used_at.elapsed() < FRESH
                || matches!(tokio::time::timeout(PING_LIMIT, connection.ping()).await, Ok(Ok(())))
            {
                return Ok(connection);
            }
            drop(connection.detach());
        }
        self.db.get_postgres_connection_pool().acquire().await.map_err(error)
    }

    /// Keeps the connection for the next statement.
    fn keep(&self, connection: PoolConnection<Postgres>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection, Instant::now()));
    }
}

impl Drop for DedicatedConnection {
    fn drop(&mut self) {
        // A pool takes connections back only within a runtime.
        if let Some((connection, _)) = self.kept() {
            drop(connection.detach());
        }
    }
}

#[async_trait]
impl ConnectionTrait for DedicatedConnection {
    fn get_database_backend(&self) -> DbBackend {
        self.db.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.give_back();
        self.db.execute_raw(statement).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.give_back();
        self.db.execute_unprepared(sql).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        Ok(self.query_all_raw(statement).await?.into_iter().next())
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        if !self.is_postgres {
            return self.db.query_all_raw(statement).await;
        }
        if let Some(fallback) = self.fallback() {
            return fallback.query_all_raw(statement).await;
        }
        let connection = match self.take().await {
            Ok(connection) => connection,
            // The server has no connection left, or does not answer; the fallback will report the latter as well.
            Err(_) if self.refuse() => return self.fallback_or_own().query_all_raw(statement).await,
            Err(error) => return Err(error),
        };
        let mut used = Used { own: self, connection: Some(connection) };
        let values = SqlxValues(statement.values.unwrap_or(Values(Vec::new())));
        let query = sqlx::query_with(AssertSqlSafe(statement.sql), values);
        let rows = query.fetch_all(used.connection()).await;
        if matches!(rows, Ok(_) | Err(sqlx::Error::Database(_))) {
            used.keep();
        }
        Ok(rows.map_err(error)?.into_iter().map(QueryResult::from).collect())
    }
}

/// A connection with a statement in flight. Dropping it closes the connection: the answer may never come, and the next
/// statement must not wait for it.
struct Used<'a> {
    own: &'a DedicatedConnection,
    connection: Option<PoolConnection<Postgres>>,
}

impl Used<'_> {
    fn connection(&mut self) -> &mut PgConnection {
        self.connection.as_mut().expect("it is taken only by what consumes this")
    }

    fn keep(mut self) {
        if let Some(connection) = self.connection.take() {
            self.own.keep(connection);
        }
    }
}

impl Drop for Used<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
    }
}

fn error(error: sqlx::Error) -> DbErr {
    DbErr::Query(RuntimeErr::SqlxError(error.into()))
}
