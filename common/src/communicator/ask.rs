//! Commands to the control connection and to the broker in memory, and the replies to requests.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use super::envelope::Envelope;
use super::{ControlRequest, Down, ReplyTo, RequestError};
use crate::message::{Control, Encoding, Reply, SIZE_BYTES_MAX};

/// A command to the control connection.
pub(super) enum Ask {
    Request { queue: String, envelope: Envelope, done: oneshot::Sender<Result<Reply, RequestError>> },
    Ping { queue: String, envelope: Envelope, done: oneshot::Sender<Result<bool, Down>> },
    Reply { to: ReplyTo, body: Vec<u8>, done: oneshot::Sender<Result<(), Down>> },
    Broadcast { envelope: Envelope, replies: mpsc::Sender<Reply>, done: oneshot::Sender<Result<(), Down>> },
    Depth { queue: String, done: oneshot::Sender<Result<u64, Down>> },
}

impl Ask {
    /// Answers that the broker is unavailable.
    pub(super) fn refuse(self, down: Down) {
        // A sender that has stopped waiting needs no answer.
        match self {
            Ask::Request { done, .. } => drop(done.send(Err(down.into()))),
            Ask::Ping { done, .. } => drop(done.send(Err(down))),
            Ask::Reply { done, .. } | Ask::Broadcast { done, .. } => drop(done.send(Err(down))),
            Ask::Depth { done, .. } => drop(done.send(Err(down))),
        }
    }
}

/// The requester that waits for replies.
pub(super) enum Asker {
    /// Waits for one reply, from the owner of this queue.
    Of { queue: String, done: oneshot::Sender<Result<Reply, RequestError>> },
    /// Waits for one reply from each worker.
    OfAll(mpsc::Sender<Reply>),
}

impl Asker {
    pub(super) fn has_given_up(&self) -> bool {
        match self {
            Asker::Of { done, .. } => done.is_closed(),
            Asker::OfAll(replies) => replies.is_closed(),
        }
    }

    pub(super) fn fail(self, error: RequestError) {
        match self {
            Asker::Of { done, .. } => drop(done.send(Err(error))),
            // The end of its channel is enough.
            Asker::OfAll(_) => {}
        }
    }
}

/// Passes a reply to its requester. A reply without a requester arrives after the requester has given up.
pub(super) fn answer(requests: &mut HashMap<String, Asker>, id: &str, reply: Reply) {
    if let Some(Asker::OfAll(replies)) = requests.get(id) {
        // A full channel means that the requester does not read it.
        let _ = replies.try_send(reply);
    } else if let Some(Asker::Of { done, .. }) = requests.remove(id) {
        let _ = done.send(Ok(reply));
    }
}

/// A control message as it is passed to the worker.
pub(super) fn control_request(control: Control, from_broadcast: bool, envelope: &Envelope) -> ControlRequest {
    ControlRequest {
        control,
        from_broadcast,
        from_baton: envelope.is_own(),
        message_id: envelope.message_id.clone(),
        user: envelope.user_id.clone(),
        reply_to: envelope.reply_to(),
        durable: None,
    }
}

/// The body of a reply. A reply that exceeds the size limit is replaced by a refusal that says so.
pub(super) fn encode_reply(reply: &Reply, encoding: Encoding) -> Vec<u8> {
    let body = reply.encode(encoding);
    if body.len() <= SIZE_BYTES_MAX {
        return body;
    }
    Reply::refusal(format!("the reply has {} bytes, which exceeds the limit of {SIZE_BYTES_MAX}", body.len()))
        .encode(encoding)
}
