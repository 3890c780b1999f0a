//! Connections that break, and connections that become silent without breaking.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use baton_tests::witness::Witness;

const PROCESSES: u32 = 40;
const ADVANCES: u64 = 150;

/// A scene with processes that are being advanced every 100 ms.
struct Counting {
    scene: Scene,
    pids: Vec<String>,
}

impl Counting {
    async fn new(scene: Scene) -> Self {
        journal::keep(&scene).await;
        let witness = scene.path("witness");
        let spec = format!(
            "{{call: baton.count, with: {{advances: {ADVANCES}, every: 100ms, witness: {}}}}}",
            witness.display()
        );
        let pids = scene.submit(&spec, PROCESSES).await;
        let counting = Self { scene, pids };
        counting.goes_on(PROCESSES as usize * 2).await;
        counting
    }

    fn witness(&self) -> Witness {
        Witness::read(&self.scene.path("witness"))
    }

    /// Waits for this many more advances.
    async fn goes_on(&self, more: usize) {
        let before = self.witness().lines();
        eventually(&format!("{more} more advances"), Duration::from_secs(30), async || {
            let now = self.witness().lines();
            if now >= before + more { Ok(()) } else { Err((now - before, self.places().await)) }
        })
        .await;
    }

    async fn finishes(&self) {
        eventually("all have finished", Duration::from_secs(90), async || {
            let rest = self.places().await;
            if rest == format!("3|4|{PROCESSES}") { Ok(()) } else { Err(rest) }
        })
        .await;
        History::read(&self.scene, vec![]).await.accepting(&self.pids).check();
    }

    async fn places(&self) -> String {
        self.scene.sql("SELECT place, state, count(*) FROM process GROUP BY 1, 2").await.trim().to_owned()
    }

    async fn attempts(&self) -> String {
        self.scene.sql("SELECT how, count(*), max(epoch) FROM attempt GROUP BY 1").await.trim().to_owned()
    }
}

/// Checks that no worker advanced a process after another worker had begun to.
fn assert_epochs_only_grow(witness: &Path) {
    let mut newest: BTreeMap<String, u64> = BTreeMap::new();
    for line in std::fs::read_to_string(witness).unwrap().lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let epoch: u64 = fields[2].parse().unwrap();
        let newest = newest.entry(fields[0].to_owned()).or_default();
        assert!(epoch >= *newest, "epoch {newest} had begun before: {line}");
        *newest = epoch;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn broken_broker_connections_cost_no_lease_and_no_advance() {
    let scene = Scene::new().await;
    let proxy = Proxy::start(&scene.broker_url()).await;
    let mut worker = scene.worker("w1", &["--broker-url", &proxy.through(&scene.broker_url())]).await;
    let connections = 3;
    eventually(
        "it has connected to consume, to publish and for control",
        Duration::from_secs(30),
        async || match proxy.n_open() {
            open if open == connections => Ok(()),
            open => Err(open),
        },
    )
    .await;
    let counting = Counting::new(scene).await;
    for _ in 0..3 {
        proxy.reset();
        eventually("the worker has reconnected", Duration::from_secs(30), async || match proxy.n_open() {
            open if open >= connections => Ok(()),
            open => Err(open),
        })
        .await;
        counting.goes_on(PROCESSES as usize).await;
    }
    counting.finishes().await;
    counting.witness().check(&counting.pids, ADVANCES, &BTreeSet::new());
    assert_eq!(counting.attempts().await, format!("ok|{PROCESSES}|1"));
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn silent_broker_stops_no_process_that_is_held() {
    let scene = Scene::new().await;
    let proxy = Proxy::start(&scene.broker_url()).await;
    let mut worker = scene.worker("w1", &["--broker-url", &proxy.through(&scene.broker_url())]).await;
    let counting = Counting::new(scene).await;
    proxy.set(Fault::Blackhole);
    counting.goes_on(PROCESSES as usize * 20).await;
    proxy.set(Fault::Pass);
    counting.finishes().await;
    counting.witness().check(&counting.pids, ADVANCES, &BTreeSet::new());
    assert_eq!(counting.attempts().await, format!("ok|{PROCESSES}|1"));
    assert_eq!(worker.terminate().await.code(), Some(0));
    // Unacknowledged deliveries would be in the queue again.
    assert_eq!(counting.scene.amqp().await.depth("baton.task.default").await, 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn worker_cut_off_from_the_database_is_replaced_and_does_nothing_more_under_its_old_lease() {
    let scene = Scene::new().await;
    let proxy = Proxy::start(&scene.database_url()).await;
    let mut cut_off = scene.worker("cut-off", &["--database-url", &proxy.through(&scene.database_url())]).await;
    let counting = Counting::new(scene).await;
    let mut other = counting.scene.worker("other", &[]).await;
    proxy.set(Fault::Blackhole);
    eventually("the other worker has taken over", Duration::from_secs(40), async || {
        let rest =
            counting.scene.sql("SELECT name, count(*) FROM process JOIN worker w ON w.id = owner GROUP BY 1").await;
        if rest.contains("other|") && !rest.contains("cut-off|") { Ok(()) } else { Err(rest) }
    })
    .await;
    proxy.set(Fault::Pass);
    counting.finishes().await;
    let lost = counting.pids.iter().cloned().collect();
    counting.witness().check(&counting.pids, ADVANCES, &lost);
    assert_epochs_only_grow(&counting.scene.path("witness"));
    assert_eq!(cut_off.terminate().await.code(), Some(0), "{}", cut_off.log());
    assert_eq!(other.terminate().await.code(), Some(0));
}
