//! Tests against a real RabbitMQ, each in its own virtual host.

use std::collections::HashSet;
use std::time::Duration;

use baton_common::communicator::{Broker, CheckError, PublishError, RequestError, TaskMessage};
use baton_common::id::Pid;
use baton_common::message::{Control, Effect, Encoding, Event, Events, Reply, Task};
use baton_common::select::Select;
use baton_common::state::Desired;
use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use tokio::time::timeout;

use crate::broker::{Vhost, counts, header};
use crate::{LIMIT, continue_task, eventually, many, options, receive, slots, start, task};

const OWN: &str = "baton.worker.w1.0";

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_task_is_delivered_with_its_trace_and_removed_once_acknowledged() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.consume(vec!["default".into()], slots(4)).await;
    let traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
    let pid = Pid::generate();
    let launch = Task::Launch { pid, spec: None, wait: false, announced_at: Some(5) };
    communicator
        .publish("default.high", vec![TaskMessage { task: launch.clone(), traceparent: traceparent.clone() }])
        .await
        .unwrap();
    let delivery = task(&mut incoming).await;
    assert_eq!((&delivery.task, delivery.queue.as_str()), (&launch, "default.high"));
    assert_eq!(delivery.traceparent, traceparent);
    assert!(!delivery.redelivered && delivery.reply_to.is_none());
    delivery.settle.ack().await;
    counts(&vhost, "baton.task.default.high", 0, 0).await;
    timeout(Duration::from_secs(5), communicator.shutdown()).await.expect("nothing holds up the end");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn many_tasks_are_published_at_once_and_counted() {
    let vhost = Vhost::new();
    let (communicator, _incoming) = start(&vhost.broker(), "cli", None).await;
    assert_eq!(communicator.depth("default").await.unwrap(), 0);
    communicator.publish("default", many(5000).1).await.unwrap();
    // Quorum queues report their length with a delay.
    eventually("all are counted", async || {
        let depth = communicator.depth("default").await.unwrap();
        (depth == 5000, depth)
    })
    .await;
    communicator.shutdown().await;
}

/// Of the deliveries that are acknowledged together, only the first notifies the acknowledger.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn deliveries_are_acknowledged_after_any_pause() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.publish("default", many(5).1).await.unwrap();
    communicator.consume(vec!["default".into()], slots(100)).await;
    let mut taken = Vec::new();
    for _ in 0..5 {
        taken.push(Some(task(&mut incoming).await));
    }
    // In this order, and together with others.
    for (n_left, idxs) in [(4, vec![0]), (3, vec![1]), (2, vec![3]), (0, vec![2, 4])] {
        for idx in idxs {
            taken[idx].take().unwrap().settle.ack().await;
        }
        counts(&vhost, "baton.task.default", 0, n_left).await;
    }
    communicator.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn thousands_of_tasks_are_settled_in_any_order_and_delivered_once() {
    const COUNT: usize = 6_000;
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.publish("default", many(COUNT).1).await.unwrap();
    communicator.consume(vec!["default".into()], slots(500)).await;
    let mut pids = HashSet::new();
    let mut settling = tokio::task::JoinSet::new();
    while pids.len() < COUNT {
        let delivery = task(&mut incoming).await;
        assert!(!delivery.redelivered, "a channel was closed");
        let n_turns = delivery.task.pid().to_string().bytes().last().unwrap() % 16;
        assert!(pids.insert(delivery.task.pid()));
        settling.spawn(async move {
            // Each yields a different number of times.
            for _ in 0..n_turns {
                tokio::task::yield_now().await;
            }
            delivery.settle.ack().await;
        });
        while settling.try_join_next().is_some() {}
    }
    settling.join_all().await;
    counts(&vhost, "baton.task.default", 0, 0).await;
    let traffic = communicator.traffic();
    assert_eq!((traffic.published, traffic.delivered), (COUNT as u64, COUNT as u64));
    assert!(traffic.ack_frames < COUNT as u64 / 4, "{} frames acknowledged {COUNT}", traffic.ack_frames);
    communicator.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_absent_queue_is_declared_and_every_concurrent_publish_arrives() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "cli", None).await;
    let (pids, tasks) = many(200);
    let publishes = tasks.into_iter().enumerate().map(|(n, task)| {
        let communicator = &communicator;
        async move { communicator.publish(["a", "b", "c"][n % 3], vec![task]).await }
    });
    for published in futures_util::future::join_all(publishes).await {
        published.unwrap();
    }
    communicator.consume(["a", "b", "c"].map(str::to_owned).to_vec(), slots(64)).await;
    let mut arrived = HashSet::new();
    while arrived.len() < pids.len() {
        let delivery = task(&mut incoming).await;
        assert!(arrived.insert(delivery.task.pid()));
        delivery.settle.ack().await;
    }
    assert_eq!(arrived, pids.into_iter().collect());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_unpublishable_task_is_rejected_at_once() {
    let vhost = Vhost::new();
    let (communicator, _incoming) = start(&vhost.broker(), "cli", None).await;
    let spec = Some(serde_json::Value::String("x".repeat(3 * 1024 * 1024)));
    let huge = Task::Launch { pid: Pid::generate(), spec: spec.map(Ok), wait: false, announced_at: None };
    let outcome = communicator.publish("default", vec![TaskMessage { task: huge, traceparent: None }]).await;
    assert!(matches!(outcome, Err(PublishError::TooLarge(_))), "{outcome:?}");
    let outcome = communicator.publish(&"x".repeat(300), vec![continue_task(Pid::generate())]).await;
    assert!(matches!(outcome, Err(PublishError::Unroutable { .. })), "{outcome:?}");
    communicator.publish("default", vec![continue_task(Pid::generate())]).await.unwrap();
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_launch_written_by_hand_is_delivered_and_answered_by_another_program() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", None).await;
    let (other, _incoming) = start(&vhost.broker(), "w2", None).await;
    worker.consume(vec!["default".into()], slots(1)).await;
    let stranger = vhost.stranger().await;
    let queue = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    stranger.channel.queue_declare("answers".into(), queue, FieldTable::default()).await.unwrap();
    let pid = Pid::generate();
    let body = format!(r#"{{"version": 1, "type": "launch", "pid": "{pid}", "spec": {{"run": ["true"]}}}}"#);
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_reply_to("answers".into())
        .with_correlation_id("mine".into());
    // This publish is not mandatory, so the queue must be bound first.
    eventually("the queue is bound", async || {
        let bindings = vhost.http("GET", "bindings/{vhost}/e/baton.task/q/baton.task.default", None);
        (bindings.as_array().is_some_and(|bindings| !bindings.is_empty()), bindings)
    })
    .await;
    stranger.publish_with("baton.task", "default", properties, body.as_bytes()).await;
    let delivery = task(&mut incoming).await;
    assert_eq!(delivery.task.pid(), pid);
    let stored = serde_json::to_string(&delivery.reply_to.unwrap()).unwrap();
    let reply = Reply { pid: Some(pid), accepted: Some(true), ..Reply::default() };
    other.reply(&serde_json::from_str(&stored).unwrap(), &reply).await.unwrap();
    let answers = stranger.take("answers", 1).await;
    assert_eq!(answers[0].properties.correlation_id().as_ref().unwrap().as_str(), "mine");
    assert_eq!(Reply::decode(&answers[0].data, Encoding::Json).unwrap(), reply);
    delivery.settle.ack().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_unreadable_message_is_dead_lettered_with_the_reason() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", Some(OWN)).await;
    communicator.publish("default", many(1).1).await.unwrap();
    let stranger = vhost.stranger().await;
    let huge = vec![b' '; 3 * 1024 * 1024];
    let unusable: [(&str, &[u8], &str); 6] = [
        ("application/json", b"{", "malformed JSON"),
        ("application/msgpack", b"{\"version\": 1}", "malformed MessagePack"),
        ("application/json", b"{\"version\": 1, \"type\": \"dance\"}", "unknown type `dance`"),
        ("application/json", b"{\"version\": 9, \"type\": \"launch\"}", "version 9 is newer"),
        ("text/plain", b"hello", "malformed MessagePack"),
        ("application/json", &huge, "exceed the limit"),
    ];
    for (content_type, body, _) in unusable {
        stranger.publish("baton.task", "default", content_type, body).await;
    }
    communicator.consume(vec!["default".into()], slots(2)).await;
    let delivery = task(&mut incoming).await;
    delivery.settle.dead("no such process").await;
    let dead = stranger.take("baton.dead", 7).await;
    let reasons: Vec<String> = dead.iter().map(|message| header(message, "x-baton-reason")).collect();
    for expected in unusable.iter().map(|(_, _, reason)| *reason).chain(["no such process"]) {
        assert!(reasons.iter().any(|reason| reason.contains(expected)), "{expected}: {reasons:?}");
    }
    for message in &dead {
        assert_eq!(header(message, "x-baton-origin"), "baton.task.default");
        assert!(header(message, "x-baton-at").ends_with('Z'));
    }
    counts(&vhost, "baton.task.default", 0, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_request_is_answered_and_an_unreadable_one_is_refused_and_dead_lettered() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", Some(OWN)).await;
    let (asker, _incoming) = start(&vhost.broker(), "cli", None).await;
    let pid = Pid::generate();
    let answer = asker.request(OWN, Control::Status(pid), LIMIT);
    let answering = async {
        let request = receive("a request", &mut incoming.controls).await;
        assert_eq!(request.control, Control::Status(pid));
        assert!(!request.from_broadcast && request.from_baton);
        let reply = Reply { outcome: Some(Effect::NotHeld), ..Reply::default() };
        worker.reply(&request.reply_to.unwrap(), &reply).await.unwrap();
    };
    let (answer, ()) = tokio::join!(answer, answering);
    assert_eq!(answer.unwrap().outcome, Some(Effect::NotHeld));

    let stranger = vhost.stranger().await;
    let queue = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    stranger.channel.queue_declare("answers".into(), queue, FieldTable::default()).await.unwrap();
    let properties =
        BasicProperties::default().with_content_type("application/json".into()).with_reply_to("answers".into());
    stranger.publish_with("", OWN, properties, b"{\"version\": 1, \"type\": \"jump\"}").await;
    let answers = stranger.take("answers", 1).await;
    let refusal = Reply::decode(&answers[0].data, Encoding::Json).unwrap();
    assert!(refusal.error.unwrap().contains("unknown type `jump`"));
    let dead = stranger.take("baton.dead", 1).await;
    assert!(header(&dead[0], "x-baton-reason").contains("unknown type `jump`"));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_request_to_a_gone_worker_is_unroutable_and_one_to_a_silent_worker_times_out() {
    let vhost = Vhost::new();
    let (worker, mut incoming) = start(&vhost.broker(), "w1", Some(OWN)).await;
    let (asker, _incoming) = start(&vhost.broker(), "cli", None).await;
    assert!(asker.ping(OWN).await.unwrap());
    assert_eq!(receive("a ping", &mut incoming.controls).await.control, Control::Ping);
    let silent = asker.request(OWN, Control::Drain, Duration::from_millis(100)).await;
    assert!(matches!(silent, Err(RequestError::TimedOut(_))), "{silent:?}");
    worker.shutdown().await;
    eventually("its queue is deleted", async || (!asker.ping(OWN).await.unwrap(), ())).await;
    let gone = futures_util::future::join_all((0..50).map(|_| asker.request(OWN, Control::Drain, LIMIT))).await;
    for outcome in gone {
        assert_eq!(outcome, Err(RequestError::Unroutable(OWN.to_owned())));
    }
    assert!(asker.control_connected_for().is_some());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_broadcast_from_outside_reaches_every_worker_and_is_recorded_by_one() {
    let vhost = Vhost::new();
    let (one, mut of_one) = start(&vhost.broker(), "w1", Some("baton.worker.w1.0")).await;
    let (two, mut of_two) = start(&vhost.broker(), "w2", Some("baton.worker.w2.0")).await;
    one.consume_control().await;
    let stranger = vhost.stranger().await;
    let properties = BasicProperties::default().with_message_id("m1".into());
    let body = br#"{"version": 1, "type": "pause", "select": {}, "reason": "maintenance"}"#;
    stranger.publish_with("baton.broadcast", "", properties, body).await;
    let mut n_durable = 0;
    for _ in 0..2 {
        let request = receive("a broadcast", &mut of_one.controls).await;
        assert!(request.from_broadcast && !request.from_baton);
        assert_eq!(request.message_id.as_deref(), Some("m1"));
        if let Some(durable) = request.durable {
            n_durable += 1;
            durable.ack().await;
        }
    }
    assert_eq!(n_durable, 1);
    assert!(receive("a broadcast", &mut of_two.controls).await.durable.is_none());
    let play = Control::Obey { verb: Desired::Run, select: Select::default(), reason: None };
    let mut answers = two.broadcast(play).await.unwrap();
    for (worker, controls) in [(&one, &mut of_one.controls), (&two, &mut of_two.controls)] {
        let mut request = receive("a broadcast", controls).await;
        while let Some(durable) = request.durable.take() {
            durable.ack().await;
            request = receive("the broadcast itself", controls).await;
        }
        assert!(request.from_baton);
        let reply = Reply { outcome: Some(Effect::Recorded), ..Reply::default() };
        worker.reply(&request.reply_to.unwrap(), &reply).await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(receive("an answer", &mut answers).await.outcome, Some(Effect::Recorded));
    }
    stranger.publish("baton.broadcast", "", "application/json", b"{}").await;
    let dead = stranger.take("baton.dead", 1).await;
    assert_eq!(header(&dead[0], "x-baton-origin"), "baton.control");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn events_are_gathered_into_few_messages() {
    let vhost = Vhost::new();
    let (communicator, _incoming) = start(&vhost.broker(), "w1", None).await;
    let event = |n: i64| Event {
        pid: Pid::generate(),
        state: ["running", "finished"][usize::try_from(n % 2).unwrap()].into(),
        at: n,
        by: "w1".into(),
        exit: None,
    };
    let stranger = vhost.stranger().await;
    let queue = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    stranger.channel.queue_declare("heard".into(), queue, FieldTable::default()).await.unwrap();
    let (heard, exchange, key) = ("heard".into(), "baton.event".into(), "process.finished".into());
    stranger
        .channel
        .queue_bind(heard, exchange, key, QueueBindOptions::default(), FieldTable::default())
        .await
        .unwrap();
    for n in 0..1000 {
        communicator.announce(event(n));
    }
    communicator.shutdown().await;
    let (mut n_events, mut n_messages) = (0, 0);
    let mut heard = stranger.consume("heard").await;
    while n_events < 500 {
        let message = timeout(LIMIT, heard.next()).await.expect("events arrive").unwrap().unwrap();
        n_events += rmp_serde::from_slice::<Events>(&message.data).unwrap().events.len();
        n_messages += 1;
        assert!(n_messages < 50, "{n_events} events in {n_messages} messages");
    }
    assert_eq!(n_events, 500);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn full_queues_share_by_weight() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    let queues = ["default.high", "default", "default.low"];
    // The broker has no messages left, so its speed does not matter.
    let all_in_hand = async || {
        for queue in queues {
            eventually("everything has been delivered", async || {
                let depth = communicator.depth(queue).await.unwrap();
                (depth == 0, depth)
            })
            .await;
        }
    };
    // More than the channel to the worker holds; the following tasks wait for their turn.
    const FIRST: usize = 80;
    communicator.publish("default.high", many(FIRST).1).await.unwrap();
    communicator.consume(vec!["default".into()], slots(1_000)).await;
    all_in_hand().await;
    for (queue, count) in queues.into_iter().zip([400, 150, 50]) {
        communicator.publish(queue, many(count).1).await.unwrap();
    }
    all_in_hand().await;
    let mut counts = [0usize; 3];
    for n in 0..FIRST + 210 {
        let delivery = task(&mut incoming).await;
        if n >= FIRST {
            counts[queues.iter().position(|queue| *queue == delivery.queue).unwrap()] += 1;
        }
        delivery.settle.ack().await;
        // Deliveries of the broker may still be in transit. After this pause there are deliveries of each class.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Roughly 160, 40 and 10: the position in the round after the first deliveries is unknown. The unit tests check
    // exact rounds.
    assert!(counts[0] > 3 * counts[1] && counts[1] > 3 * counts[2] && counts[2] > 5, "{counts:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_full_worker_gives_back_its_prefetched_tasks_and_consumes_again_when_it_is_free() {
    let vhost = Vhost::new();
    let (full, mut of_full) = start(&vhost.broker(), "w1", None).await;
    let slots_of_full = slots(1);
    full.consume(vec!["default".into()], slots_of_full).await;
    full.publish("default", many(1).1).await.unwrap();
    let held = task(&mut of_full).await;
    for queue in ["default.high", "default", "default.low"] {
        full.publish(queue, many(1).1).await.unwrap();
    }
    let since = tokio::time::Instant::now();
    let (free, mut of_free) = start(&vhost.broker(), "w2", None).await;
    free.consume(vec!["default".into()], slots(8)).await;
    for _ in 0..3 {
        task(&mut of_free).await.settle.ack().await;
    }
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    free.stop_consuming().await;
    held.settle.ack().await;
    drop(held.permit);
    let last = Pid::generate();
    full.publish("default.low", vec![continue_task(last)]).await.unwrap();
    let delivery = task(&mut of_full).await;
    assert_eq!(delivery.task.pid(), last);
    delivery.settle.ack().await;
    for queue in ["baton.task.default.high", "baton.task.default", "baton.task.default.low"] {
        counts(&vhost, queue, 0, 0).await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn after_stop_consuming_all_tasks_that_were_not_taken_are_in_the_queue() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.publish("default", many(200).1).await.unwrap();
    communicator.consume(vec!["default".into()], slots(3)).await;
    let taken = [task(&mut incoming).await, task(&mut incoming).await, task(&mut incoming).await];
    communicator.stop_consuming().await;
    counts(&vhost, "baton.task.default", 197, 3).await;
    for delivery in taken {
        delivery.settle.ack().await;
    }
    counts(&vhost, "baton.task.default", 197, 0).await;
    communicator.consume(vec!["default".into()], slots(1)).await;
    task(&mut incoming).await.settle.give_back().await;
    communicator.shutdown().await;
    counts(&vhost, "baton.task.default", 197, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn configuration_errors_are_named_without_the_password() {
    let vhost = Vhost::new();
    let wrong = vhost.url.replace("guest:guest@", "guest:s3cret@");
    let (communicator, _incoming) =
        baton_common::communicator::Communicator::start(options(Broker::Amqp(vec![wrong.clone()]), "w1", None));
    let down = communicator.wait_connected(Duration::from_secs(1)).await.unwrap_err().0;
    assert!(down.contains("rejected the credentials of user guest") && !down.contains("s3cret"), "{down}");
    let error = communicator.publish("default", many(1).1).await.unwrap_err();
    assert!(matches!(&error, PublishError::Down(down) if down.0.contains("credentials")), "{error:?}");
    communicator.shutdown().await;

    let check = async |url: &str| Broker::check(&[url.to_owned()], None).await.remove(0);
    let info = check(&vhost.url).await.unwrap();
    assert!(info.url.contains("guest@127.0.0.1"), "{info:?}");
    assert!(info.version.starts_with("RabbitMQ 3") || info.version.starts_with("RabbitMQ 4"), "{info:?}");
    assert!(info.cluster.is_some());
    assert!(matches!(check(&wrong).await, Err(CheckError::Credentials { user, .. }) if user == "guest"));
    let absent = format!("{}-absent", vhost.url);
    assert!(matches!(check(&absent).await, Err(CheckError::NoVhost { .. })));
    assert!(matches!(check("amqp://127.0.0.1:9/").await, Err(CheckError::Unreachable { .. })));
    assert!(matches!(check("http://127.0.0.1:9/").await, Err(CheckError::BadUrl { .. })));
}
