//! Deliveries: tasks and control messages, and the handle that settles each.

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::envelope::Envelope;
use super::ledger::Receipt;
use crate::message::{Control, Encoding, Task};

/// A delivered task with its slot.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub task: Task,
    /// The name of its task queue without the prefix: `default.high`.
    pub queue: String,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// Who waits for an answer.
    pub reply_to: Option<ReplyTo>,
    /// The W3C trace context of the sender.
    pub traceparent: Option<String>,
    /// The slot, which is freed when this is dropped.
    pub permit: OwnedSemaphorePermit,
    /// The handle that settles the message.
    pub settle: Settle,
}

/// A control message that arrived by the worker's own queue or by broadcast.
#[derive(Debug)]
pub struct ControlRequest {
    /// The message.
    pub control: Control,
    /// Whether it was sent to every worker.
    pub from_broadcast: bool,
    /// Whether a program of Baton sent it. Baton has recorded the request in the database already; other requests are
    /// to be recorded.
    pub from_baton: bool,
    /// The message id.
    pub message_id: Option<String>,
    /// The sender's user name at the broker, if it is stated. The broker rejects a false one.
    pub user: Option<String>,
    /// Who waits for an answer.
    pub reply_to: Option<ReplyTo>,
    /// Set if it came from `baton.control` to this worker only. Settle it once it is recorded.
    pub durable: Option<Settle>,
}

/// The address for a reply. It can be stored, and another program can send the reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// The queue on the default exchange.
    pub reply_to: String,
    /// The id by which the requester recognises the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Whether the reply is to be JSON, as the request was.
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
/// If this is dropped, the message stays unacknowledged until its channel closes, and is then delivered again. After
/// the loss of the connection every method does nothing, since the broker delivers the message again.
#[must_use = "settle it; a dropped one stays unacknowledged until the channel closes"]
#[derive(Debug)]
pub struct Settle {
    /// Boxed, since it is larger than the rest of a delivery, and rarely used.
    settlement: Box<Settlement>,
    settle_tx: mpsc::Sender<Settlement>,
}

/// A message and its verdict.
#[derive(Debug)]
pub(super) struct Settlement {
    pub(super) ticket: Ticket,
    pub(super) envelope: Envelope,
    /// The AMQP name of the queue it came from.
    pub(super) origin: String,
    pub(super) verdict: Verdict,
}

/// The broker's handle of a message.
#[derive(Clone, Debug)]
pub(super) enum Ticket {
    Amqp(Receipt),
    Memory(u64),
}

/// How to settle a message.
#[derive(Debug)]
pub(super) enum Verdict {
    Ack,
    Dead(String),
    GiveBack,
}

impl ReplyTo {
    /// Encodes the address for storage.
    pub fn to_bytes(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("two strings and a flag")
    }

    /// Decodes a stored address; `None` if it is malformed.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        rmp_serde::from_slice(bytes).ok()
    }
}

impl Settlement {
    /// Marks the message as complete. Returns whether the communicator must be notified.
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

    /// Acknowledges the message. Waits only for capacity in the communicator's channel, and rarely: only the first of
    /// the messages that are acknowledged together is sent there.
    ///
    /// # Cancel safety
    /// Not cancel safe: if this is dropped, the message, and those that would be acknowledged with it, stay
    /// unacknowledged until half of the prefetch is complete or the channel closes.
    pub async fn ack(self) {
        if self.settlement.done() {
            self.send(Verdict::Ack).await;
        }
    }

    /// Dead-letters the message: publishes it to `baton.dead` with the reason, then acknowledges it.
    pub async fn dead(self, reason: &str) {
        self.send(Verdict::Dead(reason.to_owned())).await;
    }

    /// Requeues the message for another worker.
    pub async fn give_back(self) {
        self.send(Verdict::GiveBack).await;
    }

    async fn send(mut self, verdict: Verdict) {
        self.settlement.verdict = verdict;
        // A communicator that has ended has closed its channels, so the broker delivers the message again.
        let _ = self.settle_tx.send(*self.settlement).await;
    }
}
