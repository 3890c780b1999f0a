//! A program crashes as if by SIGKILL at each border between a commit, a message, an acknowledgement and an external
//! effect. Another program then completes the work, and nothing that was recorded is done twice.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use baton_common::failpoint;
use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::scene::Scene;

/// Processes with short advances, which stay in memory.
const QUICK: u32 = 10;

/// Processes that are parked between advances.
const SLEEPY: u32 = 4;

/// Local programs.
const PROGRAMS: u32 = 3;

/// SIGABRT, which ends a program at a border.
const ABORTED: i32 = 6;

/// A worker crashes at a border each time it is started, on the given passes; then a worker starts that does not crash.
/// A client has submitted everything before.
async fn worker_crashes(border: &str, passes: &[u32]) {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let witness = scene.path("witness");
    let count = |advances: u32, every: &str| {
        format!("{{call: baton.count, with: {{advances: {advances}, every: {every}, witness: {}}}}}", witness.display())
    };
    let mut pids = scene.submit(&count(6, "20ms"), QUICK).await;
    // Processes that are parked in one commit wake in one. They sleep three times, so that some are woken twice after
    // another worker has died on the first wake-up.
    pids.extend(scene.submit(&count(4, "1100ms"), SLEEPY).await);
    let ran = scene.path("ran");
    pids.extend(scene.submit(&format!("script: 'echo ran >> {}'", ran.display()), PROGRAMS).await);
    for pass in passes {
        if border == "free-committed" {
            let mut dead = scene.worker("dead", &["--slots", "4"]).await;
            // The others may all have ended between the check and the kill.
            let long = scene.submit(&count(50, "100ms"), 1).await.remove(0);
            eventually("the worker holds the long process", Duration::from_secs(20), async || {
                let n_held = scene.count(&format!("id = '{long}' AND place = 1")).await;
                if n_held > 0 { Ok(()) } else { Err(n_held) }
            })
            .await;
            dead.kill();
        }
        let failpoints = format!("{border}={}*off->return", pass - 1);
        let mut worker = scene.worker_with(&[("FAILPOINTS", &failpoints)], "w1", &["--slots", "20"]);
        if border == "letter-published" {
            worker.ready().await;
            scene.amqp().await.publish("baton.task", "default", b"garbage", <_>::default()).await;
        }
        let status = worker.ended(Duration::from_secs(30)).await;
        assert_eq!(status.signal(), Some(ABORTED), "no crash at the border: {status:?}");
    }
    let _last = scene.worker("w1", &["--slots", "20"]).await;
    all_end(&scene).await;
    let history = History::read(&scene, vec![]).await.accepting(&pids);
    history.check();
    assert_eq!(
        history.processes.values().filter(|process| process.state == "finished").count(),
        history.processes.len()
    );
    let n_ran = std::fs::read_to_string(&ran).unwrap().lines().count();
    // A program whose end was not recorded runs again: its external effects happen at least once.
    let n_repeated = if border.starts_with("program-") { passes.len() * PROGRAMS as usize } else { 0 };
    let at_most = PROGRAMS as usize + n_repeated + repeated_holdings(&history);
    assert!((PROGRAMS as usize..=at_most).contains(&n_ran), "{n_ran} programs ran");
}

/// The number of holdings that the death of their worker cut off.
fn repeated_holdings(history: &History) -> usize {
    history.processes.values().flat_map(|process| &process.attempts).filter(|attempt| attempt.how == "lost").count()
}

async fn all_end(scene: &Scene) {
    eventually("all have ended", Duration::from_secs(40), async || {
        let rest = scene.sql("SELECT id, place, state, epoch FROM process WHERE place <> 3").await;
        if rest.is_empty() { Ok(()) } else { Err(rest) }
    })
    .await;
}

/// A CLI command that crashes at a border.
async fn command_crashes(scene: &Scene, border: &str, pass: u32, arguments: &[&str]) {
    let failpoints = format!("{border}={}*off->return", pass - 1);
    let output = scene.baton_in(scene.folder(), &[("FAILPOINTS", &failpoints)], arguments).await;
    // The code -1 stands for an end by a signal.
    assert_eq!((output.code, output.stdout.as_str()), (-1, ""), "no crash at the border: {}", output.stderr);
}

/// `baton submit` crashes: what it has committed runs, and the rest was not accepted. The first page has 100 processes;
/// the size of the others depends on the broker's speed. The broker returns what is published before its queue exists,
/// about the first two pages, and it is published again.
async fn submit_crashes(border: &str, pass: u32, committed: RangeInclusive<u64>) {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    command_crashes(&scene, border, pass, &["submit", &spec, "--count", "2500", "-o", "ids"]).await;
    let n_committed = scene.count("true").await;
    assert!(committed.contains(&n_committed), "{n_committed} committed");
    let _worker = scene.worker("w1", &["--slots", "200"]).await;
    all_end(&scene).await;
    History::read(&scene, vec![]).await.check();
    assert_eq!(scene.count("state = 4 AND epoch = 1").await, n_committed);
}

/// Names the tests, and thereby the borders that are tested.
macro_rules! crashes {
    (worker { $($worker:ident $at:literal $passes:expr;)* } client { $($client:ident $border:literal $body:expr;)* }) => {
        $(
            #[tokio::test]
            #[ignore = "needs services: run tests/run"]
            async fn $worker() {
                worker_crashes($at, &$passes).await;
            }
        )*
        $(
            #[tokio::test]
            #[ignore = "needs services: run tests/run"]
            async fn $client() {
                $body.await;
            }
        )*

        #[test]
        fn every_border_is_tested() {
            let tested: BTreeSet<&str> = [$($at,)* $($border,)*].into_iter().chain(crate::sites::BORDERS.iter().copied()).collect();
            let all: BTreeSet<&str> = failpoint::ALL.iter().map(|(name, _)| *name).collect();
            assert_eq!(tested, all);
        }
    };
}

crashes! {
    worker {
        before_a_claim "task-taken" [1, 5];
        after_a_claim "claim-committed" [1, 3];
        after_answering_a_launch "launch-answered" [1, 7];
        after_an_acknowledgement "acknowledged" [1, 2];
        after_an_effect "advance-made" [1, 20];
        after_a_checkpoint "checkpoint-committed" [1, 4];
        after_a_departure "departure-committed" [1, 4];
        while_a_program_runs "program-started" [1, 2];
        after_the_end_of_a_program "program-ended" [1, 2];
        after_freeing_what_a_dead_worker_held "free-committed" [1];
        after_waking_what_was_due "wake-committed" [1, 2];
        after_a_burial "letter-published" [1];
        after_publishing_a_continue "publish-sent" [1, 3];
        after_the_confirm_of_a_continue "publish-confirmed" [1, 3];
    }
    client {
        before_accepting "submit-begun" submit_crashes("submit-begun", 2, 100..=100);
        after_accepting "submit-committed" submit_crashes("submit-committed", 2, 101..=1100);
        in_the_middle_of_publishing "publish-sent" submit_crashes("publish-sent", 1500, 750..=2500);
        in_the_middle_of_being_confirmed "publish-confirmed" submit_crashes("publish-confirmed", 700, 350..=2500);
        after_a_request_to_one "request-committed" a_request_crashes();
        after_a_page_of_a_request_to_many "request-committed" a_request_to_many_crashes();
    }
}

/// The holder learns of the request at its next heartbeat.
async fn a_request_crashes() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let _worker = scene.worker("w1", &[]).await;
    let pid = scene.submit("{call: baton.count, with: {advances: 100000, every: 50ms}}", 1).await.remove(0);
    for (verb, state) in [("pause", "paused"), ("play", "running"), ("kill", "killed")] {
        eventually("the process exists", Duration::from_secs(20), async || {
            let now = scene.show(&pid).await["state"].clone();
            if verb == "play" || now == "running" { Ok(()) } else { Err(now) }
        })
        .await;
        command_crashes(&scene, "request-committed", 1, &[verb, &pid]).await;
        eventually(state, Duration::from_secs(10), async || {
            let now = scene.show(&pid).await["state"].clone();
            if now == state { Ok(()) } else { Err(now) }
        })
        .await;
    }
    History::read(&scene, vec![]).await.check();
}

/// Committed pages are obeyed, and the same command handles the rest when it is repeated.
async fn a_request_to_many_crashes() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let pids = scene.submit("call: baton.noop", 2500).await;
    command_crashes(&scene, "request-committed", 2, &["pause", "--all"]).await;
    assert_eq!(scene.count("state = 3").await, 2000);
    scene.baton(&["pause", "--all"]).await.ok();
    assert_eq!(scene.count("state = 3").await, 2500);
    scene.baton(&["play", "--all"]).await.ok();
    let _worker = scene.worker("w1", &["--slots", "200"]).await;
    all_end(&scene).await;
    History::read(&scene, vec![]).await.accepting(&pids).check();
}

/// The answers to some commits are lost: the worker repeats them, and learns at its next heartbeats what it holds.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn commits_whose_answers_are_lost_are_found_out() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let failpoints =
        ["claim", "checkpoint", "departure"].map(|commit| format!("{commit}-unanswered=1*return->1*off->1*return"));
    let _worker = scene.worker_with(&[("FAILPOINTS", &failpoints.join(";"))], "w1", &["--slots", "4"]);
    let spec = format!(
        "{{call: baton.count, with: {{advances: 5, every: 20ms, witness: {}}}}}",
        scene.path("witness").display()
    );
    let mut pids = Vec::new();
    for _ in 0..6 {
        pids.extend(scene.submit(&spec, 1).await);
    }
    let since = Instant::now();
    all_end(&scene).await;
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    let history = History::read(&scene, vec![]).await.accepting(&pids);
    history.check();
    let given_back = scene.sql("SELECT count(*) FROM attempt WHERE reason LIKE '%answer to its claim was lost%'").await;
    assert_ne!(given_back.trim(), "0", "no claim lost its answer");
}
