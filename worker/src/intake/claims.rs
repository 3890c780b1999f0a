//! Claims: they make this worker the holder of a process and assign it to a thread.

use std::sync::Arc;

use baton_common::id::Pid;
use baton_common::store;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::{Claim, Claimed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::author::live::{Live, Orders};
use crate::execution::lease_table::{ClaimGuard, Entry};
use crate::execution::run::{Execution, Start};
use crate::execution::thread::Thread;
use crate::intake::quarantine::Quarantine;

/// The parts of a worker that claim and start processes.
pub(crate) struct Claims {
    pub(crate) execution: Arc<Execution>,
    pub(crate) threads: Arc<Vec<Thread>>,
    pub(crate) slots: Arc<Semaphore>,
    /// The queues that the worker serves, with all their classes.
    pub(crate) queues: Arc<[String]>,
    pub(crate) quarantine: Quarantine,
}

impl Claims {
    /// Claims a process, and again if another message for it arrived meanwhile. Returns `guard` only if the process was
    /// claimed. Without a guard the claim may run at the same time as another.
    pub(crate) async fn claim(
        &self,
        pid: Pid,
        queue: &str,
        launch: Option<Box<NewProcess>>,
        guard: Option<ClaimGuard>,
    ) -> (Result<Claim, store::Error>, Option<ClaimGuard>) {
        let claim = loop {
            match self.execution.writer.claim(pid, queue.to_owned(), launch.clone()).await {
                Ok(Claim::NotQueued) if guard.as_ref().is_some_and(ClaimGuard::take_another) => {}
                claim => break claim,
            }
        };
        // Other answers may take long to handle, and a later message must be able to claim again.
        let guard = guard.filter(|_| matches!(claim, Ok(Claim::Claimed(_))));
        (claim, guard)
    }

    /// Enters a claimed process into the table and assigns it to the thread with the fewest processes, avoiding blocked
    /// ones. The returned future starts it there.
    pub(crate) fn start(
        &self,
        claimed: Box<Claimed>,
        permit: OwnedSemaphorePermit,
        guard: Option<ClaimGuard>,
    ) -> impl Future<Output = ()> + use<> {
        let held = &self.execution.leases;
        let loads = held.loads(self.threads.len());
        let idle =
            self.threads.iter().enumerate().min_by_key(|(idx, thread)| (thread.blocked().is_some(), loads[*idx]));
        let (thread_idx, thread) = idle.expect("a worker has at least one thread");
        let advances = match &claimed.checkpoint {
            Some(Ok(checkpoint)) => checkpoint.advances,
            Some(Err(_)) | None => 0,
        };
        let live = Arc::new(Live::new(advances, Orders::new(claimed.desired, claimed.urgent)));
        held.enter(Entry { fence: claimed.fence, live: Arc::clone(&live), thread_idx }, guard);
        let start = Start { claimed, live, execution: Arc::clone(&self.execution), permit };
        let starts = thread.starts();
        async move {
            // The thread ends only with the incarnation.
            let _ = starts.send(start).await;
        }
    }

    /// Claims a process that has no message; returns whether that succeeded.
    pub(crate) async fn take(
        self: Arc<Self>,
        pid: Pid,
        queue: String,
        permit: OwnedSemaphorePermit,
        guard: ClaimGuard,
    ) -> bool {
        match self.claim(pid, &queue, None, Some(guard)).await {
            (Ok(Claim::Claimed(claimed)), guard) => {
                self.start(claimed, permit, guard).await;
                return true;
            }
            (Ok(Claim::Quarantined), _) => self.quarantine.wait(pid, queue),
            (Ok(Claim::NotQueued | Claim::Absent | Claim::OtherSpec | Claim::Pruned | Claim::Rejected(_)), _) => {}
            (Err(error), _) => debug!(%pid, %error, "not claimed; the next round tries again"),
        }
        false
    }
}
