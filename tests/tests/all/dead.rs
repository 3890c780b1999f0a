//! `baton dead`: dead letters are inspected, replayed once the cause is fixed, or deleted.

use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::clean_environment;
use baton_tests::scene::{Scene, output};
use baton_tests::services::programs;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use tokio::process::Command;

fn new_pid() -> String {
    baton_common::id::Pid::generate().to_string()
}

async fn dead(scene: &Scene) -> Vec<Value> {
    scene.baton(&["dead", "list", "-o", "json"]).await.ok().json().as_array().unwrap().clone()
}

/// Waits until exactly one dead letter exists that satisfies the probe.
async fn one_dead(scene: &Scene, what: &str, probe: impl Fn(&Value) -> bool) -> Value {
    eventually(what, Duration::from_secs(20), async || {
        let letters = dead(scene).await;
        if letters.len() == 1 && probe(&letters[0]) { Ok(letters[0].clone()) } else { Err(letters) }
    })
    .await
}

fn from(origin: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("x-baton-origin".into(), AMQPValue::LongString(origin.into()));
    BasicProperties::default().with_headers(headers)
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_dead_letter_is_shown_with_its_reason_and_replayed_once_its_cause_is_mended() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let amqp = scene.amqp().await;
    // The queue exists once a process was submitted to it, or a worker serves it.
    scene.submit("call: baton.noop", 1).await;
    let pid = new_pid();
    amqp.publish_json("baton.task", "default", &json!({"version": 1, "type": "continue", "pid": pid})).await;
    let letter = one_dead(&scene, "the continue is dead", |_| true).await;
    assert_eq!((&letter["type"], &letter["pid"]), (&"continue".into(), &pid.as_str().into()));
    assert_eq!(letter["origin"], "baton.task.default");
    assert!(letter["reason"].as_str().unwrap().contains("no such process"), "{letter}");
    let id = letter["id"].as_str().unwrap();
    let table = scene.baton(&["dead", "list"]).await.ok().stdout;
    assert!(table.contains(id) && table.contains(&pid) && table.ends_with("1 of 1 dead letters\n"), "{table}");
    let show = scene.baton(&["dead", "show", id, "-o", "json"]).await.ok().json();
    assert_eq!((&show[0]["body"]["pid"], &show[0]["body_encoding"]), (&pid.as_str().into(), &"json".into()));
    assert_eq!(show[0]["properties"]["content_type"], "application/json");
    assert_eq!(show[0]["headers"]["x-baton-dead-id"], id);
    assert!(scene.baton(&["dead", "show", id]).await.ok().stdout.contains("x-baton-reason"));

    // The cause is not fixed yet, so it comes back as another letter.
    let replay = scene.baton(&["dead", "replay", id]).await.ok().stdout;
    assert_eq!(replay, format!("{id}  replayed to baton.task.default\n"));
    let again = one_dead(&scene, "it comes back", |letter| letter["id"] != id).await;
    let again = again["id"].as_str().unwrap();

    let spec = json!({"call": "baton.noop", "hold": true});
    amqp.publish_json("baton.task", "default", &json!({"version": 1, "type": "launch", "pid": pid, "spec": spec}))
        .await;
    eventually("the process exists", Duration::from_secs(20), async || {
        let show = scene.baton(&["show", &pid]).await;
        if show.code == 0 { Ok(()) } else { Err(show) }
    })
    .await;
    scene.baton(&["dead", "replay", again]).await.ok();
    scene.baton(&["play", &pid]).await.ok();
    scene.baton(&["watch", &pid, "--timeout", "30s"]).await.ok();
    assert_eq!(scene.show(&pid).await["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(dead(&scene).await, Vec::<Value>::new());
    scene.baton(&["dead", "replay", again]).await.exits(3);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_launch_that_is_replayed_again_and_again_runs_once() {
    let scene = Scene::new().await;
    let _workers = [scene.worker("w1", &[]).await, scene.worker("w2", &[]).await];
    let amqp = scene.amqp().await;
    let (pid, witness) = (new_pid(), scene.path("witness"));
    let with = json!({"advances": 3, "every": "200ms", "witness": witness});
    let launch = json!({"version": 1, "type": "launch", "pid": pid, "spec": {"call": "baton.count", "with": with}});
    let bury = async || amqp.publish("", "baton.dead", launch.to_string().as_bytes(), from("baton.task.default")).await;
    // `dead list` declares the queue. A worker that has just started may not have declared it yet, and the broker
    // confirms unroutable messages.
    assert_eq!(dead(&scene).await, Vec::<Value>::new());
    // Two copies, as after a crash between publish and acknowledgement. They are one letter.
    bury().await;
    bury().await;
    let ids = scene.baton(&["dead", "list", "-o", "ids"]).await.ok().stdout;
    let ids: Vec<&str> = ids.lines().collect();
    assert!(ids.len() == 2 && ids[0] == ids[1], "{ids:?}");
    assert_eq!(scene.baton(&["dead", "replay", ids[0]]).await.ok().stdout.lines().count(), 2);
    scene.baton(&["dead", "replay", ids[0]]).await.exits(3);
    eventually("it runs", Duration::from_secs(20), async || {
        let show = scene.baton(&["show", &pid]).await;
        if show.code == 0 { Ok(()) } else { Err(show) }
    })
    .await;
    bury().await;
    scene.baton(&["dead", "replay", "--all"]).await.ok();
    scene.baton(&["watch", &pid, "--timeout", "30s"]).await.ok();
    bury().await;
    assert_eq!(scene.baton(&["dead", "replay", "--all", "-o", "ids"]).await.ok().stdout.trim(), ids[0]);
    eventually("all are consumed", Duration::from_secs(20), async || {
        let depth = amqp.depth("baton.task.default").await;
        if depth == 0 { Ok(()) } else { Err(depth) }
    })
    .await;
    assert_eq!(scene.show(&pid).await["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(std::fs::read_to_string(&witness).unwrap().lines().count(), 3);
    assert_eq!(dead(&scene).await, Vec::<Value>::new());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn letters_are_dropped_by_those_who_mean_it_and_what_is_refused_is_kept() {
    let scene = Scene::new().await;
    // No command needs the database.
    let run = async |arguments: &[&str]| {
        let nowhere = ("BATON_DATABASE_URL", "postgres://u:s3cret@127.0.0.1:9/x");
        scene.baton_in(scene.folder(), &[nowhere], arguments).await
    };
    assert_eq!(run(&["dead", "list", "-o", "json"]).await.ok().json(), json!([]));
    let amqp = scene.amqp().await;
    for n in 0..3 {
        amqp.publish("", "baton.dead", format!("letter {n}").as_bytes(), from("baton.worker.gone.1")).await;
    }
    let ids = run(&["dead", "list", "-o", "ids", "-n", "0"]).await.ok().stdout;
    let ids: Vec<&str> = ids.lines().collect();
    assert_eq!(ids.len(), 3);
    let (one, two) = (ids[0], ids[1]);
    assert!(run(&["dead", "list", "-n", "2"]).await.ok().stdout.ends_with("2 of 3 dead letters\n"));
    let replay = run(&["dead", "replay", "--all"]).await.exits(5).stdout;
    assert!(replay.contains("queue baton.worker.gone.1 does not accept it: it does not exist"), "{replay}");
    let absent = "01940000-0000-7000-8000-000000000000";
    let drop = run(&["dead", "drop", one, absent]).await.exits(9).stdout;
    assert!(drop.contains(&format!("{one}  dropped")) && drop.contains(&format!("{absent}  no such dead letter")));
    run(&["dead", "show", absent]).await.exits(3);
    run(&["dead", "show", absent, two]).await.exits(9);
    run(&["dead", "show", "42"]).await.exits(2);
    run(&["dead", "drop"]).await.exits(2);
    run(&["dead", "drop", "--all", two]).await.exits(2);
    let refused = run(&["dead", "drop", "--all"]).await.exits(4);
    assert!(refused.stderr.contains("--yes"), "{refused:?}");
    let none = scene.baton_in(scene.folder(), &[("BATON_BROKER_URL", "")], &["dead", "list"]).await.exits(2);
    assert!(none.stderr.starts_with("error: no broker is configured"), "{none:?}");
    let nowhere = ("BATON_BROKER_URL", "amqp://u:s3cret@127.0.0.1:9/x");
    let unreachable = scene.baton_in(scene.folder(), &[nowhere], &["dead", "list"]).await.exits(7);
    assert!(!unreachable.stderr.contains("s3cret"), "{unreachable:?}");
    assert_eq!(dead(&scene).await.len(), 2);
    run(&["dead", "drop", "--all", "--yes"]).await.ok();
    assert_eq!(dead(&scene).await, Vec::<Value>::new());

    amqp.publish("", "baton.dead", b"the last", BasicProperties::default()).await;
    let mut pipe = Command::new("bash");
    clean_environment(&mut pipe);
    pipe.args(["-euo", "pipefail", "-c", r#""$0" dead list -o ids | "$0" dead drop -; "$0" dead drop - </dev/null"#])
        .arg(programs().join("baton"))
        .env("BATON_BROKER_URL", scene.broker_url());
    assert_eq!(output(pipe).await.ok().stdout.lines().count(), 1);
    assert_eq!(dead(&scene).await, Vec::<Value>::new());
}

/// A message id that is not UTF-8; AMQP libraries usually refuse to send it.
const UNREADABLE: &str = r#"
import sys, pika
connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
connection.channel().basic_publish("", "baton.dead", b"first", pika.BasicProperties(message_id=b"\xff"))
connection.close()
"#;

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_letter_that_cannot_be_read_is_taken_away_by_the_broker_and_costs_no_other() {
    let scene = Scene::new().await;
    assert_eq!(dead(&scene).await, Vec::<Value>::new());
    let mut python = Command::new("/usr/bin/python3");
    python.arg("-c").arg(UNREADABLE).arg(scene.broker_url());
    output(python).await.ok();
    scene.amqp().await.publish("", "baton.dead", b"second", BasicProperties::default()).await;
    let refused = scene.baton(&["dead", "list"]).await.exits(1);
    assert!(refused.stderr.contains("not UTF-8") && refused.stderr.contains("management UI"), "{refused:?}");
    let vhost = scene.queues().await[0]["vhost"].as_str().unwrap().to_owned();
    let take = r#"{"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"}"#;
    eventually("the broker removes it", Duration::from_secs(20), async || {
        let taken = scene.manage("POST", &format!("queues/{vhost}/baton.dead/get"), take).await;
        if taken.contains("first") { Ok(()) } else { Err(taken) }
    })
    .await;
    assert_eq!(dead(&scene).await.len(), 1);
}
