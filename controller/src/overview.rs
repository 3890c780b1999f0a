//! A summary of the fleet: slots, queued processes, and warnings.

use baton_common::store::Store;
use baton_common::store::explain::Backlog;
use baton_common::store::fleet::FleetPause;
use baton_common::store::query::{COUNT_MAX, WorkerRow, queue_name};

use crate::failure::Failure;
use crate::output::{self, age, because, warning};

/// State of the fleet at one moment.
pub(crate) struct Overview {
    /// Workers that are not gone.
    pub(crate) workers: Vec<WorkerRow>,
    backlogs: Vec<Backlog>,
    pause: Option<FleetPause>,
    now: i64,
    /// Whether the database belongs to `baton run` and has no fleet.
    is_embedded: bool,
}

impl Overview {
    pub(crate) async fn look(store: &Store) -> Result<Self, Failure> {
        Ok(Self {
            workers: store.workers(&[], false).await?,
            backlogs: store.backlogs().await?,
            pause: store.fleet_pause().await?,
            now: store.now().await?,
            is_embedded: store.is_embedded(),
        })
    }

    /// Returns the task queues that have processes and that no worker serves.
    pub(crate) fn unserved(&self) -> impl Iterator<Item = &Backlog> {
        let is_served = |queue: &str| self.workers.iter().any(|worker| worker.takes_work() && worker.serves(queue));
        self.backlogs.iter().filter(move |backlog| !self.is_embedded && !is_served(&backlog.queue))
    }

    /// Formats the slots in use and the queued processes.
    pub(crate) fn load(&self) -> Option<String> {
        if self.is_embedded {
            return None;
        }
        let (held, slots) = self.slots();
        let count = self.workers.iter().filter(|worker| worker.takes_work()).count();
        let counts = self.backlogs.iter().map(|backlog| backlog.count);
        let queued = total(counts);
        let oldest = self.backlogs.iter().map(|backlog| backlog.oldest_at).min();
        let waits = oldest.map(|at| format!(", the oldest for {}", age(self.now - at))).unwrap_or_default();
        Some(format!("workers: {count}, with {held} of {slots} slots taken; {queued} queued{waits}"))
    }

    /// Returns what an operator should know first: a pause of the fleet, and warnings.
    pub(crate) fn remarks(&self) -> Vec<String> {
        let mut remarks: Vec<String> = self.pause.iter().map(|pause| pause_text(pause, self.now)).collect();
        let (held, slots) = self.slots();
        if held * 10 > slots * 9 {
            remarks.push(warning(&format!("{held} of {slots} slots are taken; start more workers or raise --slots")));
        }
        for worker in &self.workers {
            remarks.extend(worker.lacks.as_ref().map(|lacks| {
                warning(&format!("worker {} on {} {lacks}; {}", worker.name, worker.host, lacks.remedy()))
            }));
        }
        for backlog in self.unserved() {
            let Backlog { queue, count, .. } = backlog;
            let count = output::count(*count);
            if self.workers.iter().any(|worker| worker.is_short() && worker.serves(queue)) {
                remarks.push(warning(&format!("no worker claims from queue `{queue}`; queued processes: {count}")));
                continue;
            }
            let text =
                format!("no worker serves queue `{queue}`; queued processes: {count}; start one: baton-worker --queue");
            remarks.push(warning(&format!("{text} {}", queue_name(queue))));
        }
        remarks
    }

    fn slots(&self) -> (i64, i64) {
        let takers = self.workers.iter().filter(|worker| worker.takes_work());
        takers.fold((0, 0), |(held, slots), worker| (held + worker.held, slots + worker.slots))
    }
}

/// Formats the sum of counts that may each have stopped at [`COUNT_MAX`].
pub(crate) fn total(counts: impl Iterator<Item = i64> + Clone) -> String {
    let is_exact = counts.clone().all(|count| count < COUNT_MAX);
    format!("{}{}", counts.sum::<i64>(), if is_exact { "" } else { "+" })
}

/// Says who paused the fleet, when and why.
pub(crate) fn pause_text(pause: &FleetPause, now: i64) -> String {
    let reason = because(pause.reason.as_deref());
    format!("the fleet was paused by {} ({}) {} ago{reason}", pause.by, pause.login, age(now - pause.at))
}

#[cfg(test)]
pub(crate) mod tests {
    use baton_common::id::Incarnation;

    use super::*;

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

    fn overview(workers: Vec<WorkerRow>, queue: &str) -> Overview {
        let backlog = Backlog { queue: queue.into(), count: 7, oldest_at: -60_000_000 };
        Overview { workers, backlogs: vec![backlog], pause: None, now: 0, is_embedded: false }
    }

    #[test]
    fn queue_is_unserved_if_its_workers_drain_or_are_dead() {
        let draining = WorkerRow { drain: true, ..worker("w1", "gpu") };
        let dead = WorkerRow { beat_at: -10_000_000, ..worker("w2", "gpu") };
        let other = worker("w3", "cpu,gpu2");
        let remarks = overview(vec![draining, dead, other.clone()], "gpu.high").remarks();
        assert_eq!(remarks.len(), 1, "{remarks:?}");
        assert!(
            remarks[0].contains("`gpu.high`; queued processes: 7; start one: baton-worker --queue gpu"),
            "{remarks:?}"
        );
        assert!(overview(vec![other, worker("w4", "cpu,gpu")], "gpu.high").remarks().is_empty());
    }

    #[test]
    fn only_workers_that_claim_work_count_as_slots() {
        let full = WorkerRow { held: 4, ..worker("w1", "default") };
        let draining = WorkerRow { drain: true, ..worker("w2", "default") };
        let overview = overview(vec![full, draining], "default");
        assert!(
            overview.load().unwrap().starts_with("workers: 1, with 4 of 4 slots taken; 7 queued, the oldest for 1m")
        );
        assert!(overview.remarks()[0].contains("4 of 4 slots are taken"), "{:?}", overview.remarks());
    }
}
