//! A worker: one incarnation after the other until it is told to stop.

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

/// Pause before a worker that could not start an incarnation tries again.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Open files without which a worker cannot hold its connections, its threads and a local program.
const FILES_MIN: usize = 40;

/// What a worker is started with.
#[derive(Clone)]
pub struct Options {
    /// Its label.
    pub name: String,
    /// The host's name, for people and for what it left behind.
    pub host: String,
    /// The queues that it serves.
    pub queues: Vec<String>,
    /// How many processes it holds at a time.
    pub slots: u32,
    /// How many threads advance them.
    pub threads: usize,
    /// Where sandboxes are made.
    pub root: PathBuf,
    /// How long an advance may go on when the worker stops, and how long a program has between TERM and KILL.
    pub grace: Duration,
    /// What ends endless loops.
    pub limits: Limits,
    /// The processes it knows.
    pub registry: Registry,
    /// The sites that it serves, by name.
    pub sites: BTreeMap<String, config::Site>,
    /// How to reach their machines, by name.
    pub ssh: BTreeMap<String, config::Ssh>,
    /// Where the files of processes are.
    pub objects: Objects,
    /// The database.
    pub store: Store,
    /// The broker.
    pub broker: Broker,
}

/// How to stop a worker. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    drain: CancellationToken,
    hurry: CancellationToken,
}

impl Stop {
    /// Take nothing more, finish or checkpoint within the grace, give the rest back.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Waits for a future, but not after the worker was told to stop.
    pub(crate) async fn unless_stopped<F: Future>(&self, future: F) -> Option<F::Output> {
        self.drain.run_until_cancelled(future).await
    }

    /// Do not wait for the grace.
    pub fn hurry(&self) {
        self.drain.cancel();
        self.hurry.cancel();
    }
}

/// Runs a worker until it is stopped. An incarnation that was declared gone is followed by a new one.
///
/// # Errors
/// The first incarnation could not start, and not for want of the database. Later ones are tried for ever.
pub async fn run(options: &Options, stop: &Stop) -> Result<(), Error> {
    run_as(options, None, stop).await
}

/// The same, with local programs that run as another user.
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
