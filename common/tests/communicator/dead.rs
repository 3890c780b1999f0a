//! Dead letters on a real RabbitMQ: inspected, replayed, discarded, and never lost.

use std::collections::{BTreeMap, BTreeSet};

use baton_common::communicator::CheckError;
use baton_common::communicator::dead::{Body, DeadLetters, Error, Kept, Letter, Replayed};
use baton_common::id::{LetterId, Pid};
use baton_common::message::SIZE_BYTES_MAX;
use lapin::BasicProperties;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};

use crate::broker::{Stranger, Vhost, counts, header};
use crate::{eventually, many, receive, slots, start, task};

const DEAD: &str = "baton.dead";

async fn open(vhost: &Vhost) -> DeadLetters {
    DeadLetters::open(vec![vhost.url.clone()]).await.unwrap()
}

/// The ids of all visible letters, which are not kept.
async fn ids(vhost: &Vhost) -> Vec<LetterId> {
    let mut letters = open(vhost).await;
    let mut ids = Vec::new();
    while let Some(letter) = letters.next().await.unwrap() {
        ids.push(letter.id);
    }
    letters.close().await.unwrap();
    ids
}

async fn first(letters: &mut DeadLetters) -> Letter {
    letters.next().await.unwrap().expect("there is a letter")
}

fn long(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    entries.into_iter().map(|(name, value)| (name.into(), value)).collect::<BTreeMap<_, _>>().into()
}

fn from(origin: &str) -> BasicProperties {
    BasicProperties::default().with_headers(table([("x-baton-origin", long(origin))]))
}

/// Another program, which publishes with confirms. `baton.dead` exists.
async fn publisher(vhost: &Vhost) -> Stranger {
    open(vhost).await.close().await.unwrap();
    let stranger = vhost.stranger().await;
    stranger.channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    stranger
}

/// Publishes letters by hand. The body of each is its number.
async fn put(stranger: &Stranger, n_letters: usize, properties: BasicProperties) {
    let mut confirms = Vec::new();
    for n in 0..n_letters {
        let (options, body) = (BasicPublishOptions::default(), n.to_string());
        let publish =
            stranger.channel.basic_publish("".into(), DEAD.into(), options, body.as_bytes(), properties.clone());
        confirms.push(publish.await.unwrap());
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
}

fn number(letter: &Letter) -> i64 {
    match letter.body() {
        Body::Json(value) => value.as_i64().unwrap(),
        body @ (Body::MessagePack(_) | Body::Text(_) | Body::Hex(_)) => panic!("{body:?}"),
    }
}

/// The numbers of the first letters, which are only inspected.
async fn look(vhost: &Vhost, n_letters: usize) -> Vec<i64> {
    let mut letters = open(vhost).await;
    let mut seen = Vec::new();
    while seen.len() < n_letters
        && let Some(letter) = letters.next().await.unwrap()
    {
        seen.push(number(&letter));
    }
    letters.close().await.unwrap();
    seen
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn inspection_keeps_every_letter_and_the_order_with_and_without_the_policy() {
    let all: Vec<i64> = (0..300).collect();
    for policy in [None, Some(r#"{"pattern": "^baton\\.dead$", "definition": {"delivery-limit": 1000000}}"#)] {
        let vhost = Vhost::new();
        assert_eq!(look(&vhost, 1).await, Vec::<i64>::new());
        if let Some(policy) = policy {
            apply(&vhost, policy).await;
        }
        put(&publisher(&vhost).await, 300, from("baton.task.default")).await;
        for _ in 0..3 {
            assert_eq!(look(&vhost, 1000).await, all, "{policy:?}");
        }
        // Without a close, as when the command is killed.
        let mut letters = open(&vhost).await;
        for _ in 0..100 {
            first(&mut letters).await;
        }
        drop(letters);
        for n_looked_at in [1, 40, 100] {
            assert_eq!(look(&vhost, n_looked_at).await.len(), n_looked_at);
        }
        eventually("everything is given back", async || {
            let mut seen = look(&vhost, 1000).await;
            seen.sort_unstable();
            (seen == all, seen)
        })
        .await;
    }
}

/// Applies a policy to `baton.dead`.
async fn apply(vhost: &Vhost, policy: &str) {
    vhost.http("PUT", "policies/{vhost}/dead", Some(policy));
    eventually("the policy applies", async || {
        let queue = vhost.http("GET", "queues/{vhost}/baton.dead", None);
        (queue["policy"] == "dead", queue)
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn repeated_inspection_loses_no_letter_although_the_broker_counts() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    // The default of RabbitMQ 4.
    apply(&vhost, r#"{"pattern": "^baton\\.dead$", "definition": {"delivery-limit": 20}}"#).await;
    let copies = AMQPValue::FieldArray(vec![long("baton.dead")].into());
    let foreign = BasicProperties::default().with_headers(table([("BCC", copies.clone()), ("CC", copies)]));
    put(&stranger, 40, foreign).await;
    let before = ids(&vhost).await;
    assert_eq!(before.len(), 40);
    for _ in 0..40 {
        assert_eq!(ids(&vhost).await.into_iter().collect::<BTreeSet<_>>(), before.iter().copied().collect());
    }
    // Without that protection, the same number of inspections removes all letters.
    for _ in 0..25 {
        let look = vhost.stranger().await;
        while look.channel.basic_get(DEAD.into(), BasicGetOptions::default()).await.unwrap().is_some() {}
        look.channel.close(200, "OK".into()).await.unwrap();
    }
    counts(&vhost, DEAD, 0, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_letter_keeps_its_properties_and_is_replayed_only_to_its_queue() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    worker.consume(vec!["default".into()], slots(4)).await;
    let stranger = vhost.stranger().await;
    let elsewhere = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    stranger.channel.queue_declare("elsewhere".into(), elsewhere, FieldTable::default()).await.unwrap();
    worker.publish("default", many(1).1).await.unwrap();
    task(&mut incoming).await.settle.ack().await;

    let pid = Pid::generate();
    let body = format!(r#"{{"version": 1, "type": "continue", "pid": "{pid}"}}"#);
    let copies = AMQPValue::FieldArray(vec![long("elsewhere")].into());
    let sent = BasicProperties::default()
        .with_type("continue".into())
        .with_message_id("m1".into())
        .with_content_type("application/json".into())
        .with_correlation_id("c1".into())
        .with_reply_to("answers".into())
        .with_app_id("mine".into())
        .with_timestamp(1_700_000_000)
        .with_headers(table([("CC", copies), ("traceparent", long("00-aa-bb-01")), ("campaign", long("si"))]));
    stranger.publish_with("baton.task", "default", sent, body.as_bytes()).await;
    task(&mut incoming).await.settle.dead("no such process").await;
    counts(&vhost, DEAD, 1, 0).await;
    worker.stop_consuming().await;

    let mut letters = open(&vhost).await;
    let letter = first(&mut letters).await;
    assert_eq!((letter.kind().as_deref(), letter.about()), (Some("continue"), Some(pid.to_string())));
    assert_eq!(letter.headers()["x-baton-dead-id"], letter.id.to_string());
    assert_eq!(letter.reason.as_deref(), Some("no such process"));
    assert_eq!(letters.replay(letter).await.unwrap(), Replayed::To("baton.task.default".into()));
    assert!(letters.next().await.unwrap().is_none());
    letters.close().await.unwrap();
    counts(&vhost, DEAD, 0, 0).await;

    let replayed = stranger.take("baton.task.default", 1).await.remove(0);
    assert_eq!(replayed.data, body.as_bytes());
    let expected = BasicProperties::default()
        .with_type("continue".into())
        .with_message_id("m1".into())
        .with_content_type("application/json".into())
        .with_correlation_id("c1".into())
        .with_reply_to("answers".into())
        .with_app_id("mine".into())
        .with_timestamp(1_700_000_000)
        .with_delivery_mode(2)
        .with_headers(table([("traceparent", long("00-aa-bb-01")), ("campaign", long("si"))]));
    assert_eq!(replayed.properties, expected);
    counts(&vhost, "elsewhere", 0, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_refused_request_names_the_workers_queue_and_is_kept_if_the_queue_is_gone() {
    const OWN: &str = "baton.worker.w1.0";
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", Some(OWN)).await;
    let stranger = vhost.stranger().await;
    stranger.publish("", OWN, "application/json", br#"{"version": 1, "type": "jump"}"#).await;
    counts(&vhost, DEAD, 1, 0).await;
    let replay = async || {
        let mut letters = open(&vhost).await;
        let letter = first(&mut letters).await;
        assert_eq!(letter.origin.as_deref(), Some(OWN));
        let id = letter.id;
        let replayed = letters.replay(letter).await.unwrap();
        letters.close().await.unwrap();
        (id, replayed)
    };
    let (id, replayed) = replay().await;
    assert_eq!(replayed, Replayed::To(OWN.into()));
    // The cause persists, so the message is dead-lettered again with another id.
    counts(&vhost, DEAD, 1, 0).await;
    worker.shutdown().await;
    let (again, replayed) = replay().await;
    assert_ne!(id, again);
    let Replayed::Kept(why @ Kept::NotTaken { .. }) = replayed else { panic!("{replayed:?}") };
    assert_eq!(why.to_string(), "queue baton.worker.w1.0 does not accept it: it does not exist");
    assert_eq!(ids(&vhost).await, [again]);
    assert!(incoming.controls.recv().await.is_none());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_replay_declares_an_absent_task_queue_and_a_replayed_broadcast_is_recorded() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    worker.publish("gone", many(1).1).await.unwrap();
    let stranger = publisher(&vhost).await;
    stranger.channel.queue_delete("baton.task.gone".into(), QueueDeleteOptions::default()).await.unwrap();
    let pid = Pid::generate();
    let body = format!(r#"{{"version": 1, "type": "continue", "pid": "{pid}"}}"#);
    stranger.publish_with("", DEAD, from("baton.task.gone"), body.as_bytes()).await;
    let pause = br#"{"version": 1, "type": "pause", "select": {}}"#;
    stranger.publish_with("", DEAD, from("baton.control"), pause).await;
    let mut letters = open(&vhost).await;
    for queue in ["baton.task.gone", "baton.control"] {
        let letter = first(&mut letters).await;
        assert_eq!(letters.replay(letter).await.unwrap(), Replayed::To(queue.into()));
    }
    letters.close().await.unwrap();
    worker.consume(vec!["gone".into()], slots(1)).await;
    worker.consume_control().await;
    let delivery = task(&mut incoming).await;
    assert_eq!(delivery.task.pid(), pid);
    delivery.settle.ack().await;
    receive("the broadcast", &mut incoming.controls).await.durable.expect("to be recorded").ack().await;
    counts(&vhost, DEAD, 0, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_message_that_rabbitmq_dead_lettered_is_replayed_to_its_queue() {
    let vhost = Vhost::new();
    let (publisher, _incoming) = start(&vhost.broker(), "cli", None).await;
    let policy = r#"{"pattern": "^baton\\.task", "definition":
        {"dead-letter-exchange": "", "dead-letter-routing-key": "baton.dead"}}"#;
    vhost.http("PUT", "policies/{vhost}/baton-task", Some(policy));
    let (pids, tasks) = many(1);
    publisher.publish("default.high", tasks).await.unwrap();
    let stranger = vhost.stranger().await;
    eventually("the queue is dead-lettered by the policy", async || {
        let queue = vhost.http("GET", "queues/{vhost}/baton.task.default.high", None);
        (queue["policy"] == "baton-task", queue)
    })
    .await;
    for _ in 0..2 {
        let taken = stranger.channel.basic_get("baton.task.default.high".into(), BasicGetOptions::default()).await;
        let taken = taken.unwrap().expect("it was published or replayed");
        taken.acker.reject(BasicRejectOptions { requeue: false }).await.unwrap();
        let mut id = Vec::new();
        eventually("it is dead", async || {
            id = ids(&vhost).await;
            (id.len() == 1, id.clone())
        })
        .await;
        // The id does not depend on the number of inspections.
        assert_eq!(ids(&vhost).await, id);
        let mut letters = open(&vhost).await;
        let letter = first(&mut letters).await;
        assert_eq!((letter.id, letter.about()), (id[0], Some(pids[0].to_string())));
        assert_eq!(letter.reason.as_deref(), Some("dead-lettered by the broker: rejected"));
        assert!(letter.at.is_some());
        assert_eq!(letters.replay(letter).await.unwrap(), Replayed::To("baton.task.default.high".into()));
        letters.close().await.unwrap();
        assert_eq!(ids(&vhost).await, []);
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn only_discarded_letters_are_removed() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    put(&stranger, 100, BasicProperties::default()).await;
    let mut letters = open(&vhost).await;
    while let Some(letter) = letters.next().await.unwrap() {
        if number(&letter) % 2 == 0 {
            letters.discard(letter).await.unwrap();
        } else if number(&letter) % 3 == 0 {
            assert_eq!(letters.replay(letter).await.unwrap(), Replayed::Kept(Kept::NoOrigin));
        }
    }
    assert_eq!(letters.n_total(), 100);
    letters.close().await.unwrap();
    assert_eq!(look(&vhost, 100).await, (0..100).filter(|n| n % 2 == 1).collect::<Vec<_>>());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn letters_that_return_at_once_are_replayed_once_each() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    worker.consume(vec!["default".into()], slots(64)).await;
    let stranger = publisher(&vhost).await;
    let body = format!(r#"{{"version": 1, "type": "continue", "pid": "{}"}}"#, Pid::generate());
    for _ in 0..100 {
        stranger.publish_with("", DEAD, from("baton.task.default"), body.as_bytes()).await;
    }
    // The worker can use none of them, and dead-letters each at once.
    let replay = async {
        let mut letters = open(&vhost).await;
        let mut n_replayed = 0;
        while let Some(letter) = letters.next().await.unwrap() {
            assert!(matches!(letters.replay(letter).await.unwrap(), Replayed::To(_)));
            n_replayed += 1;
        }
        letters.close().await.unwrap();
        n_replayed
    };
    let bury = async {
        while let Some(delivery) = incoming.tasks.recv().await {
            delivery.settle.dead("no such process").await;
        }
    };
    let n_replayed = tokio::select! {
        n_replayed = replay => n_replayed,
        () = bury => unreachable!(),
    };
    assert_eq!(n_replayed, 100);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn foreign_and_malformed_letters_are_read_and_kept() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    let nested = AMQPValue::FieldArray(vec![AMQPValue::FieldTable(table([("b", AMQPValue::Void)]))].into());
    let odd = BasicProperties::default()
        .with_priority(9)
        .with_expiration("100000000".into())
        .with_content_encoding("gzip".into())
        .with_timestamp(u64::MAX)
        .with_headers(table([
            ("x-baton-dead-id", long("not an id")),
            ("x-baton-at", long("yesterday")),
            ("x-baton-reason", AMQPValue::LongInt(3)),
            ("x-death", AMQPValue::FieldTable(FieldTable::default())),
            ("nested", nested),
            ("latin", AMQPValue::LongString(b"\xe4".to_vec().into())),
        ]));
    let over = vec![b' '; SIZE_BYTES_MAX + 1];
    let letters: [(BasicProperties, &[u8]); 5] = [
        (BasicProperties::default(), b""),
        (odd, b"\xc1\xff"),
        (from("baton.dead"), b"{"),
        (from(&"x".repeat(1000)), b"[]"),
        (from("baton.task.default"), &over),
    ];
    for (properties, body) in &letters {
        stranger.publish_with("", DEAD, properties.clone(), body).await;
    }
    let before = ids(&vhost).await;
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), letters.len());
    let mut seen = open(&vhost).await;
    for (_, body) in &letters {
        let letter = first(&mut seen).await;
        assert_eq!(letter.size_bytes(), body.len());
        if body.len() == 2 && letter.origin.is_none() {
            assert_eq!(letter.headers()["nested"], serde_json::json!([{"b": null}]));
            assert_eq!((letter.at, &letter.reason), (None, &None));
            assert_eq!(letter.properties()["expiration"], "100000000");
        }
        if letter.origin.as_deref() != Some("baton.task.default") {
            assert!(matches!(seen.replay(letter).await.unwrap(), Replayed::Kept(_)));
        }
    }
    seen.close().await.unwrap();
    assert_eq!(ids(&vhost).await, before);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn ten_thousand_letters_and_large_ones_are_listed_in_little_memory() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    let large = vec![b'x'; SIZE_BYTES_MAX];
    for n in 0..96 {
        stranger.publish_with("", DEAD, from(&format!("baton.task.q{n}")), &large).await;
    }
    put(&stranger, 10_000, from("baton.task.default")).await;
    drop(large);
    let before = peak_memory_mb();
    let ids = ids(&vhost).await;
    assert_eq!(ids.len(), 10_096);
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 10_096);
    let grown = peak_memory_mb() - before;
    // A page of large letters is 64 MB; all of them would be 192.
    assert!(grown < 110, "{grown} MB more");
    counts(&vhost, DEAD, 10_096, 0).await;
}

/// Peak memory of this process.
fn peak_memory_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_refusal_of_one_letter_does_not_stop_others() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    stranger.publish_with("", DEAD, from("baton.control"), b"1").await;
    stranger.publish_with("", DEAD, from("baton.task.default"), b"2").await;
    // This user may publish tasks, but not to the default exchange.
    vhost.http("PUT", "users/{vhost}", Some(r#"{"password": "p", "tags": ""}"#));
    let rights = r#"{"configure": "^baton\\.", "write": "^baton\\.", "read": "^baton\\."}"#;
    vhost.http("PUT", "permissions/{vhost}/{vhost}", Some(rights));
    let (_, name) = vhost.url.rsplit_once('/').unwrap();
    let url = vhost.url.replace("guest:guest@", &format!("{name}:p@"));
    let mut letters = DeadLetters::open(vec![url]).await.unwrap();
    let letter = first(&mut letters).await;
    let Replayed::Kept(Kept::NotTaken { reason, .. }) = letters.replay(letter).await.unwrap() else {
        panic!("it may not be published");
    };
    assert!(reason.contains("ACCESS_REFUSED"), "{reason}");
    let letter = first(&mut letters).await;
    assert_eq!(letters.replay(letter).await.unwrap(), Replayed::To("baton.task.default".into()));
    letters.close().await.unwrap();
    vhost.http("DELETE", "users/{vhost}", None);
    assert_eq!(look(&vhost, 10).await, [1]);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_lost_connection_loses_no_letter() {
    let vhost = Vhost::new();
    let stranger = publisher(&vhost).await;
    put(&stranger, 50, from("baton.task.default")).await;
    let mut letters = open(&vhost).await;
    let letter = first(&mut letters).await;
    first(&mut letters).await;
    let mut name = String::new();
    eventually("the management knows the connection", async || {
        let connections = vhost.http("GET", "vhosts/{vhost}/connections", None);
        let own = connections.as_array().unwrap().iter().find(|connection| {
            connection["client_properties"]["connection_name"].as_str().is_some_and(|own| own.starts_with("baton dead"))
        });
        name = own.map(|own| own["name"].as_str().unwrap().replace(' ', "%20").replace('>', "%3E")).unwrap_or_default();
        (!name.is_empty(), connections)
    })
    .await;
    vhost.http("DELETE", &format!("connections/{name}"), None);
    counts(&vhost, DEAD, 50, 0).await;
    assert!(matches!(letters.replay(letter).await, Err(Error::Lost(_))));
    // Letters that arrived before are still returned, but cannot be settled.
    let lost = loop {
        match letters.next().await {
            Ok(letter) => assert!(letters.discard(letter.expect("not all letters are left")).await.is_err()),
            Err(error) => break error,
        }
    };
    assert!(matches!(lost, Error::Lost(_)), "{lost:?}");
    assert_eq!(look(&vhost, 100).await, (0..50).collect::<Vec<_>>());
    let wrong = vhost.url.replace("guest:guest@", "guest:s3cret@");
    let refused = DeadLetters::open(vec![wrong]).await.err().expect("the password is wrong");
    assert!(matches!(refused, Error::Connect(CheckError::Credentials { .. })), "{refused}");
    assert!(!refused.to_string().contains("s3cret"), "{refused}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_repeated_dead_lettering_makes_one_letter_with_a_bounded_reason() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    worker.consume(vec!["default".into()], slots(1)).await;
    worker.publish("default", many(1).1).await.unwrap();
    let delivery = task(&mut incoming).await;
    // Deleted, so that the first publish is returned.
    let stranger = vhost.stranger().await;
    stranger.channel.queue_delete(DEAD.into(), QueueDeleteOptions::default()).await.unwrap();
    delivery.settle.dead(&"too long ".repeat(100_000)).await;
    // A queue is listed some time before it can be consumed. A letter in it shows that it can.
    eventually("the letter is in a queue that was declared again", async || {
        let queues = vhost.http("GET", "queues/{vhost}", None);
        let holds = |queue: &serde_json::Value| queue["name"] == DEAD && queue["messages_ready"] == 1;
        (queues.as_array().unwrap().iter().any(holds), queues)
    })
    .await;
    let dead = stranger.take(DEAD, 1).await.remove(0);
    assert!(header(&dead, "x-baton-reason").len() < 10_000);
    header(&dead, "x-baton-dead-id").parse::<LetterId>().unwrap();
    worker.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn headers_just_below_the_size_limit_fit_into_a_frame() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    worker.consume(vec!["default".into()], slots(1)).await;
    // After this delivery its queue exists.
    worker.publish("default", many(1).1).await.unwrap();
    task(&mut incoming).await.settle.ack().await;
    let stranger = vhost.stranger().await;
    let note = "n".repeat(31_000);
    let headers = table([("note", long(&note))]);
    let properties = BasicProperties::default().with_content_type("application/json".into()).with_headers(headers);
    stranger.publish_with("", "baton.task.default", properties, b"{").await;
    let dead = stranger.take(DEAD, 1).await.remove(0);
    // The worker has read it and gives its own reason; it has not ended the connection.
    let reason = header(&dead, "x-baton-reason");
    assert!(reason.contains("malformed JSON"), "{reason}");
    assert_eq!(header(&dead, "note"), note);
    worker.shutdown().await;
}
