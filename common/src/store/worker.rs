//! Workers' rows: the lease is a number that grows, and no wall clock decides over it.

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

/// A beat that stands still for this long, as seen by another worker, ends the lease.
pub const LEASE: Duration = Duration::from_secs(10);

/// What a worker says of itself when it starts.
#[derive(Clone, Debug)]
pub struct NewWorker {
    /// Its label.
    pub name: String,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub os_pid: u32,
    /// Its program's version.
    pub version: String,
    /// The queues that it serves.
    pub queues: Vec<String>,
    /// How many processes it holds at a time.
    pub slots: u32,
    /// The sites that it serves.
    pub sites: Vec<String>,
}

/// A live worker as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its incarnation.
    pub id: Incarnation,
    /// Its label.
    pub name: String,
    /// The host it runs on.
    pub host: String,
    /// Its process id there.
    pub os_pid: u32,
    /// The number that grows while it lives.
    pub beat: i64,
}

/// A process that an incarnation holds, as the database has it.
#[derive(Clone, Copy, Debug, FromQueryResult)]
pub struct Lease {
    /// The process, and the number of the lease.
    #[sea_orm(nested)]
    pub fence: Fence,
    /// When it was claimed, in database time.
    pub claimed_at: i64,
    /// The number of the try that it is in.
    #[sea_orm(from_alias = "try")]
    pub try_number: i64,
}

/// What a beat says of the worker's load.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// How many processes it holds.
    pub held: u32,
    /// Processes that block their thread, as `pid for 7s`; empty when there is none.
    pub blocked: Vec<String>,
    /// What its machine lacks.
    pub shortage: Option<Shortage>,
}

/// What a beat learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// The incarnation lives.
    Alive {
        /// The number of this beat. One that is not larger than all before it says that the database has gone back.
        beat: i64,
        /// Somebody wants it to give back what it holds and to stop.
        drain: bool,
        /// The fleet takes no work.
        is_fleet_paused: bool,
    },
    /// Somebody has declared it gone, for ever.
    Gone,
    /// The database does not know it.
    Unknown,
}

impl Peer {
    /// The name of its control queue.
    pub fn control_queue(&self) -> String {
        control_queue(&self.name, self.id)
    }
}

impl Store {
    /// Makes the row of a worker that starts. On SQLite its caller holds the lock of the file, so every other
    /// incarnation is gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn register(&self, id: Incarnation, worker: &NewWorker) -> Result<(), Error> {
        // A worker that has no connection for its beat would lose its lease at once.
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

    /// Says that this incarnation lives, and learns what is wanted of it. It has a connection of its own.
    ///
    /// # Cancel safety
    /// It may be dropped: the connection is closed then, and the next beat opens another.
    ///
    /// # Errors
    /// The database does not answer; the lease runs on until its deadline.
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

    /// The number of this incarnation's last beat, read over a connection of its own, on which no question that nobody
    /// waits for any more can be under way; `None` when the database does not know it.
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

    /// Asks live workers of a name (or the one incarnation of an id) to give back what they hold and to stop. Gives those
    /// that are asked; none means that there is no such worker.
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

    /// Every incarnation that nobody has declared gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn peers(&self) -> Result<Vec<Peer>, Error> {
        let alive = worker::Entity::find().filter(worker::Column::GoneAt.is_null());
        Ok(alive.into_partial_model::<PeerRow>().all(&self.db).await?.into_iter().map(Peer::from).collect())
    }

    /// Declares an incarnation gone whose beat still is what was seen. `false` when it lives after all, or is gone
    /// already.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn declare_gone(&self, id: Incarnation, seen_beat: i64) -> Result<bool, Error> {
        let sql = "UPDATE worker SET gone_at = {now} WHERE id = $1 AND beat = $2 AND gone_at IS NULL";
        Ok(self.execute(sql, vec![Uuid::from(id).into(), seen_beat.into()]).await? == 1)
    }

    /// Says that this incarnation has stopped and holds nothing.
    ///
    /// # Errors
    /// The database does not answer; the others find out by its beat.
    pub async fn leave(&self, id: Incarnation) -> Result<(), Error> {
        let sql = "UPDATE worker SET gone_at = {now}, load = 0 WHERE id = $1 AND gone_at IS NULL";
        self.execute(sql, vec![Uuid::from(id).into()]).await?;
        Ok(())
    }

    /// Removes the rows of workers that have been gone for a day and hold nothing. Attempts have their names.
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

    /// Everything that the database says this incarnation holds.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn held_by(&self, id: Incarnation) -> Result<Vec<Lease>, Error> {
        let sql = "SELECT id, epoch, claimed_at, try FROM process WHERE owner = $1 AND place = {held}";
        // The beat asks, so it does not wait for others.
        read(&self.beats.query_all_raw(self.dialect.statement(sql, vec![Uuid::from(id).into()])).await?)
    }

    /// What is desired of what this incarnation holds: of everything, or only of that which shall not simply go on.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn desired_of(&self, id: Incarnation, everything: bool) -> Result<Vec<Wish>, Error> {
        let which = if everything { "true" } else { "desired <> {play}" };
        let sql = format!("{WISHES} AND owner = $1 AND place = {{held}} AND {which}");
        let statement = self.dialect.statement(&sql, vec![Uuid::from(id).into()]);
        // What shall not simply go on, the beat asks for, which does not wait for others.
        let rows =
            if everything { self.db.query_all_raw(statement).await } else { self.beats.query_all_raw(statement).await };
        read(&rows?)
    }

    /// What is desired of one process that this incarnation holds; `None` when it does not.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn desired_of_one(&self, id: Incarnation, pid: Pid) -> Result<Option<Wish>, Error> {
        let sql = format!("{WISHES} AND owner = $1 AND place = {{held}} AND id = $2");
        self.first(&sql, vec![Uuid::from(id).into(), Uuid::from(pid).into()]).await
    }
}

/// What a row says that its holder has to obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Wish {
    /// The process and the number of its lease.
    #[sea_orm(nested)]
    pub fence: Fence,
    /// What is desired of it.
    pub desired: Desired,
    /// Whether that is wanted at once.
    pub urgent: bool,
}

const WISHES: &str = "SELECT id, epoch, desired, urgent FROM process WHERE true";

/// What a beat returns.
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
