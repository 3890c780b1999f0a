//! Every version of every process's row, recorded by a trigger of the test, and a check of each step from one version
//! to the next. The trigger sees what the database committed, regardless of the writer.

use std::collections::{BTreeMap, BTreeSet};

use baton_common::state::{Desired, Live, Place, State};
use serde_json::Value;

use crate::history::{Attempt, number};
use crate::scene::Scene;

/// The places, as the database stores them.
const QUEUED: i64 = Place::Queued.code() as i64;
const HELD: i64 = Place::Held.code() as i64;
const PARKED: i64 = Place::Parked.code() as i64;
const ENDED: i64 = Place::Ended.code() as i64;

/// The states that a parked row may have.
const WAITING: i64 = State::Waiting.code() as i64;
const PAUSED: i64 = State::Paused(Live::Running).code() as i64;

/// The desired states.
const RUN: i64 = Desired::Run.code() as i64;
const KILL: i64 = Desired::Kill.code() as i64;

/// One version of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Whether it was deleted.
    pub deleted: bool,
    /// The code of its place.
    pub place: i64,
    /// The code of its state.
    pub state: i64,
    /// The code of the state to which it returns from a pause.
    pub before: i64,
    /// The epoch of its last lease.
    pub epoch: i64,
    /// Its holder.
    pub owner: Option<String>,
    /// The number of recorded advances.
    pub seq: i64,
    /// A digest of the checkpoint.
    pub checkpoint: Option<String>,
    /// A digest of the outcome.
    pub outcome: Option<String>,
    /// The code of the desired state.
    pub desired: i64,
    /// Whether it has a wake-up that is not handled yet.
    pub woken: bool,
    /// Whether it has a time to wake up.
    pub is_timed: bool,
    /// Whether it has, or may have, a job at a site that a kill must end first.
    pub outside: bool,
}

/// The trigger and its table, in the schema of the search path.
const KEEP: &str = "
    CREATE TABLE journal (n bigserial PRIMARY KEY, pid uuid NOT NULL, deleted boolean NOT NULL, place bigint, state bigint, before bigint,
        epoch bigint, owner uuid, seq bigint, checkpoint text, outcome text, desired bigint, woken boolean, is_timed boolean,
        outside boolean);
    CREATE FUNCTION keep_journal() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            INSERT INTO journal (pid, deleted) VALUES (OLD.id, true);
        ELSE
            INSERT INTO journal (pid, deleted, place, state, before, epoch, owner, seq, checkpoint, outcome, desired, woken, is_timed,
                                 outside)
            VALUES (NEW.id, false, NEW.place, NEW.state, NEW.before, NEW.epoch, NEW.owner, NEW.seq, md5(NEW.checkpoint),
                    md5(NEW.outcome), NEW.desired, NEW.woken, NEW.wake_at IS NOT NULL, NEW.outside);
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER keep_journal AFTER INSERT OR UPDATE OR DELETE ON process
        FOR EACH ROW EXECUTE FUNCTION keep_journal();";

/// Starts the journal; call it before anything is submitted.
pub async fn keep(scene: &Scene) {
    // Any command creates the tables.
    scene.baton(&["list"]).await.ok();
    scene.sql(KEEP).await;
}

/// The query for all versions; no rows if no journal exists.
pub(crate) async fn select(scene: &Scene) -> &'static str {
    let is_kept = scene.sql("SELECT to_regclass('journal') IS NOT NULL").await.trim() == "t";
    // The row is locked from before the trigger until the commit, so `n` is the order of a process's commits.
    if is_kept { "SELECT * FROM journal ORDER BY n" } else { "SELECT 1 WHERE false" }
}

pub(crate) fn version(row: &Value) -> Version {
    if row["deleted"] == true {
        return Version { deleted: true, ..Version::default() };
    }
    let word = |name: &str| row[name].as_str().map(str::to_owned);
    Version {
        deleted: false,
        place: number(row, "place"),
        state: number(row, "state"),
        before: number(row, "before"),
        epoch: number(row, "epoch"),
        owner: word("owner"),
        seq: number(row, "seq"),
        checkpoint: word("checkpoint"),
        outcome: word("outcome"),
        desired: number(row, "desired"),
        woken: row["woken"] == true,
        is_timed: row["is_timed"] == true,
        outside: row["outside"] == true,
    }
}

/// A holding, according to the versions.
struct Holding<'a> {
    owner: &'a str,
    /// The advances that were recorded under it.
    recorded: BTreeSet<i64>,
    /// The row when it left the holder.
    left: Option<&'a Version>,
}

/// Checks all versions of one process against each other, against its attempts, and against the advances that its
/// witness saw (advance, epoch and name of the worker).
pub(crate) fn check(
    versions: &[Version],
    attempts: &[Attempt],
    seen: &[(i64, i64, String)],
    workers: &BTreeMap<String, String>,
    was_asked: bool,
    violation: &mut dyn FnMut(String),
) {
    for pair in versions.windows(2) {
        check_step(&pair[0], &pair[1], violation);
    }
    versions.iter().for_each(|version| check_version(version, violation));
    let holdings = holdings(versions);
    for attempt in attempts {
        match holdings.get(&attempt.epoch) {
            None => violation(format!("I8: an attempt has epoch {}, but no version was held under it", attempt.epoch)),
            Some(holding) if holding.owner != attempt.worker => {
                violation(format!("I8: the attempt of epoch {} names another worker", attempt.epoch));
            }
            Some(_) => {}
        }
    }
    let how = |epoch: i64| attempts.iter().find(|attempt| attempt.epoch == epoch).map(|attempt| attempt.how.as_str());
    for (epoch, holding) in &holdings {
        // An ordinary wait ends a holding without an attempt row.
        let waits = |left: &Version| left.state == WAITING || (left.state == PAUSED && left.before == WAITING);
        if let Some(left) = holding.left
            && !(left.place == PARKED && waits(left))
            && how(*epoch).is_none()
        {
            violation(format!("I8: the holding of epoch {epoch} has left no attempt, but {left:?}"));
        }
        if !seen.is_empty() {
            for advance in &holding.recorded {
                if !seen.iter().any(|(made, under, _)| made == advance && under == epoch) {
                    violation(format!(
                        "I3: advance {advance} is recorded under epoch {epoch} and was not made under it"
                    ));
                }
            }
        }
    }
    let recorded_under: BTreeMap<i64, i64> = holdings
        .iter()
        .flat_map(|(epoch, holding)| holding.recorded.iter().map(|advance| (*advance, *epoch)))
        .collect();
    let mut unrecorded: BTreeMap<i64, u64> = BTreeMap::new();
    let mut once = BTreeSet::new();
    for (advance, epoch, worker) in seen {
        let Some(holding) = holdings.get(epoch) else {
            violation(format!("I2: advance {advance} was made under epoch {epoch}, which nobody was given"));
            continue;
        };
        if workers.get(holding.owner) != Some(worker) {
            violation(format!("I2: {worker} made advance {advance} under epoch {epoch}, which is another's"));
        }
        if recorded_under.get(advance).is_some_and(|under| under < epoch) {
            violation(format!("I3: advance {advance} was recorded, and made again under epoch {epoch}"));
        }
        if !once.insert((advance, epoch)) && !was_asked {
            violation(format!("I3: advance {advance} was made twice under epoch {epoch}"));
        }
        if !holding.recorded.contains(advance) {
            *unrecorded.entry(*epoch).or_default() += 1;
        }
    }
    for (epoch, count) in unrecorded {
        let is_cut_off =
            holdings[&epoch].left.is_none() || matches!(how(epoch), Some("lost" | "drained" | "killed" | "paused"));
        if !is_cut_off || (count > 1 && !was_asked) {
            violation(format!(
                "I3: {count} advances made under epoch {epoch} were not recorded, although it was not cut off"
            ));
        }
    }
}

fn check_step(from: &Version, to: &Version, violation: &mut dyn FnMut(String)) {
    let Version { place, epoch, .. } = *from;
    if to.deleted {
        if place != ENDED {
            violation("I1: it was deleted before it had ended".to_owned());
        }
        return;
    }
    if from.deleted {
        violation("I4: it came back after it had been pruned".to_owned());
        return;
    }
    let is_changed = (to.place, to.state, to.epoch, to.seq) != (place, from.state, epoch, from.seq)
        || to.checkpoint != from.checkpoint
        || to.outcome != from.outcome;
    if place == ENDED && is_changed {
        violation(format!("I4: it was changed after its end, to {to:?}"));
        return;
    }
    if to.epoch < epoch {
        violation(format!("I2: epoch {epoch} was followed by {}", to.epoch));
    } else if to.epoch > epoch && (to.epoch, place, to.place) != (epoch + 1, QUEUED, HELD) {
        violation(format!("I2: epoch {} was given while its place was {place}", to.epoch));
    } else if to.epoch == epoch && to.place == HELD && (place != HELD || to.owner != from.owner) {
        violation(format!("I2: it was taken under epoch {epoch}, which it had before"));
    }
    if (to.seq != from.seq || to.checkpoint != from.checkpoint) && place != HELD {
        violation(format!("I3: its progress was changed while nobody held it, to {}", to.seq));
    } else if to.seq != from.seq && to.seq != from.seq + 1 {
        violation(format!("I3: advance {} was followed by {}", from.seq, to.seq));
    }
    if from.desired == KILL && to.desired != KILL {
        violation("I7: a kill was taken back".to_owned());
    }
}

fn check_version(version: &Version, violation: &mut dyn FnMut(String)) {
    let Version { deleted, place, state, desired, .. } = *version;
    if deleted {
        return;
    }
    if (place == HELD) != version.owner.is_some() {
        violation(format!("I5: place {place} and owner {:?} do not go together", version.owner));
    }
    // A worker has to end the job before it obeys the kill.
    let is_killing = desired == KILL && version.outside;
    if place == QUEUED && desired != RUN && !is_killing {
        violation("I7: it is queued although that is not desired".to_owned());
    }
    if place == PARKED && state == WAITING {
        if version.woken {
            violation("I5: it went to sleep over a wake-up".to_owned());
        }
        if desired != RUN && !is_killing {
            violation("I7: it went to sleep without obeying".to_owned());
        }
        if !version.is_timed {
            violation("I5: nothing will ever wake it".to_owned());
        }
    }
    if place == PARKED && state == PAUSED && desired == RUN {
        violation("I7: it is paused although nobody wants that".to_owned());
    }
}

fn holdings(versions: &[Version]) -> BTreeMap<i64, Holding<'_>> {
    let mut holdings: BTreeMap<i64, Holding<'_>> = BTreeMap::new();
    let mut former: Option<&Version> = None;
    for version in versions {
        if let Some(owner) = &version.owner {
            holdings.entry(version.epoch).or_insert(Holding { owner, recorded: BTreeSet::new(), left: None });
        }
        if let Some(former) = former.filter(|former| former.place == HELD)
            && let Some(holding) = holdings.get_mut(&former.epoch)
        {
            if version.seq > former.seq {
                holding.recorded.insert(version.seq);
            }
            if version.place != HELD && holding.left.is_none() {
                holding.left = Some(version);
            }
        }
        former = Some(version);
    }
    holdings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued() -> Version {
        Version::default()
    }

    fn held(epoch: i64, owner: &str, seq: i64) -> Version {
        Version { place: HELD, state: 1, epoch, owner: Some(owner.into()), seq, ..Version::default() }
    }

    fn left(epoch: i64, place: i64, state: i64, seq: i64) -> Version {
        Version { place, state, epoch, seq, is_timed: state == WAITING, ..Version::default() }
    }

    fn attempt(epoch: i64, worker: &str, how: &str) -> Attempt {
        Attempt { epoch, worker: worker.into(), started_at: 0, ended_at: 0, how: how.into() }
    }

    fn violations(versions: &[Version], attempts: &[Attempt], seen: &[(i64, i64, &str)]) -> Vec<String> {
        let workers = [("a", "w1"), ("b", "w2")].map(|(id, name)| (id.to_owned(), name.to_owned())).into();
        let seen: Vec<_> = seen.iter().map(|(advance, epoch, name)| (*advance, *epoch, (*name).to_owned())).collect();
        let mut violations = Vec::new();
        check(versions, attempts, &seen, &workers, false, &mut |what| violations.push(what));
        violations
    }

    fn says(violations: &[String], what: &str) {
        assert!(violations.iter().any(|violation| violation.contains(what)), "{what} is not in {violations:?}");
    }

    /// A process that was taken over in the middle of its second advance.
    fn taken_over() -> Vec<Version> {
        let freed = Version { epoch: 1, seq: 1, state: 1, ..queued() };
        vec![queued(), held(1, "a", 0), held(1, "a", 1), freed, held(2, "b", 1), held(2, "b", 2), left(2, ENDED, 4, 3)]
    }

    const TAKEN_OVER: [(i64, i64, &str); 4] = [(1, 1, "w1"), (2, 1, "w1"), (2, 2, "w2"), (3, 2, "w2")];

    #[test]
    fn good_journals_pass() {
        let attempts = [attempt(1, "a", "lost"), attempt(2, "b", "ok")];
        assert_eq!(violations(&taken_over(), &attempts, &TAKEN_OVER), Vec::<String>::new());
        let woken = Version { woken: true, ..left(1, QUEUED, 1, 1) };
        let sleeps =
            [queued(), held(1, "a", 0), left(1, PARKED, WAITING, 1), woken, held(2, "a", 1), left(2, ENDED, 4, 2)];
        assert_eq!(violations(&sleeps, &[attempt(2, "a", "ok")], &[]), Vec::<String>::new());
        let pruned = [queued(), held(1, "a", 0), left(1, ENDED, 4, 1), Version { deleted: true, ..queued() }];
        assert_eq!(violations(&pruned, &[attempt(1, "a", "ok")], &[]), Vec::<String>::new());
    }

    #[test]
    fn a_lease_that_was_taken_and_not_given_is_seen() {
        says(&violations(&[queued(), held(1, "a", 0), held(2, "b", 0)], &[], &[]), "I2: epoch 2 was given");
        says(&violations(&[left(1, PARKED, WAITING, 1), held(2, "b", 1)], &[], &[]), "I2: epoch 2 was given");
        says(&violations(&[held(1, "a", 0), held(1, "b", 0)], &[], &[]), "I2: it was taken under epoch 1");
        says(&violations(&[held(2, "a", 0), held(1, "a", 0)], &[], &[]), "I2: epoch 2 was followed by 1");
    }

    #[test]
    fn progress_that_is_lost_or_skipped_is_seen() {
        says(&violations(&[held(1, "a", 3), held(1, "a", 2)], &[], &[]), "I3: advance 3 was followed by 2");
        says(&violations(&[held(1, "a", 3), held(1, "a", 5)], &[], &[]), "I3: advance 3 was followed by 5");
        let written_by_a_zombie = [Version { epoch: 1, seq: 1, ..queued() }, Version { epoch: 1, seq: 2, ..queued() }];
        says(&violations(&written_by_a_zombie, &[], &[]), "while nobody held it");
    }

    #[test]
    fn an_end_that_does_not_stay_is_seen() {
        says(&violations(&[left(1, ENDED, 4, 1), left(1, QUEUED, 1, 1)], &[], &[]), "I4: it was changed after its end");
        let outcome = |text: &str| Version { outcome: Some(text.into()), ..left(1, ENDED, 4, 1) };
        says(&violations(&[outcome("a"), outcome("b")], &[], &[]), "I4: it was changed after its end");
        says(&violations(&[Version { deleted: true, ..queued() }, queued()], &[], &[]), "I4: it came back");
        says(&violations(&[queued(), Version { deleted: true, ..queued() }], &[], &[]), "I1: it was deleted");
    }

    #[test]
    fn a_lost_wake_up_and_a_request_that_was_passed_over_are_seen() {
        let parked = left(1, PARKED, WAITING, 1);
        says(&violations(&[Version { woken: true, ..parked.clone() }], &[], &[]), "over a wake-up");
        says(&violations(&[Version { is_timed: false, ..parked.clone() }], &[], &[]), "nothing will ever wake it");
        says(&violations(&[Version { desired: 1, ..parked }], &[], &[]), "without obeying");
        says(&violations(&[Version { desired: 1, ..queued() }], &[], &[]), "queued although");
        says(&violations(&[Version { desired: KILL, ..queued() }], &[], &[]), "queued although");
        says(&violations(&[left(1, PARKED, PAUSED, 1)], &[], &[]), "nobody wants that");
        let taken_back = [Version { desired: KILL, ..held(1, "a", 1) }, held(1, "a", 1)];
        says(&violations(&taken_back, &[], &[]), "a kill was taken back");
    }

    #[test]
    fn a_holding_without_its_attempt_is_seen() {
        let attempts = [attempt(2, "b", "ok")];
        says(&violations(&taken_over(), &attempts, &[]), "epoch 1 has left no attempt");
        let attempts = [attempt(1, "b", "lost"), attempt(2, "b", "ok"), attempt(3, "b", "ok")];
        says(&violations(&taken_over(), &attempts, &[]), "names another worker");
        says(&violations(&taken_over(), &attempts, &[]), "an attempt has epoch 3");
    }

    #[test]
    fn advances_that_the_journal_does_not_know_or_knew_before_are_seen() {
        let attempts = [attempt(1, "a", "lost"), attempt(2, "b", "ok")];
        let with =
            |line: (i64, i64, &'static str)| violations(&taken_over(), &attempts, &[&TAKEN_OVER[..], &[line]].concat());
        says(&with((1, 2, "w2")), "I3: advance 1 was recorded, and made again");
        says(&with((3, 2, "w2")), "twice under epoch 2");
        says(&with((4, 2, "w2")), "were not recorded");
        says(&with((1, 7, "w2")), "which nobody was given");
        says(&with((1, 1, "w2")), "which is another's");
        says(&violations(&taken_over(), &attempts, &TAKEN_OVER[1..]), "was not made under it");
    }
}
