//! The consume connection: takes tasks for free slots, by weights, and broadcasts to record.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::FuturesUnordered;
use lapin::Connection;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::ask::control_request;
use super::delivery::{Settlement, Ticket};
use super::envelope::{CONTROL_QUEUE, TASK_EXCHANGE, task_queue};
use super::health::Link;
use super::link::{ANSWER_LIMIT, Backoff, Dial, UNREADABLE, close};
use super::poison;
use super::publish::Job;
use super::settle::dead_letter;
use super::source::{Head, NotOpened, Opened, Plan, Seen, Source, look};
use super::topology::Item;
use super::wanted::{Order, Wanted, acquire, finish};
use super::weighted_round_robin::{WeightedRoundRobin, prefetch_of};
use super::{ControlRequest, Delivery, Settle};
use crate::message::Task;

/// Prefetched broadcasts to record; each is one statement.
const PREFETCH_CONTROL: u16 = 16;

/// How long a worker without a free slot keeps prefetched deliveries before it gives them back to others.
const FULL_LIMIT: Duration = Duration::from_secs(1);

/// How long a worker that was full gathers free slots. If it took each slot as it becomes free, it would claim short
/// tasks one by one, each with a commit. A backlog does not suffer from the pause, and without a backlog no worker is
/// full.
const GATHER_PAUSE: Duration = Duration::from_millis(2);

/// After a batch of at least this number of deliveries, the next ones gather for this time. A single delivery wakes two
/// threads, and the claims of a batch wait for each other anyway.
const BATCH: usize = 8;
const BATCH_PAUSE: Duration = Duration::from_millis(5);

/// How often the intake looks for messages that a consumer should have received. A consumer that stalls at two looks in
/// a row is replaced. Three small requests per worker and interval are no load for the broker.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How long a connection is kept although its node does not reach the leader of a queue, from the second such
/// connection in a row on. The first is left at once, since the node may be partitioned. A queue without any leader
/// must not make the consumers of the other queues reconnect forever.
const PATIENCE_MIN: Duration = Duration::from_secs(30);
const PATIENCE_MAX: Duration = Duration::from_secs(600);

/// The channel ends of this connection.
pub(super) struct Ends {
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) tasks_tx: mpsc::Sender<Delivery>,
    pub(super) controls_tx: mpsc::Sender<ControlRequest>,
    pub(super) settle_tx: mpsc::Sender<Settlement>,
    pub(super) publish_tx: mpsc::Sender<Job>,
}

/// Opens the connection at the first order, and keeps it open until it is to be closed.
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
            () = apply_orders(&mut ends.orders, &mut wanted) => break,
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
            bury_unreadable(&dial, &ends, &wanted).await;
        }
        dial.health.down(Link::Consume, Some(error));
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            () = dial.close.cancelled() => break,
            () = apply_orders(&mut ends.orders, &mut wanted) => break,
        }
    }
    dial.health.down(Link::Consume, None);
}

/// Dead-letters the unreadable messages that ended the connection. They would end the next one, too.
async fn bury_unreadable(dial: &Dial, ends: &Ends, wanted: &Wanted) {
    let control = wanted.control.then(|| CONTROL_QUEUE.to_owned());
    for queue in wanted.queues.iter().map(|queue| task_queue(queue)).chain(control) {
        for url in &dial.urls {
            match timeout(ANSWER_LIMIT, poison::bury_unreadable(url, &queue, &ends.publish_tx)).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => tracing::debug!(queue, %error, "queue not searched for unreadable messages"),
                Err(_) => tracing::debug!(queue, "queue not searched for unreadable messages: no answer"),
            }
        }
    }
}

/// Applies orders while there is no connection. Returns when no sender is left.
async fn apply_orders(orders: &mut mpsc::Receiver<Order>, wanted: &mut Wanted) {
    while let Some(order) = orders.recv().await {
        finish(wanted.apply(order));
    }
}

/// Consumes until the connection is lost (and returns the reason) or is to be closed.
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
        intake.open_wanted(wanted);
        intake.show_consumed();
        let is_waiting = intake.sources.iter().any(Source::has_head);
        let wants_slot = intake.is_paused || (is_waiting && intake.permit.is_none());
        let is_gathering = intake.gather_until.is_some();
        let has_slot = is_waiting && intake.permit.is_some() && !is_gathering && !ends.tasks_tx.is_closed();
        let full_until = intake.full_since.map(|since| since + FULL_LIMIT);
        let has_answered = tokio::select! {
            error = &mut ended => return Some(error),
            () = dial.close.cancelled() => return None,
            order = ends.orders.recv() => {
                let done = wanted.apply(order?);
                intake.want(wanted);
                let has_answered = intake.cancel_unwanted(wanted).await;
                finish(done);
                has_answered
            }
            Some((queue, opened)) = intake.openings.next() => {
                let is_silent = matches!(opened, Err(NotOpened::Silent));
                intake.opened(&queue, opened);
                if is_silent && dial.has_others() && since.elapsed() >= *patience {
                    *patience = (*patience * 2).clamp(PATIENCE_MIN, PATIENCE_MAX);
                    return Some(format!("the node answers, but not for queue {queue}; trying another"));
                }
                if intake.sources.iter().all(Source::is_live) {
                    *patience = Duration::ZERO;
                }
                intake.cancel_unwanted(wanted).await
            }
            Some(()) = intake.burials.next() => true,
            _ = look.tick(), if intake.looks.is_empty() => {
                intake.look();
                true
            }
            Some(seen) = intake.looks.next() => {
                intake.looked(&seen, wanted);
                intake.cancel_unwanted(wanted).await
            }
            () = poll_fn(|cx| poll_sources(&mut intake.sources, cx)), if !is_gathering => true,
            _ = poll_fn(|cx| intake.control.poll_head(cx)), if intake.ready_control.is_none() => {
                intake.read_control();
                true
            }
            permit = acquire(wanted.slots.clone()), if wants_slot => {
                // After a pause there is no delivery for it yet.
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
                tracing::info!("no free slot: giving back prefetched tasks");
                intake.full_since = None;
                intake.is_paused = true;
                intake.cancel_unwanted(wanted).await
            }
        };
        if !has_answered {
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

/// Becomes ready when any source has changed.
fn poll_sources(sources: &mut [Source], cx: &mut Context<'_>) -> Poll<()> {
    let n_changed = sources.iter_mut().filter_map(|source| source.poll_head(cx).is_ready().then_some(())).count();
    if n_changed > 0 { Poll::Ready(()) } else { Poll::Pending }
}

/// The state of the intake on one connection.
struct Intake {
    dial: Arc<Dial>,
    connection: Arc<Connection>,
    tasks_tx: mpsc::Sender<Delivery>,
    settle_tx: mpsc::Sender<Settlement>,
    publish_tx: mpsc::Sender<Job>,
    /// The wanted task queues; `credits` refers to their indexes.
    sources: Vec<Source>,
    credits: WeightedRoundRobin,
    /// Queues that are no longer wanted. Their channels stay open for pending settlements.
    former: Vec<Source>,
    control: Source,
    openings: FuturesUnordered<BoxFuture<'static, (String, Opened)>>,
    burials: FuturesUnordered<BoxFuture<'static, ()>>,
    /// At most one look.
    looks: FuturesUnordered<BoxFuture<'static, Vec<Seen>>>,
    /// A slot that was free before the delivery could be handed over.
    permit: Option<OwnedSemaphorePermit>,
    ready_control: Option<ControlRequest>,
    /// The consumed queues, as recorded in the health.
    shown: BTreeSet<String>,
    /// Until when to gather free slots or deliveries before the next hand-over.
    gather_until: Option<Instant>,
    /// Since when there are deliveries and no slot is free.
    full_since: Option<Instant>,
    /// Whether consuming is paused because the worker was full for long. The first free slot ends the pause.
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

    /// Adopts the wanted queues. Queues that were already consumed keep their channels.
    fn want(&mut self, wanted: &Wanted) {
        let mut known: Vec<Source> = self.sources.drain(..).chain(self.former.drain(..)).collect();
        for queue in &wanted.queues {
            let plan = Plan {
                queue: task_queue(queue),
                items: vec![Item::TaskExchange, Item::TaskQueue(queue.clone())],
                tag: format!("{} {queue}", self.dial.name),
                prefetch: prefetch_of(queue, wanted.prefetch()),
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

    /// Opens the wanted queues that are not open.
    fn open_wanted(&mut self, wanted: &Wanted) {
        let control = wanted.control.then_some(&mut self.control);
        let sources = self.sources.iter_mut().filter(|_| !self.is_paused);
        for source in sources.chain(control).filter(|source| source.is_idle()) {
            if let Some(name) = source.task_queue() {
                source.plan.prefetch = prefetch_of(name, wanted.prefetch());
            }
            let queue = source.plan.queue.clone();
            let open = source.open(Arc::clone(&self.connection), Arc::clone(&self.dial.health));
            self.openings.push(Box::pin(async move { (queue, open.await) }));
        }
    }

    /// Records in the health which queues are consumed, if that has changed.
    fn show_consumed(&mut self) {
        let live = || self.sources.iter().filter(|source| source.is_live()).map(|source| &source.plan.queue);
        if live().count() != self.shown.len() || !live().all(|queue| self.shown.contains(queue)) {
            self.shown = live().cloned().collect();
            self.dial.health.consumed(self.shown.clone());
        }
    }

    /// Begins a look for stalled consumers.
    fn look(&mut self) {
        // While a request waits for the worker, the control queue is not polled.
        let control = self.ready_control.is_none().then_some(&self.control);
        let sources = self.sources.iter().chain(control).filter(|source| source.is_live());
        let queues: Vec<String> = sources.map(|source| source.plan.queue.clone()).collect();
        if !queues.is_empty() {
            self.looks.push(Box::pin(look(Arc::clone(&self.connection), queues)));
        }
    }

    /// Acts on the result of a look.
    fn looked(&mut self, seen: &[Seen], wanted: &Wanted) {
        for seen in seen {
            let control = self.ready_control.is_none().then_some(&mut self.control);
            let mut sources = self.sources.iter_mut().chain(control);
            if let Some(source) = sources.find(|source| source.plan.queue == seen.queue) {
                source.end_if_stalled(seen);
                // The consumer was opened when few slots were free, and now many are.
                let room = source.task_queue().map_or(0, |name| prefetch_of(name, wanted.prefetch()));
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

    /// Cancels the consumers that must not be open, and gives back their deliveries. Returns false if the broker does
    /// not answer.
    async fn cancel_unwanted(&mut self, wanted: &Wanted) -> bool {
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

    /// Hands over deliveries while there are deliveries, slots and capacity in the channel. The slot is taken first, so
    /// that the next delivery is chosen only when it can be handed over.
    fn hand_over(&mut self, wanted: &Wanted) {
        let mut no_waker = Context::from_waker(Waker::noop());
        if self.gather_until.is_some() {
            return;
        }
        let mut n_handed = 0;
        loop {
            // This only polls; the caller waits with a waker.
            let _ = poll_sources(&mut self.sources, &mut no_waker);
            if !self.sources.iter().any(Source::has_head) {
                self.full_since = None;
                self.permit = None;
                self.gather_until = (n_handed >= BATCH).then(|| Instant::now() + BATCH_PAUSE);
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
            let head = source.take_head().expect("only a source with a head is picked");
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
        tracing::warn!(origin, "unreadable message dead-lettered: {error}");
        let publish_tx = self.publish_tx.clone();
        self.burials.push(Box::pin(async move {
            dead_letter(head.receipt, head.envelope, &error, &origin, &publish_tx).await;
        }));
    }
}
