//! The communicator's thread: its runtime, its tasks, and the order in which they end.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ask::Ask;
use super::delivery::Settlement;
use super::health::{HealthState, Link};
use super::link::Dial;
use super::publish::{self, Job};
use super::wanted::Order;
use super::{Broker, ControlRequest, Delivery, Options, control, intake, memory, settle};
use crate::message::Event;

/// The ends of the channels between the thread and the rest of the program.
pub(super) struct Work {
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) jobs_tx: mpsc::Sender<Job>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) settlements: mpsc::Receiver<Settlement>,
    pub(super) settle_tx: mpsc::Sender<Settlement>,
    pub(super) tasks_tx: mpsc::Sender<Delivery>,
    pub(super) controls_tx: mpsc::Sender<ControlRequest>,
    pub(super) health: Arc<HealthState>,
    pub(super) stop: CancellationToken,
}

/// Starts the thread.
pub(super) fn start(options: Options, work: Work) -> std::thread::JoinHandle<()> {
    work.health.need(Link::Publish);
    work.health.need(Link::Control);
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the operating system provides file descriptors for a runtime");
        runtime.block_on(run(options, work));
    };
    std::thread::Builder::new()
        .name("baton-communicator".to_owned())
        .spawn(run)
        .expect("the operating system provides a thread")
}

async fn run(options: Options, work: Work) {
    match options.broker {
        Broker::InProcess => run_in_process(options.control_queue, work).await,
        Broker::Amqp(ref urls) => {
            let urls = urls.clone();
            run_amqp(options, urls, work).await;
        }
    }
}

async fn run_in_process(own_queue: Option<String>, work: Work) {
    for link in [Link::Publish, Link::Control, Link::Consume] {
        work.health.up(link);
    }
    let Work { jobs, asks, orders, events, settlements, settle_tx, tasks_tx, controls_tx, .. } = work;
    let ends = memory::Ends { own_queue, jobs, events, asks, orders, settlements, tasks_tx, controls_tx, settle_tx };
    memory::run(ends, work.stop).await;
}

async fn run_amqp(options: Options, urls: Vec<String>, work: Work) {
    let Work { jobs, jobs_tx, asks, orders, events, settlements, settle_tx, tasks_tx, controls_tx, health, stop } =
        work;
    let Options { name, control_queue: own_queue, heartbeat, database, broker: _ } = options;
    let dial = Arc::new(Dial::new(urls, name, heartbeat, database, Arc::clone(&health)));
    let close = dial.close.clone();
    let control = control::Ends { own_queue, asks, controls_tx: controls_tx.clone(), publish_tx: jobs_tx.clone() };
    let intake = intake::Ends { orders, tasks_tx, controls_tx, settle_tx, publish_tx: jobs_tx.clone() };
    let mut connections = JoinSet::new();
    connections.spawn(publish::run(Arc::clone(&dial), jobs, events));
    connections.spawn(control::run(Arc::clone(&dial), control));
    connections.spawn(intake::run(dial, intake));
    // The shutdown order: settle, which needs the connections; then publish and reply what waits; then close.
    settle::run(settlements, jobs_tx, &health, stop).await;
    close.cancel();
    while let Some(ended) = connections.join_next().await {
        if let Err(error) = ended {
            tracing::error!("a connection of the communicator panicked: {error}");
        }
    }
}
