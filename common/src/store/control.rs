//! Requests to processes, by operators or by workers that cannot continue a process. One statement writes the desired
//! state and, if the process is not held, applies it.
//!
//! Every request leaves one row per process in the table `event`: the requester, the time and the outcome. The
//! statement that obeys the request writes the outcome: here if the process is not held, else the holder's fenced
//! write, or the sweep that frees it.

use std::collections::BTreeMap;

use sea_orm::{ConnectionTrait, DatabaseTransaction, FromQueryResult, Value};
use uuid::Uuid;

use super::blob::Outcome;
use super::connection::begin;
use super::dialect::{Batch, Kind};
use super::error::Error;
use super::handle::Store;
use super::lease::Fence;
pub use super::request::{Request, Settled};
use super::request::{kill_reason, settle};
use super::row::{Announced, Queued, read};
use super::select::{self, Order, Walk};
use crate::border;
use crate::id::{Incarnation, Pid, RequestId};
use crate::message::Effect;
use crate::select::Select;
use crate::state::{Desired, Place, State};

/// Rows that one statement of a request to many changes.
const PAGE_ROWS: u32 = 1_000;

/// The answer to a request to one process.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The request is recorded, and applied unless the process is held.
    Recorded(Controlled),
    /// The process has ended; nothing was written.
    Ended(State),
    /// A kill is pending, and it absorbs every other request.
    Dying,
    /// No such process.
    Absent,
}

/// A row after a request.
#[derive(Clone, Debug)]
pub struct Controlled {
    /// The process.
    pub pid: Pid,
    /// The row of the request, whose outcome says when it is applied.
    pub event: RequestId,
    /// The place now.
    pub place: Place,
    /// The state now.
    pub state: State,
    /// The holder, before a `--force` if there was one. It must be told to read the row.
    pub owner: Option<Incarnation>,
    /// The effect of the request.
    pub effect: Effect,
    /// The task queue and the row to announce, if the request has queued it.
    pub announced: Option<(String, Announced)>,
    /// The reply address for its end, if the request has ended it.
    pub reply_to: Option<Vec<u8>>,
}

/// A row before a request, locked.
#[derive(FromQueryResult)]
struct Before {
    id: Uuid,
    place: Place,
    #[sea_orm(nested)]
    state: State,
    desired: Desired,
    owner: Option<Incarnation>,
}

/// A row after a request.
#[derive(FromQueryResult)]
struct After {
    #[sea_orm(nested)]
    queued: Queued,
    place: Place,
    #[sea_orm(nested)]
    state: State,
    reply_to: Option<Vec<u8>>,
}

impl Store {
    /// Records a request to one process.
    ///
    /// # Errors
    /// Nothing is recorded, or (if the answer of the commit was lost) the request is: the same call again is safe.
    pub async fn control(&self, pid: Pid, request: &Request) -> Result<Answer, Error> {
        self.control_where("p.id = $1", vec![Uuid::from(pid).into()], request).await
    }

    /// Records a request of the holder of a process. [`Answer::Absent`] means that the lease is lost.
    ///
    /// # Errors
    /// See [`Store::control`].
    pub async fn control_held(&self, fence: Fence, request: &Request) -> Result<Answer, Error> {
        let values = vec![Uuid::from(fence.pid).into(), fence.epoch.into()];
        self.control_where(HELD_BY, values, request).await
    }

    async fn control_where(&self, which: &str, values: Vec<Value>, request: &Request) -> Result<Answer, Error> {
        let transaction = begin(&self.db).await?;
        let sql = format!("{BEFORE} WHERE {which} {{of_p}}");
        let row = transaction.query_one_raw(self.dialect.statement(&sql, values)).await?;
        let Some(row) = row else { return Ok(Answer::Absent) };
        let before = Before::from_query_result(&row, "")?;
        if before.state.is_final() {
            return Ok(Answer::Ended(before.state));
        }
        if before.desired == Desired::Kill && request.verb != Desired::Kill {
            return Ok(Answer::Dying);
        }
        let controlled = self.apply(&transaction, &[before], request, None).await?.pop().ok_or(Error::NoRow)?;
        transaction.commit().await?;
        border!("request-committed");
        Ok(Answer::Recorded(controlled))
    }

    /// Begins a request to all processes of a selection that were accepted before it was recorded. [`Many::next`]
    /// applies it page by page.
    ///
    /// The request is recorded first, under its id. A second call with the same id resumes an interrupted request and
    /// skips processes that got a later request; it returns `None` if the request is complete.
    ///
    /// # Errors
    /// See [`Store::control`].
    pub async fn control_many(&self, id: RequestId, select: &Select, request: &Request) -> Result<Option<Many>, Error> {
        let target = serde_json::to_string(select).expect("a selection is plain data");
        let Some(asked_at) = self.record_request(id, request.verb.verb(), Some(target), request).await? else {
            return Ok(None);
        };
        let walk = Walk::new(select, Order::OldestFirst, None).past_ended();
        let (store, select, request) = (self.clone(), select.clone(), request.clone());
        Ok(Some(Many { store, id, select, request, asked_at, walk }))
    }

    /// Counts the processes of a selection that a request would change, by the words of their places.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn count_selected(&self, select: &Select, verb: Desired) -> Result<BTreeMap<String, u64>, Error> {
        let condition = "p.place <> {ended} AND p.desired <> {kill} AND p.desired <> $1";
        let rows = select::count(self, select, "place", condition, vec![verb.code().into()]).await?;
        rows.into_iter()
            .map(|(code, count)| {
                let place = Place::from_code(code).ok_or_else(|| Error::Unreadable("no such place".into()))?;
                Ok((place.word().to_owned(), count))
            })
            .collect()
    }

    /// Writes a request into locked rows and into their history.
    async fn apply(
        &self,
        transaction: &DatabaseTransaction,
        rows: &[Before],
        request: &Request,
        id: Option<RequestId>,
    ) -> Result<Vec<Controlled>, Error> {
        let ids = || Batch::ids(rows.iter().map(|row| row.id));
        if request.force {
            let reason = kill_reason(&request.by, request.reason.as_deref());
            transaction.execute_raw(self.dialect.batch(END_ATTEMPT, vec![reason.into()], ids())).await?;
        }
        let values: Vec<Value> =
            vec![request.verb.code().into(), request.urgent.into(), kill_outcome(request).into(), request.force.into()];
        let answers = transaction.query_all_raw(self.dialect.batch(CONTROL, values, ids())).await?;
        let held = rows.iter().filter(|row| row.place == Place::Held).map(|row| row.id).collect::<Vec<_>>();
        if !held.is_empty() {
            // Pending requests that contradict this one.
            let values = vec![request.verb.verb().to_owned().into()];
            transaction.execute_raw(self.dialect.batch(SUPERSEDE, values, Batch::ids(held))).await?;
        }
        let mut events = Batch::new(&[("b_event", Kind::Uuid), ("b_id", Kind::Uuid), ("b_outcome", Kind::Text)]);
        let by_id: BTreeMap<Uuid, &Before> = rows.iter().map(|row| (row.id, row)).collect();
        let mut changed = Vec::with_capacity(answers.len());
        for answer in read::<After>(&answers)? {
            let before = by_id
                .get(&Uuid::from(answer.queued.announced.pid))
                .ok_or_else(|| Error::Unreadable("a row not asked for".into()))?;
            let controlled = controlled(answer, before, request);
            let is_pending = is_pending(controlled.place, request.verb);
            let outcome = if is_pending && request.verb != Desired::Run { "" } else { Settled::Applied.word() };
            events.push([Uuid::from(controlled.event).into(), before.id.into(), outcome.to_owned().into()]);
            changed.push(controlled);
        }
        if !events.is_empty() {
            let values: Vec<Value> = vec![
                id.map(Uuid::from).into(),
                request.verb.verb().to_owned().into(),
                request.by.clone().into(),
                request.login.clone().into(),
                request.reason.clone().into(),
            ];
            transaction.execute_raw(self.dialect.batch(INSERT_EVENTS, values, events)).await?;
        }
        if request.verb == Desired::Kill {
            let ended = changed.iter().filter(|row| row.place == Place::Ended);
            let ended = ended.map(|row| (row.pid, row.state)).collect::<Vec<_>>();
            settle(transaction, self.dialect, &ended).await?;
        }
        Ok(changed)
    }
}

/// A request to many processes in progress.
pub struct Many {
    store: Store,
    id: RequestId,
    select: Select,
    request: Request,
    asked_at: i64,
    walk: Walk,
}

impl Many {
    /// Applies the request to the next page of processes, and returns these in the order of their ids; `None` at the
    /// end.
    ///
    /// # Errors
    /// See [`Store::control`]; committed pages stay.
    pub async fn next(&mut self) -> Result<Option<Vec<Controlled>>, Error> {
        let Store { db, dialect, .. } = &self.store;
        while let Some(ids) = self.walk.next_ids(db, *dialect, PAGE_ROWS).await? {
            let mut values: Vec<Value> =
                vec![self.asked_at.into(), self.request.verb.code().into(), self.request.force.into()];
            let look = select::look(&self.select, &mut values);
            // The conditions are checked again under the row lock, since rows may have changed.
            let sql = format!(
                "WITH {{rows}}
                 {BEFORE}
                 WHERE p.id IN (SELECT b_id FROM b) AND p.place <> {{ended}}
                   AND (SELECT s.created_at FROM spec s WHERE s.id = p.id) <= $1
                   AND (p.desired NOT IN ($2, {{kill}}) OR $3)
                   AND (p.control = 0
                        OR NOT EXISTS (SELECT 1 FROM event e WHERE e.pid = p.id AND e.at > $1)){look}
                 ORDER BY p.id {{of_p}}"
            );
            let transaction = begin(db).await?;
            let rows = transaction.query_all_raw(dialect.batch(&sql, values, Batch::ids(ids))).await?;
            let rows: Vec<Before> = read(&rows)?;
            if rows.is_empty() {
                continue;
            }
            let mut changed = self.store.apply(&transaction, &rows, &self.request, Some(self.id)).await?;
            transaction.commit().await?;
            border!("request-committed");
            changed.sort_by_key(|row| row.pid);
            return Ok(Some(changed));
        }
        let sql = "UPDATE event SET outcome = 'recorded', settled_at = {clock} WHERE id = $1";
        self.store.execute(sql, vec![Uuid::from(self.id).into()]).await?;
        Ok(None)
    }
}

fn kill_outcome(request: &Request) -> Vec<u8> {
    Outcome::because(kill_reason(&request.by, request.reason.as_deref())).to_bytes()
}

/// Whether a request is pending: the holder has yet to obey, or a worker has yet to end the job at a site.
fn is_pending(place: Place, verb: Desired) -> bool {
    match place {
        Place::Held => true,
        Place::Queued | Place::Parked => verb == Desired::Kill,
        Place::Ended => false,
    }
}

fn controlled(row: After, before: &Before, request: &Request) -> Controlled {
    let After { queued: Queued { queue, announced }, place, state, reply_to } = row;
    let pid = announced.pid;
    let is_queued_now = place == Place::Queued && before.place != Place::Queued;
    let was_paused = matches!(before.state, State::Paused(_));
    let effect = match request.verb {
        Desired::Run if before.desired == Desired::Run => Effect::AlreadyRunning,
        Desired::Pause if was_paused => Effect::AlreadyPaused,
        verb @ (Desired::Run | Desired::Pause | Desired::Kill) => {
            if is_pending(place, verb) {
                Effect::pending(verb)
            } else {
                Effect::applied(verb)
            }
        }
    };
    Controlled {
        pid,
        event: RequestId::generate(),
        place,
        state,
        owner: before.owner,
        effect,
        announced: is_queued_now.then_some((queue, announced)),
        reply_to: reply_to.filter(|_| place == Place::Ended),
    }
}

/// The row of a process under a lease.
const HELD_BY: &str = "p.id = $1 AND p.epoch = $2 AND p.place = {held}";

const BEFORE: &str = "SELECT p.id, p.place, p.state, p.before, p.desired, p.owner FROM process p";

// A process that is not held obeys here: a kill ends it, a pause parks it, and `play` returns it to its former place
// (waiting and not woken stays parked, all else is queued). A held process only learns the desired state, unless the
// request is forced. A killed process with a job at a site is queued, so that a worker ends the job first.
const CONTROL: &str = "
    WITH {rows}
    UPDATE process
    SET desired = $1, urgent = $2, control = control + 1,
        place = CASE WHEN place = {held} AND NOT $4 THEN place
                     WHEN $1 = {kill} AND outside AND NOT $4 THEN {queued}
                     WHEN $1 = {kill} THEN {ended}
                     WHEN $1 = {pause} THEN {parked}
                     WHEN state = {paused} AND NOT (before = {waiting} AND NOT woken) THEN {queued}
                     ELSE place END,
        owner = CASE WHEN $4 THEN NULL ELSE owner END,
        state = CASE WHEN place = {held} AND NOT $4 THEN state
                     WHEN $1 = {kill} AND outside AND NOT $4 THEN {running}
                     WHEN $1 = {kill} THEN {killed}
                     WHEN $1 = {pause} THEN {paused}
                     WHEN state = {paused} THEN before
                     ELSE state END,
        before = CASE WHEN place <> {held} AND $1 = {pause} AND state <> {paused} THEN state ELSE before END,
        told_at = CASE WHEN $1 = {kill} AND outside AND place = {parked} THEN {now}
                       WHEN $1 = {play} AND state = {paused} AND NOT (before = {waiting} AND NOT woken) THEN {now}
                       ELSE told_at END,
        changed_at = CASE WHEN place = {held} AND NOT $4 THEN changed_at ELSE {clock} END,
        ended_at = CASE WHEN ((place <> {held} AND NOT outside) OR $4) AND $1 = {kill} THEN {clock} ELSE ended_at END,
        outcome = CASE WHEN ((place <> {held} AND NOT outside) OR $4) AND $1 = {kill} THEN $3 ELSE outcome END
    FROM b
    WHERE id = b_id AND place <> {ended} AND (desired <> {kill} OR $1 = {kill})
    RETURNING id, place, state, before, queue, told_at,
              (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent,
              (SELECT s.reply_to FROM spec s WHERE s.id = process.id) AS reply_to";

// A holder that is bypassed can no longer write its attempt.
const END_ATTEMPT: &str = "
    WITH {rows}
    INSERT INTO attempt (pid, epoch, worker, worker_name, try, started_at, ended_at, how, reason)
    SELECT p.id, p.epoch, p.owner, (SELECT name FROM worker WHERE id = p.owner), p.try, p.claimed_at, {clock}, 'killed', $1
    FROM process p JOIN b ON p.id = b_id WHERE p.place = {held}
    ON CONFLICT (pid, epoch) DO NOTHING";

const SUPERSEDE: &str = "
    WITH {rows}
    UPDATE event SET outcome = 'superseded', settled_at = {clock}
    FROM b
    WHERE pid = b_id AND outcome IS NULL AND what <> $1";

const INSERT_EVENTS: &str = "
    WITH {rows}
    INSERT INTO event (id, pid, request, at, what, by_whom, login, reason, outcome, settled_at)
    SELECT b_event, b_id, $1, {clock}, $2, $3, COALESCE($4, {login}), $5, NULLIF(b_outcome, ''),
           CASE WHEN b_outcome = '' THEN NULL ELSE {clock} END
    FROM b";
