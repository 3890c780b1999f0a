//! One held process: advance, checkpoint, and so on until it ends, waits, or has to be let go.
//!
//! Between two advances nothing is carried over but the checkpoint, and here everything is obeyed: a kill, a pause, the
//! worker's drain. In the middle of an advance only what is urgent is.

use std::cell::{Cell, RefCell};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::communicator::ReplyTo;
use baton_common::id::Pid;
use baton_common::spec::{Spec, Work};
use baton_common::state::{Desired, Place, State};
use baton_common::store::blob::{Checkpoint, Outcome, spec_from_bytes, spec_to_bytes};
use baton_common::store::control::{Answer, Request};
use baton_common::store::writer::{Attempt, Claimed, Fence, Fenced, How, Verb, Writer, Written};
use baton_common::store::{Error as StoreError, Store};
use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tracing::{Instrument, Span, debug, info, warn};

use crate::author::facilities::Facilities;
use crate::author::live::{Drain, Live, Orders, SLEEPING, WRITING};
use crate::author::process::{Advance, Context, Draft, Error, Interrupt, Wait, by_worker};
use crate::author::registry::{AnyProcess, NotMade, Registry};
use crate::execution::decide::{Ending, PARK_FROM, next_checkpoint, next_try, panic_text, panicked, state_of};
use crate::execution::gate::Gate;
use crate::execution::lease::Lease;
use crate::execution::lease_table::LeaseTable;
use crate::execution::limits::Limits;
use crate::execution::timer::Timer;
use crate::machine::clock::boottime_ms;
use crate::machine::random::random;
use crate::machine::shortage::Health;
use crate::outbox::Outbox;
use crate::site::Sites;

/// When a process that cannot go on, and cannot be paused either, is tried again.
const STUCK_PAUSE: Duration = Duration::from_secs(10);

/// The shortest and the longest pause of a process that needs another build: in a rolling upgrade the next worker may be
/// the right one, and what waits for one for days shall cost next to nothing.
const REFUSAL_PAUSE_MIN: Duration = Duration::from_secs(1);
const REFUSAL_PAUSE_MAX: Duration = Duration::from_secs(60);

/// The longest pause of a process that needs another worker of this build: there is one in a fleet that is mostly well.
const NOT_HERE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What the loops of all held processes work with.
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
    /// Notified when a suspect has made a checkpoint or has left: another can be claimed.
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
    // What is not needed between two advances is boxed while it is: thousands of processes may do nothing but wait.
    let (mut run, made) = Run::restore(claimed, live, &execution);
    match made {
        Ok(()) => run.go_on().await,
        // `baton run` is all workers that there are.
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
    if run.is_suspect {
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
    /// It has, or may have, a job at a site.
    has_outside: bool,
    /// No other suspect can be claimed, until this one's next checkpoint.
    is_suspect: bool,
    /// The database could never store what was written for it.
    is_rejected: bool,
    /// In which it advances; none while it waits in memory, where thousands may.
    span: Option<Span>,
    /// What the last write left, once that is no longer `held`; `None` when the lease was lost.
    left: Option<Written>,
    outcome: Option<Outcome>,
}

/// What is kept of a process that waits in memory, where thousands may for hours: maps of values and inputs take more room
/// than all else that is kept of them.
struct Packed {
    spec: Box<[u8]>,
    checkpoint: Box<[u8]>,
}

/// Whether the process is still ours.
#[derive(PartialEq)]
enum Hold {
    Held,
    Gone,
}

/// What comes after an advance.
enum Next {
    /// Another one.
    Advance,
    /// Another one after this time, in which the process stays here.
    Linger(Duration),
    /// Nothing: the process is not ours any more.
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
    /// Makes the process anew, or says why that cannot be done.
    fn restore(claimed: Box<Claimed>, live: Arc<Live>, execution: &Arc<Execution>) -> (Box<Self>, Result<(), NotMade>) {
        let is_suspect = claimed.is_suspect();
        let Claimed { fence, claimed_at, try_number, checkpoint, spec, has_outside, .. } = *claimed;
        let spec = spec.map_err(|error| unread("spec", &error));
        let checkpoint = checkpoint.transpose().map_err(|error| unread("checkpoint", &error));
        let restored = checkpoint.as_ref().ok().cloned().flatten().unwrap_or_default();
        let (spec, read) = match spec {
            Ok(spec) => (spec, Ok(())),
            Err(not_made) => (Spec::new(Work::Run { argv: vec!["false".into()] }), Err(not_made)),
        };
        let context = Context {
            facilities: Arc::clone(&execution.facilities),
            fence,
            try_number: Cell::new(try_number),
            spec: Some(Box::new(spec)),
            live,
            draft: RefCell::new(Draft::of(&restored)),
        };
        let mut run = Box::new(Run {
            execution: Arc::clone(execution),
            context: Rc::new(context),
            process: None,
            checkpoint: restored,
            claimed_at,
            has_outside,
            is_suspect,
            is_rejected: false,
            span: None,
            left: None,
            outcome: None,
        });
        let made = read.and_then(|()| {
            let spec = run.context.spec();
            let checkpoint = checkpoint?;
            let state = checkpoint.as_ref().and_then(state_of);
            if let Some(on_site) = &spec.on_site
                && execution.sites.get(&on_site.at).is_none()
            {
                return Err(NotMade::OtherBuild(format!("this worker has no site `{}`", on_site.at)));
            }
            if let Some(reason) = spec.on_site.as_ref().and_then(|on_site| execution.sites.sharing.refuses(on_site)) {
                return Err(NotMade::NotHere(format!("{}: {reason}", execution.facilities.identity.name)));
            }
            execution.registry.make(spec, run.context.input(), state)
        });
        let made = made.map(|process| run.process = Some(process));
        (run, made)
    }

    /// Leaves it, as it is, to a worker of another build. Nothing says when one comes: the pauses grow with the time for
    /// which it has been so, and each costs two commits and a message.
    async fn refuse(&mut self, reason: String, refused_at: Option<i64>, most: Duration) {
        let pause = refusal_pause(self.claimed_at, refused_at).min(most);
        if refused_at.is_none() {
            warn!(pid = %self.context.pid(), reason, "this worker cannot go on with it; another one may");
        }
        loop {
            let verb = Verb::Refuse { wake_in: pause, reason: reason.clone() };
            if self.write(verb, None, None).await == Hold::Gone {
                self.execution.timer.due_in(pause);
                return;
            }
            // It was woken or killed meanwhile.
            if self.obey().await == Hold::Gone {
                return;
            }
        }
    }

    /// The loop of a held process.
    async fn go_on(&mut self) {
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
                // Interrupted: what has to be obeyed is found at the top.
                None => Box::pin(self.begin_again(Hold::Held)).await.into(),
            };
            match next {
                Next::Advance => {}
                Next::Linger(pause) => self.linger(pause).await,
                Next::Leave => return,
            }
        }
    }

    /// An advance that begins after the lease's deadline could run twice at once; the next beat decides.
    async fn wait_for_trust(&self) {
        tokio::select! {
            () = self.execution.lease.trusted() => {}
            () = self.context.live.until(|orders| orders.abandon) => {}
        }
    }

    /// After an advance that was not made: what it has changed in memory is no state, only the checkpoint is.
    async fn begin_again(&mut self, hold: Hold) -> Hold {
        if hold == Hold::Gone || self.context.live.orders().abandon {
            return Hold::Gone;
        }
        let state = state_of(&self.checkpoint);
        match self.execution.registry.make(self.context.spec(), self.context.input(), state) {
            Ok(process) => {
                self.process = Some(process);
                Hold::Held
            }
            Err(not_made) => {
                let reason = format!("its own checkpoint cannot be read: {not_made:?}");
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
        }
    }

    /// Obeys what is desired of the process; called between two advances, and after one was dropped.
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
                    // What it waits for came meanwhile.
                    continue;
                }
                self.end(State::Killed, self.killed().await, How::Killed).await;
                return Hold::Gone;
            }
            if orders.desired == Desired::Pause {
                if self.write(Verb::Pause, None, Some((How::Paused, None))).await == Hold::Gone {
                    return Hold::Gone;
                }
                // The row has been played meanwhile, and its answer has changed the orders.
                continue;
            }
            if orders.drain != Drain::No {
                return self.write(Verb::GiveBack, None, Some((How::Drained, None))).await;
            }
            return Hold::Held;
        }
    }

    /// Ends what the process has outside before it is killed; what it has to wait for, if that takes longer.
    async fn end_outside(&mut self) -> Option<Wait> {
        let Some(process) = self.process.as_mut() else {
            // This worker cannot; another may.
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
                    warn!(pid = %context.pid(), %failure, "what it has outside could not be ended");
                    None
                }
            },
            // The lease is lost, or the worker stops: another goes on with it.
            () = context.live.until(|orders| orders.abandon || orders.drain >= Drain::Now) => {
                Some(Wait::pause(REFUSAL_PAUSE_MIN))
            }
        }
    }

    /// One advance; `None` when it was dropped because something urgent came.
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
        let process = self.process.as_mut().expect("a process that was restored is there until it ends");
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

    /// Makes an advance durable. What is not needed for one after which the process goes on is boxed.
    async fn commit(&mut self, advance: Advance) -> Next {
        border!("advance-made");
        let process = self.process.as_ref().expect("a process that was restored is there until it ends");
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
        // Whoever pauses or drains need not wait for it: a wait that is cut is an early advance later, no error.
        let _ = tokio::time::timeout(pause, self.context.live.until(Orders::are_any)).await;
        if let Some(packed) = packed {
            self.unpack(&packed);
        }
    }

    fn pack(&mut self) -> Packed {
        let context = Rc::get_mut(&mut self.context).expect("an advance has it only while it is made");
        let spec = context.spec.take().expect("it is packed once");
        Packed {
            spec: spec_to_bytes(&spec).into_boxed_slice(),
            checkpoint: std::mem::take(&mut self.checkpoint).to_bytes().into_boxed_slice(),
        }
    }

    fn unpack(&mut self, packed: &Packed) {
        let spec = spec_from_bytes(&packed.spec).expect("this program has just written it");
        let context = Rc::get_mut(&mut self.context).expect("an advance has it only while it is made");
        context.spec = Some(Box::new(spec));
        self.checkpoint = Checkpoint::from_bytes(&packed.checkpoint).expect("this program has just written it");
    }

    /// The process has come to its end by itself: well, or to be tried again, or not well.
    async fn finish(&mut self, exit: i32, checkpoint: Checkpoint) -> Hold {
        let ending = Ending::of(self.context.spec(), exit, &self.context.draft.borrow());
        if let Some(failure) = ending.failure()
            && let Some(hold) = self.retry(failure).await
        {
            return hold;
        }
        let Ending { ok, reason, is_incomplete, outcome } = ending;
        let outcome = Outcome {
            exit: Some(exit),
            ok,
            values: checkpoint.values.clone(),
            sandbox: self.place(&outcome),
            ..outcome
        };
        self.checkpoint = checkpoint;
        let how = if ok { How::Ok } else { How::Error };
        let attempt = Some((how, reason));
        let state = if is_incomplete { State::Excepted } else { State::Finished };
        self.outcome = Some(outcome.clone());
        self.write(Verb::End { state, outcome }, Some(self.checkpoint.clone()), attempt).await
    }

    /// Parks it until there is what it waits for.
    async fn wait(&mut self, Wait { waits_for, at_most }: Wait, killing: bool) -> Hold {
        let hold = self.write(Verb::Wait { waits_for, wake_in: at_most, killing }, None, None).await;
        if hold == Hold::Gone {
            self.execution.timer.due_in(at_most);
        }
        hold
    }

    /// An advance was not made.
    async fn fail(&mut self, error: Error) -> Hold {
        match error {
            Error::NotNow(wait) => self.wait(wait, false).await,
            Error::Interrupted(reason) => {
                info!(pid = %self.context.pid(), reason, "interrupted; back to the queue at no charge");
                self.write(Verb::GiveBack, None, Some((How::Drained, Some(reason)))).await
            }
            Error::Lacking(shortage) => {
                let reason = Some(shortage.to_string());
                // Before the process can come back.
                self.execution.health.note(shortage);
                self.execution.gate.take_what_it_can().await;
                self.write(Verb::GiveBack, None, Some((How::Drained, reason))).await
            }
            Error::Failed(reason) => {
                if let Some(hold) = self.retry(reason.clone()).await {
                    return hold;
                }
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
            Error::Input(reason) => {
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
            Error::Stuck(reason) => self.pause(reason).await,
        }
    }

    /// Pauses the process as an operator would, with what somebody has to see to as the reason.
    async fn pause(&mut self, reason: String) -> Hold {
        let Fence { pid, .. } = self.context.fence;
        warn!(%pid, reason, "it cannot go on by itself, and is paused");
        let by = by_worker(&self.execution.facilities.identity.name);
        let request = Request { reason: Some(reason.clone()), ..Request::new(Desired::Pause, by) };
        let asked = tokio::select! {
            biased;
            asked = self.execution.store.control_held(self.context.fence, &request) => asked,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        match asked {
            // A kill that stands is obeyed; a lease that is lost, the write finds.
            Ok(Answer::Recorded(_) | Answer::Dying | Answer::Ended(_) | Answer::Absent) => {
                self.write(Verb::Pause, None, Some((How::Error, Some(reason)))).await
            }
            Err(error) => {
                warn!(%pid, %error, "the pause is not recorded; it is tried again");
                self.wait(Wait::pause(STUCK_PAUSE), false).await
            }
        }
    }

    /// Parks the process until its next try; `None` when there is none left.
    async fn retry(&mut self, reason: String) -> Option<Hold> {
        let (checkpoint, pause) = next_try(&self.context.spec().retry, &self.checkpoint, &reason, random())?;
        info!(pid = %self.context.pid(), reason, wait_ms = pause.as_millis(), "failed; it will be tried again");
        let attempt = Some((How::Error, Some(reason)));
        let hold = self.write_as(Verb::Park { wake_in: pause }, Some(checkpoint), attempt, 1).await;
        self.execution.timer.due_in(pause);
        Some(hold)
    }

    async fn killed(&self) -> Outcome {
        let reason = self.execution.store.killed_because(self.context.pid()).await.ok().flatten();
        let outcome = self.context.draft.borrow().outcome.clone();
        Outcome {
            reason: Some(reason.unwrap_or_else(|| "killed".into())),
            values: self.checkpoint.values.clone(),
            sandbox: self.place(&outcome),
            ..Outcome::default()
        }
    }

    fn place(&self, outcome: &Outcome) -> Option<String> {
        // One at a site says where that is.
        let is_elsewhere = self.context.spec().on_site.is_some();
        outcome.sandbox.as_ref().map(|path| {
            if is_elsewhere { path.clone() } else { format!("{}:{path}", self.execution.facilities.identity.host) }
        })
    }

    async fn end(&mut self, state: State, outcome: Outcome, how: How) {
        let attempt = Some((how, outcome.reason.clone()));
        self.outcome = Some(outcome.clone());
        self.write(Verb::End { state, outcome }, None, attempt).await;
    }

    /// Writes a checkpoint after which the process goes on.
    async fn keep(&mut self, checkpoint: Checkpoint) -> Hold {
        let (has_outputs, begins_try) = {
            let draft = self.context.draft.borrow();
            (draft.has_outputs(), draft.begins_try)
        };
        if has_outputs || begins_try {
            return Box::pin(self.write_as(Verb::Keep, Some(checkpoint), None, i64::from(begins_try))).await;
        }
        self.context.live.set_stage(WRITING);
        let fence = self.context.fence;
        let write = self.execution.writer.checkpoint(fence, &checkpoint);
        let written = tokio::select! {
            biased;
            written = write => written,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        if written.is_err() && Box::pin(self.end_if_rejected(&written)).await {
            return Hold::Gone;
        }
        self.take_over(written, Some(checkpoint))
    }

    async fn write(
        &mut self,
        verb: Verb,
        checkpoint: Option<Checkpoint>,
        ended: Option<(How, Option<String>)>,
    ) -> Hold {
        self.write_as(verb, checkpoint, ended, 0).await
    }

    /// Writes under the fence, and takes over what the row says.
    async fn write_as(
        &mut self,
        verb: Verb,
        checkpoint: Option<Checkpoint>,
        ended: Option<(How, Option<String>)>,
        more_tries: i64,
    ) -> Hold {
        let fence = self.context.fence;
        let fenced = Fenced {
            fence,
            verb,
            checkpoint: checkpoint.as_ref().map(Into::into),
            try_number: self.context.try_number() + more_tries,
            ended: ended.map(|(how, reason)| Attempt { started_at: self.claimed_at, how, reason }),
            outputs: self.context.draft.borrow_mut().take_outputs(),
        };
        self.context.live.set_stage(WRITING);
        let written = tokio::select! {
            biased;
            written = self.execution.writer.write(fenced) => written,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        if written.is_err() && Box::pin(self.end_if_rejected(&written)).await {
            return Hold::Gone;
        }
        if matches!(written, Ok(Some(_))) {
            self.context.try_number.set(self.context.try_number() + more_tries);
        }
        self.take_over(written, checkpoint)
    }

    /// Takes over what the row says after a write.
    fn take_over(&mut self, written: Result<Option<Written>, StoreError>, checkpoint: Option<Checkpoint>) -> Hold {
        let fence = self.context.fence;
        match written {
            Ok(Some(written)) => {
                if let Some(checkpoint) = checkpoint {
                    self.context.live.set_advances(checkpoint.advances);
                    self.checkpoint = checkpoint;
                    if std::mem::take(&mut self.is_suspect) {
                        self.execution.quarantine_free.notify_one();
                    }
                }
                if written.place == Place::Held {
                    self.context.live.wish(written.desired, written.urgent);
                    return Hold::Held;
                }
                self.context.live.set_left_as(written.state);
                self.left = Some(written);
                Hold::Gone
            }
            Ok(None) => {
                warn!(pid = %fence.pid, epoch = fence.epoch, "the lease is lost; dropping the process");
                self.outcome = None;
                Hold::Gone
            }
            Err(error) => {
                warn!(pid = %fence.pid, %error, "not written; the reconciling beat gives the process back");
                self.outcome = None;
                Hold::Gone
            }
        }
    }

    /// Ends the process if the database can never store what was just written for it; otherwise each next holder would make
    /// the same advance and write the same again. An end that cannot be stored either is left to the reconciling beat.
    async fn end_if_rejected(&mut self, written: &Result<Option<Written>, StoreError>) -> bool {
        let Err(StoreError::Rejected(cause)) = written else { return false };
        if std::mem::replace(&mut self.is_rejected, true) {
            return false;
        }
        let reason = format!("the database can never store what it has written: {cause}");
        Box::pin(self.end(State::Excepted, Outcome::because(reason), How::Error)).await;
        true
    }

    /// Says what must be said now that the process is no longer held.
    async fn leave(&mut self, reply_to: Option<Vec<u8>>) {
        // Whatever it still has (a program's handle) goes before the others are told.
        self.process = None;
        let Some(written) = self.left.take() else { return };
        let Fence { pid, .. } = self.context.fence;
        debug!(%pid, place = written.place.word(), state = written.state.word(), "left this worker");
        match written.place {
            Place::Queued => self.execution.outbox.publish(pid, written.queue, written.announced_at).await,
            Place::Ended | Place::Parked | Place::Held => {
                let exit = self.outcome.as_ref().and_then(|outcome| outcome.exit);
                self.execution.outbox.announce(pid, written.state, exit);
            }
        }
        if written.place == Place::Ended
            && let Some(reply_to) = reply_to.as_deref().and_then(ReplyTo::from_bytes)
        {
            self.execution.outbox.answer_end(pid, written.state, self.outcome.as_ref(), reply_to).await;
        }
    }
}

/// A newer program may read what this one cannot; what nobody has written, nobody can.
fn unread(what: &str, error: &StoreError) -> NotMade {
    let reason = format!("its {what}: {error}");
    if matches!(error, StoreError::Newer { .. }) { NotMade::OtherBuild(reason) } else { NotMade::Failed(reason) }
}

/// How long a process waits that no worker could go on with since `refused_at`; both times in microseconds.
fn refusal_pause(now: i64, refused_at: Option<i64>) -> Duration {
    let since = refused_at.map_or(0, |refused_at| now - refused_at);
    Duration::from_micros(since.max(0).cast_unsigned()).clamp(REFUSAL_PAUSE_MIN, REFUSAL_PAUSE_MAX)
}
