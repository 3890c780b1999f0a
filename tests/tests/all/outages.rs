//! Outages that kill no worker: alarms, refusals, full disks, clock jumps, and a database rollback.

use std::time::{Duration, Instant};

use baton_common::state::State;
use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::busy::{Busy, PROCESSES, blocking};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_broker_that_is_stopped_in_order_costs_only_time() {
    let busy = Busy::new().await;
    blocking(|| busy.scene.services().control_broker(&["stop_app"])).await;
    busy.has_advanced(3_000).await;
    blocking(|| busy.scene.services().control_broker(&["start_app"])).await;
    busy.check().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn alarms_of_memory_and_disk_hold_nobody_up() {
    let busy = Busy::new().await;
    let scene = &busy.scene;
    for (alarm, end) in [
        (["set_vm_memory_high_watermark", "0.00001"], ["set_vm_memory_high_watermark", "0.4"]),
        (["set_disk_free_limit", "100000GB"], ["set_disk_free_limit", "50MB"]),
    ] {
        blocking(|| scene.services().control_broker(&alarm)).await;
        let since = Instant::now();
        let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
        let submitted = scene.baton(&["submit", &spec, "--count", "20", "-o", "ids"]).await.ok();
        assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
        assert!(submitted.stderr.contains("warning"), "{submitted:?}");
        blocking(|| scene.services().control_broker(&end)).await;
        let pids = submitted.stdout.lines().map(|pid| format!("'{pid}'")).collect::<Vec<_>>().join(",");
        eventually("they have run", Duration::from_secs(60), async || {
            let rest = scene.count(&format!("id IN ({pids}) AND place <> 3")).await;
            if rest == 0 { Ok(()) } else { Err(rest) }
        })
        .await;
        scene.sql(&format!("DELETE FROM attempt WHERE pid IN ({pids})")).await;
        scene.sql(&format!("DELETE FROM process WHERE id IN ({pids})")).await;
        scene.sql(&format!("DELETE FROM journal WHERE pid IN ({pids})")).await;
    }
    busy.check().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_task_queue_that_is_deleted_costs_only_time() {
    let busy = Busy::new().await;
    busy.scene.delete_queue("baton.task.default").await;
    busy.check().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_queue_that_refuses_what_is_too_much_loses_nothing() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    // Declares the queue.
    scene.submit("{call: baton.noop, hold: true}", 1).await;
    scene.policy("^baton[.]task[.]", r#"{"max-length": 10, "overflow": "reject-publish"}"#).await;
    let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    // The broker applies a policy some time after it has accepted it.
    let mut pids: Vec<String> = Vec::new();
    eventually("the queue refuses some", Duration::from_secs(60), async || {
        let submitted = scene.baton(&["submit", &spec, "--count", "1500", "-o", "ids"]).await.ok();
        pids.extend(submitted.stdout.lines().map(str::to_owned));
        if submitted.stderr.contains("warning") { Ok(()) } else { Err(pids.len()) }
    })
    .await;
    let depth = scene.amqp().await.depth("baton.task.default").await;
    assert!((depth as usize) < pids.len(), "{depth} of {} are in the queue", pids.len());
    let _worker = scene.worker("w1", &["--slots", "200"]).await;
    eventually("all have finished", Duration::from_secs(60), async || {
        let n_finished = scene.count("state = 4").await;
        if n_finished as usize == pids.len() { Ok(()) } else { Err(n_finished) }
    })
    .await;
    History::read(&scene, vec![]).await.accepting(&pids).check();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn sessions_of_the_database_that_are_ended_cost_only_time() {
    let mut busy = Busy::new().await;
    for lines in (1_500..12_000).step_by(1_500) {
        busy.has_advanced(lines).await;
        let others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                      WHERE datname = current_database() AND pid <> pg_backend_pid()";
        busy.scene.sql(others).await;
    }
    busy.finishes().await;
    let logs = busy.logs();
    assert!(logs.contains("sending it again"), "no commit was in progress: {logs}");
    assert!(!logs.contains("declared gone"), "{logs}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_full_disk_below_the_database_is_no_false_success_and_costs_only_time() {
    let scene = Scene::on_small_disk(160).await;
    let mut busy = Busy::with(scene, &[]).await;
    let filler = busy.scene.services().fill_disk();
    eventually("the workers notice", Duration::from_secs(60), async || {
        let logs = busy.logs();
        if logs.contains("sending it again") || logs.contains("database is away") { Ok(()) } else { Err("not yet") }
    })
    .await;
    let spec = busy.scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    let refused = busy.scene.baton(&["submit", &spec, "--count", "5000", "-o", "ids"]).await;
    assert!(refused.code != 0, "{refused:?}");
    let accepted = refused.stdout.lines().count();
    std::fs::remove_file(filler).unwrap();
    // PostgreSQL may have exited when it could not write its log.
    blocking(|| busy.scene.services().start_database()).await;
    let is_there = busy.scene.count("id IN (SELECT id FROM spec WHERE kind = 'baton.noop')").await;
    assert!(is_there as usize >= accepted, "{is_there} of {accepted} accepted processes exist");
    busy.scene.sql("DELETE FROM process WHERE id IN (SELECT id FROM spec WHERE kind = 'baton.noop')").await;
    busy.scene.sql("DELETE FROM journal WHERE pid IN (SELECT id FROM spec WHERE kind = 'baton.noop')").await;
    busy.scene.sql("DELETE FROM attempt WHERE pid IN (SELECT id FROM spec WHERE kind = 'baton.noop')").await;
    busy.finishes().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_worker_whose_clock_jumps_keeps_its_lease() {
    let scene = Scene::private().await;
    let clock = scene.path("clock");
    std::fs::write(&clock, "+0").unwrap();
    let variables = [
        ("LD_PRELOAD", "libfaketime.so.1"),
        ("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu/faketime:/usr/lib/aarch64-linux-gnu/faketime"),
        ("FAKETIME_TIMESTAMP_FILE", &clock.display().to_string()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    let busy = Busy::with(scene, &variables).await;
    for (lines, time) in [(2_000, "+1h"), (4_000, "-1h"), (7_000, "+300d"), (10_000, "+0")] {
        busy.has_advanced(lines).await;
        std::fs::write(&clock, time).unwrap();
    }
    assert!(busy.logs().contains("Z "), "{}", busy.logs());
    busy.check().await;
}

/// The lost time includes acknowledged work, so no worker takes anything until a person has checked.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_database_that_has_gone_back_in_time_is_refused_until_a_person_says_otherwise() {
    let busy = Busy::new().await;
    let scene = &busy.scene;
    blocking(|| scene.services().save_database()).await;
    // A worker need not notice a loss within the last second.
    let beats = async || scene.sql("SELECT min(beat) FROM worker").await.trim().parse::<u64>().unwrap();
    let saved = beats().await;
    eventually("every worker has sent a heartbeat since", Duration::from_secs(30), async || {
        let now = beats().await;
        if now >= saved + 3 { Ok(()) } else { Err(now) }
    })
    .await;
    blocking(|| scene.services().restore_database()).await;
    eventually("the fleet is paused", Duration::from_secs(30), async || {
        let reason = scene.sql("SELECT reason FROM fleet WHERE paused_at IS NOT NULL").await;
        if reason.contains("database rollback detected") { Ok(()) } else { Err((reason, busy.logs())) }
    })
    .await;
    eventually("no process is held", Duration::from_secs(30), async || {
        let n_held = scene.count("place = 1").await;
        if n_held == 0 { Ok(()) } else { Err(n_held) }
    })
    .await;
    let explained = scene.baton(&["workers"]).await.ok();
    assert!(
        explained.stdout.contains("database rollback detected")
            || explained.stderr.contains("database rollback detected"),
        "{explained:?}"
    );
    scene.baton(&["play", "--fleet"]).await.ok();
    eventually("all have finished", Duration::from_secs(120), async || {
        let n_finished = scene.count("state = 4").await;
        if n_finished == u64::from(PROCESSES) { Ok(()) } else { Err(n_finished) }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_request_over_a_silent_broker_is_obeyed_and_says_that_nobody_was_told() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let _worker = scene.worker("w1", &[]).await;
    let pid = scene.submit("{call: baton.count, with: {advances: 100000, every: 50ms}}", 1).await.remove(0);
    eventually("it is held", Duration::from_secs(20), async || {
        let n_held = scene.count("place = 1").await;
        if n_held == 1 { Ok(()) } else { Err(n_held) }
    })
    .await;
    let proxy = Proxy::start(&scene.broker_url()).await;
    proxy.set(Fault::Blackhole);
    let through = proxy.through(&scene.broker_url());
    for (verb, state) in [("pause", "paused"), ("kill", "killed")] {
        let since = Instant::now();
        let arguments = [verb, &pid, "-o", "json"];
        let asked = scene.baton_in(scene.folder(), &[("BATON_BROKER_URL", &through)], &arguments).await.ok();
        assert_eq!(asked.json()[0]["nudged"], false, "{asked:?}");
        assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
        eventually(state, Duration::from_secs(5), async || {
            let now = scene.show(&pid).await["state"].clone();
            if now == state { Ok(()) } else { Err(now) }
        })
        .await;
    }
    History::read(&scene, vec![]).await.accepting(&[pid]).check();
}

/// What a dead worker held is freed in pages, and taken by the remaining worker.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn thousands_of_leases_that_end_at_once_are_taken_over_in_pages() {
    const HELD: u64 = 3_000;
    let scene = Scene::new().await;
    let mut first = scene.worker("w1", &["--slots", "3000"]).await;
    scene.submit("{call: baton.count, with: {advances: 1000, every: 10m, stay: true}}", HELD as u32).await;
    let held_by = async |name: &str| {
        scene.count(&format!("place = 1 AND owner IN (SELECT id FROM worker WHERE name = '{name}')")).await
    };
    eventually("the first worker holds all", Duration::from_secs(60), async || {
        let n_held = held_by("w1").await;
        if n_held == HELD { Ok(()) } else { Err(n_held) }
    })
    .await;
    let second = scene.worker("w2", &["--slots", "3000"]).await;
    let before_kb = second.memory_kb();
    first.kill();
    eventually("the second worker holds all", Duration::from_secs(40), async || {
        let n_held = held_by("w2").await;
        if n_held == HELD { Ok(()) } else { Err(n_held) }
    })
    .await;
    assert_eq!(scene.count("epoch = 2").await, HELD, "each was freed once, and claimed once");
    let grown_kb = second.memory_kb() - before_kb;
    assert!(grown_kb < 64 * 1024, "{grown_kb} KB for {HELD}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_second_signal_does_not_wait_for_the_grace() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let mut worker = scene.worker("w1", &["--grace", "1h"]).await;
    let stays = scene.submit("{script: 'trap \"\" TERM; sleep 1741', needs: {time: 1h}}", 1).await.remove(0);
    eventually("it runs", Duration::from_secs(20), async || {
        let now = scene.show(&stays).await["state"].clone();
        if now == "running" { Ok(()) } else { Err(now) }
    })
    .await;
    worker.ask_to_end();
    worker.says("draining").await;
    let since = Instant::now();
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.log());
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    assert!(baton_tests::process::processes_with("sleep 1741").is_empty());
    assert_eq!(scene.show(&stays).await["place"], "queued");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_has_too_few_open_files_fails_no_process() {
    const COUNT: u32 = 20;
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &["--slots", "20"]).await;
    // Enough for a few programs at a time.
    let limit = Some(u64::try_from(worker.open_files()).unwrap() + 15);
    let pid = Pid::from_raw(worker.os_pid().cast_signed());
    prlimit(pid, Resource::Nofile, Rlimit { current: limit, maximum: limit }).unwrap();
    scene.submit("run: [sleep, '2']", COUNT).await;
    worker.says("Too many open files").await;
    eventually("all have finished", Duration::from_secs(60), async || {
        let n_finished = scene.count(&format!("state = {}", State::Finished.code())).await;
        if n_finished == u64::from(COUNT) { Ok(()) } else { Err(n_finished) }
    })
    .await;
    assert_eq!(scene.count("try > 1").await, 0);
}
