//! The operators' requests: pause, play and kill, of one process and of many, in every place.

use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::processes_in_environment;
use baton_tests::scene::Scene;
use baton_tests::witness::Witness;

/// Waits until this many rows satisfy the condition.
async fn becomes(scene: &Scene, condition: &str, count: usize) {
    eventually(condition, Duration::from_secs(20), async || {
        let now = scene.count(condition).await;
        if now == count as u64 { Ok(()) } else { Err(now) }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_broadcast_reaches_what_is_held_queued_and_parked_and_every_worker_answers() {
    let scene = Scene::new().await;
    let _workers = [scene.worker("w1", &["--slots", "40"]).await, scene.worker("w2", &["--slots", "40"]).await];
    let witness = scene.path("witness");
    let spec = |every: &str, labels: &str| {
        format!(
            "{{call: baton.count, labels: {{kind: {labels}}},
               with: {{advances: 1000000, every: {every}, stay: true, witness: {}}}}}",
            witness.display()
        )
    };
    scene.submit(&spec("200ms", "held"), 80).await;
    becomes(&scene, "place = 1", 80).await;
    scene.submit("{call: baton.noop, labels: {kind: queued}}", 20).await;
    scene.submit("{call: baton.noop, hold: true, labels: {kind: held-back}}", 5).await;
    let paused = scene.baton(&["pause", "--all", "--reason", "tests", "--wait", "-o", "json"]).await.ok().json();
    assert_eq!((&paused["selected"], &paused["applied_in_database"]), (&100.into(), &20.into()), "{paused}");
    assert_eq!((&paused["nudged"], &paused["pending"]), (&true.into(), &0.into()));
    let mut asked = 0;
    for worker in paused["workers"].as_array().unwrap() {
        assert_eq!(worker["answered"], true, "{paused}");
        assert_eq!((&worker["done"], &worker["pending"]), (&worker["asked"], &0.into()), "{paused}");
        asked += worker["asked"].as_u64().unwrap();
    }
    assert_eq!(asked, 80);
    assert_eq!(scene.count("state = 3 AND place = 2").await, 105);
    let before = Witness::read(&witness).lines();
    // Longer than the time between two advances of any of them.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(Witness::read(&witness).lines(), before, "an advance began after the answer");

    let played = scene.baton(&["play", "--label", "kind=held", "-o", "json"]).await.ok().json();
    assert_eq!(played["selected"], 80);
    becomes(&scene, "place = 1", 80).await;
    eventually("they advance again", Duration::from_secs(10), async || {
        let now = Witness::read(&witness).lines();
        if now > before { Ok(()) } else { Err(now) }
    })
    .await;
    let refused = scene.baton(&["kill", "--all"]).await.exits(4);
    assert!(refused.stderr.contains("105 processes") && refused.stderr.contains("--yes"), "{}", refused.stderr);
    let dry = scene.baton(&["kill", "--state", "paused", "--dry-run", "-o", "json"]).await.ok().json();
    assert_eq!((&dry["selected"], &dry["by"]["parked"]), (&25.into(), &25.into()));
    scene.baton(&["kill", "--all", "--yes", "--wait"]).await.ok();
    assert_eq!(scene.count("state = 6").await, 105);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_frozen_worker_is_named_and_its_processes_obey_once_they_are_taken_over() {
    let scene = Scene::new().await;
    let frozen = scene.worker("cold", &["--slots", "10"]).await;
    scene.submit("{call: baton.count, with: {advances: 1000000, every: 1h, stay: true}}", 10).await;
    becomes(&scene, "place = 1", 10).await;
    let _other = scene.worker("warm", &["--slots", "10"]).await;
    frozen.freeze();
    let pause = scene.baton(&["pause", "--all"]).await.ok();
    let line = pause.stdout.lines().find(|line| line.contains("cold")).unwrap_or_default();
    assert!(line.contains("none within 2 s"), "{}", pause.stdout);
    becomes(&scene, "state = 3 AND place = 2", 10).await;
    frozen.thaw();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_fleet_takes_nothing_while_it_is_paused_and_says_so() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    scene.submit("{call: baton.count, with: {advances: 1000000, every: 100ms}}", 1).await;
    becomes(&scene, "place = 1", 1).await;
    let paused = scene.baton(&["pause", "--fleet", "--reason", "upgrade", "-o", "json"]).await.ok().json();
    assert_eq!((&paused["fleet"], &paused["answered"]), (&"paused".into(), &1.into()));
    let newcomer = scene.worker("w2", &[]).await;
    newcomer.says("the fleet is paused").await;
    scene.submit("call: baton.noop", 3).await;
    // Long enough for the head rule and a query.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!((scene.count("place = 0").await, scene.count("place = 1").await), (3, 1), "held processes advance");
    scene.baton(&["play", "--fleet"]).await.ok();
    becomes(&scene, "state = 4", 3).await;
    let history = scene.sql("SELECT what, outcome, by_whom, reason FROM event ORDER BY at").await;
    assert!(history.starts_with("pause fleet|applied|tester@"), "{history}");
    scene.baton(&["kill", "--all", "--yes", "--wait"]).await.ok();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn without_any_worker_everything_but_running_works() {
    let scene = Scene::new().await;
    let mut worker = scene.worker("w1", &["--slots", "3"]).await;
    let counting = scene.submit("{call: baton.count, with: {advances: 1000000, every: 1h, stay: true}}", 3).await;
    becomes(&scene, "place = 1", 3).await;
    assert!(worker.terminate().await.success());
    let pid = counting[0].as_str();
    for (verb, outcome) in [("pause", "paused"), ("pause", "already_paused"), ("play", "playing"), ("kill", "killed")] {
        let output = scene.baton(&[verb, pid, "--wait", "-o", "json"]).await.ok().json();
        assert_eq!(output[0]["outcome"], outcome, "{output}");
    }
    assert_eq!(scene.baton(&["kill", pid, "-o", "json"]).await.exits(5).json()[0]["outcome"], "killed");
    let many = scene.baton(&["kill", "--all", "--yes", "--wait", "-o", "json"]).await.ok().json();
    assert_eq!((&many["selected"], &many["applied_in_database"]), (&2.into(), &2.into()));
    assert_eq!(scene.count("state = 6").await, 3);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_a_dead_worker_holds_obeys_although_no_other_worker_is_there() {
    let scene = Scene::new().await;
    let mut worker = scene.worker("w1", &[]).await;
    let counting = scene.submit("{call: baton.count, with: {advances: 1000000, every: 1h, stay: true}}", 2).await;
    becomes(&scene, "place = 1", 2).await;
    worker.kill();
    let paused = scene.baton(&["pause", &counting[0], "--wait", "-o", "json"]).await.ok().json();
    assert_eq!(paused[0]["outcome"], "paused");
    assert_eq!(scene.show(&counting[0]).await["attempts"][0]["how"], "lost");
    let killed = scene.baton(&["kill", "--all", "--yes", "--wait", "-o", "json"]).await.ok().json();
    assert_eq!((&killed["selected"], &killed["pending"]), (&2.into(), &0.into()));
    assert_eq!(scene.count("state = 6").await, 2);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn force_ends_what_a_frozen_worker_holds_and_nothing_of_it_is_left() {
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &[]).await;
    let mark = format!("mark-{}", uuid::Uuid::new_v4());
    let script = format!("{{script: \"exec sleep 1000\", vars: {{MARK: {mark}}}}}");
    let pid = scene.submit(&script, 1).await.remove(0);
    eventually("the program runs", Duration::from_secs(10), async || {
        let n_running = processes_in_environment(&mark).len();
        if n_running > 0 { Ok(()) } else { Err(n_running) }
    })
    .await;
    worker.freeze();
    let output = scene.baton(&["kill", &pid, "--force", "-o", "json"]).await.ok().json();
    assert_eq!(output[0]["outcome"], "killed");
    let shown = scene.show(&pid).await;
    assert_eq!((&shown["state"], &shown["attempts"][0]["how"]), (&"killed".into(), &"killed".into()));
    eventually("the program is gone, although no notification was possible", Duration::from_secs(30), async || {
        let running = processes_in_environment(&mark);
        if running.is_empty() { Ok(()) } else { Err(running) }
    })
    .await;
    worker.thaw();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_kill_leaves_nothing_not_even_of_what_hides_nor_its_lock() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let mark = format!("mark-{}", uuid::Uuid::new_v4());
    let lock = scene.path("lock");
    // Forks, leaves its session, closes its pipes, ignores TERM, and holds a lock on a file.
    let hide = format!(
        "exec 9>{lock}; flock 9; setsid sh -c 'trap \\\"\\\" TERM; exec >/dev/null 2>&1 </dev/null; while :; do sleep 1; done' & \
         setsid -f sh -c 'trap \\\"\\\" TERM HUP; while :; do sleep 1; done' >/dev/null 2>&1 </dev/null; echo hidden; wait",
        lock = lock.display()
    );
    let spec = format!("{{script: \"{hide}\", vars: {{MARK: {mark}}}}}");
    let pid = scene.submit(&spec, 1).await.remove(0);
    eventually("the program is detached", Duration::from_secs(10), async || {
        let status = scene.baton(&["status", &pid, "-o", "json"]).await.ok().json();
        let line = status[0]["live"]["last_line"].clone();
        if line == "hidden" { Ok(()) } else { Err(status) }
    })
    .await;
    assert!(processes_in_environment(&mark).len() >= 3, "{:?}", processes_in_environment(&mark));
    scene.baton(&["kill", &pid, "--wait"]).await.ok();
    assert_eq!(processes_in_environment(&mark), Vec::<u32>::new());
    let locked = tokio::process::Command::new("flock").args(["-n", lock.to_str().unwrap(), "true"]).status().await;
    assert!(locked.unwrap().success(), "a process holds the lock");
}
