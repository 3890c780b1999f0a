//! The database alone: the tables, indexes and statements of the store in a separate schema, driven by plain loops.

use std::collections::HashMap;

use baton_common::id::Pid;
use baton_common::state::State;
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::statements::Lane;
use baton_common::store::writer::{Attempt, Claimed, Fence, Fenced, How, Verb};
use baton_common::store::{Error, Store};

/// The bytes that a checkpoint carries for its process.
const STATE: [u8; 16] = [0x2a; 16];

/// Tables in a separate schema, which [`BaselineTables::remove`] drops.
pub(in super::super) struct BaselineTables {
    outer: Store,
    inner: Store,
    schema: String,
}

/// One connection to these tables.
pub(in super::super) struct BaselineLane(Lane);

impl BaselineTables {
    /// Creates the schema in the database of `store`, which must be PostgreSQL.
    pub(in super::super) async fn create(store: &Store, schema: &str) -> Result<Self, Error> {
        let inner = store.create_schema(schema).await?;
        Ok(Self { outer: store.clone(), inner, schema: schema.to_owned() })
    }

    /// Returns the tables, to submit processes.
    pub(in super::super) fn store(&self) -> &Store {
        &self.inner
    }

    /// Opens a connection like that of a worker's lane.
    pub(in super::super) async fn lane(&self) -> Result<BaselineLane, Error> {
        Ok(BaselineLane(self.inner.lane().await?))
    }

    /// Drops the schema.
    pub(in super::super) async fn remove(self) -> Result<(), Error> {
        self.outer.drop_schema(&self.schema).await
    }
}

impl BaselineLane {
    /// Claims some processes and ends others after `advances` advances, in one commit.
    pub(in super::super) async fn turn(
        &self,
        mut claims: Vec<Pid>,
        ends: &[Claimed],
        advances: u64,
    ) -> Result<Vec<Claimed>, Error> {
        claims.sort_unstable();
        let queued = claims.into_iter().map(|pid| (pid, "default".to_owned())).collect::<Vec<_>>();
        let mut writes = ends.iter().map(|claimed| end(claimed, advances)).collect::<Vec<_>>();
        writes.sort_unstable_by_key(|write| write.fence.pid);
        let writes = writes.iter().collect::<Vec<_>>();
        // A single statement needs no explicit transaction.
        let claimed = if writes.is_empty() {
            self.0.claim(&queued).await?
        } else if queued.is_empty() {
            self.0.write(&writes).await?;
            HashMap::new()
        } else {
            self.0.claim_and_write(&queued, &writes).await?
        };
        Ok(claimed.into_values().collect())
    }

    /// Writes a checkpoint of each process after `advances` advances, in one statement and one commit. The fences are in the
    /// order of their ids.
    ///
    /// # Errors
    /// [`Error::NoRow`] if not all processes are held under these fences; the database does not answer.
    pub(in super::super) async fn checkpoint(&self, fences: &[Fence], advances: u64) -> Result<(), Error> {
        let checkpoint = Checkpoint { advances, state: STATE.to_vec(), ..Checkpoint::default() };
        self.0.checkpoint(fences, &checkpoint).await
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
