//! The requests of operators and their outcomes: the table `event`.

use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, FromQueryResult, QueryFilter, QuerySelect, Value};
use uuid::Uuid;

use super::dialect::{Batch, Dialect, Kind};
use super::entity::event;
use super::error::Error;
use super::handle::Store;
use crate::id::{Pid, RequestId};
use crate::state::{Desired, State};

/// A request of an operator.
#[derive(Clone, Debug)]
pub struct Request {
    /// The desired state.
    pub verb: Desired,
    /// Whether it is wanted at once: `pause --now` ends a local program.
    pub urgent: bool,
    /// Whether the holder is bypassed: `kill --force` ends the process in the database, and its holder loses the lease
    /// and drops it.
    pub force: bool,
    /// The requester's name, as given: user and host, or the name of a worker.
    pub by: String,
    /// The login that the broker verified, for requests from outside; `None` stands for the database's login.
    pub login: Option<String>,
    /// The reason, as given.
    pub reason: Option<String>,
}

impl Request {
    /// A plain request over the database.
    pub fn new(verb: Desired, by: impl Into<String>) -> Self {
        Request { verb, urgent: false, force: false, by: by.into(), login: None, reason: None }
    }
}

impl Store {
    /// Returns the processes that have yet to obey a request to many.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn pending(&self, request: RequestId) -> Result<Vec<Pid>, Error> {
        let events = event::Entity::find().select_only().column(event::Column::Pid);
        let open =
            events.filter(event::Column::Request.eq(Uuid::from(request))).filter(event::Column::Outcome.is_null());
        Ok(open.filter(event::Column::Pid.is_not_null()).into_tuple().all(&self.db).await?)
    }

    /// Returns the outcome of a request to one process; `None` while its holder has yet to obey.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn settled(&self, event: RequestId) -> Result<Option<Settled>, Error> {
        let row = event::Entity::find_by_id(Uuid::from(event)).one(&self.db).await?.ok_or(Error::NoRow)?;
        Ok(row.outcome.as_deref().and_then(Settled::from_word))
    }

    /// Records a request that is not about one process, once. Returns the time of the first record, or `None` if the
    /// same request was recorded and completed before.
    pub(super) async fn record_request(
        &self,
        id: RequestId,
        what: &str,
        target: Option<String>,
        request: &Request,
    ) -> Result<Option<i64>, Error> {
        let sql = "INSERT INTO event (id, at, what, target, by_whom, login, reason)
                   VALUES ($1, {clock}, $2, $3, $4, COALESCE($5, {login}), $6)
                   ON CONFLICT (id) DO NOTHING";
        let values: Vec<Value> = vec![
            Uuid::from(id).into(),
            what.to_owned().into(),
            target.into(),
            request.by.clone().into(),
            request.login.clone().into(),
            request.reason.clone().into(),
        ];
        self.execute(sql, values).await?;
        let row = event::Entity::find_by_id(Uuid::from(id)).one(&self.db).await?.ok_or(Error::NoRow)?;
        Ok(row.outcome.is_none().then_some(row.at))
    }

    /// Returns who killed a process and why; `None` if no kill was requested.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn killed_because(&self, pid: Pid) -> Result<Option<String>, Error> {
        killed_because(&self.db, self.dialect, pid).await
    }
}

/// The outcome of a request to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The process obeyed.
    Applied,
    /// A later, different request came before the process obeyed.
    Superseded,
    /// The process ended before it obeyed.
    Ended,
}

impl Settled {
    /// The word in the `event` table.
    pub fn word(self) -> &'static str {
        match self {
            Settled::Applied => "applied",
            Settled::Superseded => "superseded",
            Settled::Ended => "ended",
        }
    }

    /// The outcome with this word; `None` for a word of a later version.
    pub fn from_word(word: &str) -> Option<Self> {
        [Settled::Applied, Settled::Superseded, Settled::Ended].into_iter().find(|settled| settled.word() == word)
    }
}

/// The requester of a kill and the reason.
#[derive(FromQueryResult)]
struct Kill {
    by_whom: String,
    reason: Option<String>,
}

/// Writes the outcomes of requests. `obeyed` are processes that had requests and that the same transaction has paused
/// or ended.
pub(super) async fn settle(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    obeyed: &[(Pid, State)],
) -> Result<(), Error> {
    let mut batch = Batch::new(&[("b_id", Kind::Uuid), ("b_what", Kind::Text), ("b_final", Kind::SmallInt)]);
    for (pid, state) in obeyed {
        let what = match state {
            State::Paused(_) => Desired::Pause.verb(),
            State::Killed => Desired::Kill.verb(),
            State::Created | State::Running | State::Waiting | State::Finished | State::Excepted => "",
        };
        batch.push([Uuid::from(*pid).into(), what.to_owned().into(), i16::from(state.is_final()).into()]);
    }
    if !batch.is_empty() {
        connection.execute_raw(dialect.batch(SETTLE, vec![], batch)).await?;
    }
    Ok(())
}

/// The reason in the outcome of a killed process.
pub(super) fn kill_reason(by: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("killed by {by}: {reason}"),
        None => format!("killed by {by}"),
    }
}

/// [`Store::killed_because`] within a transaction: a program may have no second connection for it.
pub(super) async fn killed_because(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    pid: Pid,
) -> Result<Option<String>, Error> {
    let sql = "SELECT by_whom, reason FROM event WHERE pid = $1 AND what = 'kill' ORDER BY at, id LIMIT 1";
    let rows = connection.query_all_raw(dialect.statement(sql, vec![Uuid::from(pid).into()])).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let kill = Kill::from_query_result(row, "")?;
    Ok(Some(kill_reason(&kill.by_whom, kill.reason.as_deref())))
}

const SETTLE: &str = "
    WITH {rows}
    UPDATE event
    SET outcome = CASE WHEN what = b_what THEN 'applied' ELSE 'ended' END, settled_at = {clock}
    FROM b
    WHERE pid = b_id AND outcome IS NULL AND (what = b_what OR b_final = 1)";
