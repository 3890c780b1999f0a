//! The communicator: one OS thread with its own runtime, and the only code that speaks AMQP.
//!
//! The rest of a program holds a [`Communicator`], a handle for any runtime: each method sends a command over a bounded
//! channel and waits for the answer. The thread uses RabbitMQ over three connections (consume, publish, control), or a
//! broker in memory; callers cannot tell which. An unreachable broker is no error at the start: the thread retries in
//! the background forever, and operations that cannot wait return [`Down`].

mod ask;
mod check;
mod control;
pub mod dead;
mod delivery;
mod envelope;
mod error;
mod guard;
mod health;
mod intake;
mod ledger;
mod link;
mod memory;
mod meter;
mod nesting;
mod ownership;
mod poison;
mod publish;
pub mod removal;
#[cfg(test)]
mod script;
mod settle;
mod source;
mod thread;
mod topology;
mod wanted;
mod weighted_round_robin;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::ask::{Ask, encode_reply};
use self::envelope::Envelope;
use self::health::{HealthState, Link};
use self::link::ANSWER_LIMIT;
use self::publish::{Job, Target};
use self::wanted::Order;
use crate::message::{Control, Event, Reply, SIZE_BYTES_MAX, Task, Traffic};

pub use self::delivery::{ControlRequest, Delivery, ReplyTo, Settle};
pub use self::error::{CheckError, Down, PublishError, RequestError};

/// The options of a communicator.
#[derive(Clone, Debug)]
pub struct Options {
    /// The broker.
    pub broker: Broker,
    /// The program's name in the names of connections and consumers: `baton-worker w1`.
    pub name: String,
    /// The exclusive control queue of a worker ([`control_queue`]); `None` for a program that takes no requests.
    pub control_queue: Option<String>,
    /// The AMQP heartbeat. `?heartbeat=` in the URL overrides it. Default: ten seconds.
    pub heartbeat: Option<Duration>,
    /// The identity of the database. A virtual host that belongs to another database is not used; `None` skips the
    /// check.
    pub database: Option<Uuid>,
}

/// The broker that messages go to.
#[derive(Clone, Debug)]
pub enum Broker {
    /// A broker in this program's memory, for a worker and a controller in one program.
    InProcess,
    /// RabbitMQ: `amqp://` or `amqps://` URLs of the nodes of one cluster, tried in turn.
    Amqp(Vec<String>),
}

/// The messages that arrive.
#[derive(Debug)]
pub struct Incoming {
    /// Tasks, each with a slot, after [`Communicator::consume`].
    pub tasks: mpsc::Receiver<Delivery>,
    /// Control messages: to the worker's own queue, by broadcast, and after [`Communicator::consume_control`] from the
    /// queue `baton.control`.
    pub controls: mpsc::Receiver<ControlRequest>,
}

/// A task to publish.
#[derive(Clone, Debug)]
pub struct TaskMessage {
    /// The message.
    pub task: Task,
    /// The W3C trace context of the sender.
    pub traceparent: Option<String>,
}

/// The health of the connections to the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Whether every connection that this program needs is open.
    pub connected: bool,
    /// Whether a connection that this program needs could not be opened, or was lost and is not open again.
    pub unreachable: bool,
    /// Whether the broker blocks publishers because of a memory or disk alarm.
    pub blocked: bool,
    /// The last problem that persists, in one line, without a password.
    pub last_error: Option<String>,
}

/// What a broker reports about itself, for `baton doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerInfo {
    /// Its URL, without the password.
    pub url: String,
    /// Product and version: `RabbitMQ 3.10.8`.
    pub version: String,
    /// The cluster's name, if the broker reports one.
    pub cluster: Option<String>,
}

/// Most commands of one kind that wait for their connection. Senders wait for capacity, so this only buffers between
/// two turns of the communicator's thread.
const N_COMMANDS_MAX: usize = 256;

/// Most settlements that wait: the slots of a large worker, so that settling rarely waits.
const N_SETTLEMENTS_MAX: usize = 1024;

/// Most events that wait. A burst of some thousand ends is kept. Beyond that, or while the broker is away, the newest
/// events are dropped: a listener that needs them all reads the database.
const N_EVENTS_MAX: usize = 4096;

/// Most deliveries that wait for the worker. Each holds a slot, so the slots bound them; this is only a buffer.
const N_DELIVERIES_MAX: usize = 64;

/// Most control messages that wait for the worker; more wait on the broker.
const N_CONTROLS_MAX: usize = 64;

/// Additional time limit for each message of a batch. A loaded broker confirms some hundreds per second.
const CONFIRM_TIME: Duration = Duration::from_millis(5);

/// Most replies to one broadcast that wait for the sender: one per worker, and no fleet is larger.
const N_ANSWERS_MAX: usize = 4096;

/// The handle of a communicator. Clones share it; when the last one is dropped, the communicator ends without a flush.
#[derive(Clone, Debug)]
pub struct Communicator {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    jobs_tx: mpsc::Sender<Job>,
    asks_tx: mpsc::Sender<Ask>,
    orders_tx: mpsc::Sender<Order>,
    events_tx: mpsc::Sender<Event>,
    health: Arc<HealthState>,
    in_process: bool,
    stop: CancellationToken,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The name of a worker's exclusive control queue. The incarnation distinguishes a restarted worker from its previous
/// start.
pub fn control_queue(worker: &str, incarnation: crate::id::Incarnation) -> String {
    format!("baton.worker.{worker}.{}", incarnation.short())
}

impl Broker {
    /// Tries to connect to each URL once, and returns the results in the order of the URLs. `database` is as in
    /// [`Options`].
    pub async fn check(urls: &[String], database: Option<Uuid>) -> Vec<Result<BrokerInfo, CheckError>> {
        join_all(urls.iter().map(|url| check::check(url, database))).await
    }
}

impl Communicator {
    /// Starts the thread. An unreachable broker is no error.
    ///
    /// # Panics
    /// If the operating system cannot start a thread.
    pub fn start(options: Options) -> (Communicator, Incoming) {
        let (jobs_tx, jobs) = mpsc::channel(N_COMMANDS_MAX);
        let (asks_tx, asks) = mpsc::channel(N_COMMANDS_MAX);
        let (orders_tx, orders) = mpsc::channel(N_COMMANDS_MAX);
        let (events_tx, events) = mpsc::channel(N_EVENTS_MAX);
        let (settle_tx, settlements) = mpsc::channel(N_SETTLEMENTS_MAX);
        let (tasks_tx, tasks) = mpsc::channel(N_DELIVERIES_MAX);
        let (controls_tx, controls) = mpsc::channel(N_CONTROLS_MAX);
        let health = Arc::new(HealthState::new());
        let stop = CancellationToken::new();
        let work = thread::Work {
            jobs,
            jobs_tx: jobs_tx.clone(),
            asks,
            orders,
            events,
            settlements,
            settle_tx,
            tasks_tx,
            controls_tx,
            health: Arc::clone(&health),
            stop: stop.clone(),
        };
        let in_process = matches!(options.broker, Broker::InProcess);
        let thread = Mutex::new(Some(thread::start(options, work)));
        let shared = Shared { jobs_tx, asks_tx, orders_tx, events_tx, health, in_process, stop, thread };
        (Communicator { shared: Arc::new(shared) }, Incoming { tasks, controls })
    }

    /// Consumes these task queues from now on, and again after each loss of the connection.
    ///
    /// A queue includes its three classes (`default.high`, `default` and `default.low` for `default`), which share
    /// 16:4:1. A delivery needs a permit of `slots`. A worker without a free slot gives back its prefetched deliveries
    /// after a second. Another call replaces queues and slots.
    pub async fn consume(&self, queues: Vec<String>, slots: Arc<Semaphore>) {
        self.order(Order::Consume { queues, slots }).await;
    }

    /// Also consumes the durable queue `baton.control`. Its broadcasts arrive as [`ControlRequest`]s with `durable:
    /// Some(..)`, each at one worker only.
    pub async fn consume_control(&self) {
        self.order(Order::ConsumeControl).await;
    }

    /// Cancels every consumer of tasks and of `baton.control`, and gives back the deliveries that are not in
    /// [`Incoming`] yet.
    ///
    /// The caller settles those in [`Incoming`] ([`Settle::give_back`]). [`Communicator::consume`] consumes again.
    pub async fn stop_consuming(&self) {
        let (done, is_done) = oneshot::channel();
        if self.shared.orders_tx.send(Order::Stop { done }).await.is_ok() {
            let _ = is_done.await;
        }
    }

    /// Publishes tasks to one queue, persistent and with confirms. Declares the queue if it is absent.
    ///
    /// # Errors
    /// See [`PublishError`]. Publishing is not atomic: after any error but `Down` and `TooLarge` some tasks may have
    /// arrived.
    ///
    /// # Cancel safety
    /// The outcome of a dropped future is that of [`PublishError::Unknown`].
    pub async fn publish(&self, queue: &str, tasks: Vec<TaskMessage>) -> Result<(), PublishError> {
        if tasks.is_empty() {
            return Ok(());
        }
        let messages: Vec<Envelope> =
            tasks.into_iter().map(|message| Envelope::task(&message.task, message.traceparent)).collect();
        if let Some(message) = messages.iter().find(|message| message.body.len() > SIZE_BYTES_MAX) {
            return Err(PublishError::TooLarge(message.body.len()));
        }
        let n_messages = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + ANSWER_LIMIT + CONFIRM_TIME * n_messages;
        let (done, outcome) = oneshot::channel();
        let job = Job { target: Target::Task(queue.to_owned()), messages, deadline, done };
        match timeout_at(deadline, self.shared.jobs_tx.send(job)).await {
            Ok(Ok(())) => outcome.await.unwrap_or_else(|_| Err(PublishError::Unknown(GONE.to_owned()))),
            Ok(Err(_)) => Err(Down(ENDED.to_owned()).into()),
            Err(_) => Err(Down("too many publishes wait already".to_owned()).into()),
        }
    }

    /// Sends a control message to the owner of a control queue, and waits for the reply.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub async fn request(&self, control_queue: &str, control: Control, limit: Duration) -> Result<Reply, RequestError> {
        let envelope = Envelope::control(&control);
        let answer = self.ask(|done| Ask::Request { queue: control_queue.to_owned(), envelope, done });
        match timeout(limit, answer).await {
            Ok(answer) => answer?,
            Err(_) => Err(RequestError::TimedOut(limit)),
        }
    }

    /// Whether a control queue exists, determined by a mandatory ping without a reply.
    ///
    /// # Errors
    /// [`Down`] if the broker did not answer; then it is unknown whether the queue exists.
    pub async fn ping(&self, control_queue: &str) -> Result<bool, Down> {
        let envelope = Envelope::control(&Control::Ping);
        self.ask(|done| Ask::Ping { queue: control_queue.to_owned(), envelope, done }).await?
    }

    /// How long the control connection has been open; `None` if it is not open.
    pub fn control_connected_for(&self) -> Option<Duration> {
        self.shared.health.up_for(Link::Control)
    }

    /// Sends a control message to every worker, and to `baton.control`. The replies arrive at the receiver until it is
    /// dropped or the connection ends.
    ///
    /// # Errors
    /// [`Down`]; then it is unknown whether the message has arrived.
    pub async fn broadcast(&self, control: Control) -> Result<mpsc::Receiver<Reply>, Down> {
        let envelope = Envelope::control(&control);
        let (replies, answers) = mpsc::channel(N_ANSWERS_MAX);
        self.ask(|done| Ask::Broadcast { envelope, replies, done }).await??;
        Ok(answers)
    }

    /// Announces an event. Never waits; the event is lost if the broker is away for long.
    pub fn announce(&self, event: Event) {
        // A full buffer means that the broker is away or slow, and no process waits for that.
        let _ = self.shared.events_tx.try_send(event);
    }

    /// Sends a reply to a launch or a request, which may have arrived at another program. Returns once the broker has
    /// it.
    ///
    /// # Errors
    /// [`Down`]; then it is unknown whether the reply has arrived. A requester that no longer waits is no error.
    pub async fn reply(&self, to: &ReplyTo, reply: &Reply) -> Result<(), Down> {
        let body = encode_reply(reply, to.encoding());
        self.ask(|done| Ask::Reply { to: to.clone(), body, done }).await?
    }

    /// The number of ready messages in a task queue; 0 if the queue does not exist.
    ///
    /// # Errors
    /// [`Down`] if the broker did not answer.
    pub async fn depth(&self, queue: &str) -> Result<u64, Down> {
        self.ask(|done| Ask::Depth { queue: queue.to_owned(), done }).await?
    }

    /// Whether tasks published to a queue arrive here: this program consumes the queue, and the queue confirms
    /// messages. Always true for the broker in memory.
    pub fn delivers(&self, queue: &str) -> bool {
        self.shared.in_process || self.shared.health.delivers(&envelope::task_queue(queue))
    }

    /// The traffic of the connections since the start. The broker in memory counts nothing.
    pub fn traffic(&self) -> Traffic {
        self.shared.health.meter.read()
    }

    /// The current health of the connections.
    pub fn health(&self) -> Health {
        self.shared.health.watch().borrow().clone()
    }

    /// Watches the health of the connections.
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.shared.health.watch()
    }

    /// Waits until every connection that this program needs is open.
    ///
    /// # Errors
    /// [`Down`] with the last error if that takes longer than `limit`.
    pub async fn wait_connected(&self, limit: Duration) -> Result<(), Down> {
        let mut health = self.watch_health();
        let connected = timeout(limit, health.wait_for(|health| health.connected)).await;
        if matches!(connected, Ok(Ok(_))) {
            return Ok(());
        }
        let last_error = self.health().last_error;
        Err(Down(last_error.unwrap_or_else(|| format!("no connection within {} ms", limit.as_millis()))))
    }

    /// Stops consuming, gives back prefetched deliveries, sends what waits to be sent, closes the connections, and ends
    /// the thread.
    pub async fn shutdown(&self) {
        self.stop_consuming().await;
        self.shared.stop.cancel();
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the communicator's thread panicked");
            }
        }
    }

    async fn order(&self, order: Order) {
        // Needed from now on, so that a later `wait_connected` includes this connection.
        self.shared.health.need(Link::Consume);
        // A communicator that has ended takes no orders.
        let _ = self.shared.orders_tx.send(order).await;
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Down> {
        let (done, answer) = oneshot::channel();
        match timeout(ANSWER_LIMIT, self.shared.asks_tx.send(ask(done))).await {
            Ok(Ok(())) => answer.await.map_err(|_| Down(GONE.to_owned())),
            Ok(Err(_)) => Err(Down(ENDED.to_owned())),
            Err(_) => Err(Down("too many requests wait already".to_owned())),
        }
    }
}

/// The error when the answer was lost with the connection.
const GONE: &str = "the connection was lost";

/// The error after the shutdown.
const ENDED: &str = "the communicator has ended";
