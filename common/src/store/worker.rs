//! Workers' rows: the lease is a number that grows, and no wall clock decides over it.

use std::time::Duration;

use sea_orm::Value;
use uuid::Uuid;

use super::writer::Fence;
use super::{Error, Store};
use crate::communicator::control_queue;
use crate::id::{Incarnation, Pid};
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

/// What a beat says of the worker's load.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// How many processes it holds.
    pub held: u32,
    /// Processes that block their thread, as `pid for 7s`; empty when there is none.
    pub blocked: Vec<String>,
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
        let sql = "INSERT INTO worker (id, name, host, os_pid, version, queues, slots, load, beat, started_at)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, {now})";
        let values: Vec<Value> = vec![
            Uuid::from(id).into(),
            worker.name.clone().into(),
            worker.host.clone().into(),
            i64::from(worker.os_pid).into(),
            worker.version.clone().into(),
            worker.queues.join(",").into(),
            i64::from(worker.slots).into(),
        ];
        self.execute(sql, values).await?;
        if self.is_embedded() {
            let sql = "UPDATE worker SET gone_at = {now} WHERE id <> $1 AND gone_at IS NULL";
            self.execute(sql, vec![Uuid::from(id).into()]).await?;
        }
        Ok(())
    }

    /// Says that this incarnation lives. `false` means that somebody has declared it gone, for ever.
    ///
    /// # Errors
    /// The database does not answer; the lease runs on until its deadline.
    pub async fn beat(&self, id: Incarnation, load: &Load) -> Result<bool, Error> {
        let sql = "UPDATE worker SET beat = beat + 1, load = $2, blocked = $3 WHERE id = $1 AND gone_at IS NULL";
        let blocked = (!load.blocked.is_empty()).then(|| load.blocked.join(", "));
        let values = vec![Uuid::from(id).into(), i64::from(load.held).into(), blocked.into()];
        Ok(self.execute(sql, values).await? == 1)
    }

    /// Every incarnation that nobody has declared gone.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn peers(&self) -> Result<Vec<Peer>, Error> {
        let sql = "SELECT id, name, host, os_pid, beat FROM worker WHERE gone_at IS NULL";
        self.query(sql, vec![])
            .await?
            .iter()
            .map(|row| {
                Ok(Peer {
                    id: row.try_get::<Uuid>("", "id")?.into(),
                    name: row.try_get("", "name")?,
                    host: row.try_get("", "host")?,
                    os_pid: u32::try_from(row.try_get::<i64>("", "os_pid")?).unwrap_or(0),
                    beat: row.try_get("", "beat")?,
                })
            })
            .collect()
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

    /// Removes the rows of workers that have been gone for a day and that no process names.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn forget_gone(&self) -> Result<(), Error> {
        let sql = "DELETE FROM worker
                   WHERE gone_at < {now} - 86400000000
                     AND NOT EXISTS (SELECT 1 FROM process p WHERE p.owner = worker.id AND p.place = {held})
                     AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.worker = worker.id)";
        self.execute(sql, vec![]).await?;
        Ok(())
    }

    /// Everything that the database says this incarnation holds.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn held_by(&self, id: Incarnation) -> Result<Vec<Fence>, Error> {
        let sql = "SELECT id, epoch FROM process WHERE owner = $1 AND place = {held}";
        self.query(sql, vec![Uuid::from(id).into()])
            .await?
            .iter()
            .map(|row| Ok(Fence { pid: row.try_get::<Uuid>("", "id")?.into(), epoch: row.try_get("", "epoch")? }))
            .collect()
    }

    /// Those that this incarnation holds and of which something else than going on is desired, or of those `pids` all.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn desired_of(&self, id: Incarnation, pid: Option<Pid>) -> Result<Vec<(Pid, Desired, bool)>, Error> {
        let (which, mut values) = match pid {
            Some(pid) => ("id = $2", vec![Uuid::from(pid).into()]),
            None => ("desired <> {play}", vec![]),
        };
        values.insert(0, Uuid::from(id).into());
        let sql = format!("SELECT id, desired, urgent FROM process WHERE owner = $1 AND place = {{held}} AND {which}");
        self.query(&sql, values)
            .await?
            .iter()
            .map(|row| {
                let desired = Desired::from_code(row.try_get("", "desired")?)
                    .ok_or_else(|| Error::Unreadable("no such desire".into()))?;
                Ok((row.try_get::<Uuid>("", "id")?.into(), desired, row.try_get("", "urgent")?))
            })
            .collect()
    }
}
