//! A worker: one incarnation after another until it is told to stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_common::communicator::Broker;
use baton_common::config;
use baton_common::objects::Objects;
use baton_common::store::Store;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::author::registry::Registry;
pub use crate::execution::limits::Limits;
use crate::lifecycle::cli::remedy_of;
pub use crate::lifecycle::incarnation::Error;
use crate::lifecycle::incarnation::{self, Ended};
pub use crate::lifecycle::peers::watch;
use crate::local::user::User;
use crate::machine::causes::chain;
use crate::machine::open_files;

/// Pause before another attempt to start an incarnation.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// The smallest limit of open files that suffices for the connections, the threads and a local program.
const FILES_MIN: usize = 40;

/// The options of a worker.
#[derive(Clone)]
pub struct Options {
    /// The worker's name; need not be unique.
    pub name: String,
    /// The host's name, for people and for the locations of sandboxes.
    pub host: String,
    /// The queues to serve.
    pub queues: Vec<String>,
    /// Maximum number of processes held at once.
    pub slots: u32,
    /// Number of threads that advance processes; at least 1.
    pub threads: usize,
    /// The folder for sandboxes.
    pub root: PathBuf,
    /// How long running advances may take to finish when the worker stops, and how long a local program has between TERM
    /// and KILL.
    pub grace: Duration,
    /// The limits that end endless loops.
    pub limits: Limits,
    /// The kinds of processes besides Baton's own.
    pub registry: Registry,
    /// The sites, by name.
    pub sites: BTreeMap<String, config::Site>,
    /// The SSH sections of the configuration, by name.
    pub ssh: BTreeMap<String, config::Ssh>,
    /// The object store.
    pub objects: Objects,
    /// The database.
    pub store: Store,
    /// The broker.
    pub broker: Broker,
}

/// Stops a worker. Clones stop the same worker.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    drain: CancellationToken,
    hurry: CancellationToken,
}

impl Stop {
    /// Starts to drain: the worker takes no more processes, lets running advances finish within the grace, and returns all
    /// processes to the queue.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Waits for a future until the worker is told to stop.
    pub(crate) async fn unless_stopped<F: Future>(&self, future: F) -> Option<F::Output> {
        self.drain.run_until_cancelled(future).await
    }

    /// Drains without waiting for the grace.
    pub fn hurry(&self) {
        self.drain.cancel();
        self.hurry.cancel();
    }
}

/// Runs a worker until it is stopped. When its incarnation is declared gone, it starts a new one.
///
/// # Errors
/// The first incarnation could not start, for another reason than a database that does not answer. Later incarnations are
/// tried until one starts.
///
/// # Cancel safety
/// Do not drop the future: use `stop`. A dropped worker gives nothing back, and its processes wait until its lease expires.
pub async fn run(options: &Options, stop: &Stop) -> Result<(), Error> {
    run_as(options, None, stop).await
}

/// The same, with another user for the local programs.
///
/// # Errors
/// As [`run`].
pub(crate) async fn run_as(options: &Options, user: Option<User>, stop: &Stop) -> Result<(), Error> {
    open_files::check(FILES_MIN).map_err(Error::OpenFiles)?;
    let user = user.map(Arc::new);
    let mut has_run = false;
    let mut said = String::new();
    while !stop.drain.is_cancelled() {
        match incarnation::run(options, user.clone(), stop.drain.clone(), stop.hurry.clone()).await {
            Ok(Ended::Drained) => return Ok(()),
            Ok(Ended::Gone) => has_run = true,
            Err(error) if has_run || error.is_transient() => {
                let text = chain(&error);
                if said != text {
                    let remedy = if let Error::Store(error) = &error { remedy_of(error) } else { "trying again" };
                    warn!("could not start: {text}; {remedy}");
                    said = text;
                }
                let pause = tokio::time::sleep(RESTART_PAUSE);
                stop.drain.run_until_cancelled(pause).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
