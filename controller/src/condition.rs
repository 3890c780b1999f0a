//! Why a process does not move: the first condition that is not met, decided from facts alone.

use std::collections::BTreeSet;

use baton_common::message::Status;
use baton_common::state::{Desired, Place, State};
use baton_common::store::explain::Facts;
use baton_common::store::query::{EventRow, Refusal, Summary, WorkerRow, WorkerState, queue_name};
use baton_common::store::site::{REFUSED, UNLISTED};
use baton_common::store::worker::LEASE;
use serde_json::{Value, json};

use crate::commands::sites;
use crate::output::{self, because, count, span, timestamp};
use crate::overview::pause_text;

/// What the broker brought: what the holder says of the process, if there is one and it knows it, or why nobody could be
/// asked.
pub(crate) type Answer = Result<Option<Status>, String>;

/// Why a process does not move.
#[derive(Debug)]
pub(crate) struct Explanation {
    /// The condition's word. Programs decide by it, so it stays.
    pub(crate) condition: &'static str,
    /// The same for people, with numbers.
    pub(crate) text: String,
    /// What to do about it, if something can be done.
    pub(crate) remedy: Option<String>,
    /// The numbers.
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

/// The first condition that keeps a process from going on. `is_embedded` is whether it belongs to `baton run`.
pub(crate) fn explain(facts: &Facts, answer: &Answer, is_embedded: bool) -> Explanation {
    let case = Case { facts, summary: &facts.details.summary, answer, is_embedded };
    match (case.summary.place, case.summary.state) {
        (Place::Ended, _) => case.ended(),
        (Place::Held, _) => case.held(),
        (Place::Parked, State::Paused(_)) => case.paused(),
        (Place::Parked, _) => case.waiting(),
        (Place::Queued, _) => case.queued(),
    }
}

struct Case<'a> {
    facts: &'a Facts,
    summary: &'a Summary,
    answer: &'a Answer,
    is_embedded: bool,
}

impl Case<'_> {
    fn ago(&self, at: i64) -> String {
        format!("{} ago", span(self.summary.now - at))
    }

    fn ended(&self) -> Explanation {
        let summary = self.summary;
        let outcome = summary.outcome.as_ref();
        let ended_at = summary.ended_at.unwrap_or(summary.changed_at);
        let exit = outcome.and_then(|outcome| outcome.exit);
        let reason = outcome.and_then(|outcome| outcome.reason.as_deref()).or(summary.last_error.as_deref());
        let with = exit.map(|exit| format!(" with exit {exit}")).unwrap_or_default();
        let text = format!("it has ended: {}{with} {}{}", summary.state, self.ago(ended_at), because(reason));
        let facts = json!({
            "ended_at": timestamp(ended_at),
            "exit": exit,
            "ok": outcome.map(|outcome| outcome.ok),
            "reason": reason,
        });
        Explanation::new("ended", text, facts)
    }

    fn held(&self) -> Explanation {
        let summary = self.summary;
        let name = summary.worker.as_deref().unwrap_or("a worker that is forgotten");
        let since = span(summary.now - summary.changed_at);
        let facts = self.holder_facts();
        if summary.desired != Desired::Run {
            return self.pending(name);
        }
        if let Some((condition, text, remedy)) = self.takeover() {
            let text = format!("{name} has held it for {since}; {text}");
            return Explanation { condition, text, remedy, facts };
        }
        if let Ok(Some(Status { blocked_ms: Some(blocked_ms), .. })) = self.answer {
            let text = format!(
                "it has not given its thread on {name} back for {}; its neighbours there wait, and it obeys nothing until \
                 it does",
                span(millis(*blocked_ms))
            );
            return Explanation::new("blocks_its_thread", text, facts);
        }
        let text = format!("{name} has held it for {since}: {}{}", self.stage(), self.beside());
        Explanation::new("advancing", text, facts)
    }

    /// Somebody has asked for something that the holder has not done yet.
    fn pending(&self, name: &str) -> Explanation {
        let verb = self.summary.desired.verb();
        let event = self.asked(verb);
        let asked = match event {
            Some(event) => {
                format!("{verb} asked by {} {}{}", event.by, self.ago(event.at), because(event.reason.as_deref()))
            }
            None => format!("{verb} was asked"),
        };
        let (holder, remedy) = match self.takeover() {
            Some((_, text, remedy)) => (text, remedy),
            None => (self.stage() + &self.beside(), None),
        };
        let text = format!("{asked}; {name} holds it and has not obeyed yet: {holder}");
        let mut facts = self.holder_facts();
        facts["asked_by"] = json!(event.map(|event| &event.by));
        facts["asked_at"] = json!(event.map(|event| timestamp(event.at)));
        facts["asked_reason"] = json!(event.and_then(|event| event.reason.as_ref()));
        let pid = self.summary.pid;
        if self.summary.desired == Desired::Kill {
            return Explanation::new("kill_pending", text, facts)
                .with_remedy(remedy.unwrap_or_else(|| format!("baton kill --force {pid} does not wait for it")));
        }
        let now = || format!("a pause waits for the end of the advance; baton pause --now {pid} does not");
        Explanation::new("pause_pending", text, facts).with_remedy(remedy.unwrap_or_else(now))
    }

    /// The request that is not settled yet.
    fn asked(&self, verb: &str) -> Option<&EventRow> {
        let events = &self.facts.details.events;
        events.iter().rev().find(|event| event.what == verb && event.outcome.is_none())
    }

    /// Why the holder cannot go on with it, and what happens then; `None` if it beats. With a condition's word and what an
    /// operator has to do.
    fn takeover(&self) -> Option<(&'static str, String, Option<String>)> {
        let holder = self.facts.holder.as_ref()?;
        let others = self.facts.workers.iter().filter(|other| other.id != holder.id);
        let is_watched = others.filter(|other| other.state() != WorkerState::Silent).count() > 0;
        let silence = span(micros(holder.silence()));
        let lease = LEASE.as_secs();
        let (condition, text) = match holder.state() {
            WorkerState::Live | WorkerState::Draining => return None,
            WorkerState::Gone if is_watched => {
                ("holder_gone", "it is gone, and another worker frees the process at its next sweep".to_owned())
            }
            WorkerState::Gone => ("holder_gone", "it is gone".to_owned()),
            WorkerState::Silent if is_watched => {
                let text = format!(
                    "it has not beaten for {silence}, and another worker takes the process over after {lease} s at most"
                );
                ("holder_silent", text)
            }
            WorkerState::Silent => ("holder_silent", format!("it has not beaten for {silence}")),
        };
        if is_watched {
            return Some((condition, text, None));
        }
        let remedy = if self.is_embedded {
            "run it again: `baton run` goes on with it".to_owned()
        } else {
            "nobody is left to take it over; start a worker".to_owned()
        };
        Some((condition, text, Some(remedy)))
    }

    /// What the holder says that it does.
    fn stage(&self) -> String {
        match self.answer {
            Ok(Some(status)) => {
                let line = status.last_line.as_ref().map(|line| format!(", last line: {line}")).unwrap_or_default();
                let child = status.child.map(|child| format!(", program {child}")).unwrap_or_default();
                let stage = span(millis(status.stage_ms));
                format!("stage {} for {stage}, {} advances committed{child}{line}", status.stage, status.advances)
            }
            Ok(None) => "its stage is unknown".to_owned(),
            Err(reason) => format!("its stage is unknown ({reason})"),
        }
    }

    /// What else is going on at the holder.
    fn beside(&self) -> String {
        let Some(holder) = &self.facts.holder else { return String::new() };
        let mut text = format!("; {} beat {} ago", holder.name, span(micros(holder.silence())));
        if holder.state() == WorkerState::Draining {
            text.push_str(", drains, and gives it back before its next advance");
        }
        if let Some(blocked) = &holder.blocked {
            text.push_str(&format!(", and has a blocked thread: {blocked}"));
        }
        text
    }

    fn holder_facts(&self) -> Value {
        let holder = self.facts.holder.as_ref();
        json!({
            "worker": self.summary.worker,
            "incarnation": self.summary.owner,
            "since": timestamp(self.summary.changed_at),
            "worker_state": holder.map(|holder| holder.state().word()),
            "beat_ago_ms": holder.map(|holder| micros(holder.silence()) / 1_000),
            "blocked": holder.and_then(|holder| holder.blocked.as_ref()),
            "live": self.answer.as_ref().ok(),
            "unanswered": self.answer.as_ref().err(),
        })
    }

    fn paused(&self) -> Explanation {
        let remedy = format!("baton play {}", self.summary.pid);
        let Some(paused) = &self.summary.paused else {
            let since = self.ago(self.summary.created_at);
            let text = format!("it was accepted on hold {since} (`hold: true` in its spec), and nobody has played it");
            return Explanation::new("on_hold", text, json!({"since": timestamp(self.summary.created_at)}))
                .with_remedy(remedy);
        };
        let reason = because(paused.reason.as_deref());
        let text = format!("it was paused by {} {}{reason}", paused.by, self.ago(paused.at));
        let facts = json!({"by": paused.by, "at": timestamp(paused.at), "reason": paused.reason});
        Explanation::new("paused", text, facts).with_remedy(remedy)
    }

    fn waiting(&self) -> Explanation {
        let summary = self.summary;
        if let Some(explanation) = self.at_site() {
            return explanation;
        }
        let Some(wake_at) = summary.wake_at else {
            return Explanation::new("waits_for_timer", "it waits, and nothing says for what".into(), json!({}));
        };
        let rest = wake_at - summary.now;
        if rest <= 0 && !self.facts.workers.iter().any(|worker| worker.silence() < LEASE) {
            let text = format!("its time came {}, and no worker is there to wake it", self.ago(wake_at));
            return self.no_worker(text);
        }
        let when =
            if rest > 0 { format!("in {}", span(rest)) } else { "at the next sweep, within a second".to_owned() };
        let mut facts = json!({"wake_at": timestamp(wake_at), "in_ms": rest / 1_000});
        if let Some(refusal) = &summary.refusal {
            return self.refused(refusal, &when, facts);
        }
        let (true, Some(error)) = (summary.waits_for_retry, &summary.last_error) else {
            return Explanation::new("waits_for_timer", format!("it sleeps, and wakes {when}"), facts);
        };
        let max = self.facts.details.spec.as_ref().map(|spec| spec.retry.max);
        let attempt = summary.try_number;
        facts["try"] = json!(attempt);
        facts["tries_max"] = json!(max);
        facts["last_error"] = json!(error);
        let of = max.map(|max| format!(" of {max}")).unwrap_or_default();
        let text = format!("it is tried again {when}: try {attempt}{of}; try {} failed: {error}", attempt - 1);
        Explanation::new("waits_for_retry", text, facts)
    }

    /// It waits for something at its site.
    fn at_site(&self) -> Option<Explanation> {
        let site = self.facts.site.as_ref()?;
        let name = &site.name;
        let mut facts = json!({"site": name, "state": sites::state(site), "last_error": site.last_error});
        if let Some(retry_in) = site.retry_in {
            let error = site.last_error.as_deref().unwrap_or("no reason is known");
            facts["retry_in_ms"] = json!(retry_in / 1_000);
            let text = format!("the site `{name}` cannot be reached: {error}; it is tried again in {}", span(retry_in));
            return Some(Explanation::new("site_down", text, facts).with_remedy(format!("baton site test {name}")));
        }
        let waits_for = self.summary.waits_for.as_deref().unwrap_or_default();
        if waits_for.starts_with("slot/") {
            facts["sessions"] = json!([site.slots_taken, site.slots]);
            let text = format!(
                "it waits for a session with the site `{name}`: {} of {} are open, and {} processes wait",
                site.slots_taken, site.slots, site.waiting_for_slot
            );
            return Some(Explanation::new("waits_for_session", text, facts));
        }
        if waits_for.starts_with("room/") {
            facts["jobs"] = json!(site.jobs);
            let text = format!(
                "the limits of the site `{name}` let no further job in now: {} are there, and {} processes wait",
                site.jobs, site.waiting_for_room
            );
            return Some(Explanation::new("waits_for_room", text, facts));
        }
        if let Some((_, reason)) = waits_for.strip_prefix(REFUSED).and_then(|refused| refused.split_once('/')) {
            let left = self.summary.wake_at.map_or(0, |wake_at| (wake_at - self.summary.now).max(0));
            facts["reason"] = json!(reason);
            facts["in_ms"] = json!(left / 1_000);
            let when = span(left);
            let text = format!("the site `{name}` does not accept its job now, and is asked again in {when}: {reason}");
            return Some(Explanation::new("refused_by_site", text, facts));
        }
        if waits_for.starts_with("sent/") {
            let text = format!("another process sends a file to the site `{name}` that both need");
            return Some(Explanation::new("waits_for_file", text, facts));
        }
        let job = self.facts.details.jobs.last().filter(|job| job.ended_at.is_none())?;
        facts["job"] = output::job_json(job);
        let mut text =
            format!("its job at the site `{name}` has not ended: {}", output::job_text(job, self.summary.now));
        if let Some(error) = site.last_error.as_deref().and_then(|error| error.strip_prefix(UNLISTED)) {
            text.push_str(&format!("; the jobs there cannot be listed now: {error}"));
        }
        Some(Explanation::new("waits_for_job", text, facts))
    }

    /// It waits for a worker that can go on with it.
    fn refused(&self, refusal: &Refusal, when: &str, mut facts: Value) -> Explanation {
        facts["since"] = json!(timestamp(refusal.since));
        facts["reason"] = json!(refusal.reason);
        let since = span(self.summary.now - refusal.since);
        let text = format!(
            "no worker that has taken it for {since} could go on with it: {}; the next one takes it {when}",
            refusal.reason
        );
        let queue = queue_name(&self.summary.queue);
        let remedy = format!("update the workers of queue `{queue}`, or start one there that can");
        Explanation::new("needs_other_worker", text, facts).with_remedy(remedy)
    }

    fn queued(&self) -> Explanation {
        let Facts { workers, n_before, fleet_pause, .. } = self.facts;
        let queue = &self.summary.queue;
        if let Some(pause) = fleet_pause {
            let text = format!("{}; what is queued waits", pause_text(pause, self.summary.now));
            let facts = json!({"by": pause.by, "at": timestamp(pause.at), "reason": pause.reason});
            return Explanation::new("fleet_paused", text, facts).with_remedy("baton play --fleet");
        }
        if workers.is_empty() {
            return self.no_worker("no worker is live".to_owned());
        }
        let serving: Vec<&WorkerRow> = workers.iter().filter(|worker| worker.serves(queue)).collect();
        if serving.is_empty() {
            let served: BTreeSet<&str> = workers.iter().flat_map(|worker| worker.queues.split(',')).collect();
            let served: Vec<&str> = served.into_iter().collect();
            let (name, all) = (queue_name(queue), served.join(", "));
            let text = format!("no live worker serves queue `{name}`; live are {}, which serve {all}", workers.len());
            let facts = json!({"queue": queue, "workers": workers.len(), "served": served});
            return Explanation::new("queue_not_served", text, facts).with_remedy(self.start_remedy());
        }
        let takers: Vec<&WorkerRow> = serving.iter().copied().filter(|worker| worker.takes_work()).collect();
        if takers.is_empty()
            && let Some(explanation) = short(queue, &serving)
        {
            return explanation;
        }
        if takers.is_empty() {
            let silent = serving.iter().filter(|worker| worker.silence() >= LEASE).count();
            let draining = serving.len() - silent;
            let text = format!(
                "no worker that serves queue `{queue}` takes work: {draining} drain, {silent} have not beaten for {} s",
                LEASE.as_secs()
            );
            let facts = json!({"queue": queue, "workers": serving.len(), "silent": silent, "draining": draining});
            let condition = if draining > 0 { "workers_drain" } else { "workers_silent" };
            return Explanation::new(condition, text, facts).with_remedy(self.start_remedy());
        }
        let held: i64 = takers.iter().map(|worker| worker.held.min(worker.slots)).sum();
        let slots: i64 = takers.iter().map(|worker| worker.slots).sum();
        let facts = json!({
            "queue": queue,
            "queued_at": timestamp(self.summary.changed_at),
            "before": n_before,
            "workers": takers.len(),
            "held": held,
            "slots": slots,
            "deaths": self.facts.deaths,
            "broker": self.answer.as_ref().err(),
        });
        let (condition, text) = if held >= slots {
            let before = count(*n_before);
            let text = format!("all slots for queue `{queue}` are taken, {held} of {slots}; {before} are before it");
            ("slots_taken", text)
        } else {
            let since = span(self.summary.now - self.summary.changed_at);
            let text = format!("it has been queued for {since}, {} before it", count(*n_before));
            ("queued", format!("{text}; {held} of {slots} slots for queue `{queue}` are taken"))
        };
        Explanation::new(condition, text + &self.remarks(), facts)
    }

    /// What slows a queued process down without keeping it from being taken.
    fn remarks(&self) -> String {
        let mut text = String::new();
        if self.facts.deaths >= 2 {
            text.push_str(&format!(
                "; {} of its holders have died in a row, so a worker takes it only while it holds no other such process",
                self.facts.deaths
            ));
        }
        if let Err(reason) = self.answer {
            text.push_str(&format!(
                "; the broker is not reachable from here ({reason}), but workers take it from the database as well"
            ));
        }
        text
    }

    fn no_worker(&self, text: String) -> Explanation {
        let facts = json!({"queue": self.summary.queue, "workers": 0});
        Explanation::new("no_worker", text, facts).with_remedy(self.start_remedy())
    }

    fn start_remedy(&self) -> String {
        if self.is_embedded {
            "run it again: `baton run` goes on with it".to_owned()
        } else {
            format!("start one: baton-worker --queue {}", queue_name(&self.summary.queue))
        }
    }
}

/// Every worker that could take from a queue lacks something for that; `None` if none is short.
fn short(queue: &str, serving: &[&WorkerRow]) -> Option<Explanation> {
    let is_candidate = |worker: &&&WorkerRow| worker.silence() < LEASE && !worker.drain && worker.is_short();
    let short: Vec<_> = serving
        .iter()
        .filter(is_candidate)
        .filter_map(|worker| Some((worker.name.as_str(), worker.lacks.as_ref()?)))
        .collect();
    let (_, first) = short.first()?;
    let named = short.iter().map(|(name, lacks)| format!("{name} {lacks}")).collect::<Vec<_>>().join("; ");
    let text = format!("no worker that serves queue `{queue}` takes work: {named}");
    let workers: Vec<Value> =
        short.iter().map(|(name, lacks)| json!({"name": name, "lacks": lacks.what, "text": lacks.text})).collect();
    let facts = json!({"queue": queue, "workers": workers});
    Some(Explanation::new("workers_lack", text, facts).with_remedy(first.remedy()))
}

fn millis(milliseconds: u64) -> i64 {
    i64::try_from(milliseconds).unwrap_or(i64::MAX / 1_000).saturating_mul(1_000)
}

fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use baton_common::id::{Incarnation, Pid};
    use baton_common::lack::Lacks;
    use baton_common::spec::{Spec, Work};
    use baton_common::state::Live;
    use baton_common::store::blob::Outcome;
    use baton_common::store::fleet::FleetPause;
    use baton_common::store::query::{Details, Paused};

    use super::*;

    /// In these tests it is five minutes past the beginning of time.
    const NOW: i64 = 300_000_000;

    const SECOND: i64 = 1_000_000;

    /// A live worker with four free slots, at time zero.
    pub(crate) fn worker(name: &str, queues: &str) -> WorkerRow {
        WorkerRow {
            id: Incarnation::generate(),
            name: name.into(),
            host: "h".into(),
            os_pid: 1,
            version: "0".into(),
            queues: queues.into(),
            slots: 4,
            held: 0,
            blocked: None,
            lacks: None,
            drain: false,
            beat: 1,
            beat_at: 0,
            started_at: 0,
            gone_at: None,
            control_queue: String::new(),
            now: 0,
        }
    }

    /// The same, silent for so many seconds.
    fn silent(worker: WorkerRow, seconds: i64) -> WorkerRow {
        WorkerRow { beat_at: worker.now - seconds * SECOND, ..worker }
    }

    fn queued() -> Facts {
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

    fn parked(state: State) -> Facts {
        let mut facts = queued();
        facts.details.summary.place = Place::Parked;
        facts.details.summary.state = state;
        facts
    }

    /// Held by this worker, which is alone unless the test adds others.
    fn held(holder: WorkerRow) -> Facts {
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

    fn asked(mut facts: Facts, desired: Desired) -> Facts {
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

    fn stage() -> Answer {
        Ok(Some(Status { stage: "advancing".into(), stage_ms: 20_000, advances: 12, ..Status::default() }))
    }

    /// The condition, and text and remedy in one.
    fn said(facts: &Facts, answer: &Answer) -> (&'static str, String) {
        let Explanation { condition, text, remedy, .. } = explain(facts, answer, false);
        (condition, format!("{text} | {}", remedy.unwrap_or_default()))
    }

    fn is(facts: &Facts, answer: &Answer, condition: &str, parts: &[&str]) {
        let (was, text) = said(facts, answer);
        assert_eq!(was, condition, "{text}");
        for part in parts {
            assert!(text.contains(part), "no {part:?} in: {text}");
        }
    }

    #[test]
    fn an_ended_process_says_how_and_when() {
        let mut facts = parked(State::Finished);
        facts.details.summary.place = Place::Ended;
        facts.details.summary.ended_at = Some(NOW - 60 * SECOND);
        facts.details.summary.outcome = Some(Outcome { exit: Some(4), ..Outcome::default() });
        facts.details.summary.last_error = Some("exit 4".into());
        is(&facts, &Ok(None), "ended", &["finished with exit 4 1m00s ago: exit 4"]);
        facts.details.summary.state = State::Killed;
        facts.details.summary.outcome = Some(Outcome::because("killed by ann@h: enough"));
        is(&facts, &Ok(None), "ended", &["killed 1m00s ago: killed by ann@h: enough"]);
    }

    #[test]
    fn a_request_that_the_holder_has_not_obeyed_comes_before_all_else() {
        let facts = asked(held(worker("w1", "default")), Desired::Pause);
        let parts = ["pause asked by ann@h 3.0 s ago: maintenance", "w1 holds it", "stage advancing for 20s", "--now"];
        is(&facts, &stage(), "pause_pending", &parts);
        let facts = asked(held(worker("w1", "default")), Desired::Kill);
        is(&facts, &Err("broker away".into()), "kill_pending", &["kill asked by ann@h", "broker away", "kill --force"]);
        let mut facts = asked(held(silent(worker("w1", "default"), 4)), Desired::Kill);
        is(&facts, &Ok(None), "kill_pending", &["not beaten for 4.0 s", "start a worker"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "kill_pending", &["another worker takes the process over after 10 s", "kill --force"]);
    }

    #[test]
    fn a_holder_that_is_silent_or_gone_is_named_with_what_follows() {
        let mut facts = held(silent(worker("w1", "default"), 4));
        is(&facts, &Ok(None), "holder_silent", &["w1 has held it", "not beaten for 4.0 s", "nobody is left"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "holder_silent", &["another worker takes the process over"]);
        let mut facts = held(WorkerRow { gone_at: Some(0), ..worker("w1", "default") });
        is(&facts, &Ok(None), "holder_gone", &["nobody is left"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "holder_gone", &["frees the process at its next sweep"]);
        let embedded = explain(&held(silent(worker("baton-run", "default"), 4)), &Ok(None), true);
        assert!(embedded.remedy.unwrap().contains("run it again"));
    }

    #[test]
    fn what_blocks_its_thread_is_not_merely_advancing() {
        let facts = held(worker("w1", "default"));
        let blocked = Ok(Some(Status { blocked_ms: Some(7_000), ..Status::default() }));
        is(&facts, &blocked, "blocks_its_thread", &["its thread on w1 back for 7.0 s"]);
        is(&facts, &stage(), "advancing", &["w1 has held it", "advancing for 20s, 12 advances", "w1 beat 0.0 s ago"]);
        let neighbour = WorkerRow { blocked: Some("a-pid for 9s".into()), drain: true, ..worker("w1", "default") };
        is(&held(neighbour), &Err("down".into()), "advancing", &["unknown (down)", "blocked thread: a-pid", "drains"]);
    }

    #[test]
    fn a_paused_process_says_by_whom_and_why() {
        let mut facts = parked(State::Paused(Live::Created));
        is(&facts, &Ok(None), "on_hold", &["on hold 5m00s ago", "baton play"]);
        let paused = Paused { by: "ann@h".into(), at: NOW - 180 * SECOND, reason: Some("maintenance".into()) };
        facts.details.summary.paused = Some(paused);
        is(&facts, &Ok(None), "paused", &["paused by ann@h 3m00s ago: maintenance", "baton play"]);
    }

    #[test]
    fn a_waiting_process_says_for_what_and_how_long() {
        let mut facts = parked(State::Waiting);
        facts.details.summary.wake_at = Some(NOW + 40 * SECOND);
        is(&facts, &Ok(None), "waits_for_timer", &["wakes in 40s"]);
        facts.details.summary.last_error = Some("exit 1".into());
        is(&facts, &Ok(None), "waits_for_timer", &["wakes in 40s"]);
        facts.details.summary.waits_for_retry = true;
        facts.details.summary.try_number = 2;
        facts.details.spec.as_mut().unwrap().retry.max = 3;
        is(&facts, &Ok(None), "waits_for_retry", &["again in 40s: try 2 of 3; try 1 failed: exit 1"]);
        facts.details.summary.wake_at = Some(NOW - SECOND);
        is(&facts, &Ok(None), "waits_for_retry", &["at the next sweep"]);
        let refusal = Refusal { since: NOW - 120 * SECOND, reason: "version 2".into() };
        facts.details.summary.refusal = Some(refusal);
        is(
            &facts,
            &Ok(None),
            "needs_other_worker",
            &["for 2m00s", "version 2", "at the next sweep", "queue `default`"],
        );
        facts.workers = vec![silent(worker("w1", "default"), 60)];
        is(&facts, &Ok(None), "no_worker", &["its time came 1.0 s ago", "baton-worker --queue default"]);
    }

    #[test]
    fn a_queued_process_waits_for_the_fleet_first() {
        let mut facts = queued();
        facts.workers = vec![];
        is(&facts, &Ok(None), "no_worker", &["no worker is live", "baton-worker --queue default"]);
        facts.fleet_pause = Some(FleetPause {
            at: NOW - 120 * SECOND,
            by: "ann@h".into(),
            login: "postgresql:ann".into(),
            reason: Some("night".into()),
        });
        is(
            &facts,
            &Ok(None),
            "fleet_paused",
            &["paused by ann@h (postgresql:ann), 2m00s ago: night", "baton play --fleet"],
        );
    }

    #[test]
    fn a_queue_that_nobody_takes_from_says_why() {
        let mut facts = queued();
        facts.details.summary.queue = "gpu.high".into();
        facts.workers.push(worker("w2", "cpu,default"));
        let parts = ["queue `gpu`; live are 2, which serve cpu, default", "baton-worker --queue gpu"];
        is(&facts, &Ok(None), "queue_not_served", &parts);
        facts.workers = vec![WorkerRow { drain: true, ..worker("w1", "gpu") }, worker("w2", "default")];
        is(&facts, &Ok(None), "workers_drain", &["no worker that serves queue `gpu.high` takes work: 1 drain, 0"]);
        facts.workers = vec![silent(worker("w1", "gpu"), 10), worker("w2", "default")];
        is(&facts, &Ok(None), "workers_silent", &["0 drain, 1 have not beaten for 10 s"]);
    }

    #[test]
    fn a_queue_whose_workers_lack_something_names_them() {
        let mut facts = queued();
        let lacks = |what: &str| Some(Lacks { what: what.into(), text: "0 of 8 KiB are free".into() });
        let short = WorkerRow { lacks: lacks("disk space"), ..worker("w1", "default") };
        facts.workers = vec![short.clone(), WorkerRow { drain: true, ..worker("w2", "default") }];
        let parts = ["w1 lacks disk space: 0 of 8 KiB are free; it takes nothing", "| free space"];
        is(&facts, &Ok(None), "workers_lack", &parts);
        facts.workers.push(WorkerRow { lacks: lacks("a fast disk"), ..worker("w3", "default") });
        is(&facts, &Ok(None), "queued", &["0 of 4 slots"]);
    }

    #[test]
    fn taken_slots_are_those_of_workers_that_take_from_its_queue() {
        let mut facts = queued();
        let full = |name| WorkerRow { held: 4, ..worker(name, "default") };
        let draining = WorkerRow { drain: true, ..worker("w3", "default") };
        facts.workers = vec![full("w1"), full("w2"), draining, worker("w4", "gpu")];
        is(&facts, &Ok(None), "slots_taken", &["all slots for queue `default` are taken, 8 of 8; 7 are before it"]);
        facts.workers.push(worker("w5", "default"));
        is(
            &facts,
            &Ok(None),
            "queued",
            &["queued for 0.3 s, 7 before it; 8 of 12 slots for queue `default` are taken"],
        );
    }

    #[test]
    fn without_a_broker_and_after_deaths_it_is_queued_with_a_remark() {
        let mut facts = queued();
        facts.deaths = 2;
        let parts = ["not reachable from here (refused)", "from the database as well", "2 of its holders have died"];
        is(&facts, &Err("refused".into()), "queued", &parts);
        assert!(explain(&facts, &Err("refused".into()), false).facts["broker"] == "refused");
    }

    #[test]
    fn spans_are_converted_without_overflow() {
        assert_eq!(millis(u64::MAX), i64::MAX / 1_000 * 1_000);
        assert_eq!(micros(Duration::MAX), i64::MAX);
    }
}
