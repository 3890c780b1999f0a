//! The communicator: one OS thread with its own runtime, and the only place that speaks AMQP.
//!
//! The rest of a program holds a [`Communicator`], a handle that any runtime can use: every method puts a command into
//! a bounded channel and waits for the answer. Behind it is RabbitMQ over three connections (consume, publish, control)
//! or a broker in memory; callers cannot tell which. An absent broker is no error at the start: the thread connects in
//! the background for ever, and what cannot wait is answered with [`Down`].

mod check;
mod control;
pub mod dead;
mod delivery;
mod envelope;
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
mod weighted_round_robin;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::control::{Ask, encode_reply};
use self::envelope::Envelope;
use self::health::{HealthState, Link};
use self::intake::Order;
use self::link::ANSWER_LIMIT;
use self::publish::{Job, Target};
use crate::message::{Control, Event, Reply, SIZE_BYTES_MAX, Task, Traffic};

pub use self::delivery::{ControlRequest, Delivery, ReplyTo, Settle};

/// How a communicator is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which broker.
    pub broker: Broker,
    /// Who this is, as operators see it in the names of connections and consumers: `baton-worker w1`.
    pub name: String,
    /// The exclusive queue of a worker ([`control_queue`]); a program that is asked nothing has none.
    pub control_queue: Option<String>,
    /// The heartbeat that is asked of the broker; `?heartbeat=` in the URL wins. Ten seconds by default.
    pub heartbeat: Option<Duration>,
    /// The identity of the database whose processes the messages are about. A virtual host that belongs to another one is not
    /// used; `None` does not ask.
    pub database: Option<Uuid>,
}

/// Where messages go.
#[derive(Clone, Debug)]
pub enum Broker {
    /// A broker in this program's memory, for one worker and its controller in one program.
    InProcess,
    /// RabbitMQ: `amqp://` or `amqps://` URLs of one cluster, tried in turn.
    Amqp(Vec<String>),
}

/// What comes in.
#[derive(Debug)]
pub struct Incoming {
    /// Tasks, each with a slot; only after [`Communicator::consume`].
    pub tasks: mpsc::Receiver<Delivery>,
    /// Requests to the worker's control queue, broadcasts, and what [`Communicator::consume_control`] takes.
    pub controls: mpsc::Receiver<ControlRequest>,
}

/// A task to publish.
#[derive(Clone, Debug)]
pub struct TaskMessage {
    /// The message.
    pub task: Task,
    /// The W3C trace context of whoever sends it.
    pub traceparent: Option<String>,
}

/// How the broker is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Every connection that this program needs is open.
    pub connected: bool,
    /// A connection that this program needs could not be opened, or has ended, and is not open again.
    pub unreachable: bool,
    /// The broker accepts no messages: memory or disk alarm.
    pub blocked: bool,
    /// What went wrong last and has not gone right since, in one line without any password.
    pub last_error: Option<String>,
}

/// The broker is not there, or does not take messages; nothing was sent. The text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("broker unavailable: {0}")]
pub struct Down(pub String);

/// Why tasks were not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Some or all may have arrived. Telling again is right: whoever takes a task twice claims it once.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// Nothing was sent. Tell again when the broker is back.
    #[error(transparent)]
    Down(#[from] Down),
    /// The queue does not exist and could not be declared.
    #[error("queue {queue} takes no messages: {reason}")]
    Unroutable {
        /// The task queue's name, without the prefix.
        queue: String,
        /// What the broker said.
        reason: String,
    },
    /// A body is larger than any reader accepts; nothing was sent.
    #[error("{0} bytes are more than a message may have ({SIZE_BYTES_MAX})")]
    TooLarge(usize),
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is no such control queue: the worker has gone, or is reconnecting.
    #[error("control queue {0} does not exist")]
    Unroutable(String),
    /// No answer in time; the request may have been obeyed.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// See [`Down`].
    #[error(transparent)]
    Down(#[from] Down),
}

/// What a broker says about itself, for `baton doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerInfo {
    /// Its URL, without the password.
    pub url: String,
    /// Product and version: `RabbitMQ 3.10.8`.
    pub version: String,
    /// The cluster's name, if it says one.
    pub cluster: Option<String>,
}

/// Why a broker cannot be used. No text contains a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Correct the configuration.
    #[error("broker URL {url} cannot be used: {reason}")]
    BadUrl {
        /// The URL, its password masked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Start the broker, or correct host and port.
    #[error("broker {url} cannot be reached: {reason}")]
    Unreachable {
        /// As above.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// Correct user and password.
    #[error("broker {url} refuses the credentials of user {user}")]
    Credentials {
        /// As above.
        url: String,
        /// Who it would not let in.
        user: String,
    },
    /// Make the virtual host, or permit the user to use it.
    #[error("broker {url} gives no access to virtual host {vhost}: {reason}")]
    NoVhost {
        /// As above.
        url: String,
        /// Which one.
        vhost: String,
        /// What the broker said.
        reason: String,
    },
    /// Give each database a virtual host of its own.
    #[error("virtual host {vhost} of broker {url} belongs to another database, which has processes of its own")]
    OtherDatabase {
        /// As above.
        url: String,
        /// Which one.
        vhost: String,
    },
    /// The broker answered something else.
    #[error("broker {url} refuses the connection: {reason}")]
    Refused {
        /// As above.
        url: String,
        /// What it said.
        reason: String,
    },
    /// None of several hosts can be used.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    All(Vec<CheckError>),
}

impl CheckError {
    /// What all the attempts came to.
    fn of_all(mut errors: Vec<CheckError>) -> Self {
        match errors.pop() {
            None => CheckError::BadUrl { url: String::new(), reason: "no URL is configured".to_owned() },
            Some(only) if errors.is_empty() => only,
            Some(last) => {
                errors.push(last);
                CheckError::All(errors)
            }
        }
    }
}

/// Commands of one kind that wait for their connection. Senders wait for room, so this is only a cushion between two
/// turns of the communicator's thread.
const N_COMMANDS_MAX: usize = 256;

/// Settlements that wait: as many as a large worker has slots, so that settling hardly ever waits.
const N_SETTLEMENTS_MAX: usize = 1024;

/// State changes that wait. A burst of some thousand processes that end is kept; beyond that, or while the broker is
/// away, the newest are dropped, since whoever must know everything reads the database.
const N_EVENTS_MAX: usize = 4096;

/// Deliveries that wait for the worker. Each holds a slot, so it is the slots that bound them; a cushion is enough.
const N_DELIVERIES_MAX: usize = 64;

/// Control requests that wait for the worker; more wait on the broker.
const N_CONTROLS_MAX: usize = 64;

/// What each message of a batch may take beyond the limit for an answer.
const CONFIRM_TIME: Duration = Duration::from_millis(5);

/// Answers to one broadcast that wait for the asker: one a worker, and no fleet has more.
const N_ANSWERS_MAX: usize = 4096;

/// The handle. Clones are the same communicator; when the last one is dropped, it ends without a flush.
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

/// The name of a worker's exclusive control queue: the incarnation keeps a restarted worker apart from its former self.
pub fn control_queue(worker: &str, incarnation: crate::id::Incarnation) -> String {
    format!("baton.worker.{worker}.{}", incarnation.short())
}

impl Broker {
    /// One attempt to connect to each URL, to say of each what is wrong; in their order. `database` is as in [`Options`].
    pub async fn check(urls: &[String], database: Option<Uuid>) -> Vec<Result<BrokerInfo, CheckError>> {
        join_all(urls.iter().map(|url| check::check(url, database))).await
    }
}

impl Communicator {
    /// Starts the thread. Never fails for an absent broker.
    ///
    /// # Panics
    /// When the operating system gives no thread.
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

    /// Takes tasks from these queues from now on, and again whenever the broker was away.
    ///
    /// A queue stands for its three classes (`default` for `default.high`, `default` and `default.low`), which share
    /// 16:4:1. A delivery is taken only with a permit of `slots`; a worker without a free slot gives back what it has in
    /// hand after a second. Calling it again replaces queues and slots.
    pub async fn consume(&self, queues: Vec<String>, slots: Arc<Semaphore>) {
        self.order(Order::Consume { queues, slots }).await;
    }

    /// Also takes broadcasts from the durable queue `baton.control`; they arrive as [`ControlRequest`]s with
    /// `durable: Some(..)`, each at one worker only.
    pub async fn consume_control(&self) {
        self.order(Order::ConsumeControl).await;
    }

    /// Cancels every consumer of tasks and of `baton.control` and gives back what was not handed over yet.
    ///
    /// What already lies in [`Incoming`] is the caller's to settle ([`Settle::give_back`]). [`Communicator::consume`]
    /// begins again.
    pub async fn stop_consuming(&self) {
        let (done, is_done) = oneshot::channel();
        if self.shared.orders_tx.send(Order::Stop { done }).await.is_ok() {
            let _ = is_done.await;
        }
    }

    /// Publishes tasks to one queue, persistent and confirmed; the queue is declared if it is absent.
    ///
    /// # Errors
    /// See [`PublishError`]. All or nothing is not promised: after any error but `Down` and `TooLarge` some may have arrived.
    ///
    /// # Cancel safety
    /// Dropped half-way it is as [`PublishError::Unknown`].
    pub async fn publish(&self, queue: &str, tasks: Vec<TaskMessage>) -> Result<(), PublishError> {
        if tasks.is_empty() {
            return Ok(());
        }
        let messages: Vec<Envelope> =
            tasks.into_iter().map(|told| Envelope::task(&told.task, told.traceparent)).collect();
        if let Some(message) = messages.iter().find(|message| message.body.len() > SIZE_BYTES_MAX) {
            return Err(PublishError::TooLarge(message.body.len()));
        }
        // A broker that is busy with others confirms some hundreds a second.
        let n_messages = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + ANSWER_LIMIT + CONFIRM_TIME * n_messages;
        let (done, outcome) = oneshot::channel();
        let job = Job { target: Target::Task(queue.to_owned()), messages, deadline, done };
        match timeout_at(deadline, self.shared.jobs_tx.send(job)).await {
            Ok(Ok(())) => outcome.await.unwrap_or_else(|_| Err(PublishError::Unknown(GONE.to_owned()))),
            Ok(Err(_)) => Err(Down(ENDED.to_owned()).into()),
            Err(_) => Err(Down("too much is being published already".to_owned()).into()),
        }
    }

    /// Asks the owner of a control queue and waits for its answer.
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

    /// Whether a control queue exists, asked with a mandatory ping that nobody answers.
    ///
    /// # Errors
    /// [`Down`] when the broker gave no answer: that says nothing about the queue.
    pub async fn ping(&self, control_queue: &str) -> Result<bool, Down> {
        let envelope = Envelope::control(&Control::Ping);
        self.ask(|done| Ask::Ping { queue: control_queue.to_owned(), envelope, done }).await?
    }

    /// For how long the control connection has been open; `None` while it is not.
    pub fn control_connected_for(&self) -> Option<Duration> {
        self.shared.health.up_for(Link::Control)
    }

    /// Sends a control message to every worker; it lands in `baton.control` as well. The answers come in as workers give
    /// them, for as long as the receiver is kept; it ends with the connection.
    ///
    /// # Errors
    /// [`Down`]; whether it has arrived is then unknown.
    pub async fn broadcast(&self, control: Control) -> Result<mpsc::Receiver<Reply>, Down> {
        let envelope = Envelope::control(&control);
        let (replies, answers) = mpsc::channel(N_ANSWERS_MAX);
        self.ask(|done| Ask::Broadcast { envelope, replies, done }).await??;
        Ok(answers)
    }

    /// Says a change of state to whoever listens. Never waits, and is lost when the broker is away for long.
    pub fn announce(&self, event: Event) {
        // A full buffer means that the broker is away or slow; nobody's work waits for that.
        let _ = self.shared.events_tx.try_send(event);
    }

    /// Answers a launch or a request, from whichever program; `Ok` once the broker has it.
    ///
    /// # Errors
    /// [`Down`]; whether it has arrived is then unknown. Nobody waiting for the answer any more is no error.
    pub async fn reply(&self, to: &ReplyTo, reply: &Reply) -> Result<(), Down> {
        let body = encode_reply(reply, to.encoding());
        self.ask(|done| Ask::Reply { to: to.clone(), body, done }).await?
    }

    /// How many messages are ready in a task queue; none in a queue that does not exist.
    ///
    /// # Errors
    /// [`Down`] when the broker gave no answer.
    pub async fn depth(&self, queue: &str) -> Result<u64, Down> {
        self.ask(|done| Ask::Depth { queue: queue.to_owned(), done }).await?
    }

    /// Whether what is told to a task queue arrives here: it is consumed, and takes messages. What the broker in memory
    /// is told always arrives.
    pub fn delivers(&self, queue: &str) -> bool {
        self.shared.in_process || self.shared.health.delivers(&envelope::task_queue(queue))
    }

    /// What has gone over the connections since the start. The broker in memory counts nothing.
    pub fn traffic(&self) -> Traffic {
        self.shared.health.meter.read()
    }

    /// How the broker is now.
    pub fn health(&self) -> Health {
        self.shared.health.watch().borrow().clone()
    }

    /// How the broker is, whenever that changes.
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.shared.health.watch()
    }

    /// Waits until every connection that this program needs is open.
    ///
    /// # Errors
    /// [`Down`] with the last error when that takes longer than `limit`.
    pub async fn wait_connected(&self, limit: Duration) -> Result<(), Down> {
        let mut health = self.watch_health();
        let connected = timeout(limit, health.wait_for(|health| health.connected)).await;
        if matches!(connected, Ok(Ok(_))) {
            return Ok(());
        }
        let last_error = self.health().last_error;
        Err(Down(last_error.unwrap_or_else(|| format!("no connection within {} ms", limit.as_millis()))))
    }

    /// Stops taking, gives back what is in hand, sends what is still to be said, closes, and ends the thread.
    pub async fn shutdown(&self) {
        self.stop_consuming().await;
        self.shared.stop.cancel();
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the communicator's thread has panicked");
            }
        }
    }

    async fn order(&self, order: Order) {
        // Needed from this moment on, so that whoever waits for the connection next waits for this one, too.
        self.shared.health.need(Link::Consume);
        // A communicator that has ended consumes nothing any more.
        let _ = self.shared.orders_tx.send(order).await;
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Down> {
        let (done, answer) = oneshot::channel();
        match timeout(ANSWER_LIMIT, self.shared.asks_tx.send(ask(done))).await {
            Ok(Ok(())) => answer.await.map_err(|_| Down(GONE.to_owned())),
            Ok(Err(_)) => Err(Down(ENDED.to_owned())),
            Err(_) => Err(Down("too much is being asked already".to_owned())),
        }
    }
}

/// What is said when the answer was lost with the connection.
const GONE: &str = "the connection was lost";

/// What is said after the shutdown.
const ENDED: &str = "the communicator has ended";
