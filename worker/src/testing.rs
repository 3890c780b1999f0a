//! The test kit: a process in memory, without a broker, a database or a network.
//!
//! A [`Harness`] starts, restores, advances and saves a process with the code that a worker uses, so a checkpoint in a test
//! is the checkpoint that a worker writes. It runs in a plain `#[test]` function; inside of a tokio runtime it panics.
//!
//! ```
//! use baton_worker::prelude::*;
//! use baton_worker::testing::{Harness, Step};
//! # #[derive(Serialize, Deserialize)]
//! # struct Count { to: u32, #[serde(default)] done: u32 }
//! # impl Process for Count {
//! #     fn start(input: &Value) -> Result<Self, Error> { read_input(input) }
//! #     async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
//! #         self.done += 1;
//! #         context.set_value("done", self.done);
//! #         Ok(if self.done >= self.to { Advance::Finished { exit: 0 } } else { Advance::Again })
//! #     }
//! # }
//!
//! let mut count = Harness::new::<Count>(json!({"to": 3}));
//! assert_eq!(count.advance(), Step::Again);
//! count.crash();                                  // the next advance resumes from the checkpoint
//! let end = count.run_to_end();
//! assert_eq!(end.values["done"], 3);
//! ```
//!
//! # Crashes
//!
//! A worker can die at any moment. [`Harness::crash`] drops the process between two advances,
//! [`Harness::crash_before_commit`] after an advance and before its checkpoint, and [`Harness::crash_at_await`] in the middle
//! of an advance. The next advance restores a new instance from the last checkpoint: state that is not serialized is lost, as
//! on a worker. [`run_with_crash_after_every_advance`] and [`run_with_crash_in_every_advance`] compare a whole run with
//! crashes to one without.
//!
//! # The clock
//!
//! A harness has its own clock, which starts at zero; [`Harness::elapsed`] reads it. It jumps over the waits of
//! [`Advance::After`] and [`Advance::Linger`], and over [`Context::sleep`] and the limit of [`Context::timeout`] as soon as
//! the advance waits for nothing else. Closures of [`Context::blocking`] and operations at a site run in real time and take none
//! on this clock.
//! The clock is not tokio's: `tokio::time::sleep` waits in real time, so that real sockets and programs work in a test. Use
//! [`Context::sleep`] in a process, and its tests need no real time.
//!
//! # Checkpoints of older versions
//!
//! [`Harness::keep_golden`] keeps a checkpoint in a file, and [`Harness::from_golden`] restores it. Keep one file for each
//! released version of a process, and a test shows that the present version still reads it.
//!
//! [`Context::sleep`]: crate::process::Context::sleep
//! [`Context::timeout`]: crate::process::Context::timeout
//! [`Context::blocking`]: crate::process::Context::blocking

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_common::id::{Incarnation, Pid};
use baton_common::spec::{self, Format, Spec, Work};
use baton_common::state::Desired;
use baton_common::store::blob::{Checkpoint, Progress};
use baton_common::store::writer::Fence;
use futures_util::FutureExt;
use serde_json::{Map, Value};
use tokio::runtime::Runtime;
use tokio::task::LocalSet;

use crate::author::clock::{Clock, Simulated};
use crate::author::facilities::{Facilities, Identity};
use crate::author::live::{Live, Orders};
use crate::author::process::{Advance, Context, Draft, Error, Interrupt, Process};
use crate::author::registry::{AnyProcess, NotMade, Registry};
use crate::execution::decide::{panicked, state_of};
use crate::execution::limits::Limits;
use crate::machine::causes::panic_text;
use crate::site::Folders;

mod commit;
mod drive;
mod golden;
mod step;
mod survival;

pub use golden::{Golden, NotRestored, WRITE_GOLDEN};
pub use step::{End, How, Step};
pub use survival::{run_with_crash_after_every_advance, run_with_crash_in_every_advance};

/// The kind of a process that is given by its type.
const KIND: &str = "process.under.test";

/// The worker's grace in a test.
const GRACE: Duration = Duration::from_secs(25);

/// Waits for a site in a row, or calls of `end_outside`, after which a test gives up.
const WAITS_MAX: u32 = 1_000;

/// The pause before `end_outside` is called again when the machine lacked something.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(10);

/// A process in memory, and everything that a fleet would keep of it.
pub struct Harness {
    registry: Registry,
    spec: Spec,
    clock: Simulated,
    folders: Arc<Folders>,
    facilities: Arc<Facilities>,
    limits: Limits,
    row: Row,
    held: Option<Held>,
    local: LocalSet,
    runtime: Runtime,
}

/// What the database would keep.
struct Row {
    pid: Pid,
    epoch: i64,
    try_number: i64,
    /// A whole checkpoint, as the database stores it; `None` before the first one.
    checkpoint: Option<Vec<u8>>,
    /// How long the process waits before its next advance.
    wait: Duration,
    is_paused: bool,
    end: Option<End>,
    /// The log of earlier leases, and that of the present one.
    earlier_log: String,
    log: String,
}

/// What a worker would have in memory.
struct Held {
    context: Rc<Context>,
    process: Box<dyn AnyProcess>,
    checkpoint: Checkpoint,
}

impl Harness {
    /// A new process of this type. `with` is the `with` of its spec.
    ///
    /// # Panics
    /// Inside of a tokio runtime: use it in a plain `#[test]` function.
    #[track_caller]
    pub fn new<P: Process>(with: Value) -> Self {
        let mut registry = Registry::new();
        registry.register::<P>(KIND);
        Self::of_spec(&registry, Spec::new(Work::Call { name: KIND.into(), with }))
    }

    /// A new process from a spec in YAML, as `baton submit` reads it. Use it to test a registry, `retry` or `ok.exit`.
    ///
    /// # Panics
    /// The spec is wrong, or its `call` is not in the registry. Inside of a tokio runtime.
    #[track_caller]
    pub fn from_spec(registry: &Registry, yaml: &str) -> Self {
        let spec = spec::parse(yaml, Format::Yaml).unwrap_or_else(|error| panic!("the spec is wrong: {error}"));
        Self::of_spec(registry, spec)
    }

    #[track_caller]
    fn of_spec(registry: &Registry, spec: Spec) -> Self {
        let known: BTreeSet<&str> = registry.names().collect();
        assert!(known.contains(spec.kind()), "the registry has no kind `{}`; it has {known:?}", spec.kind());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("the system lets a test start a runtime");
        let (clock, folders) = (Simulated::default(), Arc::<Folders>::default());
        let identity = Identity { me: Incarnation::generate(), name: "test".into(), host: "localhost".into() };
        let facilities = Facilities {
            identity: Arc::new(identity),
            root: std::env::temp_dir(),
            grace: GRACE,
            blocking: runtime.handle().clone(),
            clock: Clock::Simulated(clock.clone()),
            writer: None,
            sites: Arc::clone(&folders) as Arc<dyn Any + Send + Sync>,
        };
        let row = Row {
            pid: Pid::generate(),
            epoch: 0,
            try_number: 1,
            checkpoint: None,
            wait: Duration::ZERO,
            is_paused: false,
            end: None,
            earlier_log: String::new(),
            log: String::new(),
        };
        Self {
            registry: registry.clone(),
            spec,
            clock,
            folders,
            facilities: Arc::new(facilities),
            limits: Limits::default(),
            row,
            held: None,
            local: LocalSet::new(),
            runtime,
        }
    }

    /// Makes a folder of this machine the site `name` for [`Context::site`](crate::process::Context::site).
    pub fn add_site(&mut self, name: impl Into<String>, folder: impl Into<PathBuf>) {
        self.folders.add(name.into(), folder.into());
    }

    /// Makes a site unreachable (`false`) or reachable again (`true`). While it is unreachable, `Context::site` returns
    /// [`Error::NotNow`].
    ///
    /// # Panics
    /// [`Harness::add_site`] has not added the site.
    #[track_caller]
    pub fn set_site_up(&mut self, name: &str, is_up: bool) {
        assert!(self.folders.set_up(name, is_up), "this test has no site `{name}`; add it with `Harness::add_site`");
    }

    /// Waits until the next advance is due, makes it, and commits it.
    ///
    /// # Panics
    /// The process has ended or is paused, or it cannot read its own checkpoint.
    #[track_caller]
    pub fn advance(&mut self) -> Step {
        match self.advance_until(None) {
            Advanced::Ended(end) => Step::Ended(end),
            Advanced::Returned(Ok(advance)) => self.commit(&advance),
            Advanced::Returned(Err(error)) => self.fail(error),
            Advanced::Dropped => unreachable!("nothing drops it"),
        }
    }

    /// Advances the process until it ends.
    ///
    /// # Panics
    /// As [`Harness::advance`]. The process is paused by [`Error::Stuck`], or it waits 1000 times in a row for a site or for
    /// its turn.
    #[track_caller]
    pub fn run_to_end(&mut self) -> End {
        let mut n_waits = 0;
        loop {
            match self.advance() {
                Step::Ended(end) => return end,
                Step::Paused { reason } => panic!("the process is paused: {reason}"),
                step @ (Step::Waits(_) | Step::GivenBack { .. }) => {
                    n_waits += 1;
                    assert!(
                        n_waits < WAITS_MAX,
                        "the process makes no progress; its last {WAITS_MAX} steps were {step:?}"
                    );
                }
                Step::Again | Step::After(_) | Step::Linger(_) | Step::Retried { .. } => n_waits = 0,
            }
        }
    }

    /// Crashes the worker between two advances. The next advance restores the process from its last checkpoint.
    pub fn crash(&mut self) {
        self.let_go();
        self.local = LocalSet::new();
    }

    /// Makes an advance and crashes the worker before it is committed. The next advance repeats it. Returns whether there
    /// was an advance to lose: `false` when the process ended because it could not start.
    ///
    /// # Panics
    /// As [`Harness::advance`].
    #[track_caller]
    pub fn crash_before_commit(&mut self) -> bool {
        let advanced = self.advance_until(None);
        self.crash();
        !matches!(advanced, Advanced::Ended(_))
    }

    /// Begins an advance and crashes the worker when the advance suspends for the `n`-th time, from 1. Only awaits that have
    /// to wait suspend: those of [`Context::sleep`], [`Context::blocking`] and sites always do. Returns what became of the
    /// advance if it ended before, else `None`.
    ///
    /// # Panics
    /// As [`Harness::advance`].
    ///
    /// [`Context::sleep`]: crate::process::Context::sleep
    /// [`Context::blocking`]: crate::process::Context::blocking
    #[track_caller]
    pub fn crash_at_await(&mut self, n: usize) -> Option<Step> {
        match self.advance_until(Some(n)) {
            Advanced::Ended(end) => Some(Step::Ended(end)),
            Advanced::Returned(Ok(advance)) => Some(self.commit(&advance)),
            Advanced::Returned(Err(error)) => Some(self.fail(error)),
            Advanced::Dropped => {
                self.crash();
                None
            }
        }
    }

    /// Begins an advance, drops it when it suspends for the `n`-th time, and calls [`Process::interrupted`], as a worker does
    /// for `kill`, for `pause --now` and when it stops. The process is then killed, paused, or in the queue. Returns what
    /// became of the advance if it ended before, else `None`.
    ///
    /// # Panics
    /// As [`Harness::advance`].
    #[track_caller]
    pub fn interrupt_at_await(&mut self, n: usize, why: Interrupt) -> Option<Step> {
        match self.advance_until(Some(n)) {
            Advanced::Ended(end) => return Some(Step::Ended(end)),
            Advanced::Returned(Ok(advance)) => return Some(self.commit(&advance)),
            Advanced::Returned(Err(error)) => return Some(self.fail(error)),
            Advanced::Dropped => {}
        }
        let Held { context, process, .. } = self.held.as_mut().expect("its advance has just been dropped");
        let context = Rc::clone(context);
        let clean_up = context.timeout(context.interrupt_limit(), process.interrupted(&context, why));
        self.local.block_on(&self.runtime, drive::drive(&self.clock, clean_up, None));
        // Its changes in memory are no state, as on a worker.
        self.restore();
        match why {
            Interrupt::Kill => drop(self.kill()),
            Interrupt::Pause => self.pause(),
            Interrupt::Drain => self.leave(Duration::ZERO),
        }
        None
    }

    /// Kills the process between two advances. As on a worker, [`Process::end_outside`] is called if the process is held:
    /// after [`Step::Again`], after [`Step::Linger`], and after a wait of less than a second.
    ///
    /// # Panics
    /// The process has ended, or `end_outside` returns [`Error::NotNow`] 1000 times.
    #[track_caller]
    pub fn kill(&mut self) -> End {
        assert!(self.row.end.is_none(), "the process has ended already: {:?}", self.row.end);
        let mut n_waits = 0;
        while let Some(Held { context, process, .. }) = self.held.as_mut() {
            let context = Rc::clone(context);
            let ending = process.end_outside(&context);
            let ended = self.local.block_on(&self.runtime, drive::drive(&self.clock, ending, None));
            match ended.expect("nothing drops it") {
                Err(Error::NotNow(wait)) => self.clock.move_by(wait.at_most),
                Err(Error::Lacking(_)) => self.clock.move_by(SHORTAGE_PAUSE),
                Ok(()) | Err(Error::Input(_) | Error::Failed(_) | Error::Interrupted(_) | Error::Stuck(_)) => break,
            }
            n_waits += 1;
            assert!(n_waits < WAITS_MAX, "`end_outside` returns that it has to wait, {WAITS_MAX} times in a row");
            self.restore();
        }
        let values = self.checkpoint().values;
        self.end(End { how: How::Killed, exit: None, ok: false, reason: Some("killed".into()), values })
    }

    /// Pauses the process between two advances. A wait continues after [`Harness::play`].
    ///
    /// # Panics
    /// The process has ended.
    #[track_caller]
    pub fn pause(&mut self) {
        assert!(self.row.end.is_none(), "the process has ended already: {:?}", self.row.end);
        self.leave(self.row.wait);
        self.row.is_paused = true;
    }

    /// Resumes a paused process.
    pub fn play(&mut self) {
        self.row.is_paused = false;
    }

    /// The end of the process, if it has ended.
    pub fn end_state(&self) -> Option<&End> {
        self.row.end.as_ref()
    }

    /// The committed values.
    pub fn values(&self) -> Map<String, Value> {
        self.row.end.as_ref().map_or_else(|| self.checkpoint().values, |end| end.values.clone())
    }

    /// The committed progress: the steps done, and the total if the process has named it.
    pub fn progress(&self) -> Option<(u64, Option<u64>)> {
        self.checkpoint().progress.map(|Progress { done, total }| (done, total))
    }

    /// The committed lines of the log.
    pub fn log(&self) -> Vec<String> {
        let lines = self.row.earlier_log.lines().chain(self.row.log.lines());
        lines.map(str::to_owned).collect()
    }

    /// The number of committed advances.
    pub fn advances(&self) -> u64 {
        self.checkpoint().advances
    }

    /// The number of the try, from 1.
    pub fn try_number(&self) -> i64 {
        self.row.try_number
    }

    /// The time that has passed on the clock of this harness.
    pub fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// The process's id.
    pub fn pid(&self) -> Pid {
        self.row.pid
    }

    /// The last checkpoint; an empty one before the first advance.
    fn checkpoint(&self) -> Checkpoint {
        let bytes = self.row.checkpoint.as_deref();
        bytes.map_or_else(Checkpoint::default, |bytes| {
            Checkpoint::from_bytes(bytes).expect("this harness has written or checked it")
        })
    }

    /// Takes up the process: a new instance from the last checkpoint, under the next lease.
    ///
    /// # Errors
    /// The process cannot be made.
    fn claim(&mut self) -> Result<(), NotMade> {
        self.row.epoch += 1;
        let checkpoint = self.checkpoint();
        let context = Context {
            facilities: Arc::clone(&self.facilities),
            fence: Fence { pid: self.row.pid, epoch: self.row.epoch },
            try_number: Cell::new(self.row.try_number),
            spec: Some(Box::new(self.spec.clone())),
            live: Arc::new(Live::new(checkpoint.advances, Orders::new(Desired::Run, false))),
            draft: RefCell::new(Draft::of(&checkpoint)),
        };
        let process = self.registry.make(&self.spec, context.input(), state_of(&checkpoint))?;
        self.held = Some(Held { context: Rc::new(context), process, checkpoint });
        Ok(())
    }

    /// After an advance that was dropped: what it has changed in memory is no state, only the checkpoint is.
    fn restore(&mut self) {
        let Some(held) = &mut self.held else { return };
        let state = state_of(&held.checkpoint);
        match self.registry.make(&self.spec, held.context.input(), state) {
            Ok(process) => held.process = process,
            Err(not_made) => panic!("the process cannot read its own checkpoint: {not_made:?}"),
        }
    }

    /// Makes the next advance when it is due, at most until it suspends for the given time.
    #[track_caller]
    fn advance_until(&mut self, suspension: Option<usize>) -> Advanced {
        assert!(self.row.end.is_none(), "the process has ended already: {:?}", self.row.end);
        assert!(!self.row.is_paused, "the process is paused; `Harness::play` resumes it");
        self.clock.move_by(std::mem::take(&mut self.row.wait));
        if self.held.is_none()
            && let Err(not_made) = self.claim()
        {
            return match not_made {
                NotMade::Failed(reason) => Advanced::Ended(self.except(reason)),
                NotMade::UnknownKind(reason) | NotMade::OtherBuild(reason) | NotMade::NotHere(reason) => {
                    panic!("the process cannot be restored: {reason}")
                }
            };
        }
        let Held { context, process, checkpoint } = self.held.as_mut().expect("it was claimed just now");
        let context = Rc::clone(context);
        context.draft.borrow_mut().renew(checkpoint);
        context.live.set_stage("advancing");
        let advance = AssertUnwindSafe(process.advance(&context)).catch_unwind();
        match self.local.block_on(&self.runtime, drive::drive(&self.clock, advance, suspension)) {
            None => Advanced::Dropped,
            Some(Ok(returned)) => Advanced::Returned(returned),
            Some(Err(panic)) => Advanced::Returned(Err(panicked(&panic_text(panic.as_ref())))),
        }
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// What came of an advance before it is committed.
enum Advanced {
    Returned(Result<Advance, Error>),
    Dropped,
    /// The process could not be made.
    Ended(End),
}
