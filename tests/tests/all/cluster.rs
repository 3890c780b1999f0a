//! A broker of three nodes, with one node killed or isolated; dead hosts; messages that the broker drops.

use std::collections::BTreeSet;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use baton_tests::witness::Witness;
use serde_json::Value;

const PROCESSES: u32 = 500;
const ADVANCES: u64 = 12;
const QUEUE: &str = "baton.task.default";

/// Queued work is taken within this time, whatever happens to one node.
const GOES_ON: Duration = Duration::from_secs(10);

/// The node, counted from 1, that leads a queue, according to another node.
async fn leader(scene: &Scene, seen_from: usize, queue: &str) -> usize {
    eventually("the queue has a leader", Duration::from_secs(20), async || {
        let queue = scene.queue_at(seen_from, queue).await;
        let leader = queue["leader"].as_str().unwrap_or_default().to_owned();
        let node = scene.broker_urls().iter().position(|url| {
            let port = url.split([':', '/']).rev().nth(1).expect("a port");
            leader == format!("baton-test-{port}@localhost")
        });
        node.map(|idx| idx + 1).ok_or(queue)
    })
    .await
}

/// Waits until this many more processes are in their first attempt.
async fn are_taken(scene: &Scene, more: u64) {
    let before = scene.count("epoch > 0").await;
    eventually("queued processes are taken", GOES_ON, async || {
        let now = scene.count("epoch > 0").await;
        if now >= before + more { Ok(()) } else { Err((before, now)) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_killed_leader_and_a_node_that_is_cut_off_cost_only_time() {
    let scene = Scene::cluster().await;
    let urls = scene.broker_urls();
    // Each worker connects to a different node first.
    let mut workers = Vec::new();
    for (idx, name) in ["w1", "w2", "w3"].into_iter().enumerate() {
        let hosts = [&urls[idx..], &urls[..idx]].concat().join(",");
        workers.push(scene.worker(name, &["--slots", "12", "--broker-url", &hosts]).await);
    }
    scene.consumed_by(QUEUE, 3).await;
    let spec = format!(
        "{{call: baton.count, with: {{advances: {ADVANCES}, every: 250ms, witness: {}}}}}",
        scene.path("witness").display()
    );
    let pids = scene.submit(&spec, PROCESSES).await;
    are_taken(&scene, 20).await;

    let killed = leader(&scene, 1, QUEUE).await;
    tokio::task::block_in_place(|| scene.services().kill_node(killed));
    are_taken(&scene, 20).await;
    tokio::task::block_in_place(|| scene.services().start_node(killed));

    // It comes back as a follower; the next victim is the current leader.
    let cut_off = leader(&scene, killed, QUEUE).await;
    assert_ne!(cut_off, killed, "a restarted node is a follower");
    let host = urls[cut_off - 1].rsplit('@').next().and_then(|rest| rest.split('/').next()).unwrap();
    let leavings = || workers.iter().map(|worker| worker.log().matches(host).count()).sum::<usize>();
    let n_left = leavings();
    tokio::task::block_in_place(|| scene.services().split_node(cut_off));
    are_taken(&scene, 20).await;
    let moved = eventually("every worker consumes at the other nodes", Duration::from_secs(40), async || {
        let consumers = scene.queue_at(killed, QUEUE).await["consumers"].clone();
        if consumers == 3 { Ok(()) } else { Err(consumers) }
    });
    // A submit that reaches only the isolated node is as durable as one without a broker.
    let late = scene.spec("late.yaml", "call: baton.noop").display().to_string();
    let late = ["--broker-url", &urls[cut_off - 1], "submit", &late, "--count", "20"];
    let ((), submitted) = tokio::join!(moved, scene.baton(&late));
    submitted.ok();
    assert!(leavings() > n_left, "no connection left the isolated node");

    let all = format!("3|4|{}", PROCESSES + 20);
    eventually("all have finished", Duration::from_secs(60), async || {
        let rest = scene.sql("SELECT place, state, count(*) FROM process GROUP BY 1, 2").await;
        if rest.trim() == all { Ok(()) } else { Err(rest) }
    })
    .await;
    Witness::read(&scene.path("witness")).check(&pids, ADVANCES, &BTreeSet::new());
    assert_eq!(History::read(&scene, vec![]).await.violations(), Vec::<String>::new());
    let attempts = scene.sql("SELECT how, count(*), max(epoch) FROM attempt GROUP BY 1").await;
    assert_eq!(attempts.trim(), format!("ok|{}|1", PROCESSES + 20), "a process had more than one lease");
    for worker in &mut workers {
        assert!(!worker.log().contains("declared gone"), "{}", worker.log());
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn hosts_that_are_dead_or_silent_are_passed_over_and_named() {
    let scene = Scene::new().await;
    let good = scene.broker_url();
    let silent = Proxy::start(&good).await;
    silent.set(Fault::Blackhole);
    let closed = Proxy::start(&good).await;
    let dead = closed.through(&good).replace("guest:guest", "guest:s3cret");
    drop(closed);
    let hosts = format!("{dead},{},{good}", silent.through(&good));
    let mut worker = scene.worker("w1", &["--broker-url", &hosts]).await;
    scene.consumed_by(QUEUE, 1).await;
    let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    let variables = [("BATON_BROKER_URL", hosts.as_str())];
    // Whether the command reaches the good host before its timeout depends on the machine; its success does not.
    scene.baton_in(scene.folder(), &variables, &["submit", &spec, "--wait", "--timeout", "60s"]).await.ok();

    let doctor = scene.baton_in(scene.folder(), &variables, &["doctor", "-o", "json"]).await.ok();
    let findings = doctor.json();
    let brokers: Vec<&Value> =
        findings.as_array().unwrap().iter().filter(|finding| finding["what"] == "broker").collect();
    let verdicts: Vec<&Value> = brokers.iter().map(|finding| &finding["verdict"]).collect();
    assert_eq!(verdicts, ["warn", "warn", "ok"], "{findings}");
    for (finding, url) in brokers.iter().zip([&dead, &silent.through(&good), &good]) {
        let host = url.rsplit('@').next().and_then(|rest| rest.split('/').next()).unwrap();
        assert!(finding["text"].as_str().unwrap().contains(host), "{host} is not in {finding}");
    }
    let none = [("BATON_BROKER_URL", dead.as_str())];
    let alone = scene.baton_in(scene.folder(), &none, &["doctor", "-o", "json"]).await.exits(7);
    for text in [&doctor.stdout, &alone.stdout, &worker.log()] {
        assert!(!text.contains("s3cret"), "{text}");
    }
    assert!(worker.terminate().await.success());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_the_delivery_limit_drops_is_told_again() {
    const LIMIT: u32 = 3;
    let scene = Scene::new().await;
    scene.policy("^baton[.]task[.]", &format!(r#"{{"delivery-limit": {LIMIT}}}"#)).await;
    let proxy = Proxy::start(&scene.broker_url()).await;
    // Its only slot is taken: deliveries to this worker stay there until they are given back or the connection is cut.
    let mut worker = scene.worker("w1", &["--slots", "1", "--broker-url", &proxy.through(&scene.broker_url())]).await;
    let holder = scene.submit("{call: baton.count, with: {advances: 100000, every: 100ms}}", 1).await.remove(0);
    eventually("the slot is taken", Duration::from_secs(20), async || {
        let n_held = scene.count("place = 1").await;
        if n_held == 1 { Ok(()) } else { Err(n_held) }
    })
    .await;
    let noops = scene.submit("call: baton.noop", 5).await;
    let mut n_delivered = 0;
    eventually("the broker has dropped a message", Duration::from_secs(60), async || {
        let queue = scene.queue_at(1, QUEUE).await;
        if queue["messages"].as_u64().is_some_and(|n_messages| n_messages < noops.len() as u64) {
            return Ok(());
        }
        let now = queue["message_stats"]["deliver_get"].as_u64().unwrap_or(0);
        if now > n_delivered {
            n_delivered = now;
            proxy.reset();
        }
        Err(queue)
    })
    .await;
    assert_eq!(scene.count("place = 0").await, noops.len() as u64, "all of them wait");
    scene.baton(&["kill", &holder]).await.ok();
    eventually("all have finished", Duration::from_secs(60), async || {
        let n_finished = scene.count("place = 3 AND state = 4 AND epoch = 1").await;
        if n_finished == noops.len() as u64 { Ok(()) } else { Err(n_finished) }
    })
    .await;
    assert!(worker.terminate().await.success());
}
