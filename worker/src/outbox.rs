//! The messages that a worker sends: announcements of tasks, events, and replies with the end of a process.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_common::communicator::{Communicator, ReplyTo, TaskMessage};
use baton_common::id::Pid;
use baton_common::message::{Event, Reply, Task};
use baton_common::state::State;
use baton_common::store::blob::Outcome;
use baton_common::store::submit::ByQueue;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::author::facilities::Identity;

/// Announcements that wait to be published. Their rows are already queued, so a full channel only slows down further
/// writes.
const ANNOUNCEMENTS_MAX: usize = 1024;

/// Sends messages.
pub(crate) struct Outbox {
    identity: Arc<Identity>,
    communicator: Communicator,
    announcements: mpsc::Sender<(String, TaskMessage)>,
}

/// The source of messages for [`publish`].
pub(crate) type TaskMessages = mpsc::Receiver<(String, TaskMessage)>;

impl Outbox {
    pub(crate) fn new(identity: Arc<Identity>, communicator: Communicator) -> (Self, TaskMessages) {
        let (announcements, receiver) = mpsc::channel(ANNOUNCEMENTS_MAX);
        (Self { identity, communicator, announcements }, receiver)
    }

    /// Announces a row that has been queued.
    pub(crate) async fn announce(&self, pid: Pid, queue: String, announced_at: i64) {
        let message = TaskMessage { task: Task::Continue { pid, announced_at: Some(announced_at) }, traceparent: None };
        // The channel is closed only when the incarnation ends; then the head rule of another worker announces the row.
        let _ = self.announcements.send((queue, message)).await;
    }

    /// Announces rows that a sweep or a request has queued.
    pub(crate) async fn announce_all(&self, queued: ByQueue) {
        for (queue, rows) in queued {
            for row in rows {
                let task = Task::Continue { pid: row.pid, announced_at: Some(row.announced_at) };
                let message = TaskMessage { task, traceparent: row.traceparent };
                let _ = self.announcements.send((queue.clone(), message)).await;
            }
        }
    }

    /// Publishes the new state of a process.
    pub(crate) fn publish_event(&self, pid: Pid, state: State, exit: Option<i32>) {
        let at = system_micros();
        let by = self.identity.name.clone();
        self.communicator.announce(Event { pid, state: state.word().to_owned(), at, by, exit });
    }

    /// Sends the reply to the launch that waits for the end of a process.
    pub(crate) async fn answer_end(&self, pid: Pid, state: State, outcome: Option<&Outcome>, to: ReplyTo) {
        let reply = end_reply(pid, state, outcome);
        if let Err(error) = self.communicator.reply(&to, &reply).await {
            warn!(%pid, %error, "the reply with the end of this process could not be sent");
        }
    }

    /// Publishes the end of a process that was not held.
    pub(crate) async fn ended(&self, pid: Pid, state: State, reply_to: Option<Vec<u8>>) {
        self.publish_event(pid, state, None);
        if let Some(to) = reply_to.as_deref().and_then(ReplyTo::from_bytes) {
            self.answer_end(pid, state, Some(&Outcome::default()), to).await;
        }
    }
}

/// The reply to `execute` at the end of a process.
pub(crate) fn end_reply(pid: Pid, state: State, outcome: Option<&Outcome>) -> Reply {
    Reply {
        pid: Some(pid),
        state: Some(state.word().to_owned()),
        exit: outcome.and_then(|outcome| outcome.exit),
        values: outcome.map(|outcome| serde_json::Value::Object(outcome.values.clone())),
        ..Reply::default()
    }
}

/// Publishes announcements in batches of all that are waiting.
pub(crate) async fn publish(communicator: Communicator, mut announcements: TaskMessages) {
    let mut gathered = Vec::new();
    while announcements.recv_many(&mut gathered, ANNOUNCEMENTS_MAX).await > 0 {
        let mut by_queue: BTreeMap<String, Vec<TaskMessage>> = BTreeMap::new();
        for (queue, message) in gathered.drain(..) {
            by_queue.entry(queue).or_default().push(message);
        }
        for (queue, tasks) in by_queue {
            let count = tasks.len();
            if let Err(error) = communicator.publish(&queue, tasks).await {
                debug!(queue, count, %error, "not announced; the head rule announces them again");
            }
        }
    }
}

/// Microseconds since 1970 by this host's clock; only for events, on which no decision depends.
fn system_micros() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
