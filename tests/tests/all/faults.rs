//! Services die, come back, or come back empty: this costs only time. Each test has its own services.

use std::time::Duration;

use baton_tests::eventually;
use baton_tests::scene::Scene;

use crate::busy::{Busy, blocking};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_broker_that_is_killed_and_comes_back_costs_only_time() {
    let busy = Busy::new().await;
    blocking(|| {
        busy.scene.services().kill_broker();
        busy.scene.services().start_broker();
    })
    .await;
    busy.check().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_broker_that_comes_back_empty_costs_only_time() {
    let busy = Busy::new().await;
    blocking(|| busy.scene.services().restart_broker_empty()).await;
    busy.scene.make_vhost().await;
    busy.check().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn purged_queues_cost_only_time() {
    let busy = Busy::new().await;
    for lines in [1_500, 2_500, 4_000] {
        busy.has_advanced(lines).await;
        busy.scene.purge_all().await;
    }
    busy.check().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_database_that_is_restarted_and_then_killed_costs_only_time() {
    let busy = Busy::new().await;
    blocking(|| busy.scene.services().restart_database()).await;
    busy.has_advanced(3_000).await;
    blocking(|| {
        busy.scene.services().kill_database();
        busy.scene.services().start_database();
    })
    .await;
    busy.check().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_fleet_without_its_broker_takes_work_and_orders_from_the_database() {
    let scene = Scene::private().await;
    let mut worker = scene.worker("w1", &["--slots", "20"]).await;
    scene.services().kill_broker();
    let noops = scene.submit("call: baton.noop", 100).await;
    let counting = "{call: baton.count, with: {advances: 100000, every: 100ms}}";
    let [paused, killed] = &scene.submit(counting, 2).await[..] else { panic!("two pids") };
    let state_is = async |pid: &str, state: &str| {
        eventually(state, Duration::from_secs(5), async || {
            let now = scene.show(pid).await["state"].clone();
            if now == state { Ok(()) } else { Err(now) }
        })
        .await;
    };
    for (verb, pid, state) in [
        ("pause", paused, "paused"),
        ("play", paused, "running"),
        ("pause", paused, "paused"),
        ("kill", killed, "killed"),
    ] {
        state_is(pid, if verb == "play" { "paused" } else { "running" }).await;
        let output = scene.baton(&[verb, pid, "-o", "json"]).await.ok();
        assert_eq!(output.json()[0]["nudged"], false, "{}", output.stdout);
        assert!(output.stderr.contains("warning"), "{}", output.stderr);
        state_is(pid, state).await;
    }
    eventually("the other processes have finished", Duration::from_secs(20), async || {
        let n_finished = scene.count("place = 3 AND state = 4").await;
        if n_finished == noops.len() as u64 { Ok(()) } else { Err(n_finished) }
    })
    .await;
    scene.services().start_broker();
    scene.submit("call: baton.noop", 10).await;
    scene.baton(&["play", paused]).await.ok();
    scene.baton(&["kill", paused, "--wait"]).await.ok();
    eventually("all have ended", Duration::from_secs(20), async || {
        let n_ended = scene.count("place = 3").await;
        if n_ended == 112 { Ok(()) } else { Err(n_ended) }
    })
    .await;
    let repeated = scene.sql("SELECT count(*) FROM process WHERE state = 4 AND epoch <> 1").await;
    assert_eq!(repeated.trim(), "0", "a process was taken twice");
    assert!(worker.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn without_the_broker_a_process_is_explained_and_a_worker_is_drained() {
    let scene = Scene::private().await;
    let mut worker = scene.worker("w1", &["--slots", "1"]).await;
    blocking(|| scene.services().kill_broker()).await;
    let counting = "{call: baton.count, with: {advances: 100000, every: 100ms}}";
    let held = scene.submit(counting, 1).await.remove(0);
    let explained = async |pid: &str, condition: &str| {
        eventually(condition, Duration::from_secs(20), async || {
            let now = scene.baton(&["explain", pid, "-o", "json"]).await.ok().json()[0].clone();
            if now["condition"] == condition { Ok(now) } else { Err(now) }
        })
        .await
    };
    let held = explained(&held, "advancing").await;
    assert!(held["facts"]["unanswered"].is_string() && held["text"].as_str().unwrap().contains("w1"), "{held}");
    let queued = scene.submit(counting, 1).await.remove(0);
    let full = explained(&queued, "slots_taken").await;
    assert!(full["text"].as_str().unwrap().contains("workers also find queued processes in the database"), "{full}");

    let drain = scene.baton(&["drain", "w1", "--wait", "--timeout", "30s", "-o", "json"]).await.ok();
    assert!(drain.stderr.contains("warning"), "{drain:?}");
    let drained = drain.json();
    assert_eq!((&drained[0]["outcome"], &drained[0]["nudged"]), (&"drained".into(), &false.into()), "{drained}");
    assert!(worker.ended(Duration::from_secs(10)).await.success());
    let queued = explained(&queued, "no_worker").await;
    assert_eq!(queued["place"], "queued", "{queued}");
}
