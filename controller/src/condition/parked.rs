//! Why a parked process does not advance.

use baton_common::state::State;
use baton_common::store::query::{Refusal, queue_name};
use baton_common::store::site::{REFUSED, UNLISTED};
use baton_common::store::worker::LEASE;
use serde_json::{Value, json};

use super::{Case, Explanation};
use crate::output::{self, because, site_state, span, timestamp};

impl Case<'_> {
    pub(super) fn parked(&self) -> Explanation {
        if let State::Paused(_) = self.summary.state { self.paused() } else { self.waiting() }
    }

    fn paused(&self) -> Explanation {
        let remedy = format!("baton play {}", self.summary.pid);
        let Some(paused) = &self.summary.paused else {
            let since = self.ago(self.summary.created_at);
            let text =
                format!("it was accepted on hold {since} (`hold: true` in its spec) and has not been played yet");
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
            return Explanation::new("waits_for_timer", "it is waiting, cause unknown".into(), json!({}));
        };
        let rest = wake_at - summary.now;
        if rest <= 0 && !self.facts.workers.iter().any(|worker| worker.silence() < LEASE) {
            let text = format!("its timer expired {}, and no worker is live to wake it", self.ago(wake_at));
            return self.no_worker(text);
        }
        let when =
            if rest > 0 { format!("in {}", span(rest)) } else { "at the next sweep, within one second".to_owned() };
        let mut facts = json!({"wake_at": timestamp(wake_at), "in_ms": rest / 1_000});
        if let Some(refusal) = &summary.refusal {
            return self.refused(refusal, &when, facts);
        }
        let (true, Some(error)) = (summary.waits_for_retry, &summary.last_error) else {
            return Explanation::new("waits_for_timer", format!("it is sleeping and wakes {when}"), facts);
        };
        let max = self.facts.details.spec.as_ref().map(|spec| spec.retry.max);
        let try_number = summary.try_number;
        facts["try"] = json!(try_number);
        facts["tries_max"] = json!(max);
        facts["last_error"] = json!(error);
        let of = max.map(|max| format!(" of {max}")).unwrap_or_default();
        let text = format!("it is retried {when}: try {try_number}{of}; try {} failed: {error}", try_number - 1);
        Explanation::new("waits_for_retry", text, facts)
    }

    /// Returns what it waits for at its site, if it has one.
    fn at_site(&self) -> Option<Explanation> {
        let site = self.facts.site.as_ref()?;
        let name = &site.name;
        let mut facts = json!({"site": name, "state": site_state(site), "last_error": site.last_error});
        if let Some(retry_in) = site.retry_in {
            let error = site.last_error.as_deref().unwrap_or("cause unknown");
            facts["retry_in_ms"] = json!(retry_in / 1_000);
            let text = format!("site `{name}` is unreachable: {error}; Baton reconnects in {}", span(retry_in));
            return Some(Explanation::new("site_down", text, facts).with_remedy(format!("baton site test {name}")));
        }
        let waits_for = self.summary.waits_for.as_deref().unwrap_or_default();
        if waits_for.starts_with("slot/") {
            facts["sessions"] = json!([site.slots_taken, site.slots]);
            let text = format!(
                "it waits for a session at site `{name}`: {} of {} sessions are open; waiting processes: {}",
                site.slots_taken, site.slots, site.waiting_for_slot
            );
            return Some(Explanation::new("waits_for_session", text, facts));
        }
        if waits_for.starts_with("room/") {
            facts["jobs"] = json!(site.jobs);
            let text = format!(
                "site `{name}` has reached its job limit; jobs: {}, waiting processes: {}",
                site.jobs, site.waiting_for_room
            );
            return Some(Explanation::new("waits_for_room", text, facts));
        }
        if let Some((_, reason)) = waits_for.strip_prefix(REFUSED).and_then(|refused| refused.split_once('/')) {
            let left = self.summary.wake_at.map_or(0, |wake_at| (wake_at - self.summary.now).max(0));
            facts["reason"] = json!(reason);
            facts["in_ms"] = json!(left / 1_000);
            let when = span(left);
            let text = format!("site `{name}` rejected its job: {reason}; Baton submits it again in {when}");
            return Some(Explanation::new("refused_by_site", text, facts));
        }
        if waits_for.starts_with("sent/") {
            let text = format!("another process is sending a file to site `{name}` that this process also needs");
            return Some(Explanation::new("waits_for_file", text, facts));
        }
        let job = self.facts.details.jobs.last().filter(|job| job.ended_at.is_none())?;
        facts["job"] = output::job_json(job);
        let mut text = format!("its job at site `{name}` has not ended: {}", output::job_text(job, self.summary.now));
        if let Some(error) = site.last_error.as_deref().and_then(|error| error.strip_prefix(UNLISTED)) {
            text.push_str(&format!("; the jobs at the site cannot be listed: {error}"));
        }
        Some(Explanation::new("waits_for_job", text, facts))
    }

    /// It waits for a worker that can run it.
    fn refused(&self, refusal: &Refusal, when: &str, mut facts: Value) -> Explanation {
        facts["since"] = json!(timestamp(refusal.since));
        facts["reason"] = json!(refusal.reason);
        let since = span(self.summary.now - refusal.since);
        let text = format!(
            "for {since}, no worker that claimed it could run it: {}; the next claim is {when}",
            refusal.reason
        );
        let queue = queue_name(&self.summary.queue);
        let remedy = format!("update the workers of queue `{queue}`, or start one that can run it");
        Explanation::new("needs_other_worker", text, facts).with_remedy(remedy)
    }
}

#[cfg(test)]
mod tests {
    use baton_common::state::Live;
    use baton_common::store::query::Paused;

    use super::super::tests::{NOW, SECOND, is, parked, silent};
    use super::*;
    use crate::overview::tests::worker;

    #[test]
    fn paused_process_tells_who_paused_it_and_why() {
        let mut facts = parked(State::Paused(Live::Created));
        is(&facts, &Ok(None), "on_hold", &["on hold 5m00s ago", "baton play"]);
        let paused = Paused { by: "ann@h".into(), at: NOW - 180 * SECOND, reason: Some("maintenance".into()) };
        facts.details.summary.paused = Some(paused);
        is(&facts, &Ok(None), "paused", &["paused by ann@h 3m00s ago: maintenance", "baton play"]);
    }

    #[test]
    fn waiting_process_tells_for_what_and_how_long() {
        let mut facts = parked(State::Waiting);
        facts.details.summary.wake_at = Some(NOW + 40 * SECOND);
        is(&facts, &Ok(None), "waits_for_timer", &["wakes in 40s"]);
        facts.details.summary.last_error = Some("exit 1".into());
        is(&facts, &Ok(None), "waits_for_timer", &["wakes in 40s"]);
        facts.details.summary.waits_for_retry = true;
        facts.details.summary.try_number = 2;
        facts.details.spec.as_mut().unwrap().retry.max = 3;
        is(&facts, &Ok(None), "waits_for_retry", &["retried in 40s: try 2 of 3; try 1 failed: exit 1"]);
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
        is(&facts, &Ok(None), "no_worker", &["its timer expired 1.0 s ago", "baton-worker --queue default"]);
    }
}
