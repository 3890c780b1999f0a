//! Local programs: what a worker runs on its own machine, so that nothing of it is ever left behind.
//!
//! [`Programs`] owns a thread on which nothing else runs. It starts a shim for each program (see [`shim`]), tells it of
//! every renewal of the worker's lease, and waits for it; so a process thread that is blocked for a minute, or ends,
//! costs no program its lease. A [`Running`] program ends when its handle is dropped.
//!
//! A service manager must not send TERM to shims (systemd: `KillMode=mixed`): one that dies of it takes its program along at
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

/// Launches that wait for the thread: each takes it a millisecond, and who waits in vain waits in `launch` instead.
const LAUNCHES_MAX: usize = 16;

/// Requests to one program that wait for the thread: a TERM and a KILL, more make no difference.
const REQUESTS_MAX: usize = 2;

/// What the worker can do about a local program that could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox, or a file of Baton's in it, could not be made. The place is full, missing or not writable.
    #[error("could not make {path}", path = .path.display())]
    Sandbox {
        /// What was to be made.
        path: PathBuf,
        /// Why it was not.
        source: io::Error,
    },
    /// The worker could not start a thread or a shim: it has too many processes or open files. Try again later.
    #[error("could not start a shim")]
    Shim(#[source] io::Error),
    /// The shim could not start the program. Nothing was run. The machine lacks something; try again when it is there.
    #[error("the program was not started: {}", .shortage.text)]
    NotStarted {
        /// What the shim lacked.
        shortage: Shortage,
    },
    /// The shim was killed, or did not answer and was. The program has been ended; how far it had come is not known.
    #[error("the program's shim has vanished{}", if *.has_started { "" } else { " before it started the program" })]
    Vanished {
        /// Whether it had said that the program runs.
        has_started: bool,
    },
    /// [`Programs`] is stopping, or the lease is no longer renewed by anybody.
    #[error("no more programs are started by this worker")]
    Stopping,
}

impl Error {
    /// The shortage that kept a program from running, if it was one.
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

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A program and its arguments, without a shell.
    Run(Vec<String>),
    /// The text of a script: run by `/bin/sh`, or by what its first line names after `#!`.
    Script(String),
}

/// A program that is to be run in a sandbox. It cannot be printed by accident: its variables may be secrets.
#[derive(Clone)]
pub struct Program {
    /// What to run.
    pub command: Command,
    /// Variables that the spec adds to the environment.
    pub vars: BTreeMap<String, String>,
    /// What it reads from its standard input; nothing if absent.
    pub stdin: Option<String>,
    /// How long it may run.
    pub time_limit: Option<Duration>,
    /// How long it has between TERM and KILL.
    pub grace: Duration,
    /// Where it runs.
    pub sandbox: Sandbox,
}

/// The local programs of one incarnation of a worker. When it is dropped, all of them are killed.
#[derive(Debug)]
pub struct Programs {
    launches: mpsc::Sender<Launch>,
    running: watch::Sender<usize>,
    turn: Mutex<()>,
    stopped: oneshot::Receiver<()>,
}

/// A program that runs. When this is dropped, the program and everything that it started are killed at once.
#[derive(Debug)]
#[must_use = "dropping it kills the program"]
pub struct Running {
    pid: u32,
    shim: u32,
    requests: mpsc::Sender<Request>,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// A program on its way to the thread.
struct Launch {
    program: Program,
    reply: oneshot::Sender<Result<Running, Error>>,
}

impl Programs {
    /// Starts the thread; blocking work is done by the runtime of the caller. `shim` is an executable that calls
    /// [`shim::main`], normally the running one; `lease` changes at each renewal of the worker's lease, which lasts for
    /// `lease_limit` after one. If nobody can renew it any more (its sender is dropped), all programs are killed.
    ///
    /// # Errors
    /// [`Error::Shim`] if there can be no thread.
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
                // Nobody may be waiting for it.
                let _ = stopped_tx.send(());
            })
            .map_err(Error::Shim)?;
        Ok(Self { launches, running, turn: Mutex::new(()), stopped })
    }

    /// Starts a program. It can be called on any runtime and thread.
    ///
    /// A program that does not exist is no error: it ends with exit 127, and says so on its standard error.
    ///
    /// # Errors
    /// [`Error::Sandbox`], [`Error::Shim`], [`Error::NotStarted`], [`Error::Vanished`], [`Error::Stopping`]; nothing runs
    /// then.
    ///
    /// # Cancel safety
    /// If this is dropped, the program is killed or never started.
    pub async fn launch(&self, program: Program) -> Result<Running, Error> {
        let (reply, answer) = oneshot::channel();
        self.launches.send(Launch { program, reply }).await.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }

    /// How many programs run.
    pub(crate) fn count(&self) -> usize {
        *self.running.borrow()
    }

    /// Waits until their number changes, at most for this time.
    pub(crate) async fn ended(&self, limit: Duration) {
        let mut running = self.running.subscribe();
        // The sender is here.
        let _ = tokio::time::timeout(limit, running.changed()).await;
    }

    /// The right to try again next.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Kills all programs and waits until nothing of them is left.
    pub async fn stop(self) {
        drop(self.launches);
        // An error means that the thread has panicked; the shims have seen their pipes close then.
        let _ = self.stopped.await;
    }
}

impl Running {
    /// The process id of the program.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The resident memory of the program and of all that it started, in bytes; what is shared counts for each. It reads
    /// two small files in /proc for each process and so may be called on a process thread.
    pub fn memory_bytes(&self) -> u64 {
        tree::memory_bytes(self.shim)
    }

    /// Waits for the end. Nothing of the program is left when it comes back.
    ///
    /// # Errors
    /// [`Error::NotStarted`] or [`Error::Vanished`]; nothing of the program is left then.
    ///
    /// # Cancel safety
    /// It may be dropped and called again; it answers also after the end.
    pub async fn wait(&mut self) -> Result<Ended, Error> {
        match self.outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Outcome::Ended(ended))) => Ok(ended.clone()),
            Ok(Some(Outcome::Failed(shortage))) => Err(Error::NotStarted { shortage: shortage.clone() }),
            Ok(Some(Outcome::Vanished) | None) | Err(_) => Err(Error::Vanished { has_started: true }),
        }
    }

    /// Sends TERM to the program and to all that it started, after its grace KILL, and waits until nothing of it is left.
    ///
    /// # Errors
    /// As [`Running::wait`].
    ///
    /// # Cancel safety
    /// It may be dropped; the program ends nevertheless.
    pub async fn terminate(&mut self) -> Result<Ended, Error> {
        self.ask(Request::Term).await
    }

    /// Sends KILL to the program and to all that it started, and waits until nothing of it is left.
    ///
    /// # Errors
    /// As [`Running::wait`].
    ///
    /// # Cancel safety
    /// It may be dropped; the program ends nevertheless.
    pub async fn kill(&mut self) -> Result<Ended, Error> {
        self.ask(Request::Kill).await
    }

    async fn ask(&mut self, request: Request) -> Result<Ended, Error> {
        // It cannot be asked only if it has ended already.
        let _ = self.requests.send(request).await;
        self.wait().await
    }
}
