//! Programs of two versions in one fleet, and processes that need another build than the worker that takes them.
//!
//! The next version is this one built with the feature `next-version`: it writes newer specs, checkpoints and outcomes,
//! and migrates the schema (`versions/`).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use baton_tests::services::programs_of_next_version;
use baton_tests::witness::Witness;
use serde_json::Value;

fn next(program: &str) -> PathBuf {
    programs_of_next_version().join(program)
}

async fn explained_as(scene: &Scene, pid: &str, condition: &str) -> Value {
    eventually(&format!("{pid} is {condition}"), Duration::from_secs(20), async || {
        let now = scene.baton(&["explain", pid, "-o", "json"]).await.ok().json()[0].clone();
        if now["condition"] == condition { Ok(now) } else { Err(now) }
    })
    .await
}

async fn count_becomes(scene: &Scene, condition: &str, count: u64, limit: Duration) {
    eventually(&format!("{count} processes with {condition}"), limit, async || {
        if scene.count(condition).await == count {
            return Ok(());
        }
        Err(scene.sql("SELECT place, state, refusal, count(*) FROM process GROUP BY 1, 2, 3").await)
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_kind_that_no_worker_knows_waits_for_one_that_does() {
    let scene = Scene::new().await;
    let mut worker = scene.worker("w1", &[]).await;
    let spec = "{call: own.pi, with: {rounds: 2, points: 1000}}";
    let [waits, killed] = &scene.submit(spec, 2).await[..] else { panic!("two pids") };
    let explained = explained_as(&scene, waits, "needs_other_worker").await;
    assert!(explained["text"].as_str().unwrap().contains("knows no process `own.pi`"), "{explained}");
    let listed = scene.baton(&["list", "--state", "waiting"]).await.ok();
    assert!(listed.stdout.contains("needs another worker"), "{listed:?}");
    scene.baton(&["kill", killed, "--wait"]).await.ok();
    let _own = scene.worker_of("own-process", "own", &[]).await;
    count_becomes(&scene, "state = 4", 1, Duration::from_secs(40)).await;
    assert_eq!(worker.log().matches("cannot run the process").count(), 2, "once a process: {}", worker.log());
    assert!(worker.terminate().await.success());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_checkpoint_of_another_shape_is_kept_and_a_damaged_one_is_the_end() {
    let scene = Scene::new().await;
    let witness = scene.path("witness");
    let spec = format!("{{call: baton.count, with: {{advances: 6, every: 2s, witness: {}}}}}", witness.display());
    let _worker = scene.worker("w1", &[]).await;
    let pids = scene.submit(&spec, 2).await;
    let [reshaped, damaged] = &pids[..] else { panic!("two pids") };
    let sleeper = scene.submit("{call: baton.sleep, with: {for: 1h}}", 1).await.remove(0);
    count_becomes(&scene, "place = 2 AND seq >= 1", 3, Duration::from_secs(20)).await;
    for pid in &pids {
        scene.baton(&["pause", pid, "--wait"]).await.ok();
    }
    // The state of another kind simulates another build: it lacks the fields that this build expects.
    scene.sql(&format!("CREATE TABLE kept AS SELECT checkpoint FROM process WHERE id = '{reshaped}'")).await;
    let take = |from: &str, pid: &str| format!("UPDATE process SET checkpoint = ({from}) WHERE id = '{pid}'");
    let foreign = format!("SELECT checkpoint FROM process WHERE id = '{sleeper}'");
    scene.sql(&take(&foreign, reshaped)).await;
    scene.sql(&take("SELECT '\\x01ff'::bytea", damaged)).await;
    for pid in &pids {
        scene.baton(&["play", pid]).await.ok();
    }
    let explained = explained_as(&scene, reshaped, "needs_other_worker").await;
    assert!(explained["text"].as_str().unwrap().contains("does not fit this build's process"), "{explained}");
    let ended = explained_as(&scene, damaged, "ended").await;
    assert!(ended["text"].as_str().unwrap().contains("its checkpoint: unreadable row"), "{ended}");
    scene.sql(&take("SELECT checkpoint FROM kept", reshaped)).await;
    count_becomes(&scene, "state = 4", 1, Duration::from_secs(40)).await;
    let shown = scene.show(reshaped).await;
    assert_eq!((&shown["advances"], &shown["values"]["advances"]), (&6.into(), &6.into()), "{shown}");
    let runs = Witness::read(&witness);
    assert!(runs.lines() >= 7, "all of one version, some of the other");
}

/// Checks that the commands of both versions handle rows of both versions.
async fn both_command_lines_understand(scene: &Scene, pid: &str) {
    let id = pid.to_owned();
    for program in [PathBuf::from("baton"), next("baton")] {
        for arguments in [&["show", &id, "-o", "json"][..], &["explain", &id], &["list"], &["workers"], &["doctor"]] {
            let said = scene.baton_of(&program, arguments).await.ok();
            assert!(!said.stdout.is_empty(), "{program:?} {arguments:?}: {said:?}");
        }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_fleet_is_upgraded_worker_by_worker_under_load() {
    const ADVANCES: u64 = 16;
    let scene = Scene::new().await;
    let witness = scene.path("witness").display().to_string();
    let counting = |every: &str| {
        format!("{{call: baton.count, with: {{advances: {ADVANCES}, every: {every}, witness: {witness}}}}}")
    };
    let slots: &[&str] = &["--slots", "40"];
    let mut old = Vec::new();
    for name in ["old1", "old2", "old3"] {
        old.push(scene.worker(name, slots).await);
    }
    // Some processes stay with their worker, and some pass through the queue after each advance.
    let mut pids = scene.submit(&counting("300ms"), 100).await;
    pids.extend(scene.submit(&counting("1s"), 100).await);
    let newest = scene.spec("newest.yaml", &counting("300ms")).display().to_string();
    // The next version's first command migrates the schema under the old workers, which cannot run what it submits.
    let submitted = scene.baton_of(&next("baton"), &["submit", &newest, "--count", "10", "-o", "ids"]).await.ok();
    let new_pids: Vec<String> = submitted.stdout.lines().map(str::to_owned).collect();
    let explained = explained_as(&scene, &new_pids[0], "needs_other_worker").await;
    assert!(explained["text"].as_str().unwrap().contains("version 4 is newer"), "{explained}");
    both_command_lines_understand(&scene, &new_pids[0]).await;
    both_command_lines_understand(&scene, &pids[0]).await;
    // Requests of both versions are obeyed.
    scene.baton(&["pause", &new_pids[0], "--wait"]).await.ok();
    scene.baton_of(&next("baton"), &["play", &new_pids[0]]).await.ok();

    let program = next("baton-worker").display().to_string();
    let mut new = vec![scene.worker_of(&program, "new1", slots).await];
    // The earlier ones may have ended by now.
    pids.extend(scene.submit(&counting("1s"), 50).await);
    eventually("an old worker reads a checkpoint of a new one", Duration::from_secs(20), async || {
        let logs: Vec<String> = old.iter().map(Worker::log).collect();
        if logs.iter().any(|log| log.contains("its checkpoint: version 4 is newer")) { Ok(()) } else { Err(logs) }
    })
    .await;
    assert!(old[0].terminate().await.success(), "{}", old[0].log());
    // A restarted old worker finds a schema that is newer than itself.
    old[0] = scene.worker("old1", slots).await;
    pids.extend(scene.submit(&counting("300ms"), 10).await);
    for (worker, name) in old.iter_mut().zip(["new2", "new3", "new4"]) {
        new.push(scene.worker_of(&program, name, slots).await);
        assert!(worker.terminate().await.success(), "{}", worker.log());
    }
    pids.extend(new_pids);
    count_becomes(&scene, "place = 3 AND state = 4", pids.len() as u64, Duration::from_secs(60)).await;
    both_command_lines_understand(&scene, &pids[0]).await;
    Witness::read(&scene.path("witness")).check(&pids, ADVANCES, &BTreeSet::new());
    assert_eq!(History::read(&scene, vec![]).await.violations(), Vec::<String>::new());
    let hows = scene.sql("SELECT DISTINCT how FROM attempt WHERE how NOT IN ('ok', 'drained', 'paused')").await;
    assert_eq!(hows.trim(), "", "a process has failed or lost its worker");
    for worker in &mut new {
        assert!(worker.terminate().await.success());
    }
}
