//! A fleet at work on private services, for tests that break them.

use std::collections::BTreeSet;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use baton_tests::witness::Witness;

pub(crate) const PROCESSES: u32 = 500;
const ADVANCES: u64 = 40;

/// Work must advance within this time after a fault.
const GOES_ON: Duration = Duration::from_secs(10);

/// Two workers in the middle of their work.
pub(crate) struct Busy {
    pub(crate) scene: Scene,
    workers: Vec<Worker>,
    pids: Vec<String>,
}

impl Busy {
    pub(crate) async fn new() -> Self {
        Self::with(Scene::private().await, &[]).await
    }

    /// Like `new`, with additional environment variables for the workers.
    pub(crate) async fn with(scene: Scene, variables: &[(&str, &str)]) -> Self {
        journal::keep(&scene).await;
        let mut workers = Vec::new();
        for name in ["w1", "w2"] {
            let worker = scene.worker_with(variables, name, &["--slots", "150"]);
            worker.ready().await;
            workers.push(worker);
        }
        let witness = scene.path("witness");
        let spec = format!(
            "{{call: baton.count, with: {{advances: {ADVANCES}, every: 100ms, witness: {}}}}}",
            witness.display()
        );
        let pids = scene.submit(&spec, PROCESSES).await;
        let busy = Self { scene, workers, pids };
        busy.has_advanced(1_000).await;
        busy
    }

    pub(crate) async fn has_advanced(&self, lines: usize) {
        eventually("the fleet is at work", Duration::from_secs(60), async || {
            let now = self.witness().lines();
            if now >= lines { Ok(()) } else { Err(now) }
        })
        .await;
    }

    fn witness(&self) -> Witness {
        Witness::read(&self.scene.path("witness"))
    }

    /// Checks the fleet right after a fault: work advances soon, all processes finish, nothing is lost or repeated, and
    /// no worker was restarted.
    pub(crate) async fn finishes(&mut self) {
        let before = self.witness().lines();
        eventually("work advances", GOES_ON, async || {
            let now = self.witness().lines();
            let is_done = now >= self.pids.len() * ADVANCES as usize;
            if now > before || is_done { Ok(()) } else { Err(now) }
        })
        .await;
        eventually("all have finished", Duration::from_secs(120), async || {
            let rest = self.scene.sql("SELECT place, state, count(*) FROM process GROUP BY 1, 2").await;
            if rest.trim() == format!("3|4|{PROCESSES}") { Ok(()) } else { Err(rest) }
        })
        .await;
        History::read(&self.scene, vec![]).await.accepting(&self.pids).check();
        for worker in &mut self.workers {
            assert_eq!(worker.terminate().await.code(), Some(0));
        }
    }

    /// Checks the same as `finishes`, and that each process had a single lease from beginning to end.
    pub(crate) async fn check(mut self) {
        self.finishes().await;
        self.witness().check(&self.pids, ADVANCES, &BTreeSet::new());
        let attempts = self.scene.sql("SELECT how, count(*), max(epoch) FROM attempt GROUP BY 1").await;
        assert_eq!(attempts.trim(), format!("ok|{PROCESSES}|1"), "a process has changed hands");
        for worker in &self.workers {
            assert!(!worker.log().contains("declared gone"), "{}", worker.log());
        }
    }

    /// The logs of its workers.
    pub(crate) fn logs(&self) -> String {
        self.workers.iter().map(Worker::log).collect()
    }
}

/// Runs code that blocks the thread.
pub(crate) async fn blocking(work: impl FnOnce() + Send) {
    tokio::task::block_in_place(work);
}
