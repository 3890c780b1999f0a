//! Processes in Rust: the trait that an author implements, and the context in which the worker calls it.
//!
//! The crate's [front page](crate) explains how the parts work together.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use baton_common::id::Pid;
use baton_common::lack::Shortage;
use baton_common::spec::{Spec, Work};
use baton_common::store::blob::{Checkpoint, Outcome, Progress};
use baton_common::store::writer::{Fence, Fenced, Output, Stream, Verb};
use futures_util::FutureExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::author::facilities::Facilities;
use crate::author::live::Live;
use crate::machine::causes::{chain, panic_text};
use crate::machine::shortage;

/// Bytes of `log` that are kept of its beginning, and as many of its end.
const LOG_PART_BYTES: usize = 32 * 1024;

/// How much longer than the grace an interrupted process may take.
const INTERRUPT_MARGIN: Duration = Duration::from_secs(5);

/// A process. Its serialized form is its checkpoint; nothing else survives from one advance to the next holder.
///
/// A process stays on one thread and need not be `Send`. It must not block that thread, which it shares with other
/// processes: see [`Context::blocking`].
///
/// ```
/// use baton_worker::prelude::*;
///
/// /// Counts to `to`, one durable advance after the other.
/// #[derive(Serialize, Deserialize)]
/// struct Count {
///     to: u32,
///     #[serde(default)]
///     done: u32,
/// }
///
/// impl Process for Count {
///     fn start(input: &Value) -> Result<Self, Error> {
///         read_input(input)
///     }
///
///     async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
///         self.done += 1;
///         context.log(format!("now at {}", self.done));
///         Ok(if self.done >= self.to { Advance::Finished { exit: 0 } } else { Advance::Again })
///     }
/// }
/// ```
#[expect(async_fn_in_trait, reason = "a process stays on its thread, so its futures need not be `Send`")]
pub trait Process: Serialize + DeserializeOwned + 'static {
    /// Makes a new process from the `with` of its spec. [`read_input`] reads it with serde.
    ///
    /// A worker calls it again after a crash before the first checkpoint, so it must have no side effects.
    ///
    /// # Errors
    /// Return [`Error::Input`] when this kind cannot use the input. The process is excepted.
    fn start(input: &Value) -> Result<Self, Error>;

    /// Does one durable piece of work.
    ///
    /// The worker commits the changes to `self` together with the values, the progress and the log of the
    /// [`Context`] after this returns. If the worker dies before the commit, the next holder repeats the advance from the
    /// last checkpoint. After an error the worker discards the changes to `self` and reads the last checkpoint again.
    ///
    /// # Errors
    /// The variant of [`Error`] decides what happens next.
    ///
    /// # Cancel safety
    /// The worker drops this future at an await for a kill, for `pause --now`, and when it stops. It then calls
    /// [`Process::interrupted`]. A crash of the worker drops the future without that call.
    async fn advance(&mut self, context: &Context) -> Result<Advance, Error>;

    /// Cleans up after an advance that the worker has dropped: it ends what that advance has left running outside of
    /// the process. It does nothing by default.
    ///
    /// The worker discards the changes to `self` afterwards.
    ///
    /// # Cancel safety
    /// The worker drops this future after [`Context::interrupt_limit`].
    async fn interrupted(&mut self, context: &Context, why: Interrupt) {
        let _ = (context, why);
    }

    /// Ends what earlier advances have left running outside of the process, before a kill is recorded. It does nothing by
    /// default.
    ///
    /// The worker that holds the process calls it. A process that is parked or queued has no holder: its kill is recorded at
    /// once, without this call. A process that must not be killed without it waits with [`Advance::Linger`].
    ///
    /// # Errors
    /// After [`Error::NotNow`] or [`Error::Lacking`] the worker calls it again later. After any other error it logs the
    /// error and records the kill.
    async fn end_outside(&mut self, context: &Context) -> Result<(), Error> {
        let _ = context;
        Ok(())
    }
}

/// Reads the `with` of a spec. An absent `with` is an empty object.
///
/// # Errors
/// [`Error::Input`] with serde's text when the input does not fit the type.
pub fn read_input<T: DeserializeOwned>(input: &Value) -> Result<T, Error> {
    let input = if input.is_null() { Value::Object(serde_json::Map::new()) } else { input.clone() };
    serde_json::from_value(input).map_err(|error| Error::Input(format!("`with`: {error}")))
}

/// What follows a successful advance.
#[derive(Clone, Debug, PartialEq)]
pub enum Advance {
    /// The next advance follows at once.
    Again,
    /// The next advance follows after this time. From one second on, the process is parked: it occupies neither a slot nor
    /// memory, and any worker may take it up. A shorter wait is spent in memory.
    After(Duration),
    /// The next advance follows after this time, which the process spends in memory and which occupies its slot. Use it
    /// when the next advance must begin on time, or when the process keeps something in memory between its advances.
    Linger(Duration),
    /// The process ends.
    Finished {
        /// The exit code. The spec's `ok.exit` lists the codes that mean success (by default 0); after any other, `retry`
        /// applies.
        exit: i32,
    },
}

/// A wait for something at a site. The process is parked meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The key under which processes wait for the same thing; empty for a job, which wakes its own process.
    pub(crate) waits_for: String,
    /// The process is woken after this time in any case.
    pub(crate) at_most: Duration,
}

impl Wait {
    /// A wait for a job, which wakes its own process, or for time only.
    pub(crate) fn pause(at_most: Duration) -> Self {
        Self { waits_for: String::new(), at_most }
    }
}

/// Why the worker dropped an advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// An operator has killed the process.
    Kill,
    /// An operator has paused the process with `--now`. The advance is repeated after `play`.
    Pause,
    /// The worker stops. Another worker repeats the advance.
    Drain,
}

/// Why an advance did not succeed. The variant decides what the worker does next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input can never work. The process is excepted, whatever `retry` says.
    #[error("wrong input: {0}")]
    Input(String),
    /// The work failed. The worker repeats the advance as the spec's `retry` says; when no try is left, the process is
    /// excepted.
    #[error("{0}")]
    Failed(String),
    /// The process was disturbed from outside. It returns to the queue, and no try is charged.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// A person has to act before the work can continue, for example because a disk is full. The process is paused with
    /// this reason and resumes from its last checkpoint after `play`.
    #[error("{0}")]
    Stuck(String),
    /// A site cannot be used at the moment. The process is parked until it can; no try is charged. [`Context::site`] and
    /// the methods of [`AtSite`](crate::site::AtSite) return it: pass it on with `?`.
    #[error("it has to wait")]
    NotNow(Wait),
    /// The worker's machine has run out of disk space, memory, processes or open files. The process returns to the queue,
    /// no try is charged, and the worker takes no processes until the shortage is over. `?` on a [`std::io::Error`]
    /// returns it where it applies.
    #[error("{0}")]
    Lacking(Shortage),
}

impl Error {
    /// [`Error::Failed`] with the error's text and those of its causes.
    pub fn failed(error: impl Into<Box<dyn std::error::Error>>) -> Self {
        Error::Failed(chain(error.into().as_ref()))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        // All processes of a worker share these resources, so none is to blame.
        shortage::of_worker(&error).map_or_else(|| Error::failed(error), Error::Lacking)
    }
}

/// The name under which a worker pauses a process after [`Error::Stuck`].
pub fn by_worker(name: &str) -> String {
    format!("worker {name}")
}

/// What a process can use during an advance.
pub struct Context {
    pub(crate) facilities: Arc<Facilities>,
    pub(crate) fence: Fence,
    pub(crate) try_number: Cell<i64>,
    /// `None` only during a long wait in memory.
    pub(crate) spec: Option<Box<Spec>>,
    pub(crate) live: Arc<Live>,
    pub(crate) draft: RefCell<Draft>,
}

/// What an advance has reported so far. It is committed with the advance's checkpoint or dropped.
#[derive(Clone, Default)]
pub(crate) struct Draft {
    pub(crate) advances: u64,
    pub(crate) values: serde_json::Map<String, Value>,
    pub(crate) progress: Option<Progress>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) outcome: Outcome,
    /// The program has succeeded, but some of its outputs are missing: the process has failed for the outcome's reason and
    /// is not tried again.
    pub(crate) is_incomplete: bool,
    /// The next try begins with this checkpoint, at no charge.
    pub(crate) begins_try: bool,
    logged: bool,
    log: Log,
}

/// The beginning and the end of the log of this lease.
#[derive(Clone, Default)]
struct Log {
    head: Vec<u8>,
    tail: Vec<u8>,
    total_bytes: u64,
}

impl Log {
    fn append(&mut self, line: &str) {
        self.total_bytes += line.len() as u64;
        let fits = line.len().min(LOG_PART_BYTES - self.head.len());
        self.head.extend_from_slice(&line.as_bytes()[..fits]);
        self.tail.extend_from_slice(&line.as_bytes()[fits..]);
        if self.tail.len() > LOG_PART_BYTES {
            self.tail.drain(..self.tail.len() - LOG_PART_BYTES);
        }
    }

    fn output(&self) -> Output {
        Output {
            stream: Stream::Stdout,
            head: self.head.clone(),
            tail: self.tail.clone(),
            total_bytes: self.total_bytes,
        }
    }
}

impl Draft {
    /// The draft of the first advance after a checkpoint.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Self {
        Draft {
            advances: checkpoint.advances,
            values: checkpoint.values.clone(),
            progress: checkpoint.progress.clone(),
            ..Draft::default()
        }
    }

    /// Begins the draft of the next advance: the checkpoint's values and progress, and the log of this lease so far.
    pub(crate) fn renew(&mut self, checkpoint: &Checkpoint) {
        self.advances = checkpoint.advances;
        self.values.clone_from(&checkpoint.values);
        self.progress.clone_from(&checkpoint.progress);
        self.outputs.clear();
        self.outcome = Outcome::default();
        self.is_incomplete = false;
        self.begins_try = false;
    }

    /// Whether the next write includes an output.
    pub(crate) fn has_outputs(&self) -> bool {
        self.logged || !self.outputs.is_empty()
    }

    /// The outputs of the next write: the program's streams, or the log if it has grown since the last write.
    pub(crate) fn take_outputs(&mut self) -> Vec<Output> {
        // The log and the program's standard output are stored as the same stream.
        if std::mem::take(&mut self.logged) && self.outputs.is_empty() {
            self.outputs.push(self.log.output());
        }
        std::mem::take(&mut self.outputs)
    }
}

impl Context {
    /// The process's id.
    pub fn pid(&self) -> Pid {
        self.fence.pid
    }

    /// The number of the lease under which this advance runs. Each claim of the process increases it.
    pub fn epoch(&self) -> i64 {
        self.fence.epoch
    }

    /// The number of the try, from 1, as `retry` counts.
    pub fn try_number(&self) -> i64 {
        self.try_number.get()
    }

    /// The number of this advance, from 1. An advance that is repeated has the same number again, so the pid and this number
    /// identify a piece of work, for example as an idempotency key.
    pub fn advance_number(&self) -> u64 {
        self.draft.borrow().advances + 1
    }

    /// How long [`Process::interrupted`] may take: the worker's grace and 5 s.
    pub fn interrupt_limit(&self) -> Duration {
        self.facilities.grace + INTERRUPT_MARGIN
    }

    /// The worker's name.
    pub fn worker(&self) -> &str {
        &self.facilities.identity.name
    }

    /// The spec of the process.
    pub fn spec(&self) -> &Spec {
        self.spec.as_deref().expect("a process does not advance while it waits in memory")
    }

    /// The `with` of the spec.
    pub fn input(&self) -> &Value {
        match &self.spec().what {
            Work::Call { with, .. } => with,
            Work::Run { .. } | Work::Script { .. } => &Value::Null,
        }
    }

    /// Waits within the advance. The process stays in memory and occupies its slot. For a long wait, return
    /// [`Advance::After`].
    ///
    /// In a test with [`testing`](crate::testing), the wait passes at once on the test's clock.
    ///
    /// # Cancel safety
    /// The future can be dropped at any time.
    pub async fn sleep(&self, duration: Duration) {
        self.facilities.clock.sleep(duration).await;
    }

    /// Waits for a future, at most this long. Returns `None` when the time has passed; the future is dropped then.
    ///
    /// In a test with [`testing`](crate::testing), the time is that of the test's clock.
    ///
    /// # Cancel safety
    /// As cancel safe as the future.
    pub async fn timeout<F: Future>(&self, limit: Duration, future: F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = self.sleep(limit) => None,
        }
    }

    /// Sets a value that the process returns. It is committed with the advance.
    pub fn set_value(&self, name: impl Into<String>, value: impl Into<Value>) {
        self.draft.borrow_mut().values.insert(name.into(), value.into());
    }

    /// Reports `done` steps out of `total`, if the total is known. It is committed with the advance.
    ///
    /// A process that changes neither its state nor its values nor its progress for many advances is excepted (by default
    /// after 1000), so that it cannot loop for ever.
    pub fn set_progress(&self, done: u64, total: Option<u64>) {
        self.draft.borrow_mut().progress = Some(Progress { done, total });
    }

    /// Writes a line to the process's log. The first and the last 32 KiB of each attempt are kept; `baton logs` prints those
    /// of the last attempt. A wait of a second or more with [`Advance::After`] ends an attempt, and so does a retry.
    ///
    /// The log is committed with the advance. Lines of an advance that fails are kept, those of a crash are lost.
    pub fn log(&self, line: impl AsRef<str>) {
        let line = line.as_ref();
        tracing::debug!(pid = %self.pid(), "{line}");
        self.live.set_last_line(line);
        let mut draft = self.draft.borrow_mut();
        draft.log.append(&format!("{line}\n"));
        draft.logged = true;
    }

    /// Runs a closure that blocks, such as long arithmetic, large files or a synchronous library, on the blocking pool.
    /// It suspends the advance once, however short the closure is.
    ///
    /// # Errors
    /// [`Error::Failed`] when the closure panicked, [`Error::Lacking`] when the system starts no thread.
    ///
    /// # Cancel safety
    /// If the future is dropped, the closure runs to its end and its result is lost.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let _busy = self.facilities.clock.hold();
        let mut task = shortage::spawn_blocking(&self.facilities.blocking, work).map_err(Error::Lacking)?;
        let mut finished = None;
        let mut is_first = true;
        let result = poll_fn(|cx| {
            if let Some(result) = finished.take() {
                return Poll::Ready(result);
            }
            let polled = task.poll_unpin(cx);
            if std::mem::take(&mut is_first)
                && let Poll::Ready(result) = polled
            {
                // A test that crashes at this await must not depend on the time that the closure takes.
                finished = Some(result);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            polled
        });
        result.await.map_err(|error| match error.try_into_panic() {
            Ok(panic) => Error::Failed(format!("a closure of `blocking` panicked: {}", panic_text(panic.as_ref()))),
            Err(error) => Error::failed(error.to_string()),
        })
    }

    /// Names the present stage of the advance for `baton status`.
    pub fn set_stage(&self, stage: &'static str) {
        self.live.set_stage(stage);
    }

    /// Begins the next try with this advance's checkpoint, at no charge.
    pub(crate) fn begin_next_try(&self) {
        self.draft.borrow_mut().begins_try = true;
    }

    /// The folder below which sandboxes are made.
    pub(crate) fn root(&self) -> &Path {
        &self.facilities.root
    }

    /// Stores the program's output so far, in the middle of an advance.
    pub(crate) async fn keep_outputs(&self, outputs: Vec<Output>) -> Result<(), Error> {
        let Some(writer) = &self.facilities.writer else { return Ok(()) };
        let fenced = Fenced {
            fence: self.fence,
            verb: Verb::Keep,
            checkpoint: None,
            try_number: self.try_number(),
            ended: None,
            outputs,
        };
        match writer.write(fenced).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => Err(Error::Interrupted("the lease was lost".into())),
        }
    }
}
