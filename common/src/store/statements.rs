//! The statements of a worker without its group commit: one call is one statement, or one transaction. A benchmark measures
//! with them what the database can do. Workers use [`super::writer`].

use std::collections::HashMap;

use sea_orm::ConnectionTrait;

use super::blob::Checkpoint;
use super::dedicated_connection::DedicatedConnection;
use super::dialect::Dialect;
use super::writer::{Claimed, Fence, Fenced};
use super::{Error, Location, Store, fenced};
use crate::id::{Incarnation, Pid};

/// A connection like that of a worker's lane, with an incarnation that no row of `worker` has.
pub struct Lane {
    db: DedicatedConnection,
    dialect: Dialect,
    me: Incarnation,
}

impl Store {
    /// Creates a schema with empty tables in the same PostgreSQL database and opens it. [`Store::drop_schema`] removes it.
    ///
    /// # Errors
    /// [`Error::Url`] on SQLite; the database does not answer, or its user may not create schemas.
    pub async fn create_schema(&self, schema: &str) -> Result<Store, Error> {
        let Location::Postgres(url) = &self.location else { return Err(Error::Url) };
        self.db.execute_unprepared(&format!("CREATE SCHEMA {schema}")).await?;
        let separator = if url.contains('?') { '&' } else { '?' };
        Store::open(Location::Postgres(format!("{url}{separator}options=-c%20search_path%3D{schema}"))).await
    }

    /// Drops a schema with all its tables.
    ///
    /// # Errors
    /// The database does not answer; the schema still exists.
    pub async fn drop_schema(&self, schema: &str) -> Result<(), Error> {
        self.db.execute_unprepared(&format!("DROP SCHEMA {schema} CASCADE")).await?;
        Ok(())
    }

    /// Opens a connection like that of a worker's lane.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn lane(&self) -> Result<Lane, Error> {
        Ok(Lane { db: self.dedicated_connection().await?, dialect: self.dialect, me: Incarnation::generate() })
    }
}

impl Lane {
    /// Claims the queued processes among these, each from the queue that is named with it. Returns those that it claimed.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn claim(&self, claims: &[(Pid, String)]) -> Result<HashMap<Pid, Claimed>, Error> {
        fenced::claim(&self.db, self.dialect, self.me, claims).await
    }

    /// Applies fenced writes to processes for which no request is pending. The writes are in the order of their ids.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn write(&self, writes: &[&Fenced]) -> Result<(), Error> {
        fenced::write_alone(&self.db, self.me, writes).await.map(drop)
    }

    /// Does both in one transaction.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn claim_and_write(
        &self,
        claims: &[(Pid, String)],
        writes: &[&Fenced],
    ) -> Result<HashMap<Pid, Claimed>, Error> {
        let transaction = self.db.begin().await?;
        let claimed = fenced::claim(&transaction, self.dialect, self.me, claims).await?;
        fenced::write_alone(&transaction, self.me, writes).await?;
        transaction.commit().await?;
        Ok(claimed)
    }

    /// Writes the same checkpoint of each process, the next one or a repetition of the last. The fences are in the order of
    /// their ids.
    ///
    /// # Errors
    /// [`Error::NoRow`] if not all processes are held under these fences; the database does not answer.
    pub async fn checkpoint(&self, fences: &[Fence], checkpoint: &Checkpoint) -> Result<(), Error> {
        let packed = checkpoint.into();
        let checkpoints = fences.iter().map(|fence| (*fence, &packed)).collect::<Vec<_>>();
        let changed = fenced::checkpoint(&self.db, self.dialect, &checkpoints).await?;
        if changed.len() < fences.len() { Err(Error::NoRow) } else { Ok(()) }
    }
}
