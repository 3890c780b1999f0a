//! A broker in this program's memory, with the same queues, settlements and replies, but without network and disk.
//!
//! Its messages are lost when the program ends. Messages on any broker may be lost; the database knows the queued
//! processes.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::ask::{Ask, Asker, answer, control_request};
use super::delivery::{Settlement, Ticket, Verdict};
use super::envelope::{CONTROL_QUEUE, DIRECT_REPLY, Envelope, bad_queue_name};
use super::publish::{Job, Target};
use super::wanted::{Order, Wanted, acquire, finish};
use super::weighted_round_robin::WeightedRoundRobin;
use super::{ControlRequest, Delivery, Down, PublishError, RequestError, Settle};
use crate::message::{Event, Reply, Task};

/// Most control messages that wait for the worker; more are refused.
const N_CONTROLS_MAX: usize = 1024;

/// Most messages in one queue; more are refused. A message has some 300 bytes, so a full queue takes 300 MB.
const N_MESSAGES_MAX: usize = 1_000_000;

/// The ends of the communicator's channels.
pub(super) struct Ends {
    pub(super) own_queue: Option<String>,
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) settlements: mpsc::Receiver<Settlement>,
    pub(super) tasks_tx: mpsc::Sender<Delivery>,
    pub(super) controls_tx: mpsc::Sender<ControlRequest>,
    pub(super) settle_tx: mpsc::Sender<Settlement>,
}

#[derive(Default)]
struct Memory {
    own_queue: Option<String>,
    wanted: Wanted,
    credits: WeightedRoundRobin,
    queues: BTreeMap<String, VecDeque<Stored>>,
    /// The delivered messages that are not settled, by ticket.
    unsettled: HashMap<u64, (String, Stored)>,
    last_ticket: u64,
    controls: VecDeque<ControlRequest>,
    /// The broadcasts that wait to be recorded.
    broadcasts: VecDeque<Stored>,
    requests: HashMap<String, Asker>,
    permit: Option<OwnedSemaphorePermit>,
}

#[derive(Clone)]
struct Stored {
    envelope: Envelope,
    redelivered: bool,
}

/// Serves until `stop`.
pub(super) async fn run(mut ends: Ends, stop: CancellationToken) {
    let mut memory = Memory { own_queue: ends.own_queue.take(), ..Memory::default() };
    let mut announced = Vec::new();
    loop {
        memory.hand_over(&ends);
        let is_waiting = memory.has_task();
        let wants_slot = is_waiting && memory.permit.is_none();
        let has_slot = is_waiting && memory.permit.is_some() && !ends.tasks_tx.is_closed();
        let has_control = memory.next_control(&ends) && !ends.controls_tx.is_closed();
        tokio::select! {
            biased;
            Some(settlement) = ends.settlements.recv() => memory.settle(settlement),
            Some(order) = ends.orders.recv() => memory.on_order(order),
            Some(ask) = ends.asks.recv() => memory.on_ask(ask),
            Some(Job { target, messages, done, .. }) = ends.jobs.recv() => {
                let _ = done.send(memory.store(target, messages));
            }
            // There are no listeners.
            Some(_) = async { Some(ends.events.recv_many(&mut announced, 64).await).filter(|&n| n > 0) } => {
                announced.clear();
            }
            Ok(room) = ends.controls_tx.reserve(), if has_control => {
                if let Some(request) = memory.controls.pop_front() {
                    room.send(request);
                }
            }
            permit = acquire(memory.wanted.slots.clone()), if wants_slot => memory.permit = Some(permit),
            Ok(_) = ends.tasks_tx.reserve(), if has_slot => {}
            () = stop.cancelled() => return,
        }
    }
}

impl Memory {
    fn has_task(&self) -> bool {
        self.wanted.queues.iter().any(|queue| self.depth(queue) > 0)
    }

    fn depth(&self, queue: &str) -> usize {
        self.queues.get(queue).map_or(0, VecDeque::len)
    }

    fn hand_over(&mut self, ends: &Ends) {
        while self.has_task() {
            let slots = self.wanted.slots.clone();
            let free = || slots.and_then(|slots| slots.try_acquire_owned().ok());
            let Some(permit) = self.permit.take().or_else(free) else { return };
            let Ok(room) = ends.tasks_tx.try_reserve() else {
                self.permit = Some(permit);
                return;
            };
            let wanted = &self.wanted.queues;
            let queues = &self.queues;
            let is_ready = |idx: usize| queues.get(&wanted[idx]).is_some_and(|queue| !queue.is_empty());
            let Some(idx) = self.credits.pick(is_ready) else { return };
            let queue = wanted[idx].clone();
            let Some(stored) = self.queues.get_mut(&queue).and_then(VecDeque::pop_front) else { return };
            match stored.envelope.read_task() {
                Ok(task) => room.send(self.delivery(task, queue, stored, permit, &ends.settle_tx)),
                Err(error) => {
                    log_dead_letter(&queue, &error);
                    self.permit = Some(permit);
                }
            }
        }
        self.permit = None;
    }

    fn delivery(
        &mut self,
        task: Task,
        queue: String,
        stored: Stored,
        permit: OwnedSemaphorePermit,
        settle_tx: &mpsc::Sender<Settlement>,
    ) -> Delivery {
        let envelope = stored.envelope.clone();
        let redelivered = stored.redelivered;
        let ticket = self.unsettle(queue.clone(), stored);
        Delivery {
            task,
            redelivered,
            reply_to: envelope.reply_to(),
            traceparent: envelope.traceparent.clone(),
            permit,
            settle: Settle::new(ticket, envelope, queue.clone(), settle_tx),
            queue,
        }
    }

    fn unsettle(&mut self, queue: String, stored: Stored) -> Ticket {
        self.last_ticket += 1;
        self.unsettled.insert(self.last_ticket, (queue, stored));
        Ticket::Memory(self.last_ticket)
    }

    /// Whether a control message waits for the worker. If none does, takes the next broadcast that has to be recorded.
    fn next_control(&mut self, ends: &Ends) -> bool {
        if self.controls.is_empty()
            && self.wanted.control
            && let Some(stored) = self.broadcasts.pop_front()
            && let Ok(control) = stored.envelope.read_control()
        {
            let envelope = stored.envelope.clone();
            let request = control_request(control, true, &envelope);
            let ticket = self.unsettle(CONTROL_QUEUE.to_owned(), stored);
            let durable = Some(Settle::new(ticket, envelope, CONTROL_QUEUE.to_owned(), &ends.settle_tx));
            self.controls.push_back(ControlRequest { durable, ..request });
        }
        !self.controls.is_empty()
    }

    fn settle(&mut self, settlement: Settlement) {
        let Ticket::Memory(ticket) = settlement.ticket else { return };
        let Some((queue, stored)) = self.unsettled.remove(&ticket) else { return };
        match settlement.verdict {
            Verdict::Ack => {}
            Verdict::Dead(reason) => log_dead_letter(&queue, &reason),
            Verdict::GiveBack => {
                let stored = Stored { redelivered: true, ..stored };
                if queue == CONTROL_QUEUE {
                    self.broadcasts.push_front(stored);
                } else {
                    self.queues.entry(queue).or_default().push_front(stored);
                }
            }
        }
    }

    fn on_order(&mut self, order: Order) {
        let done = self.wanted.apply(order);
        self.credits = WeightedRoundRobin::new(self.wanted.queues.iter().map(String::as_str));
        self.permit = None;
        finish(done);
    }

    fn store(&mut self, target: Target, messages: Vec<Envelope>) -> Result<(), PublishError> {
        let Target::Task(queue) = target else { return Ok(()) };
        if let Some(reason) = bad_queue_name(&queue) {
            return Err(PublishError::Unroutable { queue, reason });
        }
        if self.depth(&queue) + messages.len() > N_MESSAGES_MAX {
            return Err(Down(format!("the queue has {N_MESSAGES_MAX} messages, its limit")).into());
        }
        let stored = messages.into_iter().map(|envelope| Stored { envelope, redelivered: false });
        self.queues.entry(queue).or_default().extend(stored);
        Ok(())
    }

    fn on_ask(&mut self, ask: Ask) {
        match ask {
            Ask::Request { queue, envelope, done } => {
                let Some(id) = envelope.message_id.clone().filter(|_| self.owns(&queue)) else {
                    let _ = done.send(Err(RequestError::Unroutable(queue)));
                    return;
                };
                let envelope = self.with_answer(&id, envelope);
                match self.arrive(&envelope, false) {
                    Ok(()) => drop(self.requests.insert(id, Asker::Of { queue, done })),
                    Err(down) => drop(done.send(Err(down.into()))),
                }
            }
            Ask::Ping { queue, envelope, done } => {
                let is_there = self.owns(&queue);
                let arrived = if is_there { self.arrive(&envelope, false) } else { Ok(()) };
                let _ = done.send(arrived.map(|()| is_there));
            }
            Ask::Reply { to, body, done } => {
                if let Some(id) = &to.correlation_id {
                    let reply = Reply::decode(&body, to.encoding())
                        .unwrap_or_else(|error| Reply::refusal(format!("unreadable reply: {error}")));
                    answer(&mut self.requests, id, reply);
                }
                let _ = done.send(Ok(()));
            }
            Ask::Broadcast { envelope, replies, done } => {
                let id = envelope.message_id.clone().unwrap_or_default();
                let envelope = self.with_answer(&id, envelope);
                self.requests.insert(id, Asker::OfAll(replies));
                let _ = done.send(self.broadcast(envelope));
            }
            Ask::Depth { queue, done } => {
                let _ = done.send(Ok(self.depth(&queue) as u64));
            }
        }
    }

    fn with_answer(&mut self, id: &str, envelope: Envelope) -> Envelope {
        self.requests.retain(|_, asker| !asker.has_given_up());
        let reply_to = Some(DIRECT_REPLY.to_owned());
        Envelope { reply_to, correlation_id: Some(id.to_owned()), ..envelope }
    }

    fn owns(&self, queue: &str) -> bool {
        self.own_queue.as_deref() == Some(queue)
    }

    fn broadcast(&mut self, envelope: Envelope) -> Result<(), Down> {
        if self.own_queue.is_some() {
            self.arrive(&envelope, true)?;
        }
        if self.broadcasts.len() >= N_CONTROLS_MAX {
            return Err(Down(format!("{N_CONTROLS_MAX} broadcasts wait to be recorded")));
        }
        self.broadcasts.push_back(Stored { envelope, redelivered: false });
        Ok(())
    }

    fn arrive(&mut self, envelope: &Envelope, from_broadcast: bool) -> Result<(), Down> {
        if self.controls.len() >= N_CONTROLS_MAX {
            return Err(Down(format!("{N_CONTROLS_MAX} requests wait for the worker")));
        }
        // This program has just encoded it, so it is readable.
        if let Ok(control) = envelope.read_control() {
            self.controls.push_back(control_request(control, from_broadcast, envelope));
        }
        Ok(())
    }
}

/// Logs a dead letter: its queue would be lost with the program.
fn log_dead_letter(queue: &str, reason: &str) {
    tracing::warn!(queue, "message dead-lettered: {reason}");
}
