//! Process threads: each has a runtime and a LocalSet of its own, and a process stays on the thread that it was given.
//!
//! A process must not block its thread. One that does costs its neighbours on the thread their progress and nobody else
//! anything; [`Thread::blocked`] names it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_common::id::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet};
use tracing::error;

use crate::execution::run::{self, Start};

/// A process that has not given its thread back for this long is named in the log and in `status`.
pub(crate) const BLOCKED_AFTER: Duration = Duration::from_secs(5);

/// Processes on their way to a thread. Each has a slot already; a full channel only makes the next claim wait.
const STARTS_MAX: usize = 64;

/// A thread that advances processes.
pub(crate) struct Thread {
    starts: mpsc::Sender<Start>,
    polled: Arc<Polled>,
    ended: oneshot::Receiver<()>,
}

/// Which process has the thread, and since when.
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
            // Nobody may be waiting for it.
            let _ = ended_tx.send(());
        })?;
        Ok(Self { starts, polled, ended })
    }

    /// Gives a process to this thread. Waits while many others are on their way to it.
    pub(crate) fn starts(&self) -> mpsc::Sender<Start> {
        self.starts.clone()
    }

    /// The process that has not given the thread back, and for how long.
    pub(crate) fn blocked(&self) -> Option<(Pid, Duration)> {
        let current = self.polled.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.map(|(pid, since)| (pid, since.elapsed())).filter(|(_, elapsed)| *elapsed >= BLOCKED_AFTER)
    }

    /// Waits until every process of the thread has ended, but not for one that blocks it.
    pub(crate) async fn stop(self, limit: Duration) -> bool {
        drop(self.starts);
        tokio::time::timeout(limit, self.ended).await.is_ok()
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(failure) = ended {
        // The process's own panics are caught where it is polled; this is one of the worker's.
        error!(%failure, "a process's task has panicked; its lease is given back at the next reconciling beat");
    }
}

/// A future that notes when it has the thread.
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
