//! What arrives: tasks and control requests, and the handle that settles each.

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::envelope::Envelope;
use super::ledger::Receipt;
use crate::message::{Control, Encoding, Task};

/// A task that arrived, together with the slot it was taken for.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub task: Task,
    /// The task queue it came from, as in `tell`: `default.high`.
    pub queue: String,
    /// The broker has delivered it before.
    pub redelivered: bool,
    /// Who waits for an answer.
    pub reply_to: Option<ReplyTo>,
    /// The W3C trace context of whoever sent it.
    pub traceparent: Option<String>,
    /// The slot: it is free again when this is dropped.
    pub permit: OwnedSemaphorePermit,
    /// What to do with the message.
    pub settle: Settle,
}

/// A request that arrived, by the worker's own queue or by broadcast.
#[derive(Debug)]
pub struct ControlRequest {
    /// What is asked.
    pub control: Control,
    /// To every worker, not only to this one.
    pub from_broadcast: bool,
    /// Sent by a program of Baton, which has written the decision down before; otherwise someone must record it.
    pub from_baton: bool,
    /// The sender's id of the message.
    pub message_id: Option<String>,
    /// The sender's login at the broker, if the sender has stated it; the broker lets nobody state another.
    pub user: Option<String>,
    /// Who waits for an answer.
    pub reply_to: Option<ReplyTo>,
    /// It came from `baton.control`, to this worker alone: settle it once it is recorded.
    pub durable: Option<Settle>,
}

/// Where an answer goes. It can be stored, and another program can answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// The queue, by the default exchange.
    pub reply_to: String,
    /// What the asker recognises the answer by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The asker wrote JSON, so it reads JSON.
    #[serde(default)]
    pub json: bool,
}

impl ReplyTo {
    pub(super) fn encoding(&self) -> Encoding {
        if self.json { Encoding::Json } else { Encoding::MessagePack }
    }
}

/// The right to settle one message, once.
///
/// Dropped without a word, the message stays unacknowledged until its channel closes, and then comes again. After the
/// connection was lost every method does nothing: the broker has already given the message to someone else.
#[must_use = "settle it; a dropped one stays unacknowledged until the channel closes"]
#[derive(Debug)]
pub struct Settle {
    /// Boxed, since it is larger than all else that is said of a delivery, and is seldom needed.
    settlement: Box<Settlement>,
    settle_tx: mpsc::Sender<Settlement>,
}

/// A message and what shall become of it.
#[derive(Debug)]
pub(super) struct Settlement {
    pub(super) ticket: Ticket,
    pub(super) envelope: Envelope,
    /// The AMQP name of the queue it came from.
    pub(super) origin: String,
    pub(super) verdict: Verdict,
}

/// What the broker knows the message by.
#[derive(Clone, Debug)]
pub(super) enum Ticket {
    Amqp(Receipt),
    Memory(u64),
}

/// What becomes of a message.
#[derive(Debug)]
pub(super) enum Verdict {
    Ack,
    Dead(String),
    GiveBack,
}

impl ReplyTo {
    /// As it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("two strings and a flag")
    }

    /// Reads what was stored; `None` when it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        rmp_serde::from_slice(bytes).ok()
    }
}

impl Settlement {
    /// Notes that the message is dealt with; true when the communicator has to be told of that.
    fn done(&self) -> bool {
        match &self.ticket {
            Ticket::Amqp(receipt) => receipt.done(),
            Ticket::Memory(_) => true,
        }
    }
}

impl Settle {
    pub(super) fn new(
        ticket: Ticket,
        envelope: Envelope,
        origin: String,
        settle_tx: &mpsc::Sender<Settlement>,
    ) -> Self {
        let settlement = Box::new(Settlement { ticket, envelope, origin, verdict: Verdict::GiveBack });
        Settle { settlement, settle_tx: settle_tx.clone() }
    }

    /// The message is dealt with. Waits only for room in the communicator's channel, and seldom needs any: of those that are
    /// acknowledged together the first is told.
    ///
    /// # Cancel safety
    /// Not cancel safe: if this is dropped, the message and those that would be acknowledged with it stay unacknowledged
    /// until half a prefetch is done with, or until the channel closes.
    pub async fn ack(self) {
        if self.settlement.done() {
            self.send(Verdict::Ack).await;
        }
    }

    /// Nobody can use the message: puts it into `baton.dead` with the reason, then acknowledges it.
    pub async fn dead(self, reason: &str) {
        self.send(Verdict::Dead(reason.to_owned())).await;
    }

    /// Another worker shall have the message.
    pub async fn give_back(self) {
        self.send(Verdict::GiveBack).await;
    }

    async fn send(mut self, verdict: Verdict) {
        self.settlement.verdict = verdict;
        // A communicator that has ended has closed its channels, so the message is on its way to someone else.
        let _ = self.settle_tx.send(*self.settlement).await;
    }
}
