//! The connection that consumes: takes tasks for free slots by weights, and broadcasts to be recorded.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::FuturesUnordered;
use lapin::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::control::control_request;
use super::delivery::{Settlement, Ticket};
use super::envelope::{CONTROL_QUEUE, TASK_EXCHANGE, classes, task_queue};
use super::health::Link;
use super::link::{ANSWER_LIMIT, Backoff, Dial, UNREADABLE, close};
use super::poison;
use super::publish::Job;
use super::settle::put_aside;
use super::source::{Head, NotOpened, Opened, Plan, Seen, Source, look};
use super::topology::Item;
use super::weighted_round_robin::{WeightedRoundRobin, share_of};
use super::{ControlRequest, Delivery, Settle};
use crate::message::Task;

/// Deliveries of a queue of normal priority that are not acknowledged yet: no more than the worker has free slots. A
/// worker acknowledges after a commit, so this bounds the claims in one commit; beyond some hundreds nothing is gained, and
/// more would only keep tasks from others.
const PREFETCH_MAX: usize = 400;

/// Broadcasts to record, each one statement.
const PREFETCH_CONTROL: u16 = 16;

/// How long a worker without a free slot keeps what it has in hand before others shall have it.
const FULL_LIMIT: Duration = Duration::from_secs(1);

/// How long a worker that was full gathers free slots. Taken one by one as they become free, short tasks would be claimed
/// one by one, each with a commit; a backlog does not notice the pause, and without one nobody is full.
const GATHER_PAUSE: Duration = Duration::from_millis(2);

/// So many deliveries that were handed over at once are a crowd, and for so long the next ones gather then: each that is
/// handed over by itself wakes two threads, and claims of a crowd wait for each other in any case.
const CROWD: usize = 8;
const CROWD_PAUSE: Duration = Duration::from_millis(5);

/// It does not gather more than this part of its slots, nor more than so many.
const GATHER_SHARE: usize = 8;
const GATHER_MAX: usize = 32;

/// How often it is looked at whether messages wait that a consumer should have had. Twice in a row makes a new one;
/// three small requests per worker and interval cost the broker nothing.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How long a connection is kept although the host has no leader for a queue, from the second such in a row on. A host that
/// is cut off is left at once; a queue that has no leader anywhere shall not make the others come and go for ever.
const PATIENCE_MIN: Duration = Duration::from_secs(30);
const PATIENCE_MAX: Duration = Duration::from_secs(600);

/// What the intake can be told.
pub(super) enum Order {
    Consume { queues: Vec<String>, slots: Arc<Semaphore> },
    ConsumeControl,
    Stop { done: oneshot::Sender<()> },
}

/// The ends of channels that this connection works on.
pub(super) struct Ends {
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) tasks_tx: mpsc::Sender<Delivery>,
    pub(super) controls_tx: mpsc::Sender<ControlRequest>,
    pub(super) settle_tx: mpsc::Sender<Settlement>,
    pub(super) publish_tx: mpsc::Sender<Job>,
}

/// What shall be consumed; it outlives connections.
#[derive(Default)]
pub(super) struct Wanted {
    pub(super) queues: Vec<String>,
    pub(super) slots: Option<Arc<Semaphore>>,
    /// The most of them that were seen free.
    n_slots: usize,
    pub(super) control: bool,
}

impl Wanted {
    fn is_nothing(&self) -> bool {
        self.queues.is_empty() && !self.control
    }

    /// How many deliveries of a queue of normal priority there is room for now.
    fn room(&self) -> u16 {
        let free = self.slots.as_ref().map_or(0, |slots| slots.available_permits());
        u16::try_from(free.clamp(1, PREFETCH_MAX)).expect("some hundreds at most")
    }

    /// Whether fewer slots are free than a worker gathers that was full.
    fn is_gathering(&self) -> bool {
        let free = self.slots.as_ref().map_or(0, |slots| slots.available_permits());
        free + 1 < (self.n_slots / GATHER_SHARE).min(GATHER_MAX)
    }

    pub(super) fn apply(&mut self, order: Order) -> Option<oneshot::Sender<()>> {
        match order {
            Order::Consume { queues, slots } => {
                let mut names: Vec<String> = queues.iter().flat_map(|queue| classes(queue)).collect();
                names.sort_unstable();
                names.dedup();
                self.queues = names;
                self.n_slots = slots.available_permits().max(self.n_slots);
                self.slots = Some(slots);
                None
            }
            Order::ConsumeControl => {
                self.control = true;
                None
            }
            Order::Stop { done } => {
                *self = Wanted::default();
                Some(done)
            }
        }
    }
}

/// Keeps the connection from the first order on, until it shall be closed.
pub(super) async fn run(dial: Arc<Dial>, mut ends: Ends) {
    let mut wanted = Wanted::default();
    let mut backoff = Backoff::new();
    let mut patience = Duration::ZERO;
    while wanted.is_nothing() {
        tokio::select! {
            order = ends.orders.recv() => match order {
                Some(order) => finish(wanted.apply(order)),
                None => return,
            },
            () = dial.close.cancelled() => return,
        }
    }
    loop {
        let connection = tokio::select! {
            connection = dial.connect(Link::Consume) => connection,
            () = dial.close.cancelled() => break,
            () = note(&mut ends.orders, &mut wanted) => break,
        };
        let error = match connection {
            Ok(connection) => {
                let since = Instant::now();
                let connection = Arc::new(connection);
                let outcome = session(&dial, &connection, &mut ends, &mut wanted, &mut patience).await;
                close(&connection).await;
                backoff.lasted(since);
                match outcome {
                    Some(error) => dial.ended(Link::Consume, error),
                    None => break,
                }
            }
            Err(error) => error.to_string(),
        };
        dial.health.consumed(BTreeSet::new());
        if error.ends_with(UNREADABLE) {
            put_aside_unreadable(&dial, &ends, &wanted).await;
        }
        dial.health.down(Link::Consume, Some(error));
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            () = dial.close.cancelled() => break,
            () = note(&mut ends.orders, &mut wanted) => break,
        }
    }
    dial.health.down(Link::Consume, None);
}

/// Takes out of the queues what has ended the connection, or it would end the next one as well.
async fn put_aside_unreadable(dial: &Dial, ends: &Ends, wanted: &Wanted) {
    let control = wanted.control.then(|| CONTROL_QUEUE.to_owned());
    for queue in wanted.queues.iter().map(|queue| task_queue(queue)).chain(control) {
        for url in &dial.urls {
            match timeout(ANSWER_LIMIT, poison::put_aside(url, &queue, &ends.publish_tx)).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => tracing::debug!(queue, %error, "not looked through for unreadable messages"),
                Err(_) => tracing::debug!(queue, "not looked through for unreadable messages: no answer"),
            }
        }
    }
}

/// Without a connection an order is only noted; returns when nobody can give one any more.
async fn note(orders: &mut mpsc::Receiver<Order>, wanted: &mut Wanted) {
    while let Some(order) = orders.recv().await {
        finish(wanted.apply(order));
    }
}

pub(super) fn finish(done: Option<oneshot::Sender<()>>) {
    if let Some(done) = done {
        let _ = done.send(());
    }
}

/// Consumes until the connection is gone (and says why) or shall be closed.
async fn session(
    dial: &Arc<Dial>,
    connection: &Arc<Connection>,
    ends: &mut Ends,
    wanted: &mut Wanted,
    patience: &mut Duration,
) -> Option<String> {
    let since = Instant::now();
    let mut ended = std::pin::pin!(dial.watch(Link::Consume, connection, connection.events_listener()));
    let mut intake = Intake::new(dial, connection, ends);
    intake.want(wanted);
    let mut look = interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    dial.health.up(Link::Consume);
    loop {
        intake.hand_over(wanted);
        intake.tend(wanted);
        intake.show_consumed();
        let is_waiting = intake.sources.iter().any(Source::has_head);
        let wants_slot = intake.is_paused || (is_waiting && intake.permit.is_none());
        let is_gathering = intake.gather_until.is_some();
        let has_slot = is_waiting && intake.permit.is_some() && !is_gathering && !ends.tasks_tx.is_closed();
        let full_until = intake.full_since.map(|since| since + FULL_LIMIT);
        let is_calm = tokio::select! {
            error = &mut ended => return Some(error),
            () = dial.close.cancelled() => return None,
            order = ends.orders.recv() => {
                let done = wanted.apply(order?);
                intake.want(wanted);
                let is_calm = intake.calm(wanted).await;
                finish(done);
                is_calm
            }
            Some((queue, opened)) = intake.openings.next() => {
                let is_silent = matches!(opened, Err(NotOpened::Silent));
                intake.opened(&queue, opened);
                if is_silent && dial.has_others() && since.elapsed() >= *patience {
                    *patience = (*patience * 2).clamp(PATIENCE_MIN, PATIENCE_MAX);
                    return Some(format!("the host answers, but not for queue {queue}; trying another"));
                }
                if intake.sources.iter().all(Source::is_live) {
                    *patience = Duration::ZERO;
                }
                intake.calm(wanted).await
            }
            Some(()) = intake.burials.next() => true,
            _ = look.tick(), if intake.looks.is_empty() => {
                intake.look();
                true
            }
            Some(seen) = intake.looks.next() => {
                intake.looked(&seen, wanted);
                intake.calm(wanted).await
            }
            () = poll_fn(|cx| poll_sources(&mut intake.sources, cx)), if !is_gathering => true,
            _ = poll_fn(|cx| intake.control.poll_head(cx)), if intake.ready_control.is_none() => {
                intake.read_control();
                true
            }
            permit = acquire(wanted.slots.clone()), if wants_slot => {
                // After a pause there is nothing in hand to use it for.
                intake.permit = (!intake.is_paused).then_some(permit);
                intake.is_paused = false;
                if wanted.is_gathering() {
                    intake.gather_until = Some(Instant::now() + GATHER_PAUSE);
                }
                true
            }
            () = until(intake.gather_until), if intake.gather_until.is_some() => {
                intake.gather_until = None;
                true
            }
            _ = ends.tasks_tx.reserve(), if has_slot => true,
            room = ends.controls_tx.reserve(), if intake.ready_control.is_some() => {
                if let (Ok(room), Some(request)) = (room, intake.ready_control.take()) {
                    room.send(request);
                }
                true
            }
            () = until(full_until), if full_until.is_some() => {
                tracing::info!("no free slot: tasks in hand go back to the queue");
                intake.full_since = None;
                intake.is_paused = true;
                intake.calm(wanted).await
            }
        };
        if !is_calm {
            return Some(format!("no answer within {} s", ANSWER_LIMIT.as_secs()));
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// A slot; closed semaphores never have one.
pub(super) async fn acquire(slots: Option<Arc<Semaphore>>) -> OwnedSemaphorePermit {
    if let Some(slots) = slots
        && let Ok(permit) = slots.acquire_owned().await
    {
        return permit;
    }
    std::future::pending().await
}

/// Ready once any source has changed.
fn poll_sources(sources: &mut [Source], cx: &mut Context<'_>) -> Poll<()> {
    let n_changed = sources.iter_mut().filter_map(|source| source.poll_head(cx).is_ready().then_some(())).count();
    if n_changed > 0 { Poll::Ready(()) } else { Poll::Pending }
}

/// What is in hand on one connection.
struct Intake {
    dial: Arc<Dial>,
    connection: Arc<Connection>,
    tasks_tx: mpsc::Sender<Delivery>,
    settle_tx: mpsc::Sender<Settlement>,
    publish_tx: mpsc::Sender<Job>,
    /// The wanted task queues; `credits` refers to their places.
    sources: Vec<Source>,
    credits: WeightedRoundRobin,
    /// Queues that are not wanted any more; their channels stay open for the settlements to come.
    former: Vec<Source>,
    control: Source,
    openings: FuturesUnordered<BoxFuture<'static, (String, Opened)>>,
    burials: FuturesUnordered<BoxFuture<'static, ()>>,
    /// At most one.
    looks: FuturesUnordered<BoxFuture<'static, Vec<Seen>>>,
    /// A slot that was free before there was room to hand the delivery over.
    permit: Option<OwnedSemaphorePermit>,
    ready_control: Option<ControlRequest>,
    /// What the health says is consumed.
    shown: BTreeSet<String>,
    /// It was full and lets more slots become free, or lets more deliveries arrive, before it hands anything over.
    gather_until: Option<Instant>,
    /// Since when deliveries are in hand and no slot is free.
    full_since: Option<Instant>,
    /// It was full for so long that others shall have the work; the first free slot ends it.
    is_paused: bool,
}

impl Intake {
    fn new(dial: &Arc<Dial>, connection: &Arc<Connection>, ends: &Ends) -> Self {
        let control = Plan {
            queue: CONTROL_QUEUE.to_owned(),
            items: vec![Item::BroadcastExchange, Item::ControlQueue],
            tag: format!("{} broadcasts", dial.name),
            prefetch: PREFETCH_CONTROL,
        };
        Intake {
            dial: Arc::clone(dial),
            connection: Arc::clone(connection),
            tasks_tx: ends.tasks_tx.clone(),
            settle_tx: ends.settle_tx.clone(),
            publish_tx: ends.publish_tx.clone(),
            sources: Vec::new(),
            credits: WeightedRoundRobin::default(),
            former: Vec::new(),
            control: Source::new(control),
            openings: FuturesUnordered::new(),
            burials: FuturesUnordered::new(),
            looks: FuturesUnordered::new(),
            permit: None,
            ready_control: None,
            shown: BTreeSet::new(),
            gather_until: None,
            full_since: None,
            is_paused: false,
        }
    }

    /// Takes over what is wanted now; queues that were there before keep their channels.
    fn want(&mut self, wanted: &Wanted) {
        let mut known: Vec<Source> = self.sources.drain(..).chain(self.former.drain(..)).collect();
        for queue in &wanted.queues {
            let plan = Plan {
                queue: task_queue(queue),
                items: vec![Item::TaskExchange, Item::TaskQueue(queue.clone())],
                tag: format!("{} {queue}", self.dial.name),
                prefetch: share_of(queue, wanted.room()),
            };
            let source = match known.iter().position(|source| source.plan.queue == plan.queue) {
                Some(idx) => known.swap_remove(idx).with_plan(plan),
                None => Source::new(plan),
            };
            self.sources.push(source);
        }
        self.former = known;
        self.credits = WeightedRoundRobin::new(wanted.queues.iter().map(String::as_str));
        self.full_since = None;
        self.is_paused = false;
        self.permit = None;
    }

    /// Opens what is wanted and is not open.
    fn tend(&mut self, wanted: &Wanted) {
        let control = wanted.control.then_some(&mut self.control);
        let sources = self.sources.iter_mut().filter(|_| !self.is_paused);
        for source in sources.chain(control).filter(|source| source.is_idle()) {
            if let Some(name) = source.task_queue() {
                source.plan.prefetch = share_of(name, wanted.room());
            }
            let queue = source.plan.queue.clone();
            let open = source.open(Arc::clone(&self.connection), Arc::clone(&self.dial.health));
            self.openings.push(Box::pin(async move { (queue, open.await) }));
        }
    }

    /// Writes on the health which queues are consumed, if that has changed.
    fn show_consumed(&mut self) {
        let live = || self.sources.iter().filter(|source| source.is_live()).map(|source| &source.plan.queue);
        if live().count() != self.shown.len() || !live().all(|queue| self.shown.contains(queue)) {
            self.shown = live().cloned().collect();
            self.dial.health.consumed(self.shown.clone());
        }
    }

    fn look(&mut self) {
        // While one waits for the worker, the source is not asked for more.
        let control = self.ready_control.is_none().then_some(&self.control);
        let sources = self.sources.iter().chain(control).filter(|source| source.is_live());
        let queues: Vec<String> = sources.map(|source| source.plan.queue.clone()).collect();
        if !queues.is_empty() {
            self.looks.push(Box::pin(look(Arc::clone(&self.connection), queues)));
        }
    }

    fn looked(&mut self, seen: &[Seen], wanted: &Wanted) {
        for seen in seen {
            let control = self.ready_control.is_none().then_some(&mut self.control);
            let mut sources = self.sources.iter_mut().chain(control);
            if let Some(source) = sources.find(|source| source.plan.queue == seen.queue) {
                source.end_if_stalled(seen);
                // It was opened when few slots were free, and now many are.
                let room = source.task_queue().map_or(0, |name| share_of(name, wanted.room()));
                source.is_narrow = seen.n_ready > 0 && room >= source.plan.prefetch.saturating_mul(2);
            }
        }
    }

    fn opened(&mut self, queue: &str, opened: Opened) {
        let sources = self.sources.iter_mut().chain(&mut self.former).chain([&mut self.control]);
        if let Some(source) = sources.into_iter().find(|source| source.plan.queue == queue) {
            source.opened(opened);
        }
    }

    /// Cancels what is open and shall not be, and gives back what it had in hand. False when the broker does not answer.
    async fn calm(&mut self, wanted: &Wanted) -> bool {
        let is_paused = self.is_paused;
        let sources = self.sources.iter_mut().filter(|source| is_paused || source.is_narrow);
        let control = (!wanted.control).then_some(&mut self.control);
        if !wanted.control
            && let Some(settle) = self.ready_control.take().and_then(|request| request.durable)
        {
            settle.give_back().await;
        }
        let pauses = join_all(sources.chain(&mut self.former).chain(control).map(Source::pause));
        timeout(ANSWER_LIMIT, pauses).await.is_ok()
    }

    /// Hands over as long as there are deliveries, slots and room. The slot comes first: which delivery is next is
    /// decided only when one can go.
    fn hand_over(&mut self, wanted: &Wanted) {
        let mut no_waker = Context::from_waker(Waker::noop());
        if self.gather_until.is_some() {
            return;
        }
        let mut n_handed = 0;
        loop {
            // Only a look; the caller waits with a waker.
            let _ = poll_sources(&mut self.sources, &mut no_waker);
            if !self.sources.iter().any(Source::has_head) {
                self.full_since = None;
                self.permit = None;
                self.gather_until = (n_handed >= CROWD).then(|| Instant::now() + CROWD_PAUSE);
                return;
            }
            let free = || wanted.slots.clone().and_then(|slots| slots.try_acquire_owned().ok());
            let Some(permit) = self.permit.take().or_else(free) else {
                self.full_since.get_or_insert_with(Instant::now);
                return;
            };
            self.full_since = None;
            let tasks_tx = self.tasks_tx.clone();
            let Ok(room) = tasks_tx.try_reserve() else {
                self.permit = Some(permit);
                return;
            };
            let Some(idx) = self.credits.pick(|idx| self.sources[idx].has_head()) else { return };
            let source = &mut self.sources[idx];
            let head = source.take_head().expect("only what has a head is picked");
            self.dial.health.meter.delivered();
            n_handed += 1;
            let origin = source.plan.queue.clone();
            match head.envelope.read_task() {
                Ok(task) => room.send(self.delivery(task, origin, head, permit)),
                Err(error) => {
                    self.bury(head, error, origin);
                    self.permit = Some(permit);
                }
            }
        }
    }

    fn delivery(&self, task: Task, origin: String, head: Head, permit: OwnedSemaphorePermit) -> Delivery {
        let Head { redelivered, envelope, receipt } = head;
        Delivery {
            task,
            queue: origin.strip_prefix(TASK_EXCHANGE).map_or("", |rest| rest.trim_start_matches('.')).to_owned(),
            redelivered,
            reply_to: envelope.reply_to(),
            traceparent: envelope.traceparent.clone(),
            permit,
            settle: Settle::new(Ticket::Amqp(receipt), envelope, origin, &self.settle_tx),
        }
    }

    fn read_control(&mut self) {
        let Some(head) = self.control.take_head() else { return };
        match head.envelope.read_control() {
            Ok(control) => {
                let request = control_request(control, true, &head.envelope);
                let ticket = Ticket::Amqp(head.receipt);
                let settle = Settle::new(ticket, head.envelope, CONTROL_QUEUE.to_owned(), &self.settle_tx);
                self.ready_control = Some(ControlRequest { durable: Some(settle), ..request });
            }
            Err(error) => self.bury(head, error, CONTROL_QUEUE.to_owned()),
        }
    }

    fn bury(&mut self, head: Head, error: String, origin: String) {
        tracing::warn!(origin, "a message cannot be read and goes to the dead letters: {error}");
        let publish_tx = self.publish_tx.clone();
        self.burials.push(Box::pin(async move {
            put_aside(head.receipt, head.envelope, &error, &origin, &publish_tx).await;
        }));
    }
}
