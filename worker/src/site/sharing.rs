//! Checks whether this worker can use the fleet's object store. If not, it leaves processes with files to other workers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_common::sharing;
use baton_common::spec::OnSite;
use baton_common::spec::on_site::Scope;
use tracing::{debug, info, warn};

use super::Sites;
use crate::machine::causes::chain;

/// Pause between two checks: with a problem, and without.
const PAUSE_WITH_PROBLEM: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(30);

/// Time limit of a check; a worker starts with one.
const LIMIT: Duration = Duration::from_secs(5);

/// The result of the last check.
#[derive(Default)]
pub(crate) struct Sharing {
    /// Why the fleet's store cannot be used here, as last logged and recorded.
    problem: Mutex<Option<String>>,
}

impl Sharing {
    /// Returns why this worker cannot run a process with files in the fleet's store.
    pub(crate) fn refuses(&self, on_site: &OnSite) -> Option<String> {
        let has_files = on_site.staged.is_some()
            || on_site.inputs.iter().any(|input| input.from.scope == Scope::Store)
            || on_site.outputs.iter().any(|output| output.to.scope == Scope::Store);
        self.problem().clone().filter(|_| has_files)
    }

    /// Checks the store, and logs and records a change. A worker without sites does not use the store.
    pub(crate) async fn look(&self, sites: &Sites) {
        let Some(site) = sites.all().next() else { return };
        let looked = tokio::time::timeout(LIMIT, sharing::join(&site.store, &site.objects)).await;
        let problem = match looked {
            Ok(Ok(foreign)) => foreign.map(|foreign| format!("{}; {}", foreign.text, foreign.remedy)),
            Ok(Err(sharing::Error::Database(error))) => {
                debug!(%error, "the fleet's object store could not be read");
                return;
            }
            Ok(Err(sharing::Error::Objects(error))) => Some(chain(&error)),
            Err(_) => Some(format!("{} did not answer within {} s", site.objects.location(), LIMIT.as_secs())),
        };
        if *self.problem() == problem {
            return;
        }
        match &problem {
            Some(problem) => {
                warn!(problem, "the object store cannot be used; leaving processes with files to other workers")
            }
            None => info!("the object store can be used"),
        }
        self.problem().clone_from(&problem);
        if let Err(error) = site.store.note_objects(site.me, problem.as_deref()).await {
            debug!(%error, "the state of the object store could not be recorded");
        }
    }

    fn problem(&self) -> MutexGuard<'_, Option<String>> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until it is dropped.
pub(crate) async fn run(sites: Arc<Sites>) {
    loop {
        let pause = if sites.sharing.problem().is_some() { PAUSE_WITH_PROBLEM } else { PAUSE };
        tokio::time::sleep(pause).await;
        sites.sharing.look(&sites).await;
    }
}
