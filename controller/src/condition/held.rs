//! Why a held process does not advance.

use baton_common::message::Status;
use baton_common::state::Desired;
use baton_common::store::query::{EventRow, WorkerState};
use baton_common::store::worker::LEASE;
use serde_json::{Value, json};

use super::{Case, Explanation, micros, millis};
use crate::output::{because, span, timestamp};

impl Case<'_> {
    pub(super) fn held(&self) -> Explanation {
        let summary = self.summary;
        let name = summary.worker.as_deref().unwrap_or("an unknown worker");
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
                "it has blocked its thread on {name} for {}; until it yields, no request is applied to it, and the other \
                 processes on that thread wait",
                span(millis(*blocked_ms))
            );
            return Explanation::new("blocks_its_thread", text, facts);
        }
        let text = format!("{name} has held it for {since}: {}{}", self.stage(), self.remarks_on_holder());
        Explanation::new("advancing", text, facts)
    }

    /// A request that the holder has not applied yet.
    fn pending(&self, name: &str) -> Explanation {
        let verb = self.summary.desired.verb();
        let event = self.request(verb);
        let requested = match event {
            Some(event) => {
                format!("{verb} requested by {} {}{}", event.by, self.ago(event.at), because(event.reason.as_deref()))
            }
            None => format!("{verb} was requested"),
        };
        let (holder, remedy) = match self.takeover() {
            Some((_, text, remedy)) => (text, remedy),
            None => (self.stage() + &self.remarks_on_holder(), None),
        };
        let text = format!("{requested}; {name} holds it and has not applied the request yet: {holder}");
        let mut facts = self.holder_facts();
        facts["asked_by"] = json!(event.map(|event| &event.by));
        facts["asked_at"] = json!(event.map(|event| timestamp(event.at)));
        facts["asked_reason"] = json!(event.and_then(|event| event.reason.as_ref()));
        let pid = self.summary.pid;
        if self.summary.desired == Desired::Kill {
            return Explanation::new("kill_pending", text, facts).with_remedy(
                remedy.unwrap_or_else(|| format!("to end it without waiting for the worker: baton kill --force {pid}")),
            );
        }
        let now = || format!("a pause waits for the end of the advance; to pause it now: baton pause --now {pid}");
        Explanation::new("pause_pending", text, facts).with_remedy(remedy.unwrap_or_else(now))
    }

    /// Returns the request that is not settled yet.
    fn request(&self, verb: &str) -> Option<&EventRow> {
        let events = &self.facts.details.events;
        events.iter().rev().find(|event| event.what == verb && event.outcome.is_none())
    }

    /// Returns condition, text and remedy if the holder is silent or gone; `None` if it sends heartbeats.
    fn takeover(&self) -> Option<(&'static str, String, Option<String>)> {
        let holder = self.facts.holder.as_ref()?;
        let others = self.facts.workers.iter().filter(|other| other.id != holder.id);
        let is_watched = others.filter(|other| other.state() != WorkerState::Silent).count() > 0;
        let silence = span(micros(holder.silence()));
        let lease = LEASE.as_secs();
        let (condition, text) = match holder.state() {
            WorkerState::Live | WorkerState::Draining => return None,
            WorkerState::Gone if is_watched => {
                ("holder_gone", "that worker is gone; another worker frees the process at its next sweep".to_owned())
            }
            WorkerState::Gone => ("holder_gone", "that worker is gone".to_owned()),
            WorkerState::Silent if is_watched => {
                let text = format!(
                    "that worker has sent no heartbeat for {silence}; after {lease} s another worker takes over the process"
                );
                ("holder_silent", text)
            }
            WorkerState::Silent => ("holder_silent", format!("that worker has sent no heartbeat for {silence}")),
        };
        if is_watched {
            return Some((condition, text, None));
        }
        let remedy = if self.is_embedded {
            "run the same `baton run` command again to resume it".to_owned()
        } else {
            "no worker is left to take over the process; start a worker".to_owned()
        };
        Some((condition, text, Some(remedy)))
    }

    /// Formats what the holder says about the process.
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

    /// Formats remarks on the holder: its last heartbeat, draining, a blocked thread.
    fn remarks_on_holder(&self) -> String {
        let Some(holder) = &self.facts.holder else { return String::new() };
        let mut text = format!("; last heartbeat of {} {} ago", holder.name, span(micros(holder.silence())));
        if holder.state() == WorkerState::Draining {
            text.push_str("; the worker is draining and gives it back before its next advance");
        }
        if let Some(blocked) = &holder.blocked {
            text.push_str(&format!("; the worker has a blocked thread: {blocked}"));
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
}

#[cfg(test)]
mod tests {
    use baton_common::store::query::WorkerRow;

    use super::super::explain;
    use super::super::tests::{held, is, requested, silent, stage};
    use super::*;
    use crate::overview::tests::worker;

    #[test]
    fn pending_request_is_the_first_condition_of_a_held_process() {
        let facts = requested(held(worker("w1", "default")), Desired::Pause);
        let parts =
            ["pause requested by ann@h 3.0 s ago: maintenance", "w1 holds it", "stage advancing for 20s", "--now"];
        is(&facts, &stage(), "pause_pending", &parts);
        let facts = requested(held(worker("w1", "default")), Desired::Kill);
        is(
            &facts,
            &Err("broker away".into()),
            "kill_pending",
            &["kill requested by ann@h", "broker away", "kill --force"],
        );
        let mut facts = requested(held(silent(worker("w1", "default"), 4)), Desired::Kill);
        is(&facts, &Ok(None), "kill_pending", &["no heartbeat for 4.0 s", "start a worker"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "kill_pending", &["after 10 s another worker takes over the process", "kill --force"]);
    }

    #[test]
    fn silent_or_gone_holder_is_named_with_the_consequence() {
        let mut facts = held(silent(worker("w1", "default"), 4));
        is(&facts, &Ok(None), "holder_silent", &["w1 has held it", "no heartbeat for 4.0 s", "no worker is left"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "holder_silent", &["another worker takes over the process"]);
        let mut facts = held(WorkerRow { gone_at: Some(0), ..worker("w1", "default") });
        is(&facts, &Ok(None), "holder_gone", &["no worker is left"]);
        facts.workers.push(worker("w2", "gpu"));
        is(&facts, &Ok(None), "holder_gone", &["frees the process at its next sweep"]);
        let embedded = explain(&held(silent(worker("baton-run", "default"), 4)), &Ok(None), true);
        assert!(embedded.remedy.unwrap().contains("run the same"));
    }

    #[test]
    fn process_that_blocks_its_thread_is_not_reported_as_advancing() {
        let facts = held(worker("w1", "default"));
        let blocked = Ok(Some(Status { blocked_ms: Some(7_000), ..Status::default() }));
        is(&facts, &blocked, "blocks_its_thread", &["its thread on w1 for 7.0 s"]);
        is(
            &facts,
            &stage(),
            "advancing",
            &["w1 has held it", "advancing for 20s, 12 advances", "last heartbeat of w1 0.0 s ago"],
        );
        let neighbour = WorkerRow { blocked: Some("a-pid for 9s".into()), drain: true, ..worker("w1", "default") };
        is(
            &held(neighbour),
            &Err("down".into()),
            "advancing",
            &["unknown (down)", "blocked thread: a-pid", "is draining"],
        );
    }
}
