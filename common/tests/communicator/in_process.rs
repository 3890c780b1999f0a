//! The broker in memory has the same guarantees.

use std::time::Duration;

use baton_common::communicator::{Broker, RequestError};
use baton_common::id::Pid;
use baton_common::message::{Control, Reply};
use baton_common::select::Select;
use baton_common::state::Desired;

use crate::{continue_task, eventually, many, receive, slots, start, task};

const OWN: &str = "baton.worker.w1.0";

#[tokio::test]
async fn a_task_is_delivered_with_a_slot_and_removed_once_acknowledged() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    let slots = slots(1);
    let pid = Pid::generate();
    communicator.publish("default", vec![continue_task(pid)]).await.unwrap();
    assert_eq!(communicator.depth("default").await.unwrap(), 1);
    communicator.consume(vec!["default".into()], slots.clone()).await;
    let delivery = task(&mut incoming).await;
    assert_eq!((delivery.task.pid(), delivery.queue.as_str()), (pid, "default"));
    assert_eq!(slots.available_permits(), 0);
    delivery.settle.ack().await;
    drop(delivery.permit);
    assert_eq!(slots.available_permits(), 1);
    assert_eq!(communicator.depth("default").await.unwrap(), 0);
    communicator.shutdown().await;
}

#[tokio::test]
async fn a_requeued_task_is_delivered_again_and_a_dead_letter_is_not() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    communicator.consume(vec!["default".into()], slots(1)).await;
    communicator.publish("default.low", vec![continue_task(Pid::generate())]).await.unwrap();
    let first = task(&mut incoming).await;
    assert!(!first.redelivered);
    drop(first.permit);
    first.settle.give_back().await;
    let second = task(&mut incoming).await;
    assert!(second.redelivered);
    second.settle.dead("no such process").await;
    drop(second.permit);
    let last = Pid::generate();
    communicator.publish("default.low", vec![continue_task(last)]).await.unwrap();
    assert_eq!(task(&mut incoming).await.task.pid(), last);
}

#[tokio::test]
async fn a_full_worker_leaves_tasks_in_the_queue() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    communicator.consume(vec!["default".into()], slots(1)).await;
    for queue in ["default.high", "default", "default.low"] {
        communicator.publish(queue, vec![continue_task(Pid::generate())]).await.unwrap();
    }
    let held = task(&mut incoming).await;
    let depths = async || {
        let mut n_ready = 0;
        for queue in ["default.high", "default", "default.low"] {
            n_ready += communicator.depth(queue).await.unwrap();
        }
        n_ready
    };
    assert_eq!(depths().await, 2);
    held.settle.ack().await;
    drop(held.permit);
    drop(task(&mut incoming).await.permit);
    drop(task(&mut incoming).await.permit);
    assert_eq!(depths().await, 0);
}

#[tokio::test]
async fn full_queues_share_by_weight() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    for queue in ["default.high", "default", "default.low"] {
        communicator.publish(queue, many(300).1).await.unwrap();
    }
    communicator.consume(vec!["default".into()], slots(4)).await;
    let mut n_high = 0;
    for _ in 0..210 {
        let delivery = task(&mut incoming).await;
        n_high += usize::from(delivery.queue == "default.high");
        delivery.settle.ack().await;
    }
    assert_eq!(n_high, 160);
}

#[tokio::test]
async fn requests_are_answered_and_unknown_queues_are_unroutable() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    let asker = communicator.clone();
    let answer = async { asker.request(OWN, Control::Drain, Duration::from_secs(5)).await };
    let worker = async {
        let request = receive("a request", &mut incoming.controls).await;
        assert_eq!(request.control, Control::Drain);
        communicator.reply(&request.reply_to.unwrap(), &Reply::refusal("no")).await.unwrap();
    };
    let (answer, ()) = tokio::join!(answer, worker);
    assert_eq!(answer.unwrap(), Reply::refusal("no"));
    assert!(communicator.ping(OWN).await.unwrap());
    assert!(!communicator.ping("baton.worker.gone.0").await.unwrap());
    let refused = communicator.request("baton.worker.gone.0", Control::Drain, Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(RequestError::Unroutable(_))), "{refused:?}");
    let late = communicator.request(OWN, Control::Drain, Duration::from_millis(20)).await;
    assert!(matches!(late, Err(RequestError::TimedOut(_))), "{late:?}");
}

#[tokio::test]
async fn a_broadcast_arrives_and_is_recorded_by_one() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    let pause = Control::Obey { verb: Desired::Pause, select: Select::default(), reason: None };
    communicator.broadcast(pause.clone()).await.unwrap();
    let heard = receive("a broadcast", &mut incoming.controls).await;
    assert!(heard.from_broadcast && heard.from_baton && heard.durable.is_none());
    communicator.consume_control().await;
    let to_record = receive("its durable copy", &mut incoming.controls).await;
    assert_eq!((&to_record.control, &to_record.message_id), (&pause, &heard.message_id));
    to_record.durable.unwrap().ack().await;
}

#[tokio::test]
async fn after_the_last_handle_is_dropped_no_message_arrives() {
    let (communicator, mut incoming) = start(&Broker::InProcess, "w1", Some(OWN)).await;
    drop(communicator);
    eventually("the channel is closed", async || (incoming.tasks.recv().await.is_none(), ())).await;
}
