//! The communicator against a real RabbitMQ and against the broker in memory.
//!
//! Tests that need a broker take its URL from `BATON_TEST_AMQP` and its management API from `BATON_TEST_MANAGEMENT`;
//! each creates its own virtual host. The restart test starts its own broker.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod amqp;
mod broker;
mod dead;
mod faults;
mod in_process;

use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::{Broker, Communicator, Delivery, Incoming, Options, TaskMessage};
use baton_common::id::Pid;
use baton_common::message::Task;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout};

/// Time limit for each expected result.
const LIMIT: Duration = Duration::from_secs(20);

fn options(broker: Broker, name: &str, control_queue: Option<&str>) -> Options {
    Options {
        broker,
        name: name.to_owned(),
        control_queue: control_queue.map(str::to_owned),
        heartbeat: None,
        database: None,
    }
}

/// The log of a failed test, by `RUST_LOG`.
fn log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

async fn start(broker: &Broker, name: &str, control_queue: Option<&str>) -> (Communicator, Incoming) {
    log();
    let (communicator, incoming) = Communicator::start(options(broker.clone(), name, control_queue));
    communicator.wait_connected(LIMIT).await.unwrap();
    (communicator, incoming)
}

fn slots(n_slots: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(n_slots))
}

fn continue_task(pid: Pid) -> TaskMessage {
    TaskMessage { task: Task::Continue { pid, announced_at: Some(1) }, traceparent: None }
}

fn many(n_tasks: usize) -> (Vec<Pid>, Vec<TaskMessage>) {
    let pids: Vec<Pid> = (0..n_tasks).map(|_| Pid::generate()).collect();
    let tasks = pids.iter().map(|&pid| continue_task(pid)).collect();
    (pids, tasks)
}

async fn receive<T>(what: &str, rx: &mut mpsc::Receiver<T>) -> T {
    timeout(LIMIT, rx.recv()).await.unwrap_or_else(|_| panic!("{what} did not arrive")).expect("the channel is open")
}

async fn task(incoming: &mut Incoming) -> Delivery {
    receive("a task", &mut incoming.tasks).await
}

/// Repeats the probe until it succeeds. The panic at the time limit names the expectation and the last result.
async fn eventually<T: std::fmt::Debug>(what: &str, mut probe: impl AsyncFnMut() -> (bool, T)) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (holds, seen) = probe().await;
        if holds {
            return;
        }
        assert!(Instant::now() < deadline, "{what} did not come true; last seen: {seen:?}");
        sleep(Duration::from_millis(50)).await;
    }
}
