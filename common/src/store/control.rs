//! Requests of operators, and of workers that cannot go on with a process. One statement writes what is desired and, if
//! nobody holds the process, applies it.
//!
//! Every request leaves an event a process: who asked, when, and what it came to. The outcome is written by the statement
//! that obeys: here where nobody holds the process, by the holder's fenced write, or by the sweep that frees it.

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

/// What became of a request to one process.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is written, and applied unless somebody holds the process.
    Recorded(Controlled),
    /// The process has ended; nothing was written.
    Ended(State),
    /// A kill stands, and it absorbs everything else.
    Dying,
    /// No such process.
    Absent,
}

/// A row after a request.
#[derive(Clone, Debug)]
pub struct Controlled {
    /// The process.
    pub pid: Pid,
    /// The request's event, whose outcome says when it is applied.
    pub event: RequestId,
    /// Where it is now.
    pub place: Place,
    /// Its state now.
    pub state: State,
    /// Who holds it, or held it until a `--force`, and must be told to read the row.
    pub owner: Option<Incarnation>,
    /// What the request has come to.
    pub effect: Effect,
    /// Its task queue, and the row for its message, if it is queued now and was not before.
    pub told: Option<(String, Announced)>,
    /// Whom to tell of the end, if this ended it.
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
    /// Asks one process for something.
    ///
    /// # Errors
    /// Nothing is recorded, or (when the commit's answer was lost) it is: the same call again is safe.
    pub async fn control(&self, pid: Pid, request: &Request) -> Result<Answer, Error> {
        self.control_where("p.id = $1", vec![Uuid::from(pid).into()], request).await
    }

    /// Asks for something as the holder of a process: [`Answer::Absent`] when it is not that any more.
    ///
    /// # Errors
    /// As [`Store::control`].
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

    /// Begins to ask every process of a selection for something; those that come after the request was recorded are not
    /// asked. [`Many::next`] does it page by page.
    ///
    /// The request is recorded first, under its id. The same id again goes on where the first call was cut off, and asks
    /// nobody of whom something was asked since; when the first call has come to its end, this does nothing and returns
    /// `None`.
    ///
    /// # Errors
    /// As [`Store::control`].
    pub async fn control_many(&self, id: RequestId, select: &Select, request: &Request) -> Result<Option<Many>, Error> {
        let target = serde_json::to_string(select).expect("a selection is plain data");
        let Some(asked_at) = self.record_request(id, request.verb.verb(), Some(target), request).await? else {
            return Ok(None);
        };
        let walk = Walk::new(select, Order::OldestFirst, None).past_ended();
        let (store, select, request) = (self.clone(), select.clone(), request.clone());
        Ok(Some(Many { store, id, select, request, asked_at, walk }))
    }

    /// How many processes of a selection a request would be about, by the words of their places.
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
            // What waits for its holder and is not wanted any more.
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

/// A request to many that is under way.
pub struct Many {
    store: Store,
    id: RequestId,
    select: Select,
    request: Request,
    asked_at: i64,
    walk: Walk,
}

impl Many {
    /// Asks the next page of processes, and gives those that were asked, in the order of their ids; `None` when all have
    /// been asked.
    ///
    /// # Errors
    /// As [`Store::control`]; pages that are committed stay.
    pub async fn next(&mut self) -> Result<Option<Vec<Controlled>>, Error> {
        let Store { db, dialect, .. } = &self.store;
        while let Some(ids) = self.walk.next_ids(db, *dialect, PAGE_ROWS).await? {
            let mut values: Vec<Value> =
                vec![self.asked_at.into(), self.request.verb.code().into(), self.request.force.into()];
            let look = select::look(&self.select, &mut values);
            // What has moved meanwhile is judged anew, under its lock.
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

/// Whether a request is still to be obeyed: by a holder, or by a worker that ends what is outside.
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
        told: is_queued_now.then_some((queue, announced)),
        reply_to: reply_to.filter(|_| place == Place::Ended),
    }
}

/// The row of a process while this is its lease.
const HELD_BY: &str = "p.id = $1 AND p.epoch = $2 AND p.place = {held}";

const BEFORE: &str = "SELECT p.id, p.place, p.state, p.before, p.desired, p.owner FROM process p";

// What nobody holds obeys here and now: a kill ends it, a pause parks it, and `play` returns it to where it was
// (waiting and not woken sleeps on, all else is queued). What is held only learns what is desired, unless it is forced;
// and what has a job at a site is queued, for a worker to end that first.
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

// A holder that is not asked cannot write its attempt any more.
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
