//! The loop of one held process: advance, checkpoint, and so on until the process ends, waits or leaves this worker.
//!
//! Only the checkpoint is carried over from one advance to the next. Between two advances the loop obeys every request: a
//! kill, a pause, the worker's drain. During an advance it obeys only urgent ones.

mod outcome;
mod restore;
mod write;

use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::id::Pid;
use baton_common::state::{Desired, State};
use baton_common::store::Store;
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::writer::{Claimed, How, Verb, Writer, Written};
use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tracing::{Instrument, Span, warn};

use crate::author::facilities::Facilities;
use crate::author::live::{Drain, Live, Orders, SLEEPING};
use crate::author::process::{Advance, Context, Error, Interrupt, Wait};
use crate::author::registry::{AnyProcess, NotMade, Registry};
use crate::execution::decide::{PARK_FROM, next_checkpoint, panicked};
use crate::execution::gate::Gate;
use crate::execution::lease::Lease;
use crate::execution::lease_table::LeaseTable;
use crate::execution::limits::Limits;
use crate::execution::timer::Timer;
use crate::machine::causes::panic_text;
use crate::machine::clock::boottime_ms;
use crate::machine::shortage::Health;
use crate::outbox::Outbox;
use crate::site::Sites;

/// Pause before the next attempt if a process is stuck and its pause could not be recorded.
const STUCK_PAUSE: Duration = Duration::from_secs(10);

/// The shortest and the longest pause of a process that needs another build. In a rolling upgrade the next worker may be
/// the right one; a process that waits for days must cost next to nothing.
const REFUSAL_PAUSE_MIN: Duration = Duration::from_secs(1);
const REFUSAL_PAUSE_MAX: Duration = Duration::from_secs(60);

/// The longest pause of a process that needs another worker of this build: most fleets have one that works.
const NOT_HERE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// The parts of a worker that the loops of all held processes share.
pub(crate) struct Execution {
    pub(crate) facilities: Arc<Facilities>,
    pub(crate) limits: Limits,
    pub(crate) registry: Registry,
    pub(crate) store: Store,
    pub(crate) writer: Writer,
    pub(crate) sites: Arc<Sites>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) health: Arc<Health>,
    pub(crate) leases: Arc<LeaseTable>,
    pub(crate) lease: Arc<Lease>,
    pub(crate) timer: Arc<Timer>,
    /// Notified when a quarantined process has made a checkpoint or has left, so the next can be claimed.
    pub(crate) quarantine_free: Arc<Notify>,
}

/// A claimed process on its way to its thread.
pub(crate) struct Start {
    pub(crate) claimed: Box<Claimed>,
    pub(crate) live: Arc<Live>,
    pub(crate) execution: Arc<Execution>,
    pub(crate) permit: OwnedSemaphorePermit,
}

impl Start {
    pub(crate) fn pid(&self) -> Pid {
        self.claimed.fence.pid
    }
}

/// Runs a process until it leaves this worker.
pub(crate) async fn run(start: Start) {
    let Start { mut claimed, live, execution, permit } = start;
    let (fence, refused_at) = (claimed.fence, claimed.refused_at);
    let reply_to = claimed.reply_to.take();
    // Futures that are not needed while a process waits are boxed, since thousands of processes may only wait.
    let (mut run, made) = Run::restore(claimed, live, &execution);
    match made {
        Ok(()) => run.advance_until_left().await,
        // With `baton run` there is no other worker.
        Err(NotMade::UnknownKind(reason)) if !execution.store.is_embedded() => {
            Box::pin(run.refuse(reason, refused_at, REFUSAL_PAUSE_MAX)).await;
        }
        Err(NotMade::OtherBuild(reason)) => Box::pin(run.refuse(reason, refused_at, REFUSAL_PAUSE_MAX)).await,
        Err(NotMade::NotHere(reason)) => Box::pin(run.refuse(reason, refused_at, NOT_HERE_PAUSE_MAX)).await,
        Err(NotMade::Failed(reason) | NotMade::UnknownKind(reason)) => {
            Box::pin(run.end(State::Excepted, Outcome::because(reason), How::Error)).await;
        }
    }
    Box::pin(run.leave(reply_to)).await;
    execution.leases.remove(fence);
    if run.is_quarantined {
        execution.quarantine_free.notify_one();
    }
    drop(permit);
}

/// A process while it is held.
struct Run {
    execution: Arc<Execution>,
    context: Rc<Context>,
    process: Option<Box<dyn AnyProcess>>,
    checkpoint: Checkpoint,
    claimed_at: i64,
    /// The process has or may have a job at a site.
    has_outside: bool,
    /// The process is quarantined: no other such process can be claimed until its next checkpoint.
    is_quarantined: bool,
    /// The database has rejected a write of this process for good.
    is_rejected: bool,
    /// The span of its advances; `None` while it waits in memory, to save space.
    span: Option<Span>,
    /// The row after the last write, once it is no longer `held`; `None` if the lease was lost.
    left: Option<Written>,
    outcome: Option<Outcome>,
}

/// Whether this worker still holds the process.
#[derive(PartialEq)]
enum Hold {
    Held,
    Gone,
}

/// The next step after an advance.
enum Next {
    /// The next advance.
    Advance,
    /// The next advance after this time, which the process spends in memory.
    Linger(Duration),
    /// None: this worker does not hold the process any more.
    Leave,
}

impl From<Hold> for Next {
    fn from(hold: Hold) -> Self {
        match hold {
            Hold::Held => Next::Advance,
            Hold::Gone => Next::Leave,
        }
    }
}

impl Run {
    /// The loop of a held process.
    async fn advance_until_left(&mut self) {
        loop {
            if self.context.live.orders().are_any() && Box::pin(self.obey()).await == Hold::Gone {
                return;
            }
            if !self.execution.lease.is_trusted(boottime_ms()) {
                Box::pin(self.wait_for_trust()).await;
            }
            if self.context.live.orders().abandon {
                return;
            }
            let next = match Box::pin(self.advance()).await {
                Some(Ok(advance)) => Box::pin(self.commit(advance)).await,
                Some(Err(error)) => {
                    let hold = Box::pin(self.fail(error)).await;
                    Box::pin(self.begin_again(hold)).await.into()
                }
                // Interrupted: the next round obeys the request.
                None => Box::pin(self.begin_again(Hold::Held)).await.into(),
            };
            match next {
                Next::Advance => {}
                Next::Linger(pause) => self.linger(pause).await,
                Next::Leave => return,
            }
        }
    }

    /// Waits for the next beat. An advance that begins after the deadline of the lease could run on two workers at once.
    async fn wait_for_trust(&self) {
        tokio::select! {
            () = self.execution.lease.trusted() => {}
            () = self.context.live.until(|orders| orders.abandon) => {}
        }
    }

    /// Obeys the requests; called between two advances and after one was dropped.
    async fn obey(&mut self) -> Hold {
        loop {
            let orders = self.context.live.orders();
            if orders.abandon {
                return Hold::Gone;
            }
            if orders.desired == Desired::Kill {
                if let Some(wait) = Box::pin(self.end_outside()).await {
                    if self.wait(wait, true).await == Hold::Gone {
                        return Hold::Gone;
                    }
                    // It was woken meanwhile.
                    continue;
                }
                self.end(State::Killed, self.killed().await, How::Killed).await;
                return Hold::Gone;
            }
            if orders.desired == Desired::Pause {
                if self.write(Verb::Pause, None, Some((How::Paused, None))).await == Hold::Gone {
                    return Hold::Gone;
                }
                // The process was played meanwhile, and the row has changed the orders.
                continue;
            }
            if orders.drain != Drain::No {
                return self.write(Verb::GiveBack, None, Some((How::Drained, None))).await;
            }
            return Hold::Held;
        }
    }

    /// Ends the job of the process before the process is killed. Returns a wait if that takes longer.
    async fn end_outside(&mut self) -> Option<Wait> {
        let Some(process) = self.process.as_mut() else {
            // This worker cannot end it; another may.
            return self.has_outside.then(|| Wait::pause(REFUSAL_PAUSE_MIN));
        };
        let context = Rc::clone(&self.context);
        tokio::select! {
            ended = process.end_outside(&context) => match ended {
                Ok(()) => None,
                Err(Error::NotNow(wait)) => Some(wait),
                Err(Error::Lacking(shortage)) => {
                    self.execution.health.note(shortage);
                    Some(Wait::pause(STUCK_PAUSE))
                }
                Err(failure @ (Error::Input(_) | Error::Failed(_) | Error::Interrupted(_) | Error::Stuck(_))) => {
                    warn!(pid = %context.pid(), %failure, "its job could not be ended");
                    None
                }
            },
            // The lease is lost or the worker stops; another worker continues.
            () = context.live.until(|orders| orders.abandon || orders.drain >= Drain::Now) => {
                Some(Wait::pause(REFUSAL_PAUSE_MIN))
            }
        }
    }

    /// Makes one advance; `None` if it was dropped for an urgent request.
    async fn advance(&mut self) -> Option<Result<Advance, Error>> {
        let context = Rc::clone(&self.context);
        context.draft.borrow_mut().renew(&self.checkpoint);
        context.live.set_stage("advancing");
        let span = self.span.get_or_insert_with(|| {
            tracing::info_span!(
                "process",
                process.id = %context.pid(),
                process.kind = context.spec().kind(),
                epoch = context.epoch(),
            )
        });
        let span = span.clone();
        let process = self.process.as_mut().expect("a restored process exists until it ends");
        let advanced = tokio::select! {
            biased;
            advanced = AssertUnwindSafe(process.advance(&context)).catch_unwind().instrument(span) => Some(advanced),
            () = context.live.until(Orders::interrupts) => None,
        };
        let orders = self.context.live.orders();
        match advanced {
            Some(Ok(advanced)) => Some(advanced),
            Some(Err(panic)) => {
                let text = panic_text(panic.as_ref());
                warn!(pid = %context.pid(), "the process panicked: {text}");
                Some(Err(panicked(&text)))
            }
            None if orders.abandon => None,
            None => {
                let why = if orders.desired == Desired::Kill {
                    Interrupt::Kill
                } else if orders.desired == Desired::Pause {
                    Interrupt::Pause
                } else {
                    Interrupt::Drain
                };
                let limit = context.interrupt_limit();
                tokio::select! {
                    ended = tokio::time::timeout(limit, process.interrupted(&context, why)) => if ended.is_err() {
                        warn!(pid = %context.pid(), ?why, "the process did not clean up within {}s", limit.as_secs());
                    },
                    () = context.live.until(|orders| orders.abandon || orders.drain == Drain::AtOnce) => {}
                }
                None
            }
        }
    }

    /// Makes an advance durable. Futures of the rare cases are boxed.
    async fn commit(&mut self, advance: Advance) -> Next {
        border!("advance-made");
        let process = self.process.as_ref().expect("a restored process exists until it ends");
        let state = match process.save() {
            Ok(state) => state,
            Err(error) => {
                let hold = Box::pin(self.fail(error)).await;
                return Box::pin(self.begin_again(hold)).await.into();
            }
        };
        let checkpoint = next_checkpoint(&self.checkpoint, &advance, state, &mut self.context.draft.borrow_mut());
        if let Some(reason) = self.execution.limits.broken_by(&checkpoint)
            && !matches!(advance, Advance::Finished { .. })
        {
            Box::pin(self.end(State::Excepted, Outcome::because(reason), How::Error)).await;
            return Next::Leave;
        }
        match advance {
            Advance::Again => self.keep(checkpoint).await.into(),
            Advance::After(pause) if pause >= PARK_FROM => {
                let hold = Box::pin(self.write(Verb::Park { wake_in: pause }, Some(checkpoint), None)).await;
                if hold == Hold::Gone {
                    self.execution.timer.due_in(pause);
                }
                hold.into()
            }
            Advance::After(pause) | Advance::Linger(pause) => match self.keep(checkpoint).await {
                Hold::Held => Next::Linger(pause),
                Hold::Gone => Next::Leave,
            },
            Advance::Finished { exit } => {
                let hold = Box::pin(self.finish(exit, checkpoint)).await;
                Box::pin(self.begin_again(hold)).await.into()
            }
        }
    }

    /// Waits in memory.
    async fn linger(&mut self, pause: Duration) {
        self.context.live.set_stage(SLEEPING);
        self.span = None;
        let packed = (pause >= PARK_FROM).then(|| self.pack());
        // Any request ends the wait. A wait that is cut short only makes the next advance early.
        let _ = tokio::time::timeout(pause, self.context.live.until(Orders::are_any)).await;
        if let Some(packed) = packed {
            self.unpack(&packed);
        }
    }
}
