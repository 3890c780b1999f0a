//! The communicator against a real RabbitMQ and against the broker in memory.
//!
//! Tests that need a broker take its URL from `BATON_TEST_AMQP` and its management API from `BATON_TEST_MANAGEMENT`;
//! each makes a virtual host of its own. The restart test starts a broker of its own.

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

/// Longest wait for anything that must happen.
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

fn go_on(pid: Pid) -> TaskMessage {
    TaskMessage { task: Task::Continue { pid, announced_at: Some(1) }, traceparent: None }
}

fn many(n_tasks: usize) -> (Vec<Pid>, Vec<TaskMessage>) {
    let pids: Vec<Pid> = (0..n_tasks).map(|_| Pid::generate()).collect();
    let tasks = pids.iter().map(|&pid| go_on(pid)).collect();
    (pids, tasks)
}

async fn receive<T>(what: &str, rx: &mut mpsc::Receiver<T>) -> T {
    timeout(LIMIT, rx.recv()).await.unwrap_or_else(|_| panic!("{what} did not arrive")).expect("the channel is open")
}

async fn task(incoming: &mut Incoming) -> Delivery {
    receive("a task", &mut incoming.tasks).await
}

/// Asks again and again until it holds; a panic says what did not and what was seen last.
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
