//! One incarnation of a worker: from its row in the database to its drain, or until it is declared gone.
//!
//! Incarnations share nothing. The order of the end: stop taking, checkpoint and give back the held processes, settle
//! deliveries, leave the table of workers, close.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::{self, Communicator, Incoming};
use baton_common::id::Incarnation as Id;
use baton_common::store::worker::NewWorker;
use baton_common::store::writer::Writer;
use baton_common::store::{self, Store};
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::author::clock::Clock;
use crate::author::facilities::{Facilities, Identity};
use crate::author::live::Drain;
use crate::builtin;
use crate::builtin::program::Local;
use crate::execution::gate::Gate;
use crate::execution::lease::{Lease, TRUST};
use crate::execution::lease_table::LeaseTable;
use crate::execution::run::Execution;
use crate::execution::thread::Thread;
use crate::execution::timer::Timer;
use crate::intake::backoff::Backoff;
use crate::intake::broker::{self, Intake};
use crate::intake::claims::Claims;
use crate::intake::control::{self, Handler};
use crate::intake::heads::Heads;
use crate::intake::quarantine::{self, Quarantine};
use crate::intake::{database, sites};
use crate::lifecycle::heartbeat::{self, Heartbeat};
use crate::lifecycle::peers::{self, FailureDetector};
use crate::lifecycle::probing::{self, Probing};
use crate::lifecycle::sweeps::Sweeps;
use crate::lifecycle::worker::Options;
use crate::local::user::User;
use crate::local::{self, Programs};
use crate::machine::SELF;
use crate::machine::clock::boottime_ms;
use crate::machine::shortage::Health;
use crate::outbox::{self, Outbox, TaskMessages};
use crate::site::{self, Sites, sharing};

/// How long to wait for the threads to end; after that a blocked thread is abandoned.
const THREADS_LIMIT: Duration = Duration::from_secs(2);

/// Time limit of the last write to the worker's row.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// How long a process may take beyond the grace to end its program.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(10);

/// How an incarnation ended.
pub(crate) enum Ended {
    /// It gave its processes back.
    Drained,
    /// It was declared gone.
    Gone,
}

/// The task queues of a queue: one for each priority class.
fn classes(queue: &str) -> [String; 3] {
    [format!("{queue}.high"), queue.to_owned(), format!("{queue}.low")]
}

/// Runs one incarnation until it is drained or gone. `drain` is cancelled to end it.
pub(crate) async fn run(
    options: &Options,
    user: Option<Arc<User>>,
    drain: CancellationToken,
    hurry: CancellationToken,
) -> Result<Ended, Error> {
    let me = Id::generate();
    let sent_at = boottime_ms();
    let row = NewWorker {
        name: options.name.clone(),
        host: options.host.clone(),
        os_pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        queues: options.queues.clone(),
        slots: options.slots,
        sites: options.sites.keys().cloned().collect(),
    };
    options.store.register(me, &row).await?;
    let mut tasks = JoinSet::new();
    let (wires, receivers) = Wires::open(options, me, &mut tasks).await?;
    let lease = Arc::new(Lease::new(sent_at));
    let programs = Programs::start(PathBuf::from(SELF), lease.renewals(), TRUST)?;
    let local = Arc::new(Local { programs, health: Arc::clone(&wires.health), user });
    let execution = Arc::new(execution(options, &wires, &local, lease)?);
    let threads = (0..options.threads).map(Thread::start).collect::<Result<Vec<_>, _>>().map_err(Error::Thread)?;
    let mut incarnation = Incarnation {
        wires,
        execution,
        local,
        threads: Arc::new(threads),
        drain,
        gone: CancellationToken::new(),
        tasks,
        stop: CancellationToken::new(),
    };
    incarnation.start(receivers).await;
    info!(worker = options.name, incarnation = %me, queues = options.queues.join(","), slots = options.slots, "worker ready");
    let ended = tokio::select! {
        () = incarnation.drain.cancelled() => Ended::Drained,
        () = incarnation.gone.cancelled() => Ended::Gone,
    };
    match ended {
        Ended::Drained => incarnation.drain(&hurry).await,
        Ended::Gone => incarnation.abandon().await,
    }
    Ok(ended)
}

/// The connections and shared state of an incarnation.
struct Wires {
    identity: Arc<Identity>,
    store: Store,
    writer: Writer,
    communicator: Communicator,
    outbox: Arc<Outbox>,
    /// The queues that the worker serves, with all priority classes.
    queues: Arc<[String]>,
    slots: Arc<Semaphore>,
    health: Arc<Health>,
}

/// The receivers of the channels, for the loops that read them.
struct Receivers {
    incoming: Incoming,
    told: TaskMessages,
}

impl Wires {
    async fn open(options: &Options, me: Id, tasks: &mut JoinSet<()>) -> Result<(Self, Receivers), Error> {
        let store = options.store.clone();
        let slots = Arc::new(Semaphore::new(usize::try_from(options.slots).unwrap_or(usize::MAX >> 4)));
        let (writer, writing) = Writer::new(&store, me, &slots).await?;
        tasks.spawn(writing);
        let (communicator, incoming) = Communicator::start(communicator::Options {
            broker: options.broker.clone(),
            name: format!("baton-worker {}", options.name),
            control_queue: Some(communicator::control_queue(&options.name, me)),
            heartbeat: None,
            database: Some(store.identity().await?),
        });
        let identity = Arc::new(Identity { me, name: options.name.clone(), host: options.host.clone() });
        let (outbox, told) = Outbox::new(Arc::clone(&identity), communicator.clone());
        let wires = Self {
            identity,
            store,
            writer,
            communicator,
            outbox: Arc::new(outbox),
            queues: options.queues.iter().flat_map(|queue| classes(queue)).collect(),
            slots,
            health: Arc::default(),
        };
        Ok((wires, Receivers { incoming, told }))
    }
}

/// The parts that the processes of an incarnation share.
fn execution(options: &Options, wires: &Wires, local: &Arc<Local>, lease: Arc<Lease>) -> Result<Execution, Error> {
    let blocking = Handle::current();
    let common = site::Common {
        me: wires.identity.me,
        store: wires.store.clone(),
        objects: options.objects.clone(),
        outbox: Arc::clone(&wires.outbox),
        queues: Arc::clone(&wires.queues),
        blocking: blocking.clone(),
    };
    let sites = Arc::new(Sites::new(&options.sites, &options.ssh, &common).map_err(Error::Sites)?);
    let facilities = Facilities {
        identity: Arc::clone(&wires.identity),
        root: options.root.clone(),
        grace: options.grace,
        blocking,
        clock: Clock::System,
        writer: Some(wires.writer.clone()),
        sites: Arc::clone(&sites) as _,
    };
    let quarantine_free = Arc::new(Notify::new());
    let gate = Gate::new(
        wires.communicator.clone(),
        Arc::clone(&wires.queues),
        Arc::clone(&wires.slots),
        Arc::clone(&wires.health),
        Arc::clone(&quarantine_free),
    );
    Ok(Execution {
        facilities: Arc::new(facilities),
        limits: options.limits,
        registry: builtin::registry(&options.registry, local, &sites),
        store: wires.store.clone(),
        writer: wires.writer.clone(),
        sites,
        outbox: Arc::clone(&wires.outbox),
        gate: Arc::new(gate),
        health: Arc::clone(&wires.health),
        leases: Arc::new(LeaseTable::default()),
        lease,
        timer: Arc::new(Timer::default()),
        quarantine_free,
    })
}

/// The parts of an incarnation that end in a fixed order.
struct Incarnation {
    wires: Wires,
    execution: Arc<Execution>,
    local: Arc<Local>,
    threads: Arc<Vec<Thread>>,
    /// Cancelled to drain the worker.
    drain: CancellationToken,
    /// Cancelled when this incarnation was declared gone.
    gone: CancellationToken,
    tasks: JoinSet<()>,
    stop: CancellationToken,
}

impl Incarnation {
    async fn start(&mut self, receivers: Receivers) {
        let Receivers { incoming: Incoming { tasks: deliveries, controls }, told } = receivers;
        let (heads, backoff, beat_now): (Arc<Heads>, Arc<Backoff>, Arc<Notify>) = Default::default();
        let claims = self.claims();
        let detector = Arc::new(self.detector(&heads));
        self.tasks.spawn(outbox::publish(self.wires.communicator.clone(), told));
        self.tasks.spawn(broker::run(Arc::new(self.intake(&claims, heads, &backoff)), deliveries));
        self.tasks.spawn(control::run(Arc::new(self.handler(backoff, &beat_now)), controls));
        peers::take_up_own(&detector).await;
        self.until_stop(Box::pin(heartbeat::run(self.heartbeat(&beat_now))));
        self.until_stop(Box::pin(Arc::clone(&detector.sweeps).run()));
        self.until_stop(Box::pin(quarantine::run(Arc::clone(&claims))));
        if !self.wires.store.is_embedded() {
            self.until_stop(Box::pin(peers::run(detector)));
            self.until_stop(Box::pin(database::run(Arc::clone(&claims), self.wires.communicator.clone())));
        }
        // Processes with files are taken only if the object store is the fleet's.
        let sites = Arc::clone(&self.execution.sites);
        sites.sharing.look(&sites).await;
        self.until_stop(Box::pin(sharing::run(Arc::clone(&sites))));
        for site in sites.all() {
            self.until_stop(Box::pin(sites::run(Arc::clone(&claims), Arc::clone(site))));
        }
        let probing = self.probing(beat_now);
        probing::look_once(&probing).await;
        self.until_stop(Box::pin(probing::run(probing)));
        self.execution.gate.take_what_it_can().await;
    }

    fn until_stop(&mut self, task: BoxFuture<'static, ()>) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(task).await;
        });
    }

    fn claims(&self) -> Arc<Claims> {
        Arc::new(Claims {
            execution: Arc::clone(&self.execution),
            threads: Arc::clone(&self.threads),
            slots: Arc::clone(&self.wires.slots),
            queues: Arc::clone(&self.wires.queues),
            quarantine: Quarantine::new(Arc::clone(&self.execution.quarantine_free)),
        })
    }

    fn intake(&self, claims: &Arc<Claims>, heads: Arc<Heads>, backoff: &Arc<Backoff>) -> Intake {
        Intake {
            claims: Arc::clone(claims),
            communicator: self.wires.communicator.clone(),
            heads,
            backoff: Arc::clone(backoff),
            health: Arc::clone(&self.wires.health),
            drain: self.drain.clone(),
        }
    }

    fn handler(&self, backoff: Arc<Backoff>, beat_now: &Arc<Notify>) -> Handler {
        Handler {
            identity: Arc::clone(&self.wires.identity),
            store: self.wires.store.clone(),
            communicator: self.wires.communicator.clone(),
            outbox: Arc::clone(&self.wires.outbox),
            leases: Arc::clone(&self.execution.leases),
            threads: Arc::clone(&self.threads),
            backoff,
            blocking: self.execution.facilities.blocking.clone(),
            drain: self.drain.clone(),
            beat_now: Arc::clone(beat_now),
        }
    }

    fn detector(&self, heads: &Arc<Heads>) -> FailureDetector {
        let sweeps = Sweeps {
            store: self.wires.store.clone(),
            communicator: self.wires.communicator.clone(),
            outbox: Arc::clone(&self.wires.outbox),
            queues: Arc::clone(&self.wires.queues),
            heads: Arc::clone(heads),
            timer: Arc::clone(&self.execution.timer),
        };
        FailureDetector {
            identity: Arc::clone(&self.wires.identity),
            store: self.wires.store.clone(),
            communicator: self.wires.communicator.clone(),
            sweeps: Arc::new(sweeps),
        }
    }

    fn heartbeat(&self, beat_now: &Arc<Notify>) -> Heartbeat {
        Heartbeat {
            identity: Arc::clone(&self.wires.identity),
            store: self.wires.store.clone(),
            writer: self.wires.writer.clone(),
            communicator: self.wires.communicator.clone(),
            outbox: Arc::clone(&self.wires.outbox),
            gate: Arc::clone(&self.execution.gate),
            health: Arc::clone(&self.wires.health),
            leases: Arc::clone(&self.execution.leases),
            lease: Arc::clone(&self.execution.lease),
            threads: Arc::clone(&self.threads),
            drain: self.drain.clone(),
            gone: self.gone.clone(),
            beat_now: Arc::clone(beat_now),
        }
    }

    fn probing(&self, beat_now: Arc<Notify>) -> Probing {
        Probing {
            root: self.execution.facilities.root.clone(),
            local: Arc::clone(&self.local),
            health: Arc::clone(&self.wires.health),
            gate: Arc::clone(&self.execution.gate),
            beat_now,
        }
    }

    /// Gives the held processes back, and ends those that exceed the grace.
    async fn drain(self, hurry: &CancellationToken) {
        let held = &self.execution.leases;
        info!(held = held.count(), grace_s = self.execution.facilities.grace.as_secs(), "draining");
        self.execution.gate.take_nothing_more().await;
        held.drain(Drain::Soon);
        tokio::select! {
            _ = held.emptied(self.execution.facilities.grace) => {}
            () = hurry.cancelled() => {}
        }
        held.drain(Drain::Now);
        tokio::select! {
            _ = held.emptied(self.execution.facilities.grace + CLEAN_UP_LIMIT) => {}
            // Without the database nothing can be given back, and by then the shims have ended the programs.
            () = self.execution.lease.distrusted() => {}
            () = hurry.cancelled() => {
                held.drain(Drain::AtOnce);
                tokio::select! {
                    _ = held.emptied(CLEAN_UP_LIMIT) => {}
                    () = self.execution.lease.distrusted() => {}
                }
            }
        }
        let left = held.count();
        if left > 0 {
            let is_away = !self.execution.lease.is_trusted(boottime_ms());
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

    /// Drops everything: other workers take the processes over.
    async fn abandon(self) {
        let dropped = self.execution.leases.abandon_all();
        warn!(
            incarnation = %self.wires.identity.me,
            processes = dropped,
            "this incarnation was declared gone: stopping its processes and their programs without further writes"
        );
        self.execution.gate.take_nothing_more().await;
        self.end().await;
    }

    async fn end(mut self) {
        self.stop.cancel();
        self.execution.sites.close().await;
        let emptied = self.execution.leases.count() == 0;
        let leaving = tokio::time::timeout(LEAVE_LIMIT, self.execution.store.leave(self.wires.identity.me));
        if emptied && !matches!(leaving.await, Ok(Ok(()))) {
            debug!("deregistration failed; the lease will expire");
        }
        // Flushes events and announcements, then closes the channels that the tasks read.
        self.wires.communicator.shutdown().await;
        self.tasks.shutdown().await;
        if let Ok(threads) = Arc::try_unwrap(self.threads) {
            for thread in threads {
                if !thread.stop(THREADS_LIMIT).await {
                    warn!("a process blocks its thread; abandoning the thread");
                }
            }
        }
    }
}

/// Why a worker cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database does not answer or refuses.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The operating system refused a thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// The limit of open files is too low.
    #[error(transparent)]
    OpenFiles(std::io::Error),
    /// The configuration of a site is wrong.
    #[error("{0}")]
    Sites(String),
    /// Local programs cannot run.
    #[error("cannot run local programs")]
    Programs(#[from] local::Error),
}

impl Error {
    /// Whether a retry can succeed without a person.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Error::Store(error) if error.is_transient())
    }
}
