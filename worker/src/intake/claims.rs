//! Claims: how a process becomes this worker's, whichever way it came, and finds a thread.

use std::sync::Arc;

use baton_common::id::Pid;
use baton_common::store;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::{Claim, Claimed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::author::live::{Live, Orders};
use crate::execution::lease_table::{Begun, Entry};
use crate::execution::run::{Execution, Start};
use crate::execution::thread::Thread;
use crate::intake::quarantine::Quarantine;

/// What it takes to claim processes and to start them.
pub(crate) struct Claims {
    pub(crate) execution: Arc<Execution>,
    pub(crate) threads: Arc<Vec<Thread>>,
    pub(crate) slots: Arc<Semaphore>,
    /// The queues that the worker serves, with all their classes.
    pub(crate) queues: Arc<[String]>,
    pub(crate) quarantine: Quarantine,
}

impl Claims {
    /// Claims, and looks once more if another message for the same process has come meanwhile. `begun` comes back only if
    /// the process is this worker's now; it is `None` for a claim that does not care whether there is another.
    pub(crate) async fn claim(
        &self,
        pid: Pid,
        queue: &str,
        launch: Option<Box<NewProcess>>,
        begun: Option<Begun>,
    ) -> (Result<Claim, store::Error>, Option<Begun>) {
        let claim = loop {
            match self.execution.writer.claim(pid, queue.to_owned(), launch.clone()).await {
                Ok(Claim::NotQueued) if begun.as_ref().is_some_and(Begun::take_another) => {}
                claim => break claim,
            }
        };
        // What follows another answer may take long, and a message that comes meanwhile is claimed anew.
        let begun = begun.filter(|_| matches!(claim, Ok(Claim::Claimed(_))));
        (claim, begun)
    }

    /// Enters a claimed process into the table and finds it a thread: the one with the fewest, and none that is blocked. What
    /// is returned starts it there.
    pub(crate) fn start(
        &self,
        claimed: Box<Claimed>,
        permit: OwnedSemaphorePermit,
        begun: Option<Begun>,
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
        held.enter(Entry { fence: claimed.fence, live: Arc::clone(&live), thread_idx }, begun);
        let start = Start { claimed, live, execution: Arc::clone(&self.execution), permit };
        let starts = thread.starts();
        async move {
            // The thread ends only with the incarnation.
            let _ = starts.send(start).await;
        }
    }

    /// Claims one that is told by no message; says whether it is this worker's now.
    pub(crate) async fn take(
        self: Arc<Self>,
        pid: Pid,
        queue: String,
        permit: OwnedSemaphorePermit,
        begun: Begun,
    ) -> bool {
        match self.claim(pid, &queue, None, Some(begun)).await {
            (Ok(Claim::Claimed(claimed)), begun) => {
                self.start(claimed, permit, begun).await;
                return true;
            }
            (Ok(Claim::NotBesideAnother), _) => self.quarantine.wait(pid, queue),
            (Ok(Claim::NotQueued | Claim::Absent | Claim::OtherSpec | Claim::Pruned | Claim::Rejected(_)), _) => {}
            (Err(error), _) => debug!(%pid, %error, "not claimed; the next look tries again"),
        }
        false
    }
}
