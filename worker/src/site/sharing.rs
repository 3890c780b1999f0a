//! Whether this worker can use the object store that its fleet shares. If not, it leaves processes with files to other workers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_common::sharing;
use baton_common::spec::OnSite;
use baton_common::spec::on_site::Scope;
use tracing::{debug, info, warn};

use super::Sites;
use crate::machine::causes::chain;

/// Pause between two looks: while something is wrong, and while nothing is.
const PAUSE_WRONG: Duration = Duration::from_secs(10);
const PAUSE_WELL: Duration = Duration::from_secs(30);

/// How long a look may take; a worker begins with one.
const LIMIT: Duration = Duration::from_secs(5);

/// What the last look has shown.
#[derive(Default)]
pub(crate) struct Sharing {
    /// Why the fleet's store cannot be used here; the last that is logged and recorded.
    problem: Mutex<Option<String>>,
}

impl Sharing {
    /// Why a process that has files in the fleet's store cannot be done here.
    pub(crate) fn refuses(&self, on_site: &OnSite) -> Option<String> {
        let has_files = on_site.staged.is_some()
            || on_site.inputs.iter().any(|input| input.from.scope == Scope::Store)
            || on_site.outputs.iter().any(|output| output.to.scope == Scope::Store);
        self.problem().clone().filter(|_| has_files)
    }

    /// Looks, and logs and records what has changed. A worker without sites has no use for a store.
    pub(crate) async fn look(&self, sites: &Sites) {
        let Some(site) = sites.all().next() else { return };
        let looked = tokio::time::timeout(LIMIT, sharing::join(&site.store, &site.objects)).await;
        let problem = match looked {
            Ok(Ok(foreign)) => foreign.map(|foreign| format!("{}; {}", foreign.text, foreign.remedy)),
            Ok(Err(sharing::Error::Database(error))) => {
                debug!(%error, "which object store the fleet shares is not known");
                return;
            }
            Ok(Err(sharing::Error::Objects(error))) => Some(chain(&error)),
            Err(_) => Some(format!("{} does not answer within {} s", site.objects.location(), LIMIT.as_secs())),
        };
        if *self.problem() == problem {
            return;
        }
        match &problem {
            Some(problem) => warn!(problem, "the object store cannot be used; processes with files are left to others"),
            None => info!("the object store can be used"),
        }
        self.problem().clone_from(&problem);
        if let Err(error) = site.store.note_objects(site.me, problem.as_deref()).await {
            debug!(%error, "the state of the object store is not recorded");
        }
    }

    fn problem(&self) -> MutexGuard<'_, Option<String>> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until it is dropped.
pub(crate) async fn run(sites: Arc<Sites>) {
    loop {
        let pause = if sites.sharing.problem().is_some() { PAUSE_WRONG } else { PAUSE_WELL };
        tokio::time::sleep(pause).await;
        sites.sharing.look(&sites).await;
    }
}
