//! Why a queued process is not claimed.

use std::collections::BTreeSet;

use baton_common::store::explain::Facts;
use baton_common::store::query::{WorkerRow, queue_name};
use baton_common::store::worker::LEASE;
use serde_json::{Value, json};

use super::{Case, Explanation};
use crate::output::{count, span, timestamp};
use crate::overview::pause_text;

impl Case<'_> {
    pub(super) fn queued(&self) -> Explanation {
        let Facts { workers, fleet_pause, .. } = self.facts;
        let queue = &self.summary.queue;
        if let Some(pause) = fleet_pause {
            let text = format!("{}; queued processes wait", pause_text(pause, self.summary.now));
            let facts = json!({"by": pause.by, "at": timestamp(pause.at), "reason": pause.reason});
            return Explanation::new("fleet_paused", text, facts).with_remedy("baton play --fleet");
        }
        if workers.is_empty() {
            return self.no_worker("no worker is live".to_owned());
        }
        let serving: Vec<&WorkerRow> = workers.iter().filter(|worker| worker.serves(queue)).collect();
        if serving.is_empty() {
            return self.queue_not_served();
        }
        let takers: Vec<&WorkerRow> = serving.iter().copied().filter(|worker| worker.takes_work()).collect();
        if takers.is_empty() {
            return lacking(queue, &serving).unwrap_or_else(|| self.draining_or_silent(&serving));
        }
        self.claimable(&takers)
    }

    fn queue_not_served(&self) -> Explanation {
        let (queue, workers) = (&self.summary.queue, &self.facts.workers);
        let served: BTreeSet<&str> = workers.iter().flat_map(|worker| worker.queues.split(',')).collect();
        let served: Vec<&str> = served.into_iter().collect();
        let (name, all) = (queue_name(queue), served.join(", "));
        let text = format!("no live worker serves queue `{name}`; live workers: {}, serving {all}", workers.len());
        let facts = json!({"queue": queue, "workers": workers.len(), "served": served});
        Explanation::new("queue_not_served", text, facts).with_remedy(self.start_remedy())
    }

    /// No worker that serves the queue claims from it, and none lacks a resource.
    fn draining_or_silent(&self, serving: &[&WorkerRow]) -> Explanation {
        let queue = &self.summary.queue;
        let silent = serving.iter().filter(|worker| worker.silence() >= LEASE).count();
        let draining = serving.len() - silent;
        let text = format!(
            "no worker that serves queue `{queue}` claims work: {draining} draining, {silent} without a heartbeat for {} s",
            LEASE.as_secs()
        );
        let facts = json!({"queue": queue, "workers": serving.len(), "silent": silent, "draining": draining});
        let condition = if draining > 0 { "workers_drain" } else { "workers_silent" };
        Explanation::new(condition, text, facts).with_remedy(self.start_remedy())
    }

    /// `takers` claim from the queue of the process.
    fn claimable(&self, takers: &[&WorkerRow]) -> Explanation {
        let queue = &self.summary.queue;
        let ahead = count(self.facts.n_before);
        let held: i64 = takers.iter().map(|worker| worker.held.min(worker.slots)).sum();
        let slots: i64 = takers.iter().map(|worker| worker.slots).sum();
        let facts = json!({
            "queue": queue,
            "queued_at": timestamp(self.summary.changed_at),
            "before": self.facts.n_before,
            "workers": takers.len(),
            "held": held,
            "slots": slots,
            "deaths": self.facts.deaths,
            "broker": self.answer.as_ref().err(),
        });
        let (condition, text) = if held >= slots {
            let text = format!("all slots for queue `{queue}` are taken ({held} of {slots}); processes ahead: {ahead}");
            ("slots_taken", text)
        } else {
            let since = span(self.summary.now - self.summary.changed_at);
            let text = format!("it has been queued for {since}; processes ahead: {ahead}");
            ("queued", format!("{text}; {held} of {slots} slots for queue `{queue}` are taken"))
        };
        Explanation::new(condition, text + &self.remarks(), facts)
    }

    /// Formats what delays a claim without preventing it.
    fn remarks(&self) -> String {
        let mut text = String::new();
        if self.facts.deaths >= 2 {
            text.push_str(&format!(
                "; it is quarantined: {} of its holders died without a checkpoint, so a worker claims it only while holding \
                 no other quarantined process",
                self.facts.deaths
            ));
        }
        if let Err(reason) = self.answer {
            text.push_str(&format!(
                "; the broker is unreachable from here ({reason}), but workers also find queued processes in the database"
            ));
        }
        text
    }
}

/// Every worker that could claim from the queue lacks a resource; `None` if none does.
fn lacking(queue: &str, serving: &[&WorkerRow]) -> Option<Explanation> {
    let is_candidate = |worker: &&&WorkerRow| worker.silence() < LEASE && !worker.drain && worker.is_short();
    let short: Vec<_> = serving
        .iter()
        .filter(is_candidate)
        .filter_map(|worker| Some((worker.name.as_str(), worker.lacks.as_ref()?)))
        .collect();
    let (_, first) = short.first()?;
    let named = short.iter().map(|(name, lacks)| format!("{name} {lacks}")).collect::<Vec<_>>().join("; ");
    let text = format!("no worker that serves queue `{queue}` claims work: {named}");
    let workers: Vec<Value> =
        short.iter().map(|(name, lacks)| json!({"name": name, "lacks": lacks.what, "text": lacks.text})).collect();
    let facts = json!({"queue": queue, "workers": workers});
    Some(Explanation::new("workers_lack", text, facts).with_remedy(first.remedy()))
}

#[cfg(test)]
mod tests {
    use baton_common::lack::Lacks;
    use baton_common::store::fleet::FleetPause;

    use super::super::explain;
    use super::super::tests::{NOW, SECOND, is, queued, silent};
    use super::*;
    use crate::overview::tests::worker;

    #[test]
    fn pause_of_the_fleet_is_the_first_condition_of_a_queued_process() {
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
            &["paused by ann@h (postgresql:ann) 2m00s ago: night", "baton play --fleet"],
        );
    }

    #[test]
    fn queue_without_claims_tells_why() {
        let mut facts = queued();
        facts.details.summary.queue = "gpu.high".into();
        facts.workers.push(worker("w2", "cpu,default"));
        let parts = ["queue `gpu`; live workers: 2, serving cpu, default", "baton-worker --queue gpu"];
        is(&facts, &Ok(None), "queue_not_served", &parts);
        facts.workers = vec![WorkerRow { drain: true, ..worker("w1", "gpu") }, worker("w2", "default")];
        is(&facts, &Ok(None), "workers_drain", &["no worker that serves queue `gpu.high` claims work: 1 draining, 0"]);
        facts.workers = vec![silent(worker("w1", "gpu"), 10), worker("w2", "default")];
        is(&facts, &Ok(None), "workers_silent", &["0 draining, 1 without a heartbeat for 10 s"]);
    }

    #[test]
    fn workers_that_lack_a_resource_are_named() {
        let mut facts = queued();
        let lacks = |what: &str| Some(Lacks { what: what.into(), text: "0 of 8 KiB are free".into() });
        let short = WorkerRow { lacks: lacks("disk space"), ..worker("w1", "default") };
        facts.workers = vec![short.clone(), WorkerRow { drain: true, ..worker("w2", "default") }];
        let parts = ["w1 lacks disk space: 0 of 8 KiB are free; it takes no processes meanwhile", "| free space"];
        is(&facts, &Ok(None), "workers_lack", &parts);
        facts.workers.push(WorkerRow { lacks: lacks("a fast disk"), ..worker("w3", "default") });
        is(&facts, &Ok(None), "queued", &["0 of 4 slots"]);
    }

    #[test]
    fn only_slots_of_workers_that_claim_from_the_queue_count() {
        let mut facts = queued();
        let full = |name| WorkerRow { held: 4, ..worker(name, "default") };
        let draining = WorkerRow { drain: true, ..worker("w3", "default") };
        facts.workers = vec![full("w1"), full("w2"), draining, worker("w4", "gpu")];
        is(&facts, &Ok(None), "slots_taken", &["all slots for queue `default` are taken (8 of 8); processes ahead: 7"]);
        facts.workers.push(worker("w5", "default"));
        is(
            &facts,
            &Ok(None),
            "queued",
            &["queued for 0.3 s; processes ahead: 7; 8 of 12 slots for queue `default` are taken"],
        );
    }

    #[test]
    fn missing_broker_and_deaths_of_holders_are_remarks() {
        let mut facts = queued();
        facts.deaths = 2;
        let parts = ["unreachable from here (refused)", "in the database", "2 of its holders died"];
        is(&facts, &Err("refused".into()), "queued", &parts);
        assert!(explain(&facts, &Err("refused".into()), false).facts["broker"] == "refused");
    }
}
