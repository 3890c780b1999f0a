//! The database with nothing around it: the same tables, indexes and statements in a schema of their own, driven by
//! plain loops. What Baton's own rates are compared with.

use std::collections::HashMap;

use sea_orm::ConnectionTrait;

use super::blob::{Checkpoint, Outcome};
use super::dedicated_connection::DedicatedConnection;
use super::writer::{Attempt, Claimed, Fence, Fenced, How, Verb};
use super::{Error, Location, Store, fenced};
use crate::id::{Incarnation, Pid};
use crate::state::State;

/// A schema of its own, which goes with [`BaselineTables::remove`].
pub struct BaselineTables {
    outer: Store,
    inner: Store,
    schema: String,
}

/// One connection to it.
pub struct BaselineLane {
    db: DedicatedConnection,
    store: Store,
    me: Incarnation,
}

impl BaselineTables {
    /// Makes the schema in the database of `store`, which must be PostgreSQL.
    ///
    /// # Errors
    /// The database does not answer, or its user may not make schemas.
    pub async fn create(store: &Store, schema: &str) -> Result<Self, Error> {
        let Location::Postgres(url) = &store.location else { return Err(Error::Url) };
        store.db.execute_unprepared(&format!("CREATE SCHEMA {schema}")).await?;
        let separator = if url.contains('?') { '&' } else { '?' };
        let location = Location::Postgres(format!("{url}{separator}options=-c%20search_path%3D{schema}"));
        let inner = Store::open(location).await?;
        Ok(Self { outer: store.clone(), inner, schema: schema.to_owned() })
    }

    /// The tables, for accepting processes.
    pub fn store(&self) -> &Store {
        &self.inner
    }

    /// A connection like one of a worker's lanes.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn lane(&self) -> Result<BaselineLane, Error> {
        let db = self.inner.dedicated_connection().await?;
        Ok(BaselineLane { db, store: self.inner.clone(), me: Incarnation::generate() })
    }

    /// Removes the schema.
    ///
    /// # Errors
    /// The database does not answer; the schema is left behind.
    pub async fn remove(self) -> Result<(), Error> {
        self.outer.db.execute_unprepared(&format!("DROP SCHEMA {} CASCADE", self.schema)).await?;
        Ok(())
    }
}

impl BaselineLane {
    /// Claims some and ends others with their last advance, the number of which is `advances`, in one commit.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn turn(&self, mut claims: Vec<Pid>, ends: &[Claimed], advances: u64) -> Result<Vec<Claimed>, Error> {
        claims.sort_unstable();
        let queued = claims.into_iter().map(|pid| (pid, "default".to_owned())).collect::<Vec<_>>();
        let mut writes = ends.iter().map(|claimed| end(claimed, advances)).collect::<Vec<_>>();
        writes.sort_unstable_by_key(|write| write.fence.pid);
        let writes = writes.iter().collect::<Vec<_>>();
        // One statement is its own transaction.
        let claimed = if writes.is_empty() {
            fenced::claim(&self.db, self.store.dialect, self.me, &queued).await?
        } else if queued.is_empty() {
            fenced::write_alone(&self.db, self.me, &writes).await?;
            HashMap::new()
        } else {
            let transaction = self.db.begin().await?;
            let claimed = fenced::claim(&transaction, self.store.dialect, self.me, &queued).await?;
            fenced::write_alone(&transaction, self.me, &writes).await?;
            transaction.commit().await?;
            claimed
        };
        Ok(claimed.into_values().collect())
    }

    /// Writes the checkpoint of each after so many advances, the next one or the same once more, in one statement and one
    /// commit. They are in the order of their ids.
    ///
    /// # Errors
    /// [`Error::NoRow`] when not all of them are held under these fences; the database does not answer.
    pub async fn checkpoint(&self, fences: &[Fence], advances: u64) -> Result<(), Error> {
        let checkpoint = (&Checkpoint { advances, state: vec![0x2a; 16], ..Checkpoint::default() }).into();
        let checkpoints = fences.iter().map(|fence| (*fence, &checkpoint)).collect::<Vec<_>>();
        let changed = fenced::checkpoint(&self.db, self.store.dialect, &checkpoints).await?;
        if changed.len() < fences.len() { Err(Error::NoRow) } else { Ok(()) }
    }
}

fn end(claimed: &Claimed, advances: u64) -> Fenced {
    let outcome = Outcome { exit: Some(0), ok: true, ..Outcome::default() };
    Fenced {
        fence: claimed.fence,
        verb: Verb::End { state: State::Finished, outcome },
        checkpoint: Some((&Checkpoint { advances, ..Checkpoint::default() }).into()),
        try_number: 1,
        ended: Some(Attempt { started_at: claimed.claimed_at, how: How::Ok, reason: None }),
        outputs: vec![],
    }
}
