//! Requests of operators. One statement writes what is desired and, if nobody holds the process, applies it.

use sea_orm::{ConnectionTrait, DatabaseTransaction, QueryResult, Value};
use uuid::Uuid;

use super::blob::Outcome;
use super::submit::Told;
use super::{Error, Store, begin};
use crate::id::{Incarnation, Pid};
use crate::message::Select;
use crate::state::{Desired, Place, State};

/// Rows that one statement of a request to many changes.
const PAGE_ROWS: u32 = 1_000;

/// What somebody asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is wanted.
    pub verb: Desired,
    /// At once: `pause --now` ends a local program.
    pub urgent: bool,
    /// Who asks.
    pub by: String,
    /// Why, in their words.
    pub reason: Option<String>,
}

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
    /// Where it is now.
    pub place: Place,
    /// Its state now.
    pub state: State,
    /// Who holds it and must be told to read the row.
    pub owner: Option<Incarnation>,
    /// Whether it was as desired before.
    pub was_so: bool,
    /// Its task queue, and the row for its message, if it is queued now and was not before.
    pub told: Option<(String, Told)>,
    /// Whom to tell of the end, if this ended it.
    pub reply_to: Option<Vec<u8>>,
}

impl Store {
    /// Asks one process for something.
    ///
    /// # Errors
    /// Nothing is recorded, or (when the commit's answer was lost) it is: the same call again is safe.
    pub async fn control(&self, pid: Pid, request: &Request) -> Result<Answer, Error> {
        let transaction = begin(&self.db).await?;
        let id: Value = Uuid::from(pid).into();
        let sql = "SELECT place, state, before, desired FROM process WHERE id = $1 {for_update}";
        let row = transaction.query_one_raw(self.dialect.statement(sql, vec![id])).await?;
        let Some(row) = row else { return Ok(Answer::Absent) };
        let before = state(&row)?;
        if before.is_final() {
            return Ok(Answer::Ended(before));
        }
        if row.try_get::<i16>("", "desired")? == Desired::Kill.code() && request.verb != Desired::Kill {
            return Ok(Answer::Dying);
        }
        let was_queued = row.try_get::<i16>("", "place")? == Place::Queued.code();
        let was_so = match request.verb {
            Desired::Run => {
                !matches!(before, State::Paused(_)) && row.try_get::<i16>("", "desired")? == Desired::Run.code()
            }
            Desired::Pause => matches!(before, State::Paused(_)),
            Desired::Kill => row.try_get::<i16>("", "desired")? == Desired::Kill.code(),
        };
        let values = vec![
            request.verb.code().into(),
            request.urgent.into(),
            Self::kill_outcome(request).into(),
            Uuid::from(pid).into(),
        ];
        let sql = CONTROL.replace("{which}", "id = $4");
        let rows = transaction.query_all_raw(self.dialect.statement(&sql, values)).await?;
        let row = rows.first().ok_or(Error::NoRow)?;
        self.record(&transaction, Some(pid), request).await?;
        let controlled = controlled(row, was_so, was_queued)?;
        transaction.commit().await?;
        Ok(Answer::Recorded(controlled))
    }

    /// Asks every process of a selection for something, page by page in the order of ids; those that come after the
    /// call began are not asked. Calls `page` after each commit.
    ///
    /// # Errors
    /// As [`Store::control`]; pages that are committed stay.
    pub async fn control_many(
        &self,
        select: &Select,
        request: &Request,
        mut page: impl FnMut(Vec<Controlled>),
    ) -> Result<u64, Error> {
        let until = self.now().await?;
        let mut count = 0;
        let mut after = Uuid::nil();
        loop {
            let mut values: Vec<Value> = vec![
                request.verb.code().into(),
                request.urgent.into(),
                Self::kill_outcome(request).into(),
                after.into(),
                until.into(),
                request.verb.code().into(),
            ];
            let filter = self.filter(select, &mut values);
            let pick = format!(
                "id IN (SELECT p.id FROM process p JOIN spec s ON s.id = p.id
                        WHERE p.id > $4 AND s.created_at <= $5 AND p.place <> {{ended}} AND p.desired <> $6 {filter}
                        ORDER BY p.id LIMIT {PAGE_ROWS} {{for_update}})"
            );
            let pick = pick.replace("{for_update}", if self.is_embedded() { "" } else { "FOR UPDATE OF p" });
            let transaction = begin(&self.db).await?;
            let sql = CONTROL.replace("{which}", &pick);
            let rows = transaction.query_all_raw(self.dialect.statement(&sql, values)).await?;
            let mut changed = Vec::with_capacity(rows.len());
            for row in &rows {
                // Only `play` queues a row, and only one that was paused.
                let controlled = controlled(row, false, request.verb != Desired::Run)?;
                after = after.max(controlled.pid.into());
                self.record(&transaction, Some(controlled.pid), request).await?;
                changed.push(controlled);
            }
            changed.sort_by_key(|row| row.pid);
            transaction.commit().await?;
            if changed.is_empty() {
                return Ok(count);
            }
            count += changed.len() as u64;
            page(changed);
        }
    }

    /// Records a broadcast from outside under its message id, whatever text that is; `false` when somebody has done so
    /// before.
    ///
    /// # Errors
    /// The database did not take it; the message must not be acknowledged.
    pub async fn record_broadcast(&self, message_id: &str, request: &Request) -> Result<bool, Error> {
        let sql = "INSERT INTO event (id, at, what, by_whom, reason) VALUES ($1, {now}, $2, $3, $4)
                   ON CONFLICT (id) DO NOTHING";
        let what = format!("broadcast {}", request.verb.verb());
        let digest = blake3::hash(message_id.as_bytes());
        let id = Uuid::from_slice(&digest.as_bytes()[..16]).expect("sixteen bytes are a UUID");
        let values = vec![id.into(), what.into(), request.by.clone().into(), request.reason.clone().into()];
        Ok(self.execute(sql, values).await? == 1)
    }

    fn filter(&self, select: &Select, values: &mut Vec<Value>) -> String {
        let mut filter = String::new();
        if !select.pids.is_empty() {
            let first = values.len() + 1;
            values.extend(select.pids.iter().map(|pid| Value::from(Uuid::from(*pid))));
            let places: Vec<String> = (first..=values.len()).map(|number| format!("${number}")).collect();
            filter.push_str(&format!(" AND p.id IN ({})", places.join(", ")));
        }
        for (key, value) in &select.labels {
            values.push(key.clone().into());
            values.push(value.clone().into());
            let number = values.len();
            filter.push_str(&format!(" AND (s.labels{{json}} ->> ${}) = ${number}", number - 1));
        }
        filter
    }

    fn kill_outcome(request: &Request) -> Vec<u8> {
        Outcome::because(kill_reason(&request.by, request.reason.as_deref())).to_bytes()
    }

    async fn record(
        &self,
        transaction: &DatabaseTransaction,
        pid: Option<Pid>,
        request: &Request,
    ) -> Result<(), Error> {
        let sql = "INSERT INTO event (id, pid, at, what, by_whom, reason) VALUES ($1, $2, {now}, $3, $4, $5)";
        let values = vec![
            Uuid::now_v7().into(),
            pid.map(Uuid::from).into(),
            request.verb.verb().to_owned().into(),
            request.by.clone().into(),
            request.reason.clone().into(),
        ];
        transaction.execute_raw(self.dialect.statement(sql, values)).await?;
        Ok(())
    }
}

/// What a killed process's outcome says.
pub(super) fn kill_reason(by: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("killed by {by}: {reason}"),
        None => format!("killed by {by}"),
    }
}

fn state(row: &QueryResult) -> Result<State, Error> {
    State::from_codes(row.try_get("", "state")?, Some(row.try_get("", "before")?))
        .ok_or_else(|| Error::Unreadable("no such state".into()))
}

fn controlled(row: &QueryResult, was_so: bool, was_queued: bool) -> Result<Controlled, Error> {
    let pid = Pid::from(row.try_get::<Uuid>("", "id")?);
    let place = Place::from_code(row.try_get("", "place")?).ok_or_else(|| Error::Unreadable("no such place".into()))?;
    let told = if place == Place::Queued && !was_queued {
        let told = Told { pid, told_at: row.try_get("", "told_at")?, traceparent: row.try_get("", "traceparent")? };
        Some((row.try_get("", "queue")?, told))
    } else {
        None
    };
    Ok(Controlled {
        pid,
        place,
        state: state(row)?,
        owner: row.try_get::<Option<Uuid>>("", "owner")?.map(Incarnation::from),
        was_so,
        told,
        reply_to: if place == Place::Ended { row.try_get("", "reply_to")? } else { None },
    })
}

// What nobody holds obeys here and now: a kill ends it, a pause parks it, and `play` returns it to where it was
// (waiting and not woken sleeps on, all else is queued). What is held only learns what is desired.
const CONTROL: &str = "
    UPDATE process
    SET desired = $1, urgent = $2, control = control + 1,
        place = CASE WHEN place = {held} THEN place
                     WHEN $1 = {kill} THEN {ended}
                     WHEN $1 = {pause} THEN {parked}
                     WHEN state = {paused} AND NOT (before = {waiting} AND NOT woken) THEN {queued}
                     ELSE place END,
        state = CASE WHEN place = {held} THEN state
                     WHEN $1 = {kill} THEN {killed}
                     WHEN $1 = {pause} THEN {paused}
                     WHEN state = {paused} THEN before
                     ELSE state END,
        before = CASE WHEN place <> {held} AND $1 = {pause} AND state <> {paused} THEN state ELSE before END,
        told_at = CASE WHEN $1 = {play} AND state = {paused} AND NOT (before = {waiting} AND NOT woken) THEN {now}
                       ELSE told_at END,
        changed_at = CASE WHEN place = {held} THEN changed_at ELSE {now} END,
        ended_at = CASE WHEN place <> {held} AND $1 = {kill} THEN {now} ELSE ended_at END,
        outcome = CASE WHEN place <> {held} AND $1 = {kill} THEN $3 ELSE outcome END
    WHERE {which} AND place <> {ended} AND (desired <> {kill} OR $1 = {kill})
    RETURNING id, place, state, before, owner, queue, told_at,
              (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent,
              (SELECT s.reply_to FROM spec s WHERE s.id = process.id) AS reply_to";
