//! A connection that stays with its user. A pool asks the server, each time that a connection is given back to it, whether
//! that is still alive: a way there and back, and as much work as a small statement, after every statement.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sea_orm::prelude::async_trait::async_trait;
use sea_orm::sqlx::pool::PoolConnection;
use sea_orm::sqlx::{self, AssertSqlSafe, Connection, Postgres};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr,
    Statement, Values,
};
use sea_query_sqlx::SqlxValues;

use super::{Error, Location, Use, begin, connect};

/// A connection that was not used for so long is asked first whether it is still alive.
const FRESH: Duration = Duration::from_secs(30);

/// How long the server has to say so.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// One connection, used by one task at a time. On SQLite, which is in this program, it is the pool's.
pub(super) struct OwnConnection {
    /// A pool of one, which opens the connection, also again.
    db: DatabaseConnection,
    is_postgres: bool,
    /// With the time of its last use; none while it is in use, and after something went wrong with it.
    kept: Mutex<Option<(PoolConnection<Postgres>, Instant)>>,
}

impl OwnConnection {
    pub(super) async fn open(location: &Location) -> Result<Self, Error> {
        let db = connect(location, Use::Lane).await?;
        let is_postgres = matches!(location, Location::Postgres(_));
        Ok(Self { db, is_postgres, kept: Mutex::new(None) })
    }

    /// A transaction on this connection.
    pub(super) async fn begin(&self) -> Result<DatabaseTransaction, Error> {
        self.give_back();
        begin(&self.db).await
    }

    fn kept(&self) -> Option<(PoolConnection<Postgres>, Instant)> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn give_back(&self) {
        if let Some((connection, used_at)) = self.kept()
            && used_at.elapsed() >= FRESH
        {
            // The pool would ask the server whether it is alive, and wait for as long as that takes.
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

    /// Keeps it for the next statement. What is dropped instead, as after an error, goes back to the pool, which looks
    /// whether it can be used.
    fn keep(&self, connection: PoolConnection<Postgres>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection, Instant::now()));
    }
}

impl Drop for OwnConnection {
    fn drop(&mut self) {
        // The pool takes connections back only where there is a runtime.
        if let Some((connection, _)) = self.kept() {
            drop(connection.detach());
        }
    }
}

#[async_trait]
impl ConnectionTrait for OwnConnection {
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
        let mut connection = self.take().await?;
        let values = SqlxValues(statement.values.unwrap_or(Values(Vec::new())));
        let query = sqlx::query_with(AssertSqlSafe(statement.sql), values);
        let rows = query.fetch_all(&mut *connection).await.map_err(error)?;
        self.keep(connection);
        Ok(rows.into_iter().map(QueryResult::from).collect())
    }
}

fn error(error: sqlx::Error) -> DbErr {
    DbErr::Query(RuntimeErr::SqlxError(error.into()))
}
