//! The rows of workers. The lease is a counter that its worker increments; no wall clock decides about it.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DerivePartialModel, EntityTrait, FromQueryResult, QueryFilter, QuerySelect, Value,
};
use uuid::Uuid;

use super::connection::{Use, begin, connect};
use super::entity::worker;
use super::error::Error;
use super::handle::Store;
use super::lease::Fence;
use super::request::Request;
use super::row::read;
use crate::communicator::control_queue;
use crate::id::{Incarnation, Pid};
use crate::lack::Shortage;
use crate::state::Desired;

/// Pause between two beats.
pub const BEAT: Duration = Duration::from_secs(1);

/// A lease ends when another worker has seen its beat unchanged for this long.
pub const LEASE: Duration = Duration::from_secs(10);

/// The description of a worker at its start.
#[derive(Clone, Debug)]
pub struct NewWorker {
    /// Its name.
    pub name: String,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub os_pid: u32,
    /// The version of its program.
    pub version: String,
    /// The queues that it serves.
    pub queues: Vec<String>,
    /// The number of processes that it holds at a time.
    pub slots: u32,
    /// The sites that it serves.
    pub sites: Vec<String>,
}

/// A live worker as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its incarnation.
    pub id: Incarnation,
    /// Its name.
    pub name: String,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub os_pid: u32,
    /// The counter of its lease.
    pub beat: i64,
}

/// A process that an incarnation holds, according to the database.
#[derive(Clone, Copy, Debug, FromQueryResult)]
pub struct Lease {
    /// The lease.
    #[sea_orm(nested)]
    pub fence: Fence,
    /// The time of the claim, by the database's clock.
    pub claimed_at: i64,
    /// The number of the try.
    #[sea_orm(from_alias = "try")]
    pub try_number: i64,
}

/// The load that a beat reports.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The number of held processes.
    pub held: u32,
    /// Processes that block their thread, as `pid for 7s`.
    pub blocked: Vec<String>,
    /// The shortage of its machine.
    pub shortage: Option<Shortage>,
}

/// The answer to a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// The incarnation is alive.
    Alive {
        /// The number of this beat. If it is not larger than all before it, the database has been rolled back.
        beat: i64,
        /// The worker is asked to give back what it holds and to stop.
        drain: bool,
        /// The fleet is paused.
        is_fleet_paused: bool,
    },
    /// The incarnation was declared gone, which is final.
    Gone,
    /// The incarnation has no row.
    Unknown,
}

impl Peer {
    /// The name of its control queue.
    pub fn control_queue(&self) -> String {
        control_queue(&self.name, self.id)
    }
}

impl Store {
    /// Inserts the row of a worker that starts. On SQLite the caller holds the lock of the file, so all other
    /// incarnations are gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn register(&self, id: Incarnation, worker: &NewWorker) -> Result<(), Error> {
        // A worker without a connection for its beat would lose its lease at once.
        self.beats.warm().await?;
        let sql =
            "INSERT INTO worker (id, name, host, os_pid, version, queues, slots, sites, load, drain, beat, beat_at,
                                       started_at)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, false, 0, {now}, {now})";
        let values: Vec<Value> = vec![
            Uuid::from(id).into(),
            worker.name.clone().into(),
            worker.host.clone().into(),
            i64::from(worker.os_pid).into(),
            worker.version.clone().into(),
            worker.queues.join(",").into(),
            i64::from(worker.slots).into(),
            serde_json::to_string(&worker.sites).expect("texts are JSON").into(),
        ];
        self.execute(sql, values).await?;
        if self.is_embedded() {
            let sql = "UPDATE worker SET gone_at = {now} WHERE id <> $1 AND gone_at IS NULL";
            self.execute(sql, vec![Uuid::from(id).into()]).await?;
        }
        Ok(())
    }

    /// Beats, and returns what is wanted of the incarnation. Uses a dedicated connection.
    ///
    /// # Cancel safety
    /// May be dropped: this closes the connection, and the next beat opens another.
    ///
    /// # Errors
    /// The database does not answer; the lease runs until its deadline.
    pub async fn beat(&self, id: Incarnation, load: &Load) -> Result<Beat, Error> {
        let sql = "UPDATE worker SET beat = beat + 1, beat_at = {now}, load = $2, blocked = $3, lacks = $4,
                                     lacks_text = $5
                   WHERE id = $1 AND gone_at IS NULL
                   RETURNING beat, drain, (SELECT COUNT(*) FROM fleet WHERE paused_at IS NOT NULL) AS n_paused";
        let blocked = (!load.blocked.is_empty()).then(|| load.blocked.join(", "));
        let values: Vec<Value> = vec![
            Uuid::from(id).into(),
            i64::from(load.held).into(),
            blocked.into(),
            load.shortage.as_ref().map(|shortage| shortage.lack.word().to_owned()).into(),
            load.shortage.as_ref().map(|shortage| shortage.text.clone()).into(),
        ];
        let rows = self.beats.query_all_raw(self.dialect.statement(sql, values)).await?;
        let Some(row) = rows.first() else {
            let sql = "SELECT 1 AS n FROM worker WHERE id = $1";
            let statement = self.dialect.statement(sql, vec![Uuid::from(id).into()]);
            let rows = self.beats.query_all_raw(statement).await?;
            return Ok(if rows.is_empty() { Beat::Unknown } else { Beat::Gone });
        };
        let BeatRow { beat, drain, n_paused } = BeatRow::from_query_result(row, "")?;
        Ok(Beat::Alive { beat, drain, is_fleet_paused: n_paused > 0 })
    }

    /// Returns the number of this incarnation's last beat; `None` if it has no row. Uses a new connection, on which no
    /// abandoned statement can be in flight.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn last_beat(&self, id: Incarnation) -> Result<Option<i64>, Error> {
        let db = connect(&self.location, &self.access, Use::Beat).await?;
        let beat = worker::Entity::find_by_id(Uuid::from(id)).select_only().column(worker::Column::Beat);
        let beat = beat.into_tuple().one(&db).await?;
        db.close().await?;
        Ok(beat)
    }

    /// Asks the live workers of a name (or one incarnation by id) to give back what they hold and to stop, and returns
    /// them. An empty result means that there is no such worker.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn drain(&self, name: &str, request: &Request) -> Result<Vec<Peer>, Error> {
        let transaction = begin(&self.db).await?;
        let sql = "UPDATE worker SET drain = true
                   WHERE gone_at IS NULL AND (name = $1 OR id = $2)
                   RETURNING id, name, host, os_pid, beat";
        let id = name.parse::<Uuid>().unwrap_or_default();
        let rows = transaction.query_all_raw(self.dialect.statement(sql, vec![name.to_owned().into(), id.into()]));
        let peers: Vec<Peer> = read::<PeerRow>(&rows.await?)?.into_iter().map(Peer::from).collect();
        if !peers.is_empty() {
            let sql = "INSERT INTO event (id, at, what, target, by_whom, login, reason, outcome, settled_at)
                       VALUES ($1, {now}, 'drain', $2, $3, COALESCE($4, {login}), $5, 'recorded', {now})";
            let values: Vec<Value> = vec![
                Uuid::now_v7().into(),
                name.to_owned().into(),
                request.by.clone().into(),
                request.login.clone().into(),
                request.reason.clone().into(),
            ];
            transaction.execute_raw(self.dialect.statement(sql, values)).await?;
        }
        transaction.commit().await?;
        Ok(peers)
    }

    /// Returns every incarnation that is not gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn peers(&self) -> Result<Vec<Peer>, Error> {
        let alive = worker::Entity::find().filter(worker::Column::GoneAt.is_null());
        Ok(alive.into_partial_model::<PeerRow>().all(&self.db).await?.into_iter().map(Peer::from).collect())
    }

    /// Declares an incarnation gone if its beat is unchanged. Returns `false` if it has beaten since, or is gone
    /// already.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn declare_gone(&self, id: Incarnation, seen_beat: i64) -> Result<bool, Error> {
        let sql = "UPDATE worker SET gone_at = {now} WHERE id = $1 AND beat = $2 AND gone_at IS NULL";
        Ok(self.execute(sql, vec![Uuid::from(id).into(), seen_beat.into()]).await? == 1)
    }

    /// Records that this incarnation has stopped and holds nothing.
    ///
    /// # Errors
    /// The database does not answer; the others notice by its beat.
    pub async fn leave(&self, id: Incarnation) -> Result<(), Error> {
        let sql = "UPDATE worker SET gone_at = {now}, load = 0 WHERE id = $1 AND gone_at IS NULL";
        self.execute(sql, vec![Uuid::from(id).into()]).await?;
        Ok(())
    }

    /// Deletes the rows of workers that have been gone for a day and hold nothing. Attempts keep their names.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn forget_gone(&self) -> Result<(), Error> {
        let sql = "DELETE FROM worker
                   WHERE gone_at < {now} - 86400000000
                     AND NOT EXISTS (SELECT 1 FROM process p WHERE p.owner = worker.id AND p.place = {held})";
        self.execute(sql, vec![]).await?;
        Ok(())
    }

    /// Returns the leases of this incarnation, according to the database.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn held_by(&self, id: Incarnation) -> Result<Vec<Lease>, Error> {
        let sql = "SELECT id, epoch, claimed_at, try FROM process WHERE owner = $1 AND place = {held}";
        // On the connection of the beat, which does not wait for other statements.
        read(&self.beats.query_all_raw(self.dialect.statement(sql, vec![Uuid::from(id).into()])).await?)
    }

    /// Returns the desired states of the processes that this incarnation holds. Unless `everything` is set, processes that
    /// should continue are left out.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn desired_of(&self, id: Incarnation, everything: bool) -> Result<Vec<Wish>, Error> {
        let which = if everything { "true" } else { "desired <> {play}" };
        let sql = format!("{WISHES} AND owner = $1 AND place = {{held}} AND {which}");
        let statement = self.dialect.statement(&sql, vec![Uuid::from(id).into()]);
        // The beat asks for those that should not continue, over its own connection, which does not wait for other
        // statements.
        let rows =
            if everything { self.db.query_all_raw(statement).await } else { self.beats.query_all_raw(statement).await };
        read(&rows?)
    }

    /// Returns the desired state of one process; `None` if this incarnation does not hold it.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn desired_of_one(&self, id: Incarnation, pid: Pid) -> Result<Option<Wish>, Error> {
        let sql = format!("{WISHES} AND owner = $1 AND place = {{held}} AND id = $2");
        self.first(&sql, vec![Uuid::from(id).into(), Uuid::from(pid).into()]).await
    }
}

/// The desired state of a held process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Wish {
    /// The lease.
    #[sea_orm(nested)]
    pub fence: Fence,
    /// The desired state.
    pub desired: Desired,
    /// Whether it is wanted at once.
    pub urgent: bool,
}

const WISHES: &str = "SELECT id, epoch, desired, urgent FROM process WHERE true";

/// The row that a beat returns.
#[derive(FromQueryResult)]
struct BeatRow {
    beat: i64,
    drain: bool,
    n_paused: i64,
}

#[derive(DerivePartialModel)]
#[sea_orm(entity = "worker::Entity")]
struct PeerRow {
    id: Incarnation,
    name: String,
    host: String,
    os_pid: i64,
    beat: i64,
}

impl From<PeerRow> for Peer {
    fn from(row: PeerRow) -> Self {
        let PeerRow { id, name, host, os_pid, beat } = row;
        Peer { id, name, host, os_pid: u32::try_from(os_pid).unwrap_or(0), beat }
    }
}
