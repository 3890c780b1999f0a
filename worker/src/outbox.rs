//! What a worker says by the broker: tasks, events, and how processes have ended.

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

/// Messages that wait to be published. Each stands for a row that is queued already, so a full channel only slows down
/// whoever queues more.
const TELL_LENGTH: usize = 1024;

/// The way out for messages.
pub(crate) struct Outbox {
    identity: Arc<Identity>,
    communicator: Communicator,
    tell: mpsc::Sender<(String, TaskMessage)>,
}

/// What [`publish`] takes messages from.
pub(crate) type TaskMessages = mpsc::Receiver<(String, TaskMessage)>;

impl Outbox {
    pub(crate) fn new(identity: Arc<Identity>, communicator: Communicator) -> (Self, TaskMessages) {
        let (tell, told) = mpsc::channel(TELL_LENGTH);
        (Self { identity, communicator, tell }, told)
    }

    /// Publishes the `continue` of a row that has been queued.
    pub(crate) async fn publish(&self, pid: Pid, queue: String, announced_at: i64) {
        let told = TaskMessage { task: Task::Continue { pid, announced_at: Some(announced_at) }, traceparent: None };
        // The channel is closed only when the incarnation ends; the head rule of another worker finds the row then.
        let _ = self.tell.send((queue, told)).await;
    }

    /// Publishes the messages of rows that a sweep or a request has queued.
    pub(crate) async fn tell_all(&self, queued: ByQueue) {
        for (queue, rows) in queued {
            for row in rows {
                let task = Task::Continue { pid: row.pid, announced_at: Some(row.announced_at) };
                let _ = self.tell.send((queue.clone(), TaskMessage { task, traceparent: row.traceparent })).await;
            }
        }
    }

    /// Says in which state a process is now.
    pub(crate) fn announce(&self, pid: Pid, state: State, exit: Option<i32>) {
        let at = system_micros();
        let by = self.identity.name.clone();
        self.communicator.announce(Event { pid, state: state.word().to_owned(), at, by, exit });
    }

    /// Answers whoever waits for the end of a process.
    pub(crate) async fn answer_end(&self, pid: Pid, state: State, outcome: Option<&Outcome>, to: ReplyTo) {
        let reply = end_reply(pid, state, outcome);
        if let Err(error) = self.communicator.reply(&to, &reply).await {
            warn!(%pid, %error, "whoever waits for the end of this process could not be told");
        }
    }

    /// Says that a process has ended which nobody held.
    pub(crate) async fn ended(&self, pid: Pid, state: State, reply_to: Option<Vec<u8>>) {
        self.announce(pid, state, None);
        if let Some(to) = reply_to.as_deref().and_then(ReplyTo::from_bytes) {
            self.answer_end(pid, state, Some(&Outcome::default()), to).await;
        }
    }
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

/// Publishes what has been queued, in batches of whatever has gathered.
pub(crate) async fn publish(communicator: Communicator, mut told: TaskMessages) {
    let mut gathered = Vec::new();
    while told.recv_many(&mut gathered, TELL_LENGTH).await > 0 {
        let mut by_queue: BTreeMap<String, Vec<TaskMessage>> = BTreeMap::new();
        for (queue, told) in gathered.drain(..) {
            by_queue.entry(queue).or_default().push(told);
        }
        for (queue, tasks) in by_queue {
            let count = tasks.len();
            if let Err(error) = communicator.publish(&queue, tasks).await {
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
