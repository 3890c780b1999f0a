//! The statements of the holder: the claim, and the writes that its epoch fences.
//!
//! Every fenced write has the condition `epoch = … AND place = held`, clears `woken`, and applies the desired state if
//! it takes the row out of `held`. So an empty result has one meaning: the lease is lost.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use sea_orm::{ConnectionTrait, FromQueryResult, QueryResult, Value};
use uuid::Uuid;

use super::blob::{self, Checkpoint, Outcome, PackedCheckpoint};
use super::dialect::{Batch, Dialect, Kind};
use super::error::Error;
use super::lease::{Attempt, Claimed, Fence, Fenced, QUARANTINE_DEATHS, Verb, Written};
use super::request::settle;
use super::row::read;
use crate::id::{Incarnation, Pid};
use crate::state::{Desired, Place, State};

/// Claims the processes that are queued in the queue of their message, and no others.
pub(super) async fn claim(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    me: Incarnation,
    claims: &[(Pid, String)],
) -> Result<HashMap<Pid, Claimed>, Error> {
    if claims.is_empty() {
        return Ok(HashMap::new());
    }
    let scalars: Vec<Value> = vec![Uuid::from(me).into(), QUARANTINE_DEATHS.into()];
    let rows = connection.query_all_raw(dialect.hot_batch(CLAIM, scalars, batch_of_claims(claims))).await?;
    rows.iter()
        .map(|row| {
            let claimed = Claimed::try_from(ClaimedRow::from_query_result(row, "")?)?;
            Ok((claimed.fence.pid, claimed))
        })
        .collect()
}

/// A process that exists and was not claimed.
#[derive(FromQueryResult)]
pub(super) struct Missed {
    #[sea_orm(from_alias = "id")]
    pid: Pid,
    /// The digest of its spec, which tells whether a launch means this process.
    pub(super) digest: Vec<u8>,
    /// Whether it is queued in the queue of the claim, and quarantined.
    pub(super) is_queued_in_quarantine: bool,
}

/// Returns the processes that exist among those that were not claimed.
pub(super) async fn missed(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    claims: Vec<(Pid, String)>,
) -> Result<HashMap<Pid, Missed>, Error> {
    if claims.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = connection
        .query_all_raw(dialect.batch(MISSED, vec![QUARANTINE_DEATHS.into()], batch_of_claims(&claims)))
        .await?;
    Ok(read(&rows)?.into_iter().map(|missed: Missed| (missed.pid, missed)).collect())
}

fn batch_of_claims(claims: &[(Pid, String)]) -> Batch {
    let mut batch = Batch::new(&[("b_id", Kind::Uuid), ("b_queue", Kind::Text)]);
    for (pid, queue) in claims {
        batch.push([Uuid::from(*pid).into(), queue.clone().into()]);
    }
    batch
}

/// A row of [`CLAIM`].
#[derive(FromQueryResult)]
struct ClaimedRow {
    #[sea_orm(nested)]
    fence: Fence,
    claimed_at: i64,
    #[sea_orm(from_alias = "try")]
    try_number: i64,
    deaths: i64,
    #[sea_orm(from_alias = "outside")]
    has_outside: bool,
    refused_at: Option<i64>,
    desired: Desired,
    urgent: bool,
    checkpoint: Option<Vec<u8>>,
    body: Option<Vec<u8>>,
    traceparent: Option<String>,
    reply_to: Option<Vec<u8>>,
}

impl TryFrom<ClaimedRow> for Claimed {
    type Error = Error;

    fn try_from(row: ClaimedRow) -> Result<Self, Error> {
        let body = row.body.ok_or_else(|| Error::Unreadable(format!("process {} has no spec", row.fence.pid)))?;
        Ok(Claimed {
            fence: row.fence,
            claimed_at: row.claimed_at,
            try_number: row.try_number,
            deaths: row.deaths,
            has_outside: row.has_outside,
            refused_at: row.refused_at,
            desired: row.desired,
            urgent: row.urgent,
            checkpoint: row.checkpoint.map(|bytes| Checkpoint::from_bytes(&bytes)),
            spec: blob::spec_from_bytes(&body),
            traceparent: row.traceparent,
            reply_to: row.reply_to,
        })
    }
}

/// Applies one fenced write per process, with everything that follows from it, within the transaction `connection`. A
/// pid without an answer has lost its lease.
pub(super) async fn write(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    me: Incarnation,
    writes: &[&Fenced],
) -> Result<HashMap<Pid, Written>, Error> {
    if writes.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = connection.query_all_raw(dialect.hot_batch(&WRITE, vec![], batch_of(writes))).await?;
    let mut obeyed = Vec::new();
    let mut answers = HashMap::with_capacity(rows.len());
    for row in &rows {
        let (pid, written) = written(row)?;
        if written.place != Place::Held && row.try_get::<i64>("", "control")? > 0 {
            obeyed.push((pid, written.state));
        }
        answers.insert(pid, written);
    }
    let left = writes.iter().filter(|fenced| {
        fenced.ended.is_some() && answers.get(&fenced.fence.pid).is_some_and(|written| written.place != Place::Held)
    });
    let left: Vec<&Fenced> = left.copied().collect();
    if !left.is_empty() {
        connection
            .execute_raw(dialect.hot_batch(&INSERT_ATTEMPTS, vec![Uuid::from(me).into()], batch_of(&left)))
            .await?;
    }
    settle(connection, dialect, &obeyed).await?;
    insert_outputs(
        connection,
        dialect,
        writes.iter().copied().filter(|fenced| answers.contains_key(&fenced.fence.pid)),
    )
    .await?;
    Ok(answers)
}

/// The same in one statement, for PostgreSQL. It applies only to rows without any request, so that there is nothing to
/// settle, and takes no outputs. A pid without an answer must go through [`write`].
///
/// It must not settle requests: a request that was recorded while this statement waited for the row is invisible to it,
/// since all parts of a statement see the tables as of its start, and only the row itself is read again.
pub(super) async fn write_alone(
    connection: &impl ConnectionTrait,
    me: Incarnation,
    writes: &[&Fenced],
) -> Result<HashMap<Pid, Written>, Error> {
    if writes.is_empty() {
        return Ok(HashMap::new());
    }
    let dialect = Dialect::Postgres;
    let rows = connection
        .query_all_raw(dialect.hot_batch(&WRITE_ALONE, vec![Uuid::from(me).into()], batch_of(writes)))
        .await?;
    rows.iter().map(written).collect()
}

/// Returns the row if this write has already ended its process. The caller asks after it has repeated a commit without
/// an answer. No other program writes the same outcome under this epoch.
pub(super) async fn own_end(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    fenced: &Fenced,
) -> Result<Option<Written>, Error> {
    let Verb::End { outcome, .. } = &fenced.verb else { return Ok(None) };
    let sql = "SELECT id, place, state, before, desired, urgent, queue, told_at FROM process
               WHERE id = $1 AND epoch = $2 AND place = {ended} AND outcome = $3";
    let values = vec![Uuid::from(fenced.fence.pid).into(), fenced.fence.epoch.into(), outcome.to_bytes().into()];
    let row = connection.query_one_raw(dialect.statement(sql, values)).await?;
    Ok(row.as_ref().map(written).transpose()?.map(|(_, written)| written))
}

/// Writes checkpoints that keep the lease: by far the most frequent write, with the least to do. It obeys no request,
/// so there is nothing to settle; the answers carry the desired state.
pub(super) async fn checkpoint(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    checkpoints: &[(Fence, &PackedCheckpoint)],
) -> Result<HashMap<Pid, Written>, Error> {
    if checkpoints.is_empty() {
        return Ok(HashMap::new());
    }
    let mut batch = Batch::new(&[
        ("b_id", Kind::Uuid),
        ("b_epoch", Kind::BigInt),
        ("b_checkpoint", Kind::Bytes),
        ("b_seq", Kind::BigInt),
    ]);
    for (fence, checkpoint) in checkpoints {
        batch.push([
            Uuid::from(fence.pid).into(),
            fence.epoch.into(),
            checkpoint.bytes.clone().into(),
            checkpoint.advances.cast_signed().into(),
        ]);
    }
    let rows = connection.query_all_raw(dialect.hot_batch(&CHECKPOINT, vec![], batch)).await?;
    rows.iter()
        .map(|row| {
            let written = Written {
                place: Place::Held,
                state: State::Running,
                desired: row.try_get_by_index(1)?,
                urgent: row.try_get_by_index(2)?,
                queue: String::new(),
                announced_at: 0,
            };
            Ok((row.try_get_by_index(0)?, written))
        })
        .collect()
}

fn written(row: &QueryResult) -> Result<(Pid, Written), Error> {
    Ok((row.try_get("", "id")?, Written::from_query_result(row, "")?))
}

fn batch_of(writes: &[&Fenced]) -> Batch {
    let mut batch = Batch::new(&[
        ("b_id", Kind::Uuid),
        ("b_epoch", Kind::BigInt),
        ("b_verb", Kind::SmallInt),
        ("b_checkpoint", Kind::Bytes),
        ("b_seq", Kind::BigInt),
        ("b_wake_at", Kind::BigInt),
        ("b_try", Kind::BigInt),
        ("b_state", Kind::SmallInt),
        ("b_outcome", Kind::Bytes),
        ("b_started_at", Kind::BigInt),
        ("b_how", Kind::Text),
        ("b_reason", Kind::Text),
        ("b_refusal", Kind::Text),
        ("b_waits_for", Kind::Text),
    ]);
    for fenced in writes {
        let VerbColumns { verb, wake_us, state, outcome, refusal, waits_for } = VerbColumns::from(&fenced.verb);
        let (started_at, how, reason) = match &fenced.ended {
            Some(Attempt { started_at, how, reason }) => (*started_at, how.word(), reason.clone().unwrap_or_default()),
            None => (0, "", String::new()),
        };
        batch.push([
            Uuid::from(fenced.fence.pid).into(),
            fenced.fence.epoch.into(),
            verb.into(),
            fenced.checkpoint.as_ref().map(|checkpoint| checkpoint.bytes.clone()).unwrap_or_default().into(),
            fenced.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.advances.cast_signed()).into(),
            wake_us.into(),
            fenced.try_number.into(),
            state.code().into(),
            outcome.map(Outcome::to_bytes).unwrap_or_default().into(),
            started_at.into(),
            how.to_owned().into(),
            reason.into(),
            refusal.to_owned().into(),
            waits_for.to_owned().into(),
        ]);
    }
    batch
}

/// The columns of the batch that depend on the verb.
struct VerbColumns<'a> {
    verb: i16,
    wake_us: i64,
    state: State,
    outcome: Option<&'a Outcome>,
    refusal: &'a str,
    waits_for: &'a str,
}

impl<'a> From<&'a Verb> for VerbColumns<'a> {
    fn from(verb: &'a Verb) -> Self {
        let running =
            |verb| VerbColumns { verb, wake_us: 0, state: State::Running, outcome: None, refusal: "", waits_for: "" };
        let waiting = |verb, wake_in: &Duration| {
            let wake_us = i64::try_from(wake_in.as_micros()).unwrap_or(i64::MAX / 2).max(1);
            VerbColumns { wake_us, state: State::Waiting, ..running(verb) }
        };
        match verb {
            Verb::Keep => running(KEEP),
            Verb::Park { wake_in } => waiting(PARK, wake_in),
            Verb::Refuse { wake_in, reason } => VerbColumns { refusal: reason, ..waiting(PARK, wake_in) },
            Verb::Wait { waits_for, wake_in, killing } => {
                VerbColumns { waits_for, ..waiting(if *killing { WAIT_KILLING } else { PARK }, wake_in) }
            }
            Verb::Pause => running(PAUSE),
            Verb::GiveBack => running(GIVE_BACK),
            Verb::End { state, outcome } => VerbColumns { state: *state, outcome: Some(outcome), ..running(END) },
        }
    }
}

async fn insert_outputs(
    connection: &impl ConnectionTrait,
    dialect: Dialect,
    writes: impl Iterator<Item = &Fenced>,
) -> Result<(), Error> {
    let mut batch = Batch::new(&[
        ("b_id", Kind::Uuid),
        ("b_epoch", Kind::BigInt),
        ("b_stream", Kind::SmallInt),
        ("b_head", Kind::Bytes),
        ("b_tail", Kind::Bytes),
        ("b_total", Kind::BigInt),
    ]);
    for fenced in writes {
        for output in &fenced.outputs {
            batch.push([
                Uuid::from(fenced.fence.pid).into(),
                fenced.fence.epoch.into(),
                output.stream.code().into(),
                output.head.clone().into(),
                output.tail.clone().into(),
                i64::try_from(output.total_bytes).unwrap_or(i64::MAX).into(),
            ]);
        }
    }
    if !batch.is_empty() {
        connection.execute_raw(dialect.hot_batch(UPSERT_OUTPUT, vec![], batch)).await?;
    }
    Ok(())
}

// `{id_of_b}` and `place + 0`, here and in the fenced writes: the row is found by its primary key. A planner that
// believes that hardly any process exists, or is queued, would otherwise go through all of them for each row of the
// batch.
const CLAIM: &str = "
    WITH {rows}
    UPDATE process
    SET place = {held}, state = {running}, owner = $1, epoch = epoch + 1, claimed_at = {clock}, woken = false,
        queue_deadline = NULL, wake_at = NULL, changed_at = {clock}
    FROM b
    WHERE {id_of_b} AND place + 0 = {queued} AND queue = b_queue
      AND (deaths < $2
           OR (NOT EXISTS (SELECT 1 FROM process h WHERE h.owner = $1 AND h.place = {held} AND h.deaths >= $2)
               AND b_id = (SELECT s.id FROM process s JOIN b ON {id_of_b}
                           WHERE s.place + 0 = {queued} AND s.deaths >= $2 ORDER BY s.id LIMIT 1)))
    RETURNING id, epoch, claimed_at, checkpoint, desired, urgent, try, deaths, outside, refused_at,
              (SELECT s.body FROM spec s WHERE s.id = process.id) AS body,
              (SELECT s.traceparent FROM spec s WHERE s.id = process.id) AS traceparent,
              (SELECT s.reply_to FROM spec s WHERE s.id = process.id) AS reply_to";

const MISSED: &str = "
    WITH {rows}
    SELECT id, (SELECT s.digest FROM spec s WHERE s.id = process.id) AS digest,
           place + 0 = {queued} AND queue = b_queue AND deaths >= $1 AS is_queued_in_quarantine
    FROM b JOIN process ON {id_of_b}";

static CHECKPOINT: LazyLock<String> =
    LazyLock::new(|| CHECKPOINT_SQL.replace("{fence}", FENCE).replace("{follows}", FOLLOWS));

const CHECKPOINT_SQL: &str = "
    WITH {rows}
    UPDATE process
    SET seq = b_seq, checkpoint = b_checkpoint, deaths = 0, woken = false
    FROM b
    WHERE {id_of_b} AND {fence} AND {follows}
    RETURNING id, desired, urgent";

/// A checkpoint follows its predecessor or repeats it. If the predecessor is missing (the database was restored from a
/// backup, for example), the write would hide the gap.
const FOLLOWS: &str = "seq IN (b_seq - 1, b_seq)";

/// The fence of every write of a holder.
const FENCE: &str = "epoch = b_epoch AND place + 0 = {held}";

/// Whether the process was woken while it was about to park.
const WOKEN: &str = "woken";

/// Whether a pause is desired.
const PAUSE_DESIRED: &str = "desired = {pause}";

const KEEP: i16 = 0;
const PARK: i16 = 1;
const PAUSE: i16 = 2;
const GIVE_BACK: i16 = 3;
const END: i16 = 4;
/// Like [`PARK`], for a process that is to be killed once its job has ended.
const WAIT_KILLING: i16 = 5;

/// The statement of every fenced write, with one more condition. `place` is decided first; owner, state and the rest
/// follow from it.
fn fenced_sql(and: &str) -> String {
    // A wake-up or a kill that arrived while the process was about to park is seen here, under the row lock.
    let stays = format!(
        "(b_verb = {KEEP} OR (b_verb IN ({PARK}, {WAIT_KILLING}) AND {WOKEN}) OR (b_verb = {PARK} AND desired = {{kill}})
          OR (b_verb = {PAUSE} AND desired <> {{pause}}))"
    );
    // Every way out of `held`, except the end, obeys a pause.
    let paused = format!("(NOT {stays} AND b_verb <> {END} AND {PAUSE_DESIRED})");
    format!(
        "UPDATE process
         SET seq = CASE WHEN length(b_checkpoint) = 0 THEN seq ELSE b_seq END,
             checkpoint = CASE WHEN length(b_checkpoint) = 0 THEN checkpoint ELSE b_checkpoint END,
             deaths = CASE WHEN length(b_checkpoint) = 0 THEN deaths ELSE 0 END,
             try = CASE WHEN b_try = 0 THEN try ELSE b_try END,
             woken = false,
             refused_at = CASE WHEN b_refusal = '' THEN NULL ELSE COALESCE(refused_at, {{now}}) END,
             refusal = NULLIF(b_refusal, ''),
             waits_for = NULLIF(b_waits_for, ''),
             wake_at = CASE WHEN b_verb IN ({PARK}, {WAIT_KILLING}) AND NOT {stays} THEN {{now}} + b_wake_at ELSE NULL END,
             place = CASE WHEN {stays} THEN {{held}}
                          WHEN b_verb = {END} THEN {{ended}}
                          WHEN b_verb = {GIVE_BACK} AND desired <> {{pause}} THEN {{queued}}
                          ELSE {{parked}} END,
             owner = CASE WHEN {stays} THEN owner ELSE NULL END,
             state = CASE WHEN {paused} THEN {{paused}} WHEN {stays} THEN {{running}} ELSE b_state END,
             before = CASE WHEN {paused} THEN b_state ELSE before END,
             told_at = CASE WHEN b_verb = {GIVE_BACK} AND desired <> {{pause}} THEN {{now}} ELSE told_at END,
             changed_at = CASE WHEN {stays} THEN changed_at ELSE {{clock}} END,
             ended_at = CASE WHEN b_verb = {END} THEN {{clock}} ELSE NULL END,
             outcome = CASE WHEN b_verb = {END} THEN b_outcome ELSE NULL END
         FROM b
         WHERE {{id_of_b}} AND {FENCE} AND (length(b_checkpoint) = 0 OR {FOLLOWS}) {and}
         RETURNING id, place, state, before, desired, urgent, control, queue, told_at"
    )
}

static WRITE: LazyLock<String> = LazyLock::new(|| format!("WITH {{rows}} {}", fenced_sql("")));

static WRITE_ALONE: LazyLock<String> = LazyLock::new(|| {
    let update = fenced_sql("AND control = 0");
    format!(
        "WITH {{rows}},
         w AS ({update}, b_id, b_epoch, b_try, b_started_at, b_how, b_reason),
         a AS ({INSERT_ATTEMPT} FROM w WHERE b_how <> '' AND place <> {{held}} {ONCE})
         SELECT id, place, state, before, desired, urgent, control, queue, told_at FROM w"
    )
});

static INSERT_ATTEMPTS: LazyLock<String> =
    LazyLock::new(|| format!("WITH {{rows}} {INSERT_ATTEMPT} FROM b WHERE true {ONCE}"));

const INSERT_ATTEMPT: &str = "
    INSERT INTO attempt (pid, epoch, worker, worker_name, try, started_at, ended_at, how, reason)
    SELECT b_id, b_epoch, $1, (SELECT name FROM worker WHERE id = $1), b_try, b_started_at, {clock}, b_how,
           NULLIF(b_reason, '')";

const ONCE: &str = "ON CONFLICT (pid, epoch) DO NOTHING";

const UPSERT_OUTPUT: &str = "
    WITH {rows}
    INSERT INTO output (pid, epoch, stream, head, tail, total_bytes)
    SELECT b_id, b_epoch, b_stream, b_head, b_tail, b_total FROM b WHERE true
    ON CONFLICT (pid, epoch, stream)
    DO UPDATE SET head = excluded.head, tail = excluded.tail, total_bytes = excluded.total_bytes";
