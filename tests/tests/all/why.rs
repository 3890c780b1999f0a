//! What operators ask a fleet: why a process does not move, what a worker holds, and what has happened to a process;
//! and the drain of a worker, which gives everything back.

use std::process::Stdio;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// It advances for longer than any test runs.
const ENDLESS: &str = "{call: baton.count, with: {advances: 100000, every: 100ms}}";

async fn explained(scene: &Scene, pid: &str) -> Value {
    scene.baton(&["explain", pid, "-o", "json"]).await.ok().json()[0].clone()
}

/// Waits until the condition is this one, and returns the whole answer.
async fn explained_as(scene: &Scene, pid: &str, condition: &str) -> Value {
    eventually(&format!("{pid} is {condition}"), Duration::from_secs(20), async || {
        let now = explained(scene, pid).await;
        if now["condition"] == condition { Ok(now) } else { Err(now) }
    })
    .await
}

/// Asserts a part of the text for people.
fn says(explanation: &Value, part: &str) {
    let text = format!("{} | {}", explanation["text"], explanation["remedy"]);
    assert!(text.contains(part), "no {part:?} in {explanation}");
}

async fn is_held_by(scene: &Scene, pid: &str, worker: &str) {
    eventually(&format!("{worker} holds {pid}"), Duration::from_secs(20), async || {
        let now = scene.show(pid).await["worker"].clone();
        if now == worker { Ok(()) } else { Err(now) }
    })
    .await;
}

async fn count_becomes(scene: &Scene, condition: &str, count: u64) {
    eventually(&format!("{count} processes with {condition}"), Duration::from_secs(20), async || {
        let now = scene.count(condition).await;
        if now == count { Ok(()) } else { Err(now) }
    })
    .await;
}

async fn worker_row(scene: &Scene, name: &str) -> Value {
    scene.baton(&["workers", name, "-o", "json"]).await.ok().json()[0].clone()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn explain_says_what_is_missing_among_the_workers() {
    let scene = Scene::new().await;
    scene.baton(&["explain", "01940000-0000-7000-8000-000000000000"]).await.exits(3);
    let first = scene.submit(ENDLESS, 1).await.remove(0);
    says(&explained_as(&scene, &first, "no_worker").await, "baton-worker --queue default");

    let worker = scene.worker("w1", &["--slots", "1"]).await;
    let advancing = explained_as(&scene, &first, "advancing").await;
    assert_eq!(advancing["facts"]["live"]["worker"], "w1", "{advancing}");
    let waiting = scene.submit(ENDLESS, 2).await;
    let full = explained_as(&scene, &waiting[1], "slots_taken").await;
    assert_eq!((&full["facts"]["slots"], &full["facts"]["before"]), (&1.into(), &1.into()), "{full}");
    says(&full, "all slots for queue `default` are taken (1 of 1); processes ahead: 1");

    let elsewhere = scene.submit("{call: baton.noop, queue: gpu, priority: high}", 1).await.remove(0);
    let unserved = explained(&scene, &elsewhere).await;
    assert_eq!(
        (&unserved["condition"], &unserved["facts"]["served"][0]),
        (&"queue_not_served".into(), &"default".into())
    );
    says(&unserved, "baton-worker --queue gpu");
    let list = scene.baton(&["list"]).await.ok();
    for part in [
        "workers: 1, with 1 of 1 slots taken; 3 queued, the oldest for",
        "warning: 1 of 1 slots are taken",
        "warning: no worker serves queue `gpu.high`; queued processes: 1; start one: baton-worker --queue gpu",
    ] {
        assert!(list.stdout.contains(part), "no {part:?} in {}", list.stdout);
    }

    scene.baton(&["pause", "--fleet", "--reason", "night"]).await.ok();
    let asleep = explained(&scene, &waiting[0]).await;
    assert_eq!((&asleep["condition"], &asleep["facts"]["reason"]), (&"fleet_paused".into(), &"night".into()));
    says(&asleep, "by tester@");
    for command in ["list", "workers"] {
        let output = scene.baton(&[command]).await.ok();
        assert!(output.stdout.contains("the fleet was paused by tester@"), "{}", output.stdout);
    }
    scene.baton(&["play", "--fleet"]).await.ok();

    // It sends no heartbeat, and no other worker can declare it gone.
    worker.freeze();
    says(&explained_as(&scene, &first, "holder_silent").await, "start a worker");
    assert_eq!(worker_row(&scene, "w1").await["state"], "silent");
    explained_as(&scene, &waiting[0], "workers_silent").await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn explain_says_what_a_process_waits_for_and_who_has_stopped_it() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let failing = scene.submit("{call: baton.fail, retry: {max: 3, wait: 1h}}", 1).await.remove(0);
    let retried = explained_as(&scene, &failing, "waits_for_retry").await;
    says(&retried, "try 2 of 3; try 1 failed: it was asked to fail");
    let wait_ms = retried["facts"]["in_ms"].as_i64().unwrap();
    assert!((3_500_000..=3_600_000).contains(&wait_ms), "{retried}");
    let sleeping = scene.submit("{call: baton.sleep, with: {for: 1h}}", 1).await.remove(0);
    says(&explained_as(&scene, &sleeping, "waits_for_timer").await, "wakes in ");
    let on_hold = scene.submit("{call: baton.noop, hold: true}", 1).await.remove(0);
    says(&explained(&scene, &on_hold).await, "`hold: true`");
    assert_eq!(explained(&scene, &on_hold).await["condition"], "on_hold");
    scene.baton(&["pause", &sleeping, "--reason", "too early"]).await.ok();
    let paused = explained(&scene, &sleeping).await;
    assert_eq!((&paused["condition"], &paused["facts"]["reason"]), (&"paused".into(), &"too early".into()));
    says(&paused, "paused by tester@");

    let list = scene.baton(&["list"]).await.ok();
    for part in ["try 2 in 59m", "after: it was asked to fail", "paused by tester@", " ago: too early", "on hold"] {
        assert!(list.stdout.contains(part), "no {part:?} in {}", list.stdout);
    }
    let json = scene.baton(&["list", &failing, &sleeping, "-o", "json"]).await.ok().json();
    let [paused, retried] = json.as_array().unwrap().as_slice() else { panic!("two rows: {json}") };
    assert_eq!((&retried["last_error"], &retried["retries"]), (&"it was asked to fail".into(), &1.into()));
    assert_eq!((&paused["paused_reason"], &paused["retries"]), (&"too early".into(), &0.into()));
    assert!(
        paused["paused_by"].as_str().unwrap().starts_with("tester@") && paused["paused_at"].is_string(),
        "{paused}"
    );

    scene.baton(&["kill", &sleeping]).await.ok();
    says(&explained_as(&scene, &sleeping, "ended").await, "killed by tester@");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_history_has_every_request_and_what_it_came_to() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let pid = scene.submit("{call: baton.block, with: {for: 12s}}", 1).await.remove(0);
    is_held_by(&scene, &pid, "w1").await;
    scene.baton(&["pause", &pid, "--reason", "one"]).await.ok();
    let pending = explained(&scene, &pid).await;
    assert_eq!((&pending["condition"], &pending["facts"]["asked_reason"]), (&"pause_pending".into(), &"one".into()));
    says(&pending, "w1 holds it and has not applied the request yet");
    scene.baton(&["play", &pid]).await.ok();
    explained_as(&scene, &pid, "blocks_its_thread").await;
    scene.baton(&["pause", &pid, "--reason", "two"]).await.ok();
    let text = scene.baton(&["show", &pid]).await.ok().stdout;
    assert!(text.contains("): two; not applied yet"), "{text}");
    // It ends before it can be paused.
    scene.baton(&["watch", &pid, "--timeout", "30s"]).await.ok();

    let show = scene.show(&pid).await;
    let events: Vec<(&str, Option<&str>, &str)> = show["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| {
            assert!(event["by"].as_str().unwrap().starts_with("tester@"), "{event}");
            assert!(event["login"].as_str().unwrap().starts_with("postgresql:"), "{event}");
            assert!(event["at"].as_str() <= event["settled_at"].as_str(), "{event}");
            (event["what"].as_str().unwrap(), event["reason"].as_str(), event["outcome"].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        events,
        [("pause", Some("one"), "superseded"), ("play", None, "applied"), ("pause", Some("two"), "ended")]
    );
    let text = scene.baton(&["show", &pid]).await.ok().stdout;
    let timeline: Vec<&str> = text.lines().skip_while(|line| *line != "  timeline").collect();
    let position = |part: &str| {
        timeline.iter().position(|line| line.contains(part)).unwrap_or_else(|| panic!("no {part:?} in {text}"))
    };
    let order = [
        "accepted from tester@",
        "claimed by w1",
        "): one",
        "superseded by a later request",
        "): two",
        "too late, the process had ended",
    ];
    assert!(order.map(position).is_sorted(), "{text}");
    assert!(text.contains("play requested by tester@") && text.contains("(postgresql:"), "{text}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_drained_worker_is_shown_until_others_have_what_it_held() {
    let scene = Scene::new().await;
    let mut first = scene.worker("w1", &["--slots", "50"]).await;
    let counting = scene.submit("{call: baton.count, with: {advances: 100, every: 100ms}}", 20).await;
    // An advance that the drain waits for; the test lets it end.
    let go = scene.path("go");
    let script = format!("script: 'until [ -e {} ]; do sleep 0.1; done'", go.display());
    let program = scene.submit(&script, 1).await.remove(0);
    count_becomes(&scene, "place = 1", 21).await;
    let mut second = scene.worker("w2", &["--slots", "50"]).await;

    scene.baton(&["drain", "w3"]).await.exits(3);
    let some = scene.baton(&["drain", "w3", "w1", "--reason", "new kernel", "-o", "json"]).await.exits(9).json();
    assert_eq!((&some[0]["outcome"], &some[0]["nudged"]), (&"absent".into(), &false.into()), "{some}");
    assert_eq!((&some[1]["outcome"], &some[1]["nudged"]), (&"draining".into(), &true.into()), "{some}");
    let row = worker_row(&scene, "w1").await;
    assert_eq!(row["state"], "draining", "{row}");
    says(&explained(&scene, &program).await, "is draining and gives it back");

    let id = row["id"].as_str().unwrap();
    let path = scene.path("drained");
    let mut command = scene.command(&["drain", id, "--wait", "--timeout", "30s"]);
    command.stdout(Stdio::from(std::fs::File::create(&path).unwrap())).kill_on_drop(true);
    let mut draining = command.spawn().unwrap();
    let printed = || std::fs::read_to_string(&path).unwrap();
    eventually("only the program is left", Duration::from_secs(10), async || {
        let now = printed();
        if now.ends_with("w1  draining, holds 1\n") { Ok(()) } else { Err(now) }
    })
    .await;
    std::fs::write(go, "").unwrap();
    assert!(draining.wait().await.unwrap().success());
    assert_eq!(printed().lines().last(), Some("w1  drained"));
    assert_eq!(first.ended(Duration::from_secs(10)).await.code(), Some(0));
    let pids: Vec<&str> = counting.iter().chain([&program]).map(String::as_str).collect();
    scene.baton(&[&["watch", "--timeout", "30s"], &pids[..]].concat()).await.ok();
    let ends = scene.sql("SELECT w.name, a.how, count(*) FROM attempt a JOIN worker w ON w.id = a.worker GROUP BY 1, 2 ORDER BY 1, 2").await;
    // The process in its last advance has ended on its worker.
    assert_eq!(ends.lines().collect::<Vec<_>>(), ["w1|drained|20", "w1|ok|1", "w2|ok|20"]);
    let asked =
        scene.sql("SELECT by_whom LIKE 'tester@%', target, reason FROM event WHERE what = 'drain' ORDER BY at").await;
    assert_eq!(asked.lines().next(), Some("t|w1|new kernel"));
    // The worker is gone, so the name is unknown.
    scene.baton(&["drain", "w1"]).await.exits(3);
    scene.baton(&["workers", "w1"]).await.exits(3);
    assert_eq!(scene.baton(&["workers", "w1", "--all", "-o", "json"]).await.ok().json()[0]["state"], "gone");

    // A frozen worker does not answer; it drains as soon as it resumes.
    second.freeze();
    let silent = scene.baton(&["drain", "w2", "--wait", "--timeout", "1s", "-o", "json"]).await.exits(6);
    assert_eq!((&silent.json()[0]["outcome"], &silent.json()[0]["nudged"]), (&"draining".into(), &false.into()));
    second.thaw();
    assert_eq!(second.ended(Duration::from_secs(20)).await.code(), Some(0));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn workers_drain_is_why_nothing_is_taken() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let program = scene.submit("script: sleep 1753", 1).await.remove(0);
    is_held_by(&scene, &program, "w1").await;
    scene.baton(&["drain", "w1"]).await.ok();
    let queued = scene.submit("call: baton.noop", 1).await.remove(0);
    says(&explained_as(&scene, &queued, "workers_drain").await, "baton-worker --queue default");
    scene.baton(&["kill", &program, "--wait"]).await.ok();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_worker_holds_is_shown_within_bounds() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &["--slots", "50"]).await;
    scene.submit(ENDLESS, 23).await;
    count_becomes(&scene, "place = 1", 23).await;
    let row = worker_row(&scene, "w1").await;
    let (total, processes) = (&row["holds"]["total"], row["holds"]["processes"].as_array().unwrap());
    assert_eq!((total, processes.len()), (&23.into(), 20), "{row}");
    assert_eq!((&processes[0]["kind"], &processes[0]["status"]), (&"baton.count".into(), &"running".into()));
    assert!(row["beat_ago_ms"].as_u64() < row["lease_ms"].as_u64() && row["lease_ms"] == 10_000, "{row}");
    let text = scene.baton(&["workers", "w1"]).await.ok().stdout;
    assert!(text.contains("holds 23") && text.trim_end().ends_with("and 3 more"), "{text}");
    assert!(text.contains("NAME") && text.contains("LEASE") && text.contains(" of 10 s"), "{text}");
    let all = scene.baton(&["workers", "-o", "json"]).await.ok().json();
    assert!(all[0].get("holds").is_none(), "{all}");
}

/// The parts of the output of `workers --watch`, once there are three, and the exit after SIGINT.
async fn watched(scene: &Scene, more: &[&str], split: &str) -> (Vec<String>, Option<i32>) {
    let path = scene.path("watched");
    let mut command = scene.command(&[&["workers", "--watch"], more].concat());
    command.stdout(Stdio::from(std::fs::File::create(&path).unwrap())).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let parts = || -> Vec<String> {
        let text = std::fs::read_to_string(&path).unwrap();
        text.split_terminator(split).map(str::to_owned).collect()
    };
    eventually("three tables", Duration::from_secs(20), async || {
        let now = parts();
        if now.len() >= 3 { Ok(()) } else { Err(now) }
    })
    .await;
    let pid = i32::try_from(child.id().unwrap()).ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(10), child.wait()).await.unwrap().unwrap();
    (parts(), status.code())
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn workers_are_watched_until_somebody_interrupts_it() {
    let scene = Scene::new().await;
    let mut workers: Vec<Worker> = Vec::new();
    for name in ["w1", "w2"] {
        workers.push(scene.worker(name, &[]).await);
    }
    let (blocks, code) = watched(&scene, &[], "\n\n").await;
    assert_eq!(code, Some(0));
    for block in &blocks {
        let names: Vec<&str> = block.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
        assert_eq!(names, ["NAME", "w1", "w2"], "{block}");
        assert!(!block.contains('\x1b'), "no terminal, no redrawing: {block:?}");
    }
    let (lines, code) = watched(&scene, &["-o", "json"], "\n").await;
    assert_eq!(code, Some(0));
    let beats: Vec<i64> =
        lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()[0]["beat"].as_i64().unwrap()).collect();
    assert!(beats.is_sorted() && beats[0] < beats[beats.len() - 1], "{beats:?}");
}
