//! Faults of the broker, of a queue, of a channel, and of a declaration.

use std::collections::HashSet;
use std::time::Duration;

use baton_common::communicator::{PublishError, TaskMessage};
use baton_common::id::Pid;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use tokio::time::{Instant, timeout};

use crate::broker::{OwnBroker, Vhost, counts};
use crate::{LIMIT, continue_task, eventually, many, slots, start, task};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs services: run tests/run"]
async fn a_killed_broker_loses_no_confirmed_task() {
    let mut broker = OwnBroker::start().await;
    let (worker, mut incoming) = start(&broker.broker(), "w1", Some("baton.worker.w1.0")).await;
    let (publisher, _incoming) = start(&broker.broker(), "cli", None).await;
    worker.consume(vec!["default".into()], slots(16)).await;
    // 2,000 tasks are published one by one. The broker is killed when a quarter has arrived.
    let publish = async {
        let mut confirmed = Vec::new();
        let mut n_publishes = 0;
        while confirmed.len() < 2000 {
            let pids: Vec<Pid> = (0..10).map(|_| Pid::generate()).collect();
            let tasks: Vec<TaskMessage> = pids.iter().map(|&pid| continue_task(pid)).collect();
            n_publishes += 1;
            match publisher.publish("default", tasks).await {
                Ok(()) => confirmed.extend(pids),
                Err(PublishError::Down(_)) => {
                    let _ = publisher.wait_connected(Duration::from_secs(1)).await;
                }
                Err(PublishError::Unknown(_)) => {}
                Err(error @ (PublishError::Unroutable { .. } | PublishError::TooLarge(_))) => panic!("{error}"),
            }
            assert!(n_publishes < 10_000, "only {} tasks were confirmed", confirmed.len());
        }
        confirmed
    };
    let (arrived_tx, mut arrived_rx) = tokio::sync::mpsc::channel(10_000);
    let deliver = async {
        loop {
            // The time limit is that of the test, since the broker restarts meanwhile.
            let delivery = incoming.tasks.recv().await.expect("the channel is open");
            let _ = arrived_tx.send(delivery.task.pid()).await;
            delivery.settle.ack().await;
        }
    };
    let follow = async {
        let mut arrived = HashSet::new();
        while arrived.len() < 500 {
            arrived.insert(arrived_rx.recv().await.unwrap());
        }
        broker.save_directory();
        broker.kill();
        broker.start_server().await;
        arrived
    };
    let (confirmed, mut arrived) = tokio::select! {
        both = async { tokio::join!(publish, follow) } => both,
        () = async { timeout(Duration::from_secs(120), deliver).await.unwrap() } => unreachable!(),
    };
    let missing = |arrived: &HashSet<Pid>| confirmed.iter().filter(|pid| !arrived.contains(pid)).count();
    while missing(&arrived) > 0 {
        while let Ok(pid) = arrived_rx.try_recv() {
            arrived.insert(pid);
        }
        if missing(&arrived) == 0 {
            break;
        }
        let n_missing = missing(&arrived);
        let delivery = timeout(LIMIT, incoming.tasks.recv()).await.unwrap_or_else(|_| {
            panic!("{n_missing} missing; {:?}\n{}", worker.health(), broker.report());
        });
        let delivery = delivery.unwrap();
        arrived.insert(delivery.task.pid());
        delivery.settle.ack().await;
    }
    // Its other connections may still wait for their next attempt.
    worker.wait_connected(LIMIT).await.unwrap();
    publisher.wait_connected(LIMIT).await.unwrap();
    assert!(publisher.ping("baton.worker.w1.0").await.unwrap(), "the control queue exists again");

    // The prefetch still applies after the restart: one consumer bounds the unacknowledged messages.
    let (_, tasks) = many(100);
    publisher.publish("default", tasks).await.unwrap();
    let mut held = Vec::new();
    while held.len() < 16 {
        held.push(task(&mut incoming).await);
    }
    let stranger = broker.stranger().await;
    eventually("at least 84 tasks are not out, or are given back", async || {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = stranger.channel.queue_declare("baton.task.default".into(), passive, FieldTable::default());
        let n_ready = queue.await.unwrap().message_count();
        (n_ready >= 84, n_ready)
    })
    .await;
    drop(held);
    worker.shutdown().await;
    publisher.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_absent_broker_is_no_error_and_is_found_when_it_starts() {
    let mut broker = OwnBroker::start().await;
    broker.kill();
    let (communicator, mut incoming) = baton_common::communicator::Communicator::start(crate::options(
        broker.broker(),
        "w1",
        Some("baton.worker.w1.0"),
    ));
    communicator.consume(vec!["default".into()], slots(1)).await;
    let down = communicator.wait_connected(Duration::from_millis(500)).await.unwrap_err();
    assert!(down.0.contains("cannot reach broker"), "{down}");
    let published = communicator.publish("default", many(1).1).await;
    assert!(matches!(published, Err(PublishError::Down(_))), "{published:?}");
    assert!(communicator.depth("default").await.is_err());
    broker.start_server().await;
    communicator.wait_connected(LIMIT).await.unwrap();
    communicator.publish("default", many(1).1).await.unwrap();
    task(&mut incoming).await.settle.ack().await;
    communicator.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn purging_or_deleting_a_queue_loses_only_its_messages() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.publish("default", many(100).1).await.unwrap();
    vhost.http("DELETE", "queues/{vhost}/baton.task.default/contents", None);
    communicator.consume(vec!["default".into()], slots(2)).await;
    let first = Pid::generate();
    communicator.publish("default", vec![continue_task(first)]).await.unwrap();
    let delivery = task(&mut incoming).await;
    assert_eq!(delivery.task.pid(), first);
    // Deleted while it is consumed and has an unacknowledged delivery.
    let stranger = vhost.stranger().await;
    stranger.channel.queue_delete("baton.task.default".into(), QueueDeleteOptions::default()).await.unwrap();
    let second = Pid::generate();
    communicator.publish("default", vec![continue_task(second)]).await.unwrap();
    delivery.settle.ack().await;
    drop(delivery.permit);
    let delivery = task(&mut incoming).await;
    assert_eq!(delivery.task.pid(), second);
    delivery.settle.ack().await;
    counts(&vhost, "baton.task.default", 0, 0).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn closed_connections_are_reopened_and_old_deliveries_are_harmless() {
    let vhost = Vhost::new();
    let (communicator, mut incoming) = start(&vhost.broker(), "baton-worker w1", Some("baton.worker.w1.0")).await;
    communicator.consume(vec!["default".into()], slots(4)).await;
    communicator.publish("default", many(1).1).await.unwrap();
    let old = task(&mut incoming).await;
    let mut names = HashSet::new();
    eventually("the management knows the three connections", async || {
        let connections = vhost.http("GET", "vhosts/{vhost}/connections", None);
        names = connections
            .as_array()
            .unwrap()
            .iter()
            .map(|c| {
                (
                    c["name"].as_str().unwrap_or_default().to_owned(),
                    c["client_properties"]["connection_name"].as_str().unwrap_or_default().to_owned(),
                )
            })
            .collect();
        (names.len() == 3 && names.iter().all(|(_, own)| !own.is_empty()), names.clone())
    })
    .await;
    let own: HashSet<&str> = names.iter().map(|(_, own)| own.as_str()).collect();
    assert_eq!(own, HashSet::from(["baton-worker w1 publish", "baton-worker w1 control", "baton-worker w1 consume"]));
    for (name, _) in &names {
        vhost.http("DELETE", &format!("connections/{}", name.replace(' ', "%20").replace('>', "%3E")), None);
    }
    // The message is delivered again over a new connection. The acknowledgement of the old delivery has no effect.
    let again = task(&mut incoming).await;
    assert_eq!(again.task.pid(), old.task.pid());
    assert!(again.redelivered);
    old.settle.ack().await;
    communicator.wait_connected(LIMIT).await.unwrap();
    again.settle.ack().await;
    counts(&vhost, "baton.task.default", 0, 0).await;
    let (pids, tasks) = many(50);
    eventually("tasks can be published again", async || {
        let outcome = communicator.publish("default", tasks.clone()).await;
        (outcome.is_ok(), outcome)
    })
    .await;
    let mut arrived = HashSet::new();
    while arrived.len() < pids.len() {
        let delivery = task(&mut incoming).await;
        arrived.insert(delivery.task.pid());
        delivery.settle.ack().await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_queue_with_other_properties_is_named_with_its_remedy_and_the_others_run() {
    let vhost = Vhost::new();
    let stranger = vhost.stranger().await;
    let classic = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    stranger.channel.queue_declare("baton.task.gpu".into(), classic, FieldTable::default()).await.unwrap();
    let (communicator, mut incoming) = start(&vhost.broker(), "w1", None).await;
    communicator.consume(vec!["gpu".into(), "default".into()], slots(4)).await;
    communicator.publish("default", many(1).1).await.unwrap();
    communicator.publish("gpu.high", many(1).1).await.unwrap();
    for _ in 0..2 {
        task(&mut incoming).await.settle.ack().await;
    }
    eventually("the queue is named", async || {
        let error = communicator.health().last_error.unwrap_or_default();
        (error.contains("queue baton.task.gpu exists with other properties") && error.contains("delete it"), error)
    })
    .await;
    assert!(communicator.health().connected);
    stranger.channel.queue_delete("baton.task.gpu".into(), QueueDeleteOptions::default()).await.unwrap();
    eventually("the queue is put right", async || {
        let health = communicator.health();
        (health.last_error.is_none(), health)
    })
    .await;
    communicator.publish("gpu", many(1).1).await.unwrap();
    assert_eq!(task(&mut incoming).await.queue, "gpu");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn during_an_alarm_publishes_fail_fast_and_acknowledgements_arrive() {
    let broker = OwnBroker::start().await;
    let (communicator, mut incoming) = start(&broker.broker(), "w1", Some("baton.worker.w1.0")).await;
    communicator.consume(vec!["default".into()], slots(4)).await;
    communicator.publish("default", many(4).1).await.unwrap();
    let held = [task(&mut incoming).await, task(&mut incoming).await, task(&mut incoming).await];
    broker.control(&["set_vm_memory_high_watermark", "0.00001"]);
    // The broker reports the block only after a publish on the connection.
    let since = Instant::now();
    let first = communicator.publish("default", many(1).1).await;
    assert!(matches!(first, Err(PublishError::Unknown(_))), "{first:?}");
    let second = communicator.publish("default", many(1).1).await;
    assert!(matches!(&second, Err(PublishError::Down(down)) if down.0.contains("alarm")), "{second:?}");
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert!(communicator.health().blocked);
    for delivery in held {
        delivery.settle.ack().await;
    }
    let stranger = broker.stranger().await;
    task(&mut incoming).await.settle.ack().await;
    communicator.stop_consuming().await;
    eventually("nothing is left, so everything was acknowledged", async || {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = stranger.channel.queue_declare("baton.task.default".into(), passive, FieldTable::default());
        let n_ready = queue.await.unwrap().message_count();
        (n_ready == 0, n_ready)
    })
    .await;
    broker.control(&["set_vm_memory_high_watermark", "0.4"]);
    eventually("the alarm is over", async || {
        let outcome = communicator.publish("default", many(1).1).await;
        (outcome.is_ok() && !communicator.health().blocked, outcome)
    })
    .await;
    communicator.shutdown().await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_channel_that_the_broker_closes_for_a_late_acknowledgement_is_reopened() {
    let broker = OwnBroker::start().await;
    broker.control(&["eval", "application:set_env(rabbit, consumer_timeout, 2000)."]);
    broker.control(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."]);
    let (communicator, mut incoming) = start(&broker.broker(), "w1", None).await;
    communicator.consume(vec!["default".into()], slots(4)).await;
    communicator.publish("default", many(1).1).await.unwrap();
    let late = task(&mut incoming).await;
    let again = task(&mut incoming).await;
    assert_eq!(again.task.pid(), late.task.pid());
    late.settle.ack().await;
    again.settle.ack().await;
    communicator.publish("default.high", many(1).1).await.unwrap();
    task(&mut incoming).await.settle.ack().await;
    communicator.publish("default", many(1).1).await.unwrap();
    task(&mut incoming).await.settle.ack().await;
    communicator.shutdown().await;
}
