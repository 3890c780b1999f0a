//! Whether this worker's object store is the one that its fleet shares. What has files there is left to workers that have it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::sharing::{self, Foreign};
use baton_common::spec::OnSite;
use baton_common::spec::on_site::Scope;
use tracing::{debug, info, warn};

use crate::cli::chain;
use crate::incarnation::Shared;

/// Pause between two looks: while something is wrong, and while nothing is.
const PAUSE_WRONG: Duration = Duration::from_secs(5);
const PAUSE_WELL: Duration = Duration::from_secs(30);

/// How long a look may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What the last look has shown.
#[derive(Default)]
pub(crate) struct Sharing {
    foreign: Mutex<Option<Foreign>>,
    /// What was last told of it.
    told: Mutex<Option<String>>,
}

impl Sharing {
    /// Why a process cannot be done here, if that is so: it has files in the fleet's store.
    pub(crate) fn refuses(&self, on_site: &OnSite) -> Option<String> {
        let has_files = on_site.staged.is_some()
            || on_site.inputs.iter().any(|input| input.from.scope == Scope::Store)
            || on_site.outputs.iter().any(|output| output.to.scope == Scope::Store);
        let foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        foreign.as_ref().filter(|_| has_files).map(|foreign| format!("{}; {}", foreign.text, foreign.remedy))
    }

    /// Looks, and says what has changed. A worker without sites has no use for a store.
    pub(crate) async fn look(&self, shared: &Shared) {
        let Some(site) = shared.sites.all().next() else { return };
        let looked = tokio::time::timeout(LIMIT, sharing::join(&site.store, &site.objects)).await;
        let problem = match looked {
            Ok(Ok(foreign)) => {
                let text = foreign.as_ref().map(|foreign| format!("{}; {}", foreign.text, foreign.remedy));
                *self.foreign.lock().unwrap_or_else(PoisonError::into_inner) = foreign;
                text
            }
            Ok(Err(sharing::Error::Database(error))) => {
                debug!(%error, "which object store the fleet shares is not known");
                return;
            }
            Ok(Err(sharing::Error::Objects(error))) => Some(chain(&error)),
            Err(_) => Some(format!("{} does not answer within {} s", site.objects.place(), LIMIT.as_secs())),
        };
        if *self.told.lock().unwrap_or_else(PoisonError::into_inner) == problem {
            return;
        }
        if let Err(error) = site.store.note_objects(shared.me, problem.as_deref()).await {
            debug!(%error, "what is wrong with the object store is not recorded");
            return;
        }
        match &problem {
            Some(problem) => warn!(problem, "the object store cannot be used; processes with files are left to others"),
            None => info!("the object store can be used"),
        }
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    fn is_wrong(&self) -> bool {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// Runs until it is dropped.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        let pause = if shared.sites.sharing.is_wrong() { PAUSE_WRONG } else { PAUSE_WELL };
        tokio::time::sleep(pause).await;
        shared.sites.sharing.look(&shared).await;
    }
}
