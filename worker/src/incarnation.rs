//! One incarnation of a worker: from its row in the database to its end by a drain, or by being declared gone.
//!
//! Everything of an incarnation is made anew for the next one; nothing is shared. The order of its end: stop taking,
//! checkpoint and give back what is held, settle deliveries, leave the table of workers, close.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::communicator::{self, Communicator, Incoming, ReplyTo, Told};
use baton_common::id::{Incarnation as Id, Pid};
use baton_common::message::{Event, Reply, Task};
use baton_common::state::State;
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::submit::ByQueue;
use baton_common::store::worker::NewWorker;
use baton_common::store::writer::Writer;
use baton_common::store::{self, Store};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::held::Held;
use crate::lease::{Lease, TRUST};
use crate::live::Drain;
use crate::local::{self, Programs};
use crate::machine::SELF;
use crate::machine::clock::boottime_ms;
use crate::machine::shortage::Health;
use crate::registry::Registry;
use crate::setbacks::Setbacks;
use crate::site::{Sites, actor, sharing};
use crate::suspects::Suspects;
use crate::sweeps::Timer;
use crate::thread::Thread;
use crate::user::User;
use crate::worker::Options;
use crate::{beat, control, direct, intake, peers, probing, suspects, sweeps};

/// Messages that wait to be published. Each stands for a row that is queued already, so a full channel only slows down
/// whoever queues more.
const TELL_LENGTH: usize = 1024;

/// How long the end of the threads is awaited; a process that blocks its thread is left behind after that.
const THREADS_LIMIT: Duration = Duration::from_secs(2);

/// How long the row of a worker that stops may take to be written.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// How long a process may take beyond the grace to end what it runs.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(10);

/// What everything in an incarnation works with.
pub(crate) struct Shared {
    pub(crate) me: Id,
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) root: PathBuf,
    pub(crate) user: Option<Arc<User>>,
    pub(crate) grace: Duration,
    pub(crate) limits: Limits,
    /// The queues it serves, with all their classes.
    pub(crate) queues: Vec<String>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) registry: Registry,
    pub(crate) store: Store,
    pub(crate) writer: Writer,
    pub(crate) communicator: Communicator,
    pub(crate) programs: Programs,
    pub(crate) sites: Sites,
    pub(crate) held: Held,
    pub(crate) lease: Lease,
    pub(crate) timer: Timer,
    pub(crate) suspects: Suspects,
    pub(crate) setbacks: Setbacks,
    pub(crate) blocking: tokio::runtime::Handle,
    /// Cancelled to let the worker drain and end.
    pub(crate) drain: CancellationToken,
    /// Cancelled when somebody has declared this incarnation gone.
    pub(crate) gone: CancellationToken,
    /// Notified when a beat has something to learn.
    pub(crate) beat_now: Notify,
    /// What the worker's machine lacks.
    pub(crate) health: Health,
    takes_tasks: AtomicBool,
    halts: tokio::sync::Mutex<Halts>,
    heads: Mutex<HashMap<String, i64>>,
    tell: mpsc::Sender<(String, Told)>,
}

/// What keeps this worker from taking tasks, beside what its machine lacks; and what it takes.
#[derive(Default)]
struct Halts {
    is_ending: bool,
    is_database_away: bool,
    is_fleet_paused: bool,
    taking: Taking,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Taking {
    /// Neither tasks nor broadcasts that have to be recorded.
    #[default]
    Nothing,
    /// Broadcasts only.
    Orders,
    Everything,
}

/// What ends endless loops.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Advances that a process may make in all.
    pub advances_max: u64,
    /// Advances in a row that change neither its state nor its values nor its progress.
    pub idle_advances_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { advances_max: 1_000_000, idle_advances_max: 1_000 }
    }
}

impl Limits {
    /// Why a process with this checkpoint must not go on.
    pub(crate) fn broken_by(&self, checkpoint: &Checkpoint) -> Option<String> {
        if checkpoint.advances >= self.advances_max {
            return Some(format!("it has made {} advances, and more are not allowed", checkpoint.advances));
        }
        (checkpoint.idle_advances >= self.idle_advances_max)
            .then(|| format!("it has made {} advances in a row without any progress", checkpoint.idle_advances))
    }
}

/// How an incarnation ended.
pub(crate) enum Ended {
    /// It gave back what it held.
    Drained,
    /// Somebody declared it gone.
    Gone,
}

impl Shared {
    /// Publishes the `continue` of a row that has been queued.
    pub(crate) async fn tell(&self, pid: Pid, queue: String, told_at: i64) {
        let told = Told { task: Task::Continue { pid, told_at: Some(told_at) }, traceparent: None };
        // The channel is closed only when the incarnation ends; the head rule of another worker finds the row then.
        let _ = self.tell.send((queue, told)).await;
    }

    /// Publishes the messages of rows that a sweep or a request has queued.
    pub(crate) async fn tell_all(&self, queued: ByQueue) {
        for (queue, rows) in queued {
            for row in rows {
                let task = Task::Continue { pid: row.pid, told_at: Some(row.told_at) };
                let _ = self.tell.send((queue.clone(), Told { task, traceparent: row.traceparent })).await;
            }
        }
    }

    pub(crate) fn announce(&self, pid: Pid, state: State, exit: Option<i32>) {
        let at = system_micros();
        self.communicator.announce(Event { pid, state: state.word().to_owned(), at, by: self.name.clone(), exit });
    }

    /// Answers whoever waits for the end of a process.
    pub(crate) async fn answer_end(&self, pid: Pid, state: State, outcome: Option<&Outcome>, to: ReplyTo) {
        let reply = end_reply(pid, state, outcome);
        if let Err(error) = self.communicator.reply(&to, &reply).await {
            warn!(%pid, %error, "whoever waits for the end of this process could not be told");
        }
    }

    /// Notes that a task was delivered that was told at this time: what was told long before it has no message any more.
    pub(crate) fn note_head(&self, queue: &str, told_at: Option<i64>) {
        let Some(told_at) = told_at else { return };
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        let head = heads.entry(queue.to_owned()).or_insert(told_at);
        *head = (*head).max(told_at);
    }

    /// The largest `told_at` delivered from this queue.
    pub(crate) fn head(&self, queue: &str) -> Option<i64> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).get(queue).copied()
    }

    /// The database has answered a beat, which also says whether the fleet is paused.
    pub(crate) async fn has_database(&self, is_fleet_paused: bool) {
        let mut halts = self.halts.lock().await;
        (halts.is_database_away, halts.is_fleet_paused) = (false, is_fleet_paused);
        self.settle(&mut halts).await;
    }

    /// The database does not answer.
    pub(crate) async fn lacks_database(&self) {
        let mut halts = self.halts.lock().await;
        halts.is_database_away = true;
        self.settle(&mut halts).await;
    }

    /// The incarnation ends: it takes nothing more.
    async fn take_nothing_more(&self) {
        let mut halts = self.halts.lock().await;
        halts.is_ending = true;
        self.settle(&mut halts).await;
    }

    /// Begins or ends to take tasks, as the machine allows.
    pub(crate) async fn take_what_it_can(&self) {
        self.settle(&mut *self.halts.lock().await).await;
    }

    async fn settle(&self, halts: &mut Halts) {
        let taking = if halts.is_ending || halts.is_database_away {
            Taking::Nothing
        } else if halts.is_fleet_paused || self.health.stops_taking() {
            Taking::Orders
        } else {
            Taking::Everything
        };
        if std::mem::replace(&mut halts.taking, taking) == taking {
            return;
        }
        self.takes_tasks.store(taking == Taking::Everything, Ordering::Release);
        match taking {
            Taking::Nothing => self.communicator.stop_consuming().await,
            Taking::Orders => {
                self.communicator.stop_consuming().await;
                self.communicator.consume_control().await;
            }
            Taking::Everything => {
                self.communicator.consume(self.queues.clone(), Arc::clone(&self.slots)).await;
                self.communicator.consume_control().await;
                self.suspects.next();
            }
        }
    }

    /// Whether this worker takes tasks at the moment.
    pub(crate) fn takes_tasks(&self) -> bool {
        self.takes_tasks.load(Ordering::Acquire) && !self.health.stops_taking()
    }
}

/// The task queues that a queue's name stands for.
fn classes(queue: &str) -> [String; 3] {
    [format!("{queue}.high"), queue.to_owned(), format!("{queue}.low")]
}

/// What `execute` is answered with at the end.
pub(crate) fn end_reply(pid: Pid, state: State, outcome: Option<&Outcome>) -> Reply {
    Reply {
        pid: Some(pid),
        state: Some(state.word().to_owned()),
        exit: outcome.and_then(|outcome| outcome.exit),
        values: outcome.map(|outcome| serde_json::Value::Object(outcome.values.clone())),
        ..Reply::default()
    }
}

/// Runs one incarnation until it is drained or gone. `drain` is cancelled to end it.
pub(crate) async fn run(
    options: &Options,
    user: Option<Arc<User>>,
    drain: CancellationToken,
    hurry: CancellationToken,
) -> Result<Ended, Error> {
    let me = Id::generate();
    let store = options.store.clone();
    let sent_at = boottime_ms();
    store
        .register(
            me,
            &NewWorker {
                name: options.name.clone(),
                host: options.host.clone(),
                os_pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                queues: options.queues.clone(),
                slots: options.slots,
                sites: options.sites.keys().cloned().collect(),
            },
        )
        .await?;
    let slots = Arc::new(Semaphore::new(usize::try_from(options.slots).unwrap_or(usize::MAX >> 4)));
    let (writer, writing) = Writer::new(&store, me, &slots).await?;
    let (communicator, incoming) = Communicator::start(communicator::Options {
        broker: options.broker.clone(),
        name: format!("baton-worker {}", options.name),
        control_queue: Some(communicator::control_queue(&options.name, me)),
        heartbeat: None,
        database: Some(store.identity().await?),
    });
    let lease = Lease::new(sent_at);
    let programs = Programs::start(PathBuf::from(SELF), lease.renewals(), TRUST)?;
    let sites = Sites::new(&options.sites, &options.ssh, &store, &options.objects, me).map_err(Error::Sites)?;
    let (tell, told) = mpsc::channel(TELL_LENGTH);
    let threads = (0..options.threads).map(Thread::start).collect::<Result<Vec<_>, _>>().map_err(Error::Thread)?;
    let shared = Arc::new(Shared {
        me,
        name: options.name.clone(),
        host: options.host.clone(),
        root: options.root.clone(),
        user,
        grace: options.grace,
        limits: options.limits,
        queues: options.queues.iter().flat_map(|queue| classes(queue)).collect(),
        slots,
        registry: options.registry.clone(),
        store,
        writer,
        communicator,
        programs,
        sites,
        held: Held::default(),
        lease,
        timer: Timer::default(),
        suspects: Suspects::default(),
        setbacks: Setbacks::default(),
        blocking: tokio::runtime::Handle::current(),
        drain,
        gone: CancellationToken::new(),
        beat_now: Notify::new(),
        health: Health::default(),
        takes_tasks: AtomicBool::new(false),
        halts: tokio::sync::Mutex::default(),
        heads: Mutex::default(),
        tell,
    });
    let mut incarnation =
        Incarnation { shared, threads: Arc::new(threads), tasks: JoinSet::new(), stop: CancellationToken::new() };
    incarnation.tasks.spawn(writing);
    incarnation.start(incoming, told).await;
    info!(worker = options.name, incarnation = %me, queues = options.queues.join(","), slots = options.slots, "worker ready");
    let ended = tokio::select! {
        () = incarnation.shared.drain.cancelled() => Ended::Drained,
        () = incarnation.shared.gone.cancelled() => Ended::Gone,
    };
    match ended {
        Ended::Drained => incarnation.drain(&hurry).await,
        Ended::Gone => incarnation.abandon().await,
    }
    Ok(ended)
}

/// What has to be ended in order.
struct Incarnation {
    shared: Arc<Shared>,
    threads: Arc<Vec<Thread>>,
    tasks: JoinSet<()>,
    stop: CancellationToken,
}

impl Incarnation {
    async fn start(&mut self, incoming: Incoming, told: mpsc::Receiver<(String, Told)>) {
        let Incoming { tasks: deliveries, controls } = incoming;
        let shared = &self.shared;
        self.tasks.spawn(publish(Arc::clone(shared), told));
        self.tasks.spawn(intake::run(Arc::clone(shared), Arc::clone(&self.threads), deliveries));
        self.tasks.spawn(control::run(Arc::clone(shared), Arc::clone(&self.threads), controls));
        peers::take_up_own(shared).await;
        let until_stop = |task: futures_util::future::BoxFuture<'static, ()>| {
            let stop = self.stop.clone();
            async move {
                stop.run_until_cancelled(task).await;
            }
        };
        let beat = beat::run(Arc::clone(shared), Arc::clone(&self.threads));
        self.tasks.spawn(until_stop(Box::pin(beat)));
        self.tasks.spawn(until_stop(Box::pin(sweeps::run(Arc::clone(shared)))));
        self.tasks.spawn(until_stop(Box::pin(suspects::run(Arc::clone(shared), Arc::clone(&self.threads)))));
        if !shared.store.is_embedded() {
            self.tasks.spawn(until_stop(Box::pin(peers::run(Arc::clone(shared)))));
            let direct = direct::run(Arc::clone(shared), Arc::clone(&self.threads));
            self.tasks.spawn(until_stop(Box::pin(direct)));
        }
        // What has files is taken only where they are.
        shared.sites.sharing.look(shared).await;
        self.tasks.spawn(until_stop(Box::pin(sharing::run(Arc::clone(shared)))));
        for site in shared.sites.all() {
            let actor = actor::run(Arc::clone(shared), Arc::clone(&self.threads), Arc::clone(site));
            self.tasks.spawn(until_stop(Box::pin(actor)));
        }
        probing::look_once(shared).await;
        self.tasks.spawn(until_stop(Box::pin(probing::run(Arc::clone(shared)))));
        shared.take_what_it_can().await;
    }

    /// Gives back what is held, and ends what outlives the grace.
    async fn drain(self, hurry: &CancellationToken) {
        let held = &self.shared.held;
        info!(held = held.count(), grace_s = self.shared.grace.as_secs(), "draining");
        self.shared.take_nothing_more().await;
        held.drain(Drain::Soon);
        tokio::select! {
            _ = held.emptied(self.shared.grace) => {}
            () = hurry.cancelled() => {}
        }
        held.drain(Drain::Now);
        tokio::select! {
            _ = held.emptied(self.shared.grace + CLEAN_UP_LIMIT) => {}
            // Without the database nothing can be given back, and by then the shims have ended the programs.
            () = self.shared.lease.distrusted() => {}
            () = hurry.cancelled() => {
                held.drain(Drain::AtOnce);
                tokio::select! {
                    _ = held.emptied(CLEAN_UP_LIMIT) => {}
                    () = self.shared.lease.distrusted() => {}
                }
            }
        }
        let left = held.count();
        if left > 0 {
            let is_away = !self.shared.lease.is_trusted(boottime_ms());
            let blocked = self.threads.iter().filter(|thread| thread.blocked().is_some()).count();
            let cause = match (is_away, blocked) {
                (true, _) => "the database does not answer",
                (false, 1..) => "some of them block their thread",
                (false, 0) => "they did not end in time",
            };
            warn!(
                held = left,
                blocked, cause, "stopping with processes that could not be given back; other workers take them over"
            );
            if is_away {
                held.abandon_all();
                held.emptied(CLEAN_UP_LIMIT).await;
            }
        }
        self.end().await;
        info!("drained");
    }

    /// Drops everything: others have taken it over or will.
    async fn abandon(self) {
        let dropped = self.shared.held.abandon_all();
        warn!(
            incarnation = %self.shared.me,
            processes = dropped,
            "this incarnation was declared gone: it stops its processes and their programs, and writes nothing more for them"
        );
        self.shared.take_nothing_more().await;
        self.end().await;
    }

    async fn end(mut self) {
        self.stop.cancel();
        self.shared.sites.close().await;
        let emptied = self.shared.held.count() == 0;
        let leaving = tokio::time::timeout(LEAVE_LIMIT, self.shared.store.leave(self.shared.me));
        if emptied && !matches!(leaving.await, Ok(Ok(()))) {
            debug!("deregistration failed; the lease will expire");
        }
        // Flushes what was announced and told, then ends the channels that the tasks read.
        self.shared.communicator.shutdown().await;
        self.tasks.shutdown().await;
        if let Ok(threads) = Arc::try_unwrap(self.threads) {
            for thread in threads {
                if !thread.stop(THREADS_LIMIT).await {
                    warn!("a process blocks its thread; the thread is left behind");
                }
            }
        }
    }
}

/// Publishes what has been queued, in batches of whatever has gathered.
async fn publish(shared: Arc<Shared>, mut told: mpsc::Receiver<(String, Told)>) {
    let mut gathered = Vec::new();
    while told.recv_many(&mut gathered, TELL_LENGTH).await > 0 {
        let mut by_queue: BTreeMap<String, Vec<Told>> = BTreeMap::new();
        for (queue, told) in gathered.drain(..) {
            by_queue.entry(queue).or_default().push(told);
        }
        for (queue, tasks) in by_queue {
            let count = tasks.len();
            if let Err(error) = shared.communicator.tell(&queue, tasks).await {
                debug!(queue, count, %error, "not told; the head rule tells them again");
            }
        }
    }
}

/// Microseconds since 1970 by this host's clock; for events, which nobody decides by.
fn system_micros() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Why a worker cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The operating system gives no thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// The operating system lets it open too few files.
    #[error(transparent)]
    OpenFiles(std::io::Error),
    /// A site is not configured as it must be.
    #[error("{0}")]
    Sites(String),
    /// Local programs cannot be run.
    #[error("cannot run local programs")]
    Programs(#[from] local::Error),
}

impl Error {
    /// Whether the same can succeed later without a person.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Error::Store(error) if error.is_transient())
    }
}
