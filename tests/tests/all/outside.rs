//! Foreign messages on the broker: plain AMQP clients, copies, and messages that nothing can use.

use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::scene::{Scene, output};
use lapin::BasicProperties;
use serde_json::json;
use tokio::process::Command;

fn new_pid() -> String {
    baton_common::id::Pid::generate().to_string()
}

async fn ends(scene: &Scene, pid: &str, state: &str) {
    eventually(&format!("{pid} is {state}"), Duration::from_secs(30), async || {
        let row = scene.baton(&["show", pid, "-o", "json"]).await;
        if row.code == 0 && row.json()[0]["state"] == state { Ok(()) } else { Err(row) }
    })
    .await;
}

const LAUNCH: &str = r#"
import json, sys, pika
url, pid = sys.argv[1:3]
connection = pika.BlockingConnection(pika.URLParameters(url))
message = {"version": 1, "type": "launch", "pid": pid, "spec": {"name": "from-python", "run": ["true"]}}
properties = pika.BasicProperties(content_type="application/json", delivery_mode=2)
connection.channel().basic_publish("baton.task", "default", json.dumps(message), properties)
connection.close()
"#;

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_python_script_launches_a_process_with_one_message() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let pid = new_pid();
    let script = scene.spec("launch.py", LAUNCH);
    eventually("the exchange exists", Duration::from_secs(20), async || {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(&script).arg(scene.broker_url()).arg(&pid);
        let output = output(command).await;
        if output.code == 0 && scene.baton(&["show", &pid]).await.code == 0 { Ok(()) } else { Err(output) }
    })
    .await;
    ends(&scene, &pid, "finished").await;
    let show = scene.show(&pid).await;
    assert_eq!((&show["name"], &show["exit"]), (&"from-python".into(), &0.into()));
}

const UNREADABLE: &str = r#"
import sys, pika
connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
# A quorum queue need not get what a channel that closes has published without confirms.
channel.confirm_delivery()
for exchange, key in [("baton.task", "default"), ("baton.task", "default"), ("baton.broadcast", "")]:
    channel.basic_publish(exchange, key, b"{}", pika.BasicProperties(message_id=b"\xff\xfe", delivery_mode=2))
sys.setrecursionlimit(20000)
for exchange, key in [("baton.task", "default"), ("baton.broadcast", "")]:
    nested = []
    for _ in range(4000):
        nested = [nested]
    properties = pika.BasicProperties(headers={"deep": nested}, delivery_mode=2)
    channel.basic_publish(exchange, key, b"{}", properties)
connection.close()
"#;

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn messages_that_the_library_cannot_read_go_to_the_dead_letters_and_stop_nobody() {
    let scene = Scene::new().await;
    let mut workers = [scene.worker("w1", &[]).await, scene.worker("w2", &[]).await];
    scene.submit("call: baton.noop", 1).await;
    let script = scene.spec("unreadable.py", UNREADABLE);
    let mut command = Command::new("/usr/bin/python3");
    command.arg(&script).arg(scene.broker_url());
    output(command).await.ok();
    scene.submit("call: baton.noop", 50).await;
    eventually("all have finished", Duration::from_secs(30), async || {
        let n_finished = scene.count("state = 4").await;
        if n_finished == 51 { Ok(()) } else { Err(n_finished) }
    })
    .await;
    let amqp = scene.amqp().await;
    eventually("each is dead-lettered once", Duration::from_secs(30), async || {
        let tasks = amqp.depth("baton.task.default").await;
        let depths = (amqp.depth("baton.dead").await, tasks, amqp.depth("baton.control").await);
        if depths == (5, 0, 0) { Ok(()) } else { Err(depths) }
    })
    .await;
    let letters = scene.baton(&["dead", "list", "-o", "json"]).await.ok().json();
    for letter in letters.as_array().unwrap() {
        assert!(letter["reason"].as_str().unwrap().contains("not UTF-8"), "{letters}");
    }
    for worker in &mut workers {
        assert!(worker.terminate().await.success());
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn execute_is_answered_when_accepted_and_when_ended() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let amqp = scene.amqp().await;
    scene.submit("call: baton.noop", 1).await;
    let pid = new_pid();
    let spec = json!({"call": "baton.count", "with": {"advances": 3, "every": "1100ms"}});
    let launch = json!({"version": 1, "type": "launch", "pid": pid, "spec": spec, "wait": true});
    let replies = amqp.request("baton.task", "default", &launch, 2).await;
    assert_eq!(replies[0], json!({"pid": pid, "accepted": true}));
    assert_eq!(replies[1], json!({"pid": pid, "state": "finished", "exit": 0, "values": {"advances": 3}}));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_hundred_copies_of_a_launch_and_of_a_continue_are_one_attempt() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let mut workers = Vec::new();
    for name in ["w1", "w2", "w3", "w4"] {
        workers.push(scene.worker(name, &[]).await);
    }
    let amqp = scene.amqp().await;
    let witness = scene.path("witness");
    let with = json!({"advances": 3, "every": "200ms", "witness": witness});
    let pid = new_pid();
    let launch = json!({"version": 1, "type": "launch", "pid": pid, "spec": {"call": "baton.count", "with": with}});
    scene.submit("call: baton.noop", 1).await;
    for _ in 0..100 {
        amqp.publish_json("baton.task", "default", &launch).await;
    }
    ends(&scene, &pid, "finished").await;
    for _ in 0..100 {
        amqp.publish_json("baton.task", "default", &json!({"version": 1, "type": "continue", "pid": pid})).await;
    }
    eventually("all are consumed", Duration::from_secs(20), async || {
        let depth = amqp.depth("baton.task.default").await;
        if depth == 0 { Ok(()) } else { Err(depth) }
    })
    .await;
    assert_eq!(scene.show(&pid).await["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(std::fs::read_to_string(&witness).unwrap().lines().count(), 3);
    assert_eq!(amqp.depth("baton.dead").await, 0);
    History::read(&scene, vec![]).await.accepting(&[pid]).check();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_launch_is_acknowledged_only_once_it_is_in_the_database() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let mut worker = scene.worker("w1", &[]).await;
    // The queue exists once a process was submitted to it.
    let before = scene.submit("call: baton.noop", 1).await.remove(0);
    ends(&scene, &before, "finished").await;
    let lock = "BEGIN; LOCK TABLE spec IN SHARE ROW EXCLUSIVE MODE; SELECT pg_sleep(3600)";
    let mut locking =
        Command::new("psql").args([&scene.database_url(), "-c", lock]).kill_on_drop(true).spawn().unwrap();
    let locks = async |which: &str| {
        let held = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = current_schema AND c.relname = 'spec'";
        scene.sql(&format!("{held} AND {which}")).await.trim() != "0"
    };
    eventually("nobody can insert", Duration::from_secs(20), async || {
        if locks("mode = 'ShareRowExclusiveLock' AND granted").await { Ok(()) } else { Err("not locked") }
    })
    .await;
    let pid = new_pid();
    let launch = json!({"version": 1, "type": "launch", "pid": pid, "spec": {"call": "baton.noop"}});
    scene.amqp().await.publish_json("baton.task", "default", &launch).await;
    eventually("the worker waits for the database", Duration::from_secs(20), async || {
        if locks("NOT granted").await { Ok(()) } else { Err("nobody waits") }
    })
    .await;
    worker.kill();
    locking.kill().await.unwrap();
    let ended = scene.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(3600)%'
                           AND pid <> pg_backend_pid()",
    );
    ended.await;
    let _next = scene.worker("w2", &[]).await;
    ends(&scene, &pid, "finished").await;
    History::read(&scene, vec![]).await.accepting(&[before, pid]).check();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_nobody_can_use_is_in_the_dead_letter_queue_with_the_reason() {
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &[]).await;
    let existing = scene.submit("call: baton.noop", 1).await.remove(0);
    ends(&scene, &existing, "finished").await;
    let amqp = scene.amqp().await;
    let control_queue =
        scene.baton(&["workers", "-o", "json"]).await.ok().json()[0]["control_queue"].as_str().unwrap().to_owned();
    let pid = new_pid();
    let json_launch =
        |spec: serde_json::Value| json!({"version": 1, "type": "launch", "pid": new_pid(), "spec": spec}).to_string();
    let launch_of = |pid: &str| {
        json!({"version": 1, "type": "launch", "pid": pid, "spec": {"run": ["true"]}}).to_string().into_bytes()
    };
    let cases: Vec<(&str, Option<&str>, Vec<u8>, &str)> = vec![
        ("json", None, b"not json".to_vec(), "malformed JSON"),
        ("msgpack", None, b"\xc1\xff\x00".to_vec(), "malformed MessagePack"),
        ("msgpack", None, b"".to_vec(), "malformed MessagePack"),
        ("msgpack", None, vec![0xdf, 0xff, 0xff, 0xff, 0xff], "malformed MessagePack"),
        ("json", None, vec![b'['; 50_000], "malformed JSON"),
        ("json", None, br#"{"version": 9, "type": "launch"}"#.to_vec(), "version 9 is newer"),
        ("json", None, br#"{"version": 1, "type": "dance"}"#.to_vec(), "unknown type"),
        ("json", None, br#"{"version": 1, "type": "launch", "pid": 7}"#.to_vec(), "malformed JSON"),
        ("json", None, br#"{"version": 1, "type": "launch", "spec": {}}"#.to_vec(), "`pid` is missing"),
        (
            "json",
            None,
            format!(r#"{{"version": 1, "type": "continue", "pid": "{pid}"}}"#).into_bytes(),
            "no such process",
        ),
        ("json", None, json_launch(json!({"rnu": ["true"]})).into_bytes(), "rnu"),
        ("json", None, json_launch(json!({"run": ["true"], "env": "x"})).into_bytes(), "not supported by this version"),
        (
            "json",
            None,
            format!(
                r#"{{"version": 1, "type": "launch", "pid": "{pid}", "spec": {{"run": ["true"], "run": ["false"]}}}}"#
            )
            .into_bytes(),
            "duplicate key `run`",
        ),
        (
            "json",
            None,
            json_launch(json!({"run": ["true"], "at": "cluster", "in": ["client://a"]})).into_bytes(),
            "the sender of a message has no folder",
        ),
        ("json", None, json_launch(json!({"run": ["true"], "labels": {"a": "b\0"}})).into_bytes(), "NUL byte"),
        ("json", None, json_launch(json!({"run": ["true"], "labels": {"a\0": "b"}})).into_bytes(), "NUL byte"),
        ("json", None, json_launch(json!({"run": ["true"], "name": "a\0"})).into_bytes(), "must be one line of"),
        ("json", None, launch_of("6ba7b810-9dad-41d1-80b4-00c04fd430c9"), "UUID of version 7"),
        ("json", None, launch_of("00000000-0000-0000-0000-000000000000"), "UUID of version 7"),
        ("json", None, launch_of("ffffffff-ffff-7000-8000-000000000000"), "made in the future"),
        ("json", None, b"[1, \"launch\"]".to_vec(), "malformed JSON"),
        (
            "json",
            None,
            json!({"version": 1, "type": "launch", "pid": existing, "spec": {"run": ["false"]}})
                .to_string()
                .into_bytes(),
            "another spec",
        ),
        ("json", Some(&control_queue), b"{".to_vec(), "malformed JSON"),
    ];
    for (encoding, queue, body, reason) in cases {
        let properties = BasicProperties::default().with_content_type(format!("application/{encoding}").into());
        match queue {
            None => amqp.publish("baton.task", "default", &body, properties).await,
            Some(queue) => amqp.publish("", queue, &body, properties).await,
        }
        let (dead, why) = eventually(&format!("dead because of {reason}"), Duration::from_secs(20), async || {
            amqp.get("baton.dead", "x-baton-reason").await.ok_or("nothing in baton.dead")
        })
        .await;
        assert_eq!(dead, body);
        let why = why.unwrap_or_default();
        assert!(why.contains(reason), "{reason}: {why}");
    }
    let after = scene.submit("call: baton.noop", 1).await.remove(0);
    ends(&scene, &after, "finished").await;
    assert_eq!(worker.log().matches("worker ready").count(), 1);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_person_pauses_and_plays_the_fleet_by_a_json_message() {
    let scene = Scene::new().await;
    let _workers = [scene.worker("w1", &[]).await, scene.worker("w2", &[]).await];
    let amqp = scene.amqp().await;
    scene.submit("{call: baton.count, with: {advances: 100000, every: 50ms}}", 20).await;
    scene.submit("{call: baton.sleep, with: {for: 1h}}", 20).await;
    let running = "state = 1 AND place = 1";
    let becomes = async |condition: &str, count: u64| {
        eventually(condition, Duration::from_secs(20), async || {
            let now = scene.count(condition).await;
            if now == count { Ok(()) } else { Err(now) }
        })
        .await;
    };
    becomes(running, 20).await;
    becomes("state = 2", 20).await;
    // As the form of the management UI sends it, twice in a row.
    let message = json!({"version": 1, "type": "pause", "select": {}, "reason": "maintenance"}).to_string();
    let form = json!({
        "routing_key": "",
        "payload": message,
        "payload_encoding": "string",
        "properties": {"message_id": "maintenance-1", "content_type": "application/json"},
    });
    for _ in 0..2 {
        scene.publish_by_form("baton.broadcast", &form.to_string()).await;
    }
    becomes("state = 3", 40).await;
    amqp.publish_json("baton.broadcast", "", &json!({"version": 1, "type": "play", "select": {}})).await;
    becomes(running, 20).await;
    becomes("state = 2", 20).await;
    assert_eq!(
        scene.sql("SELECT what, count(*) FROM event WHERE pid IS NULL GROUP BY 1 ORDER BY 1").await.trim(),
        "pause|1\nplay|1"
    );
    amqp.publish_json("baton.broadcast", "", &json!({"version": 1, "type": "kill", "select": {}})).await;
    becomes("state = 6", 40).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_the_database_does_not_store_does_not_come_again_and_again() {
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &[]).await;
    let refuse = |name: &str, code: &str, table: &str, condition: &str| {
        format!(
            "CREATE FUNCTION {name}() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION '{name}' USING ERRCODE = '{code}'; END $$
             LANGUAGE plpgsql;
             CREATE TRIGGER {name} BEFORE INSERT ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION {name}();"
        )
    };
    // The first two values can never be stored; the third is a permission that may be granted later.
    scene.sql(&refuse("no_such_name", "22021", "spec", "NEW.name = 'unstorable'")).await;
    scene.sql(&refuse("no_such_end", "22021", "attempt", "NEW.reason = 'exit 7'")).await;
    scene.sql(&refuse("no_right", "42501", "spec", "NEW.name = 'forbidden'")).await;
    let amqp = scene.amqp().await;
    let launch = |name: &str| {
        let spec = json!({"name": name, "run": ["true"]});
        json!({"version": 1, "type": "launch", "pid": new_pid(), "spec": spec})
    };
    amqp.publish_json("baton.task", "default", &launch("unstorable")).await;
    let (_, why) = eventually("a dead letter exists", Duration::from_secs(20), async || {
        amqp.get("baton.dead", "x-baton-reason").await.ok_or("nothing in baton.dead")
    })
    .await;
    let why = why.unwrap_or_default();
    assert!(why.contains("can never store this: no_such_name"), "{why}");

    let ran = scene.path("ran");
    let spec = json!({"script": format!("echo x >> '{}'; exit 7", ran.display())});
    let pid = scene.submit(&spec.to_string(), 1).await.remove(0);
    ends(&scene, &pid, "excepted").await;
    let reason = scene.show(&pid).await["reason"].to_string();
    assert!(reason.contains("the database can never store what it has written"), "{reason}");
    assert_eq!(std::fs::read_to_string(&ran).unwrap(), "x\n");

    let forbidden = launch("forbidden");
    amqp.publish_json("baton.task", "default", &forbidden).await;
    worker.says("pause_ms=800").await;
    assert!(worker.log().matches("not claimed").count() <= 5, "{}", worker.log());
    scene.sql("DROP TRIGGER no_right ON spec").await;
    ends(&scene, forbidden["pid"].as_str().unwrap(), "finished").await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_broadcast_that_has_lost_its_target_kills_no_process() {
    let scene = Scene::new().await;
    let worker = scene.worker("w1", &[]).await;
    let amqp = scene.amqp().await;
    scene.submit("{call: baton.sleep, with: {for: 1h}, labels: {campaign: si}}", 5).await;
    // Conditions that are present but empty match no process; an invalid selection is a dead letter.
    let empty = [json!({"pids": []}), json!({"labels": {}}), json!({"states": []}), json!({"session": ""})];
    for select in &empty {
        amqp.publish_json("baton.broadcast", "", &json!({"version": 1, "type": "kill", "select": select})).await;
    }
    let unusable = [json!([]), json!(null), json!({"pids": null}), json!({"labels": null, "states": ["waiting"]})];
    for select in &unusable {
        amqp.publish_json("baton.broadcast", "", &json!({"version": 1, "type": "kill", "select": select})).await;
    }
    // Workers are drained one by one.
    let drain = json!({"version": 1, "type": "drain", "select": {"worker": "nobody"}});
    amqp.publish_json("baton.broadcast", "", &drain).await;
    eventually("all of them are recorded or dead letters", Duration::from_secs(20), async || {
        let recorded = scene.sql("SELECT count(*) FROM event WHERE pid IS NULL AND outcome = 'recorded'").await;
        let recorded: usize = recorded.trim().parse().unwrap();
        let n_dead = scene.baton(&["dead", "list", "-o", "ids"]).await.stdout.lines().count();
        // Both copies of the unreadable message: that of the worker and that of `baton.control`.
        if recorded == empty.len() && n_dead > unusable.len() { Ok(()) } else { Err((recorded, n_dead)) }
    })
    .await;
    assert_eq!(scene.count("state = 6").await, 0);
    assert!(!worker.log().contains("drain"), "{}", worker.log());
    for arguments in [
        ["pause", "--fleet", "--label", "campaign=ge"],
        ["pause", "--fleet", "--state", "paused"],
        ["play", "--fleet", "--worker", "nobody"],
    ] {
        assert_eq!(scene.baton(&arguments).await.code, 2, "{arguments:?}");
    }
    assert_eq!(scene.baton(&["pause", "--fleet", "--dry-run"]).await.code, 2);
    // Commands on the command line are piped through `-`: no ids select no processes.
    let baton = |arguments: &'static [&'static str]| scene.baton(arguments);
    assert_eq!(baton(&["kill", "--yes", "--session", ""]).await.code, 0);
    assert_eq!(baton(&["kill", "--yes", "--label", "campaign=si", "--label", "campaign=ge"]).await.code, 2);
    assert_eq!(scene.count("state = 6").await, 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_virtual_host_of_another_database_is_refused_with_the_remedy() {
    let (scene, other) = (Scene::new().await, Scene::new().await);
    let _worker = scene.worker("w1", &[]).await;
    let pid = scene.submit("{call: baton.sleep, with: {for: 1h}}", 1).await.remove(0);
    let theirs = scene.broker_url();
    let mixed = [("BATON_BROKER_URL", theirs.as_str())];
    // A worker of another database does not start there.
    let mut worker = other.worker_with(&mixed, "w2", &[]);
    let ended = worker.ended(Duration::from_secs(30)).await;
    assert_eq!(ended.code(), Some(5), "{}", worker.log());
    assert!(worker.log().contains("belongs to another database"), "{}", worker.log());
    let doctor = other.baton_in(other.folder(), &mixed, &["doctor"]).await.exits(5);
    assert!(doctor.stdout.contains("delete the queue `baton.database`"), "{doctor:?}");
    // A command sends nothing there, either: its request is recorded in its own database.
    let spec = other.spec("noop.yaml", "call: baton.noop").display().to_string();
    let submit = other.baton_in(other.folder(), &mixed, &["submit", &spec]).await;
    assert!(submit.stderr.contains("belongs to another database"), "{submit:?}");
    let kill = other.baton_in(other.folder(), &mixed, &["kill", "--all", "--yes"]).await;
    assert!(kill.stderr.contains("belongs to another database"), "{kill:?}");
    assert_eq!(scene.show(&pid).await["state"], "waiting");
    assert_eq!(scene.amqp().await.get("baton.dead", "x-baton-reason").await, None);
}
