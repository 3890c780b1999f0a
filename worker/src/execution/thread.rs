//! Process threads: each has its own runtime and LocalSet, and a process stays on its thread.
//!
//! A process must not block its thread. One that does stops the other processes of the thread, but nothing else;
//! [`Thread::blocked`] names it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_common::id::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet};
use tracing::error;

use crate::execution::run::{self, Start};

/// A process that blocks its thread for this long is named in the log and in `status`.
pub(crate) const BLOCKED_AFTER: Duration = Duration::from_secs(5);

/// Processes on their way to a thread. Each has a slot already; a full channel only delays the next claim.
const STARTS_MAX: usize = 64;

/// A thread that advances processes.
pub(crate) struct Thread {
    starts: mpsc::Sender<Start>,
    polled: Arc<Polled>,
    ended: oneshot::Receiver<()>,
}

/// The process that is polled now, and since when.
#[derive(Default)]
struct Polled {
    current: Mutex<Option<(Pid, Instant)>>,
}

impl Thread {
    pub(crate) fn start(idx: usize) -> std::io::Result<Self> {
        let (starts, mut receiver) = mpsc::channel::<Start>(STARTS_MAX);
        let (ended_tx, ended) = oneshot::channel();
        let polled = Arc::new(Polled::default());
        let watched = Arc::clone(&polled);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("process-{idx}")).spawn(move || {
            let local = LocalSet::new();
            local.block_on(&runtime, async move {
                let mut processes = JoinSet::new();
                loop {
                    tokio::select! {
                        start = receiver.recv() => match start {
                            Some(start) => {
                                let (pid, polled) = (start.pid(), Arc::clone(&watched));
                                processes.spawn_local(Watched { pid, polled, inner: Box::pin(run::run(start)) });
                            }
                            None => break,
                        },
                        Some(ended) = processes.join_next() => report(ended),
                    }
                }
                while let Some(ended) = processes.join_next().await {
                    report(ended);
                }
            });
            // The receiver may be gone.
            let _ = ended_tx.send(());
        })?;
        Ok(Self { starts, polled, ended })
    }

    /// The channel of processes to this thread.
    pub(crate) fn starts(&self) -> mpsc::Sender<Start> {
        self.starts.clone()
    }

    /// The process that blocks the thread, and for how long.
    pub(crate) fn blocked(&self) -> Option<(Pid, Duration)> {
        let current = self.polled.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.map(|(pid, since)| (pid, since.elapsed())).filter(|(_, elapsed)| *elapsed >= BLOCKED_AFTER)
    }

    /// Waits until every process of the thread has ended or the limit has passed; returns whether all have ended.
    pub(crate) async fn stop(self, limit: Duration) -> bool {
        drop(self.starts);
        tokio::time::timeout(limit, self.ended).await.is_ok()
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(failure) = ended {
        // Panics of the process itself are caught where it is polled; this one is the worker's.
        error!(%failure, "the task of a process panicked; the next reconciling beat gives its lease back");
    }
}

/// A future that records when it is polled.
struct Watched<F> {
    pid: Pid,
    polled: Arc<Polled>,
    inner: Pin<Box<F>>,
}

impl<F: Future<Output = ()>> Future for Watched<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        *self.polled.current.lock().unwrap_or_else(PoisonError::into_inner) = Some((self.pid, Instant::now()));
        let poll = self.inner.as_mut().poll(context);
        *self.polled.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
        poll
    }
}
