//! The fleet as users see it: submit, control, and workers that die, stop, freeze and drain.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::process::processes_with;
use baton_tests::scene::Scene;
use baton_tests::witness::Witness;
use serde_json::Value;

/// Waits until this many processes satisfy an SQL condition.
async fn count_becomes(scene: &Scene, condition: &str, count: u64, limit: u64) {
    eventually(&format!("{count} processes with {condition}"), Duration::from_secs(limit), async || {
        let now = scene.count(condition).await;
        if now == count {
            Ok(())
        } else {
            Err((now, scene.sql("SELECT place, state, count(*) FROM process GROUP BY 1, 2").await))
        }
    })
    .await;
}

fn count_spec(advances: u64, every: &str, witness: &std::path::Path) -> String {
    format!("{{call: baton.count, with: {{advances: {advances}, every: {every}, witness: {}}}}}", witness.display())
}

async fn how_attempts_ended(scene: &Scene) -> String {
    scene.sql("SELECT how, count(*) FROM attempt GROUP BY 1 ORDER BY 1").await
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_submitted_process_is_run_by_a_worker_and_leaves_its_history() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let spec = scene.spec("job.yaml", "name: job\nlabels: {a: b}\nscript: echo done; exit 0\n");
    let output =
        scene.baton(&["submit", &spec.display().to_string(), "--wait", "--timeout", "30s", "-o", "ids"]).await.ok();
    let show = scene.show(output.stdout.trim()).await;
    assert_eq!((&show["state"], &show["exit"], &show["name"]), (&"finished".into(), &0.into(), &"job".into()));
    assert_eq!(show["attempts"][0]["worker"], "w1");
    assert_eq!(show["created_by"].as_str().unwrap().split('@').next(), Some("tester"));
    let failing = scene.spec("fail.yaml", "script: exit 4");
    scene.baton(&["submit", &failing.display().to_string(), "--wait"]).await.exits(8);
    let workers = scene.baton(&["workers", "-o", "json"]).await.ok().json();
    assert_eq!(workers[0]["name"], "w1");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_killed_worker_loses_nothing_and_no_committed_advance_is_repeated() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let witness = scene.path("witness");
    let mut first = scene.worker("w1", &["--slots", "200"]).await;
    let _second = scene.worker("w2", &["--slots", "200"]).await;
    scene.consumed_by("baton.task.default", 2).await;
    let pids = scene.submit(&count_spec(50, "200ms", &witness), 200).await;
    eventually("both workers are at work", Duration::from_secs(30), async || {
        let now = Witness::read(&witness);
        if now.workers().len() == 2 && now.lines() > 2_000 { Ok(()) } else { Err(now.lines()) }
    })
    .await;
    let held =
        scene.sql("SELECT p.id FROM process p JOIN worker w ON w.id = p.owner WHERE w.name = 'w1' AND place = 1").await;
    first.kill();
    let killed_at = Instant::now();
    let lost: BTreeSet<String> = held.lines().map(str::to_owned).collect();
    assert!(!lost.is_empty(), "the killed worker held nothing");
    eventually("another worker holds them", Duration::from_secs(15), async || {
        let rest = scene.count("owner IN (SELECT id FROM worker WHERE name = 'w1')").await;
        if rest == 0 { Ok(()) } else { Err(rest) }
    })
    .await;
    let taken_over_in = killed_at.elapsed();
    count_becomes(&scene, "state = 4", 200, 90).await;
    Witness::read(&witness).check(&pids, 50, &lost);
    History::read(&scene, vec![]).await.accepting(&pids).check();
    let how = how_attempts_ended(&scene).await;
    assert!(how.contains("lost|"), "{how}");
    // The limit allows for the slow detection; the fast one needs two to three seconds.
    assert!(taken_over_in < Duration::from_secs(15), "{taken_over_in:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_frozen_worker_writes_nothing_more_ends_its_programs_and_goes_on_as_a_new_one() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let witness = scene.path("witness");
    let frozen = scene.worker("frozen", &["--threads", "1"]).await;
    let mut pids = scene.submit(&count_spec(200, "100ms", &witness), 10).await;
    let program =
        scene.submit("{script: 'echo $$ >> ../../../../../started; sleep 1733; true', name: sleeper}", 1).await;
    eventually("the program runs", Duration::from_secs(20), async || {
        let now = processes_with("sleep 1733");
        if now.is_empty() { Err("no program") } else { Ok(()) }
    })
    .await;
    eventually("every process has advanced", Duration::from_secs(20), async || {
        let lines = Witness::read(&witness).lines();
        if lines > 40 { Ok(()) } else { Err(lines) }
    })
    .await;
    let _other = scene.worker("other", &[]).await;
    frozen.freeze();
    eventually("all are taken over", Duration::from_secs(30), async || {
        let rest = scene.count("place = 1 AND owner IN (SELECT id FROM worker WHERE name = 'frozen')").await;
        if rest == 0 { Ok(()) } else { Err(rest) }
    })
    .await;
    // Epoch 1 only: what it claims as a new incarnation has another epoch.
    let lines_of_frozen = |epoch: &str| {
        let text = std::fs::read_to_string(&witness).unwrap();
        text.lines().filter(|line| line.ends_with(&format!("{epoch}frozen"))).count()
    };
    let before = lines_of_frozen(" 1 ");
    eventually("the other worker runs the program", Duration::from_secs(20), async || {
        let now = processes_with("sleep 1733");
        // The shell and its sleep, of one worker only: the shim of the frozen worker has ended the first program.
        if now.len() == 2 || now.len() == 1 { Ok(()) } else { Err(now) }
    })
    .await;
    frozen.thaw();
    frozen.says("was declared gone").await;
    eventually("the frozen worker is ready again", Duration::from_secs(20), async || {
        let count = frozen.log().matches("worker ready").count();
        if count == 2 { Ok(()) } else { Err(count) }
    })
    .await;
    // Its one thread may have been about to write the line of an advance that had begun; it begins no other.
    let after = lines_of_frozen(" 1 ");
    assert!(
        (before..=before + 1).contains(&after),
        "the frozen worker advanced a process that it had lost: {before} {after}"
    );
    // As a new incarnation it takes work again.
    let all = lines_of_frozen(" ");
    let more = scene.submit(&count_spec(5, "10ms", &witness), 300).await;
    pids.extend(more);
    scene.baton(&["kill", "--wait", &program[0]]).await.ok();
    assert!(processes_with("sleep 1733").is_empty());
    count_becomes(&scene, "state = 4", 310, 90).await;
    History::read(&scene, vec![]).await.accepting(&pids).check();
    assert!(lines_of_frozen(" ") > all, "the worker takes no more work");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_drained_worker_gives_everything_back_at_no_charge() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let witness = scene.path("witness");
    let mut first = scene.worker("w1", &["--grace", "1s"]).await;
    let pids = scene.submit(&count_spec(60, "100ms", &witness), 20).await;
    scene.submit("{script: 'sleep 1737', needs: {time: 1h}}", 1).await;
    eventually("all of it runs", Duration::from_secs(20), async || {
        let now = (processes_with("sleep 1737").len(), Witness::read(&witness).lines());
        if now.0 > 0 && now.1 > 100 { Ok(()) } else { Err(now) }
    })
    .await;
    let _second = scene.worker("w2", &[]).await;
    let status = first.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", first.log());
    assert_eq!(scene.count("owner IN (SELECT id FROM worker WHERE name = 'w1')").await, 0);
    count_becomes(&scene, "state = 4", 20, 60).await;
    Witness::read(&witness).check(&pids, 60, &BTreeSet::new());
    History::read(&scene, vec![]).await.accepting(&pids).check();
    let how = how_attempts_ended(&scene).await;
    assert_eq!(how.lines().collect::<Vec<_>>(), ["drained|21", "ok|20"], "no death, no charge");
    scene.baton(&["list", "--state", "running", "-o", "json"]).await.ok();
    assert_eq!(scene.sql("SELECT max(deaths) FROM process").await.trim(), "0");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn parked_processes_occupy_nothing() {
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &["--slots", "50"]).await;
    // The first thousand show the cost of taking them; the others must add nothing.
    scene.submit("{call: baton.sleep, with: {for: 10m}}", 1_000).await;
    count_becomes(&scene, "place = 2 AND state = 2", 1_000, 60).await;
    let (memory_kb, files) = (worker.memory_kb(), worker.open_files());
    scene.submit("{call: baton.sleep, with: {for: 10m}}", 4_000).await;
    count_becomes(&scene, "place = 2 AND state = 2", 5_000, 60).await;
    assert!(worker.memory_kb() < memory_kb + 4 * 1024, "{memory_kb} kB grew to {} kB", worker.memory_kb());
    assert!(worker.open_files() <= files + 4, "{files} open files became {}", worker.open_files());
    let spec = scene.spec("noop.yaml", "call: baton.noop");
    scene.baton(&["submit", &spec.display().to_string(), "--wait", "--timeout", "10s"]).await.ok();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn control_reaches_processes_wherever_they_are() {
    let scene = Scene::new().await;
    let witness = scene.path("witness");
    // Queued: there is no worker.
    let queued = scene.submit(&count_spec(10, "50ms", &witness), 1).await.remove(0);
    let pause = scene.baton(&["pause", &queued, "-o", "json"]).await.ok().json();
    assert_eq!((&pause[0]["outcome"], &pause[0]["nudged"]), (&"paused".into(), &true.into()));
    let again = scene.baton(&["pause", &queued, "-o", "json"]).await.ok().json();
    assert_eq!(again[0]["outcome"], "already_paused");

    let _worker = scene.worker("w1", &[]).await;
    scene.baton(&["play", &queued]).await.ok();
    scene.baton(&["watch", &queued, "--timeout", "30s"]).await.ok();

    // Held: it advances all the time.
    let held = scene.submit(&count_spec(100_000, "20ms", &witness), 1).await.remove(0);
    count_becomes(&scene, "place = 1", 1, 20).await;
    let status = scene.baton(&["status", &held, "-o", "json"]).await.ok().json();
    assert_eq!(status[0]["live"]["worker"], "w1");
    scene.baton(&["pause", "--wait", &held]).await.ok();
    let lines = Witness::read(&witness).lines();
    assert_eq!(scene.count("place = 2 AND state = 3").await, 1);
    scene.baton(&["play", "--wait", &held]).await.ok();
    eventually("it advances", Duration::from_secs(10), async || {
        let now = Witness::read(&witness).lines();
        if now > lines + 3 { Ok(()) } else { Err(now) }
    })
    .await;
    scene.baton(&["kill", "--wait", "--reason", "done with it", &held]).await.ok();
    let show = scene.show(&held).await;
    assert_eq!(show["state"], "killed");
    assert!(show["reason"].as_str().unwrap().contains("done with it"), "{show}");
    let asked: Vec<&Value> = show["events"].as_array().unwrap().iter().map(|event| &event["what"]).collect();
    assert_eq!(asked, ["pause", "play", "kill"]);

    // Parked, and ended.
    let parked = scene.submit("{call: baton.sleep, with: {for: 1h}}", 1).await.remove(0);
    count_becomes(&scene, "place = 2 AND state = 2", 1, 20).await;
    assert_eq!(scene.baton(&["kill", &parked, "-o", "json"]).await.ok().json()[0]["outcome"], "killed");
    scene.baton(&["play", &parked]).await.exits(5);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_kill_leaves_nothing_of_a_program_that_hides() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &["--grace", "1s"]).await;
    let script = "setsid sh -c 'exec 0<&- 1>&- 2>&-; trap \"\" TERM; while :; do sleep 1739; done' & sleep 1739";
    let pid = scene.submit(&format!("script: {}", serde_json::to_string(script).unwrap()), 1).await.remove(0);
    eventually("both run", Duration::from_secs(20), async || {
        let now = processes_with("sleep 1739");
        if now.len() >= 3 { Ok(()) } else { Err(now) }
    })
    .await;
    scene.baton(&["kill", "--wait", &pid]).await.ok();
    assert!(processes_with("sleep 1739").is_empty());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn output_is_followed_live_and_kept_when_worker_and_disk_are_gone() {
    let scene = Scene::new().await;
    let mut worker = scene.worker("w1", &[]).await;
    let pid = scene.submit("script: 'for i in 1 2 3 4 5 6; do echo line $i; sleep 0.3; done'", 1).await.remove(0);
    let live = scene.baton(&["logs", "-f", &pid]).await.ok();
    assert_eq!(live.stdout, "line 1\nline 2\nline 3\nline 4\nline 5\nline 6\n");
    scene.baton(&["watch", &pid]).await.ok();
    worker.kill();
    std::fs::remove_dir_all(scene.path("worker-w1")).unwrap();
    assert_eq!(scene.baton(&["logs", &pid]).await.ok().stdout, live.stdout);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_process_that_blocks_its_thread_costs_only_its_thread() {
    let scene = Scene::new().await;
    let witness = scene.path("witness");
    let worker = scene.worker("w1", &["--threads", "2"]).await;
    let blocking = scene.submit("{call: baton.block, with: {for: 60s}}", 1).await.remove(0);
    let other = scene.submit(&count_spec(100_000, "50ms", &witness), 1).await.remove(0);
    worker.says("blocks its thread").await;
    let status = scene.baton(&["status", &blocking, "-o", "json"]).await.ok().json();
    assert!(status[0]["live"]["blocked_ms"].as_u64().unwrap() >= 5_000, "{status}");
    assert!(scene.baton(&["workers"]).await.ok().stdout.contains(&blocking));
    let pause = scene.baton(&["pause", "--wait", &other, "-o", "json"]).await.ok().json();
    assert_eq!((&pause[0]["outcome"], &pause[0]["nudged"]), (&"paused".into(), &true.into()));
    // Much longer than the heartbeat of ten seconds: the connection stays open, and the blocking process ends normally.
    scene.baton(&["watch", &blocking, "--timeout", "90s"]).await.ok();
    assert!(!worker.log().contains("broker: "), "{}", worker.log());
    assert_eq!(scene.show(&blocking).await["attempts"].as_array().unwrap().len(), 1);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_process_that_kills_its_workers_is_excepted_after_five_deaths() {
    let scene = Scene::new().await;
    let pid = scene.submit("{call: baton.fail, with: {how: abort}}", 1).await.remove(0);
    for _ in 0..5 {
        // A worker that starts under the name of a dead one frees at once what that worker held.
        let mut worker = scene.worker("w1", &[]).await;
        worker.ended(Duration::from_secs(60)).await;
    }
    let _worker = scene.worker("w1", &[]).await;
    scene.baton(&["watch", &pid, "--timeout", "30s"]).await.exits(8);
    let show = scene.show(&pid).await;
    assert_eq!(show["state"], "excepted");
    assert!(show["reason"].as_str().unwrap().contains("died 5 times"), "{show}");
    let how: Vec<&Value> = show["attempts"].as_array().unwrap().iter().map(|row| &row["how"]).collect();
    assert_eq!(how, ["lost"; 5]);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn suspects_go_on_one_after_the_other_without_a_pause() {
    let scene = Scene::new().await;
    // While one is held, the messages of the others are dropped. With the head rule alone, at best one would run every
    // two seconds.
    scene.submit("{call: baton.block, with: {for: 2s}}", 1).await;
    scene.submit("call: baton.noop", 30).await;
    scene.submit("{call: baton.count, with: {advances: 3, every: 600s}}", 10).await;
    scene.sql("UPDATE process SET deaths = 2").await;
    let since = Instant::now();
    let _worker = scene.worker("w1", &["--slots", "50"]).await;
    count_becomes(&scene, "state = 4", 31, 60).await;
    count_becomes(&scene, "place <> 3 AND deaths = 0", 10, 60).await;
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    assert_eq!(scene.sql("SELECT max(epoch) FROM process").await.trim(), "1");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_full_worker_leaves_the_rest_to_others_and_priorities_share() {
    let scene = Scene::new().await;
    let _full = scene.worker("full", &["--slots", "1"]).await;
    scene.submit("{call: baton.block, with: {for: 8s}}", 1).await;
    count_becomes(&scene, "place = 1", 1, 20).await;
    let pids = scene.submit("{call: baton.noop, priority: low}", 20).await;
    let _free = scene.worker("free", &["--slots", "4"]).await;
    let arguments: Vec<&str> =
        ["watch", "--timeout", "30s"].into_iter().chain(pids.iter().map(String::as_str)).collect();
    scene.baton(&arguments).await.ok();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn on_hold_waits_for_play_and_a_queue_nobody_serves_is_named() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let held_back = scene.submit("{call: baton.noop, hold: true}", 1).await.remove(0);
    scene.submit("{call: baton.noop, queue: gpu}", 1).await;
    let doctor = scene.baton(&["doctor"]).await.ok();
    assert!(doctor.stdout.contains("baton-worker --queue gpu"), "{doctor:?}");
    assert_eq!(scene.show(&held_back).await["state"], "paused");
    scene.baton(&["play", &held_back]).await.ok();
    scene.baton(&["watch", &held_back, "--timeout", "20s"]).await.ok();
    let _gpu = scene.worker("w2", &["--queue", "gpu"]).await;
    count_becomes(&scene, "state = 4", 2, 20).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_crate_outside_the_workspace_runs_a_process_of_its_own() {
    let scene = Scene::new().await;
    let _worker = scene.worker_of("own-process", "own", &["--queue", "own"]).await;
    let spec = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/own-process/own-pi.yaml");
    let pid = scene.submit(&std::fs::read_to_string(spec).unwrap(), 1).await.remove(0);
    scene.baton(&["watch", &pid, "--timeout", "60s"]).await.ok();
    let show = scene.show(&pid).await;
    assert_eq!(show["kind"], "own.pi");
    assert!(!show["values"].as_object().unwrap().is_empty(), "{show}");
}
