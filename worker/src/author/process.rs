//! Processes in Rust: what an author implements, and what the worker makes of it.
//!
//! ```
//! use baton_worker::process::{Advance, Context, Error, Process};
//! use futures_util::future::LocalBoxFuture;
//! use serde::{Deserialize, Serialize};
//!
//! /// Counts to three, one durable advance after the other.
//! #[derive(Serialize, Deserialize)]
//! struct Three(u32);
//!
//! impl Process for Three {
//!     fn start(_input: &serde_json::Value) -> Result<Self, Error> {
//!         Ok(Three(0))
//!     }
//!
//!     fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>> {
//!         Box::pin(async move {
//!             self.0 += 1;
//!             context.log(format!("now at {}", self.0));
//!             Ok(if self.0 == 3 { Advance::Finished { exit: 0 } } else { Advance::Again })
//!         })
//!     }
//! }
//! ```

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_common::id::Pid;
use baton_common::lack::Shortage;
use baton_common::spec::{Spec, Work};
use baton_common::store::blob::{Checkpoint, Outcome, Progress};
use baton_common::store::writer::{Fence, Fenced, Output, Stream, Verb};
use futures_util::future::LocalBoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::author::facilities::Facilities;
use crate::author::live::Live;
use crate::machine::causes::chain;
use crate::machine::shortage;

/// Bytes of `log` that are kept of its beginning, and as many of its end.
const LOG_PART_BYTES: usize = 32 * 1024;

/// What an interrupted process may take beyond the grace.
const INTERRUPT_MARGIN: Duration = Duration::from_secs(5);

/// A process: its own serialized form is what is kept between two advances, and nothing else is.
///
/// It stays on the thread that it was given and need not be `Send`. It must not block that thread: see
/// [`Context::blocking`].
pub trait Process: Serialize + DeserializeOwned + 'static {
    /// Makes a new process from the `with` of its spec.
    ///
    /// # Errors
    /// [`Error::Input`] when the input is not what this kind needs; the process is excepted.
    fn start(input: &Value) -> Result<Self, Error>;

    /// Does one durable piece of work. What it changed in `self` is committed after it returns; if the worker dies
    /// before that, the advance is repeated from the last commit. So it is after an error, too: nothing of what a failed
    /// or dropped advance changed in `self` stays.
    ///
    /// # Errors
    /// [`Error::Failed`] is retried as the spec's `retry` says, and then the process is excepted; [`Error::NotNow`] is no
    /// failure.
    ///
    /// # Cancel safety
    /// It may be dropped at any await: by a kill, by `pause --now`, and when the worker stops.
    /// [`Process::interrupted`] is called then.
    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>>;

    /// Ends what a dropped advance has left running outside: the place for what a kill, a pause at once or a drain has to
    /// undo. It has until [`Context::interrupt_limit`] has passed, and is dropped then.
    fn interrupted<'a>(&'a mut self, context: &'a Context, why: Interrupt) -> LocalBoxFuture<'a, ()> {
        let _ = (context, why);
        Box::pin(async {})
    }

    /// Ends what earlier advances have left running outside, such as a job at a site, before a kill is recorded.
    ///
    /// # Errors
    /// [`Error::NotNow`] when that takes longer: then it is called again. Any other: it cannot be ended, and the process is
    /// killed all the same.
    fn end_outside<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<(), Error>> {
        let _ = context;
        Box::pin(async { Ok(()) })
    }
}

/// What comes after an advance.
#[derive(Clone, Debug, PartialEq)]
pub enum Advance {
    /// The next one, at once.
    Again,
    /// The next one, not before this time has passed. From a second on, the process occupies nothing meanwhile.
    After(Duration),
    /// The next one, not before this time has passed, which it spends in memory with its lease and its slot: for a process
    /// whose next advance must begin to the moment, or that is asked by others of its thread.
    Linger(Duration),
    /// Nothing: it has come to its end.
    Finished {
        /// As a program's: the spec's `ok.exit` says which are good.
        exit: i32,
    },
}

/// A wait for something at a site, which occupies nothing meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Where those stand that wait for the same; empty for a job, which wakes its own process.
    pub(crate) waits_for: String,
    /// It is woken after this time in any case.
    pub(crate) at_most: Duration,
}

impl Wait {
    /// For a job, which wakes its own process, or for nothing but time.
    pub(crate) fn pause(at_most: Duration) -> Self {
        Self { waits_for: String::new(), at_most }
    }
}

/// Why an advance was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// The process is to end.
    Kill,
    /// The process is to pause; the advance is repeated after `play`.
    Pause,
    /// The worker stops; the advance is repeated by another.
    Drain,
}

/// Why an advance failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input can never work; not tried again.
    #[error("wrong input: {0}")]
    Input(String),
    /// Something broke; tried again if the spec says so.
    #[error("{0}")]
    Failed(String),
    /// Not the process's fault; it goes back to the queue at no charge.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// Work is done that cannot be used, and somebody has to see to that: a disk is full, say. The process is paused with
    /// this reason, and goes on from its last checkpoint when it is played.
    #[error("{0}")]
    Stuck(String),
    /// Something at a site is not to be had now. The advance is made when it is, and counts for nothing.
    #[error("it has to wait")]
    NotNow(Wait),
    /// The worker's machine lacks something. The process goes back to the queue at no charge, and the worker takes nothing
    /// until it is there again.
    #[error("{0}")]
    Lacking(Shortage),
}

impl Error {
    /// An error with the whole chain of its causes.
    pub fn failed(error: impl Into<Box<dyn std::error::Error>>) -> Self {
        Error::Failed(chain(error.into().as_ref()))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        // All processes of a worker share these, so none is to blame.
        shortage::of_worker(&error).map_or_else(|| Error::failed(error), Error::Lacking)
    }
}

/// How a worker names itself in a pause of a process that cannot go on.
pub fn by_worker(name: &str) -> String {
    format!("worker {name}")
}

/// What a process may use during an advance.
pub struct Context {
    pub(crate) facilities: Arc<Facilities>,
    pub(crate) fence: Fence,
    pub(crate) try_number: Cell<i64>,
    /// None only while the process waits in memory for long.
    pub(crate) spec: Option<Box<Spec>>,
    pub(crate) live: Arc<Live>,
    pub(crate) draft: RefCell<Draft>,
}

/// What an advance has said so far; committed with its checkpoint, or dropped with it.
#[derive(Clone, Default)]
pub(crate) struct Draft {
    pub(crate) advances: u64,
    pub(crate) values: serde_json::Map<String, Value>,
    pub(crate) progress: Option<Progress>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) outcome: Outcome,
    /// The program has ended well, and not all that it should have left is there: the process has failed, as the outcome's
    /// reason says, and is not tried again.
    pub(crate) is_incomplete: bool,
    /// The advance begins another try, at no charge.
    pub(crate) begins_try: bool,
    logged: bool,
    log: Log,
}

/// The beginning and the end of what was logged under this lease.
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
    /// A draft as the checkpoint left it.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Self {
        Draft {
            advances: checkpoint.advances,
            values: checkpoint.values.clone(),
            progress: checkpoint.progress.clone(),
            ..Draft::default()
        }
    }

    /// Begins the draft of the next advance: as the checkpoint left it, with the log of this lease so far.
    pub(crate) fn renew(&mut self, checkpoint: &Checkpoint) {
        self.advances = checkpoint.advances;
        self.values.clone_from(&checkpoint.values);
        self.progress.clone_from(&checkpoint.progress);
        self.outputs.clear();
        self.outcome = Outcome::default();
        self.is_incomplete = false;
        self.begins_try = false;
    }

    /// Whether anything goes into the next write.
    pub(crate) fn has_outputs(&self) -> bool {
        self.logged || !self.outputs.is_empty()
    }

    /// What goes into the next write: the program's streams, or the log if a line has come since the last write.
    pub(crate) fn take_outputs(&mut self) -> Vec<Output> {
        // Both would be the same stream.
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

    /// The number of the lease under which this advance runs; it grows with every takeover.
    pub fn epoch(&self) -> i64 {
        self.fence.epoch
    }

    /// The number of the try, from 1.
    pub fn try_number(&self) -> i64 {
        self.try_number.get()
    }

    /// The number of this advance, from 1: one more than are committed.
    pub fn advance_number(&self) -> u64 {
        self.draft.borrow().advances + 1
    }

    /// How long [`Process::interrupted`] may take: the worker's grace, and a little more for what is killed after it.
    pub fn interrupt_limit(&self) -> Duration {
        self.facilities.grace + INTERRUPT_MARGIN
    }

    /// The worker's name.
    pub fn worker(&self) -> &str {
        &self.facilities.identity.name
    }

    /// What the user wrote.
    pub fn spec(&self) -> &Spec {
        self.spec.as_deref().expect("nobody asks for it while the process waits in memory")
    }

    /// The `with` of the spec.
    pub fn input(&self) -> &Value {
        match &self.spec().what {
            Work::Call { with, .. } => with,
            Work::Run { .. } | Work::Script { .. } => &Value::Null,
        }
    }

    /// Waits within the advance. The process stays in memory; to wait for long, return [`Advance::After`].
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Sets a value that the process returns. Committed with the advance.
    pub fn set_value(&self, name: impl Into<String>, value: impl Into<Value>) {
        self.draft.borrow_mut().values.insert(name.into(), value.into());
    }

    /// Says how far the process is. Committed with the advance; counts as progress.
    pub fn set_progress(&self, done: u64, total: Option<u64>) {
        self.draft.borrow_mut().progress = Some(Progress { done, total });
    }

    /// Writes a line to the process's log, which `baton logs` shows. Its beginning and end are kept, not all of a long one.
    pub fn log(&self, line: impl AsRef<str>) {
        let line = line.as_ref();
        tracing::debug!(pid = %self.pid(), "{line}");
        self.live.set_last_line(line);
        let mut draft = self.draft.borrow_mut();
        draft.log.append(&format!("{line}\n"));
        draft.logged = true;
    }

    /// Runs what blocks (hashing, big files, a library that waits) on the blocking pool.
    ///
    /// # Errors
    /// [`Error::Failed`] when the work panicked, [`Error::Lacking`] when there is no thread for it.
    ///
    /// # Cancel safety
    /// If this is dropped, the work runs on to its end and its result is lost.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let task = shortage::spawn_blocking(&self.facilities.blocking, work).map_err(Error::Lacking)?;
        task.await.map_err(|error| Error::failed(error.to_string()))
    }

    /// Names what the process does now, for `baton status`.
    pub fn set_stage(&self, stage: &'static str) {
        self.live.set_stage(stage);
    }

    /// With this advance's checkpoint another try begins, which is not charged.
    pub(crate) fn begin_next_try(&self) {
        self.draft.borrow_mut().begins_try = true;
    }

    /// The folder below which sandboxes are made.
    pub(crate) fn root(&self) -> &Path {
        &self.facilities.root
    }

    /// Stores what the program has written so far, in the middle of an advance.
    pub(crate) async fn keep_outputs(&self, outputs: Vec<Output>) -> Result<(), Error> {
        let fenced = Fenced {
            fence: self.fence,
            verb: Verb::Keep,
            checkpoint: None,
            try_number: self.try_number(),
            ended: None,
            outputs,
        };
        match self.facilities.writer.write(fenced).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => Err(Error::Interrupted("the lease was lost".into())),
        }
    }
}
