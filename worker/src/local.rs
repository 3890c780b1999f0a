//! Local programs: programs on the worker's own machine. None of them outlives the lease of its worker.
//!
//! [`Programs`] owns a dedicated thread. For each program it starts a shim (see [`shim`]), forwards every renewal of the
//! worker's lease to it, and waits for it. A process thread that blocks for a minute, or ends, therefore costs no program
//! its lease. A [`Running`] program ends when its handle is dropped.
//!
//! A service manager must not send TERM to shims (systemd: `KillMode=mixed`): if one dies of it, its program is killed at
//! once, without the grace.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use baton_common::lack::{Lack, Shortage};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot, watch};

use crate::local::shim::tree;
use crate::local::shim::wire::{Ended, Request};
use crate::machine::causes::chain;
use crate::machine::{open_files, shortage};

mod keeper;
pub(crate) mod output;
pub(crate) mod probe;
pub(crate) mod sandbox;
pub(crate) mod shim;
pub(crate) mod user;

use keeper::{Keeper, Outcome};
use sandbox::Sandbox;

/// Launches that wait for the thread, which needs a millisecond for each; further callers wait in `launch`.
const LAUNCHES_MAX: usize = 16;

/// Requests to one program that wait for the thread: a TERM and a KILL; more would change nothing.
const REQUESTS_MAX: usize = 2;

/// Why a local program could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox or a file of Baton in it could not be made. The disk is full, or the folder is missing or not
    /// writable.
    #[error("could not make {path}", path = .path.display())]
    Sandbox {
        /// The folder or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The worker could not start a thread or a shim: it has too many processes or open files. Try again later.
    #[error("could not start a shim")]
    Shim(#[source] io::Error),
    /// The shim could not start the program, for a shortage. Nothing was run. Try again when the shortage is over.
    #[error("the program was not started: {}", .shortage.text)]
    NotStarted {
        /// The shortage.
        shortage: Shortage,
    },
    /// The shim was killed, possibly because it did not answer. The program has ended; its progress is unknown.
    #[error("the program's shim has vanished{}", if *.has_started { "" } else { " before it started the program" })]
    Vanished {
        /// Whether it had reported the start of the program.
        has_started: bool,
    },
    /// [`Programs`] is stopping, or the lease has no owner any more.
    #[error("this worker starts no more programs")]
    Stopping,
}

impl Error {
    /// The shortage that kept the program from running, if that was the cause.
    pub(crate) fn shortage(&self) -> Option<Shortage> {
        match self {
            Error::Sandbox { path, source } => Some(shortage::below_root(path, source)),
            Error::Shim(source) => Some(shortage::of_children(&self.to_string(), source)),
            Error::NotStarted { shortage } => Some(shortage.clone()),
            Error::Vanished { has_started: false } => Some(Shortage { lack: Lack::Children, text: chain(self) }),
            Error::Vanished { has_started: true } | Error::Stopping => None,
        }
    }
}

/// The command of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A program and its arguments, without a shell.
    Run(Vec<String>),
    /// The text of a script. `/bin/sh` runs it, or the interpreter after `#!` in its first line.
    Script(String),
}

/// A program to run in a sandbox. Not `Debug`, since its variables may be secrets.
#[derive(Clone)]
pub struct Program {
    /// The command.
    pub command: Command,
    /// Variables that the spec adds to the environment.
    pub vars: BTreeMap<String, String>,
    /// The standard input; empty if absent.
    pub stdin: Option<String>,
    /// The time limit.
    pub time_limit: Option<Duration>,
    /// The time between TERM and KILL.
    pub grace: Duration,
    /// The sandbox.
    pub sandbox: Sandbox,
}

/// The local programs of one incarnation of a worker. Dropping it kills all of them.
#[derive(Debug)]
pub struct Programs {
    launches: mpsc::Sender<Launch>,
    running: watch::Sender<usize>,
    turn: Mutex<()>,
    stopped: oneshot::Receiver<()>,
}

/// A running program. Dropping it kills the program and its descendants at once.
#[derive(Debug)]
#[must_use = "dropping it kills the program"]
pub struct Running {
    pid: u32,
    shim: u32,
    requests: mpsc::Sender<Request>,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// A launch on its way to the thread.
struct Launch {
    program: Program,
    reply: oneshot::Sender<Result<Running, Error>>,
}

impl Programs {
    /// Starts the thread. Blocking work runs on the caller's runtime. `shim` is an executable that calls [`shim::main`],
    /// normally the running one. `lease` changes at each renewal of the worker's lease, which lasts `lease_limit`. If its
    /// sender is dropped, all programs are killed.
    ///
    /// # Errors
    /// [`Error::Shim`] if the thread cannot be started.
    pub fn start(shim: PathBuf, lease: watch::Receiver<u64>, lease_limit: Duration) -> Result<Self, Error> {
        open_files::raise();
        let (launches, launches_rx) = mpsc::channel(LAUNCHES_MAX);
        let (stopped_tx, stopped) = oneshot::channel();
        let blocking = Handle::current();
        let running = watch::Sender::new(0);
        let count = running.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Shim)?;
        std::thread::Builder::new()
            .name("programs".into())
            .spawn(move || {
                runtime.block_on(keeper::keep(
                    Keeper { shim, blocking, running: count },
                    lease,
                    lease_limit,
                    launches_rx,
                ));
                // The receiver may be gone.
                let _ = stopped_tx.send(());
            })
            .map_err(Error::Shim)?;
        Ok(Self { launches, running, turn: Mutex::new(()), stopped })
    }

    /// Starts a program. Callable from any runtime and thread.
    ///
    /// A program that does not exist is no error: it ends with exit 127 and a message on its standard error.
    ///
    /// # Errors
    /// [`Error::Sandbox`], [`Error::Shim`], [`Error::NotStarted`], [`Error::Vanished`], [`Error::Stopping`]. Nothing runs
    /// after an error.
    ///
    /// # Cancel safety
    /// If the future is dropped, the program is killed or never started.
    pub async fn launch(&self, program: Program) -> Result<Running, Error> {
        let (reply, answer) = oneshot::channel();
        self.launches.send(Launch { program, reply }).await.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }

    /// The number of running programs.
    pub(crate) fn count(&self) -> usize {
        *self.running.borrow()
    }

    /// Waits until that number changes, at most for this time.
    pub(crate) async fn ended(&self, limit: Duration) {
        let mut running = self.running.subscribe();
        // `self` owns the sender, so `changed` cannot fail.
        let _ = tokio::time::timeout(limit, running.changed()).await;
    }

    /// Waits for the turn to launch again after a shortage.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Kills all programs and waits until none of their processes is left.
    pub async fn stop(self) {
        drop(self.launches);
        // An error means that the thread panicked, which closed the pipes of the shims.
        let _ = self.stopped.await;
    }
}

impl Running {
    /// The process id of the program.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The resident memory of the program and its descendants, in bytes; shared memory counts for each. Reads two small
    /// files in /proc for each process, so it may run on a process thread.
    pub fn memory_bytes(&self) -> u64 {
        tree::memory_bytes(self.shim)
    }

    /// Waits for the end. None of the program's processes is left when it returns.
    ///
    /// # Errors
    /// [`Error::NotStarted`] or [`Error::Vanished`]. None of the program's processes is left then either.
    ///
    /// # Cancel safety
    /// Cancel safe. A later call returns the same result, also after the end.
    pub async fn wait(&mut self) -> Result<Ended, Error> {
        match self.outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Outcome::Ended(ended))) => Ok(ended.clone()),
            Ok(Some(Outcome::Failed(shortage))) => Err(Error::NotStarted { shortage: shortage.clone() }),
            Ok(Some(Outcome::Vanished) | None) | Err(_) => Err(Error::Vanished { has_started: true }),
        }
    }

    /// Sends TERM to the program and its descendants, KILL after the grace, and waits until none is left.
    ///
    /// # Errors
    /// As [`Running::wait`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the program ends nevertheless.
    pub async fn terminate(&mut self) -> Result<Ended, Error> {
        self.ask(Request::Term).await
    }

    /// Sends KILL to the program and its descendants, and waits until none is left.
    ///
    /// # Errors
    /// As [`Running::wait`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the program ends nevertheless.
    pub async fn kill(&mut self) -> Result<Ended, Error> {
        self.ask(Request::Kill).await
    }

    async fn ask(&mut self, request: Request) -> Result<Ended, Error> {
        // Sending fails only if the program has ended already.
        let _ = self.requests.send(request).await;
        self.wait().await
    }
}
