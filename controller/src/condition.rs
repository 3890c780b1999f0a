//! Why a process does not advance: the first unmet condition, decided from facts alone.

mod held;
mod parked;
mod queued;

use baton_common::message::Status;
use baton_common::state::Place;
use baton_common::store::explain::Facts;
use baton_common::store::query::{Summary, queue_name};
use serde_json::{Value, json};

use crate::output::{span, timestamp};

/// What the holder says about the process; `None` if there is no holder or it does not know the process. The error says why
/// the holder could not be asked.
pub(crate) type Answer = Result<Option<Status>, String>;

/// Why a process does not advance.
#[derive(Debug)]
pub(crate) struct Explanation {
    /// Identifier of the condition. Programs depend on it, so it never changes.
    pub(crate) condition: &'static str,
    /// Explanation for people, with numbers.
    pub(crate) text: String,
    /// What an operator can do about it.
    pub(crate) remedy: Option<String>,
    /// The numbers for programs.
    pub(crate) facts: Value,
}

impl Explanation {
    fn new(condition: &'static str, text: String, facts: Value) -> Self {
        Self { condition, text, remedy: None, facts }
    }

    fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

/// Returns the first condition that keeps a process from advancing. `is_embedded` means that it belongs to `baton run`.
pub(crate) fn explain(facts: &Facts, answer: &Answer, is_embedded: bool) -> Explanation {
    let case = Case { facts, summary: &facts.details.summary, answer, is_embedded };
    match case.summary.place {
        Place::Ended => case.ended(),
        Place::Held => case.held(),
        Place::Parked => case.parked(),
        Place::Queued => case.queued(),
    }
}

/// The facts about one process.
struct Case<'a> {
    facts: &'a Facts,
    summary: &'a Summary,
    answer: &'a Answer,
    is_embedded: bool,
}

impl Case<'_> {
    fn ended(&self) -> Explanation {
        let summary = self.summary;
        let outcome = summary.outcome.as_ref();
        let ended_at = summary.ended_at.unwrap_or(summary.changed_at);
        let exit = outcome.and_then(|outcome| outcome.exit);
        let reason = outcome.and_then(|outcome| outcome.reason.as_deref()).or(summary.last_error.as_deref());
        let with = exit.map(|exit| format!(" with exit code {exit}")).unwrap_or_default();
        let because = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
        let text = format!("it ended {}: {}{with}{because}", self.ago(ended_at), summary.state);
        let facts = json!({
            "ended_at": timestamp(ended_at),
            "exit": exit,
            "ok": outcome.map(|outcome| outcome.ok),
            "reason": reason,
        });
        Explanation::new("ended", text, facts)
    }

    fn no_worker(&self, text: String) -> Explanation {
        let facts = json!({"queue": self.summary.queue, "workers": 0});
        Explanation::new("no_worker", text, facts).with_remedy(self.start_remedy())
    }

    fn start_remedy(&self) -> String {
        if self.is_embedded {
            "run the same `baton run` command again to resume it".to_owned()
        } else {
            format!("start one: baton-worker --queue {}", queue_name(&self.summary.queue))
        }
    }

    fn ago(&self, at: i64) -> String {
        format!("{} ago", span(self.summary.now - at))
    }
}

fn millis(milliseconds: u64) -> i64 {
    i64::try_from(milliseconds).unwrap_or(i64::MAX / 1_000).saturating_mul(1_000)
}

fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_common::id::Pid;
    use baton_common::spec::{Spec, Work};
    use baton_common::state::{Desired, State};
    use baton_common::store::blob::Outcome;
    use baton_common::store::query::{Details, EventRow, WorkerRow};

    use super::*;
    use crate::overview::tests::worker;

    /// Five minutes after the epoch.
    pub(super) const NOW: i64 = 300_000_000;

    pub(super) const SECOND: i64 = 1_000_000;

    /// Makes the worker silent for so many seconds.
    pub(super) fn silent(worker: WorkerRow, seconds: i64) -> WorkerRow {
        WorkerRow { beat_at: worker.now - seconds * SECOND, ..worker }
    }

    pub(super) fn queued() -> Facts {
        let summary = Summary {
            pid: Pid::generate(),
            name: "job".into(),
            kind: "program".into(),
            place: Place::Queued,
            state: State::Created,
            desired: Desired::Run,
            queue: "default".into(),
            worker: None,
            owner: None,
            epoch: 0,
            try_number: 1,
            advances: 0,
            created_at: 0,
            changed_at: NOW - 300_000,
            ended_at: None,
            wake_at: None,
            outcome: None,
            last_error: None,
            waits_for_retry: false,
            refusal: None,
            has_outside: false,
            waits_for: None,
            paused: None,
            now: NOW,
        };
        Facts {
            site: None,
            details: Details {
                jobs: vec![],
                summary,
                spec: Some(Spec::new(Work::Run { argv: vec!["true".into()] })),
                unreadable: None,
                created_by: "ann@h".into(),
                checkpoint: None,
                attempts: vec![],
                events: vec![],
            },
            deaths: 0,
            n_before: 7,
            holder: None,
            workers: vec![worker("w1", "default")],
            fleet_pause: None,
        }
    }

    pub(super) fn parked(state: State) -> Facts {
        let mut facts = queued();
        facts.details.summary.place = Place::Parked;
        facts.details.summary.state = state;
        facts
    }

    /// A process held by this worker, the only one unless the test adds others.
    pub(super) fn held(holder: WorkerRow) -> Facts {
        let mut facts = queued();
        let summary = &mut facts.details.summary;
        summary.place = Place::Held;
        summary.state = State::Running;
        summary.worker = Some(holder.name.clone());
        summary.owner = Some(holder.id);
        facts.workers = if holder.gone_at.is_none() { vec![holder.clone()] } else { vec![] };
        facts.holder = Some(holder);
        facts
    }

    pub(super) fn requested(mut facts: Facts, desired: Desired) -> Facts {
        facts.details.summary.desired = desired;
        facts.details.events.push(EventRow {
            at: NOW - 3 * SECOND,
            what: desired.verb().into(),
            by: "ann@h".into(),
            login: "postgresql:ann".into(),
            reason: Some("maintenance".into()),
            request: None,
            outcome: None,
            settled_at: None,
        });
        facts
    }

    pub(super) fn stage() -> Answer {
        Ok(Some(Status { stage: "advancing".into(), stage_ms: 20_000, advances: 12, ..Status::default() }))
    }

    /// Returns the condition, and text and remedy in one string.
    fn said(facts: &Facts, answer: &Answer) -> (&'static str, String) {
        let Explanation { condition, text, remedy, .. } = explain(facts, answer, false);
        (condition, format!("{text} | {}", remedy.unwrap_or_default()))
    }

    pub(super) fn is(facts: &Facts, answer: &Answer, condition: &str, parts: &[&str]) {
        let (was, text) = said(facts, answer);
        assert_eq!(was, condition, "{text}");
        for part in parts {
            assert!(text.contains(part), "no {part:?} in: {text}");
        }
    }

    #[test]
    fn ended_process_tells_outcome_and_time() {
        let mut facts = parked(State::Finished);
        facts.details.summary.place = Place::Ended;
        facts.details.summary.ended_at = Some(NOW - 60 * SECOND);
        facts.details.summary.outcome = Some(Outcome { exit: Some(4), ..Outcome::default() });
        facts.details.summary.last_error = Some("exit 4".into());
        is(&facts, &Ok(None), "ended", &["it ended 1m00s ago: finished with exit code 4 (exit 4)"]);
        facts.details.summary.state = State::Killed;
        facts.details.summary.outcome = Some(Outcome::because("killed by ann@h: enough"));
        is(&facts, &Ok(None), "ended", &["it ended 1m00s ago: killed (killed by ann@h: enough)"]);
    }

    #[test]
    fn spans_are_converted_without_overflow() {
        assert_eq!(millis(u64::MAX), i64::MAX / 1_000 * 1_000);
        assert_eq!(micros(Duration::MAX), i64::MAX);
    }
}
