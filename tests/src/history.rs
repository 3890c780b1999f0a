//! The history of processes from the database, their operators and their witness, and whether it keeps the promises.
//!
//! The checks are: a request that was answered as applied is in the history and is never undone; none is applied twice
//! or after the end; none is left over; between a pause and the next `play` nothing runs; only one lease exists at a
//! time; what was accepted exists. With a [`journal`], each step of each process is checked as well.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::journal::{self, Version};
use crate::scene::Scene;
use crate::witness;

/// A process at rest.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// The word of its state.
    pub state: String,
    /// The requests about it, in the order in which they were recorded.
    pub events: Vec<Event>,
    /// Its attempts, by epoch.
    pub attempts: Vec<Attempt>,
    /// Every version of its row, if a journal was kept.
    pub versions: Vec<Version>,
    /// The advances that its witness saw: advance, epoch, name of the worker.
    pub seen: Vec<(i64, i64, String)>,
}

/// A request in the history.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its id.
    pub id: String,
    /// The request to many processes that it belongs to.
    pub request: Option<String>,
    /// `pause`, `play` or `kill`.
    pub what: String,
    /// When it was recorded, in microseconds.
    pub at: i64,
    /// `applied`, `superseded` or `ended`.
    pub outcome: Option<String>,
    /// When it was settled, in microseconds.
    pub settled_at: Option<i64>,
}

/// A holding that has left an attempt row.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The epoch of the lease.
    pub epoch: i64,
    /// The incarnation that held it.
    pub worker: String,
    /// When it was claimed, in microseconds.
    pub started_at: i64,
    /// When it ended, in microseconds.
    pub ended_at: i64,
    /// How it ended.
    pub how: String,
}

/// The answer that an operator received.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The id of the recorded request.
    pub event: String,
    /// The process.
    pub pid: String,
    /// The verb.
    pub what: String,
    /// Whether the answer said that it is applied.
    pub applied: bool,
}

/// All that is known.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// By pid.
    pub processes: BTreeMap<String, Process>,
    /// The answers that operators received.
    pub answers: Vec<Answered>,
    /// The names of the incarnations.
    pub workers: BTreeMap<String, String>,
    /// The pids that the client was told are accepted.
    pub accepted: Vec<String>,
}

impl History {
    /// Reads the database as of one moment, and the witness file of the scene. If there is a witness, all processes
    /// must be at rest.
    pub async fn read(scene: &Scene, answers: Vec<Answered>) -> Self {
        let mut history = Self { answers, ..Self::default() };
        let journal = journal::select(scene).await;
        let [workers, processes, events, attempts, versions] = rows(
            scene,
            [
                "SELECT id, name FROM worker",
                "SELECT id AS pid, state FROM process",
                "SELECT id, pid, request, what, at, outcome, settled_at FROM event WHERE pid IS NOT NULL ORDER BY at, id",
                "SELECT pid, epoch, worker, started_at, ended_at, how FROM attempt ORDER BY pid, epoch",
                journal,
            ],
        )
        .await;
        for row in workers {
            history.workers.insert(text(&row, "id"), text(&row, "name"));
        }
        for row in processes {
            let words = ["created", "running", "waiting", "paused", "finished", "excepted", "killed"];
            let code = usize::try_from(row["state"].as_u64().expect("a code")).expect("a small number");
            let process = Process { state: words[code].to_owned(), ..Process::default() };
            history.processes.insert(text(&row, "pid"), process);
        }
        for row in events {
            let event = Event {
                id: text(&row, "id"),
                request: row["request"].as_str().map(str::to_owned),
                what: text(&row, "what"),
                at: number(&row, "at"),
                outcome: row["outcome"].as_str().map(str::to_owned),
                settled_at: row["settled_at"].as_i64(),
            };
            history.process(&row).events.push(event);
        }
        for row in attempts {
            let attempt = Attempt {
                epoch: number(&row, "epoch"),
                worker: text(&row, "worker"),
                started_at: number(&row, "started_at"),
                ended_at: number(&row, "ended_at"),
                how: text(&row, "how"),
            };
            history.process(&row).attempts.push(attempt);
        }
        for row in versions {
            history.process(&row).versions.push(journal::version(&row));
        }
        for (pid, advance, epoch, worker) in witness::lines(&scene.path("witness")) {
            history.processes.entry(pid).or_default().seen.push((advance, epoch, worker));
        }
        history
    }

    /// Adds pids that were accepted.
    #[must_use]
    pub fn accepting(mut self, pids: &[String]) -> Self {
        self.accepted.extend_from_slice(pids);
        self
    }

    /// Fails unless every promise was kept.
    ///
    /// # Panics
    /// With every violation.
    pub fn check(&self) {
        let violations = self.violations();
        assert!(
            violations.is_empty(),
            "{} violations, among them {:#?}",
            violations.len(),
            &violations[..violations.len().min(20)]
        );
    }

    fn process(&mut self, row: &Value) -> &mut Process {
        self.processes.entry(text(row, "pid")).or_default()
    }

    /// Returns every violation as text; empty if there is none.
    pub fn violations(&self) -> Vec<String> {
        let mut violations = Vec::new();
        for (pid, process) in &self.processes {
            let mut violation = |what| violations.push(format!("{pid}: {what}"));
            process.check(&mut violation);
            if !process.versions.is_empty() {
                let Process { versions, attempts, seen, events, .. } = process;
                journal::check(versions, attempts, seen, &self.workers, !events.is_empty(), &mut violation);
            }
        }
        for pid in self.accepted.iter().filter(|pid| !self.processes.contains_key(*pid)) {
            violations.push(format!("{pid}: I1: it was accepted and is lost"));
        }
        for answer in &self.answers {
            let process = self.processes.get(&answer.pid);
            let event = process.and_then(|process| process.events.iter().find(|event| event.id == answer.event));
            match event {
                None => violations.push(format!("{}: {} was answered and is missing", answer.pid, answer.what)),
                Some(event) if answer.applied && event.outcome.as_deref() != Some("applied") => violations.push(
                    format!("{}: {} was answered as applied, and is {:?}", answer.pid, answer.what, event.outcome),
                ),
                Some(_) => {}
            }
        }
        violations
    }
}

impl Process {
    fn is_ended(&self) -> bool {
        matches!(self.state.as_str(), "finished" | "excepted" | "killed")
    }

    fn check(&self, violation: &mut dyn FnMut(String)) {
        let mut requests = BTreeSet::new();
        for event in &self.events {
            if event.outcome.is_none() {
                violation(format!("lost {}: it was never obeyed", event.what));
            }
            if event.request.as_ref().is_some_and(|request| !requests.insert(request)) {
                violation(format!("double apply: {} was written twice for one request", event.what));
            }
            if event.settled_at.is_some_and(|settled_at| settled_at < event.at) {
                violation(format!("{} is settled before it was asked", event.what));
            }
        }
        let applied = || self.events.iter().filter(|event| event.outcome.as_deref() == Some("applied"));
        let kill = applied().filter(|event| event.what == "kill").filter_map(|event| event.settled_at).min();
        if let Some(killed_at) = kill {
            if self.state != "killed" {
                violation(format!("lost kill: it was applied, and the process is {}", self.state));
            }
            if applied().any(|event| event.what != "kill" && event.at > killed_at) {
                violation("applied after the end".to_owned());
            }
            if self.attempts.iter().any(|attempt| attempt.started_at > killed_at) {
                violation("it ran after it was killed".to_owned());
            }
        }
        if kill.is_none() && self.state == "killed" {
            violation("killed without an applied kill".to_owned());
        }
        self.check_pauses(violation);
        for pair in self.attempts.windows(2) {
            if pair[1].started_at < pair[0].ended_at {
                violation(format!("epochs {} and {} overlap", pair[0].epoch, pair[1].epoch));
            }
        }
    }

    /// From the time at which a pause is applied to the next `play`, nothing begins and nothing ends by itself.
    fn check_pauses(&self, violation: &mut dyn FnMut(String)) {
        for (idx, pause) in self.events.iter().enumerate() {
            let (Some(paused_at), "pause", Some("applied")) =
                (pause.settled_at, pause.what.as_str(), pause.outcome.as_deref())
            else {
                continue;
            };
            // A request between the pause and its execution has superseded the pause, so the next one is later.
            let next = self.events[idx + 1..].iter().find(|event| event.what != "pause" && event.at >= paused_at);
            let until = next.map_or(i64::MAX, |event| event.at);
            for attempt in &self.attempts {
                if attempt.started_at > paused_at && attempt.started_at < until {
                    violation(format!("pause undone: epoch {} began while it was paused", attempt.epoch));
                }
                let by_itself = matches!(attempt.how.as_str(), "ok" | "error");
                if by_itself && attempt.ended_at > paused_at && attempt.ended_at < until {
                    violation(format!("pause undone: epoch {} came to its end while it was paused", attempt.epoch));
                }
            }
            if next.is_none() && self.state != "paused" {
                violation(format!("pause undone: nobody played it, and it is {}", self.state));
            }
        }
        let last = self.events.iter().rfind(|event| event.outcome.as_deref() == Some("applied"));
        if self.state == "paused" && last.is_some_and(|event| event.what != "pause") {
            violation("play undone: it is paused, but the last applied request is no pause".to_owned());
        }
        if !self.is_ended() && last.is_some_and(|event| event.what == "kill") {
            violation("kill undone: it has not ended".to_owned());
        }
    }
}

/// The rows of several queries, all as of one moment.
async fn rows<const N: usize>(scene: &Scene, queries: [&str; N]) -> [Vec<Value>; N] {
    let mut sql = "BEGIN ISOLATION LEVEL REPEATABLE READ;".to_owned();
    for (idx, query) in queries.iter().enumerate() {
        sql += &format!("SELECT {idx}, row_to_json(r) FROM ({query}) r;");
    }
    let text = scene.sql(&(sql + "COMMIT")).await;
    let mut rows = std::array::from_fn(|_| Vec::new());
    for line in text.lines() {
        let (idx, row) = line.split_once('|').expect("a number and a row");
        let idx: usize = idx.parse().expect("a number");
        rows[idx].push(serde_json::from_str(row).expect("a row in JSON"));
    }
    rows
}

pub(crate) fn text(row: &Value, name: &str) -> String {
    row[name].as_str().unwrap_or_else(|| panic!("{name} in {row}")).to_owned()
}

pub(crate) fn number(row: &Value, name: &str) -> i64 {
    row[name].as_i64().unwrap_or_else(|| panic!("{name} in {row}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: &str, at: i64, outcome: &str, settled_at: i64) -> Event {
        Event {
            id: format!("{what}{at}"),
            request: None,
            what: what.into(),
            at,
            outcome: (!outcome.is_empty()).then(|| outcome.into()),
            settled_at: (!outcome.is_empty()).then_some(settled_at),
        }
    }

    fn attempt(epoch: i64, started_at: i64, ended_at: i64, how: &str) -> Attempt {
        Attempt { epoch, worker: "a".into(), started_at, ended_at, how: how.into() }
    }

    fn history(state: &str, events: &[Event], attempts: &[Attempt]) -> History {
        let (events, attempts) = (events.to_vec(), attempts.to_vec());
        let process = Process { state: state.into(), events, attempts, ..Process::default() };
        History { processes: [("p".to_owned(), process)].into(), ..History::default() }
    }

    fn says(history: &History, what: &str) {
        let violations = history.violations();
        assert!(violations.iter().any(|violation| violation.contains(what)), "{what} is not in {violations:?}");
    }

    #[test]
    fn good_histories_pass() {
        let good = [
            history("finished", &[], &[attempt(1, 1, 2, "ok")]),
            history(
                "finished",
                &[event("pause", 10, "applied", 12), event("play", 20, "applied", 20)],
                &[attempt(1, 1, 12, "paused"), attempt(2, 21, 30, "ok")],
            ),
            history("killed", &[event("kill", 10, "applied", 15)], &[attempt(1, 1, 15, "killed")]),
            history("finished", &[event("kill", 10, "ended", 15)], &[attempt(1, 1, 15, "ok")]),
            history("paused", &[event("pause", 10, "applied", 10)], &[attempt(1, 1, 5, "lost")]),
            history(
                "finished",
                &[event("pause", 10, "superseded", 11), event("play", 11, "applied", 11)],
                &[attempt(1, 1, 30, "ok")],
            ),
        ];
        for history in good {
            assert_eq!(history.violations(), Vec::<String>::new());
        }
    }

    #[test]
    fn a_lost_kill_is_seen() {
        says(&history("finished", &[event("kill", 10, "applied", 15)], &[]), "lost kill");
        says(&history("running", &[event("kill", 10, "", 0)], &[]), "lost kill");
        says(&history("killed", &[event("kill", 10, "applied", 15)], &[attempt(2, 16, 20, "lost")]), "ran after");
    }

    #[test]
    fn a_pause_undone_by_a_takeover_is_seen() {
        let paused = event("pause", 10, "applied", 12);
        let took_over = [attempt(1, 1, 12, "lost"), attempt(2, 14, 20, "drained")];
        says(&history("paused", std::slice::from_ref(&paused), &took_over), "pause undone");
        says(&history("running", std::slice::from_ref(&paused), &[]), "nobody played it");
        says(&history("finished", &[paused], &[attempt(1, 1, 20, "ok")]), "came to its end while");
    }

    #[test]
    fn a_play_undone_is_seen() {
        let events = [event("pause", 10, "applied", 10), event("play", 20, "applied", 20)];
        says(&history("paused", &events, &[]), "play undone");
    }

    #[test]
    fn a_request_applied_twice_is_seen() {
        let once = Event { request: Some("r".into()), ..event("pause", 10, "applied", 10) };
        let twice = Event { request: Some("r".into()), ..event("pause", 11, "applied", 11) };
        says(&history("paused", &[once, twice], &[]), "double apply");
    }

    #[test]
    fn a_request_applied_after_the_end_is_seen() {
        let events = [event("kill", 10, "applied", 15), event("play", 16, "applied", 16)];
        says(&history("killed", &events, &[]), "applied after the end");
    }

    #[test]
    fn an_answer_that_the_history_does_not_know_is_seen() {
        let mut lying = history("finished", &[event("kill", 10, "ended", 15)], &[]);
        let answer =
            |event: &str| Answered { event: event.into(), pid: "p".into(), what: "kill".into(), applied: true };
        lying.answers = vec![answer("kill10")];
        says(&lying, "was answered as applied");
        lying.answers = vec![answer("kill11")];
        says(&lying, "is missing");
    }

    #[test]
    fn what_was_accepted_and_is_not_there_is_seen() {
        says(&history("finished", &[], &[]).accepting(&["q".to_owned()]), "I1: it was accepted and is lost");
    }

    #[test]
    fn two_leases_at_once_are_seen() {
        says(&history("finished", &[], &[attempt(1, 1, 10, "lost"), attempt(2, 9, 12, "ok")]), "overlap");
    }
}
