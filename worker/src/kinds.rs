//! The kinds of processes that Baton brings along.

use std::sync::Arc;

use self::job::Job;
use self::program::{Local, Program};
use crate::registry::Registry;
use crate::site::Sites;

mod aids;
mod job;
pub(crate) mod program;

/// Baton's own kinds with what they need of their worker, and those of the program's author, who may replace any.
pub(crate) fn registry(authors: &Registry, local: &Arc<Local>, sites: &Arc<Sites>) -> Registry {
    let mut registry = Registry::new();
    let local = Arc::clone(local);
    registry.register_equipped("program", move |program: Program| program.with(Arc::clone(&local)));
    let sites = Arc::clone(sites);
    registry.register_equipped("job", move |job: Job| job.with(Arc::clone(&sites)));
    registry.register::<aids::Noop>("baton.noop");
    registry.register::<aids::Sleep>("baton.sleep");
    registry.register::<aids::Count>("baton.count");
    registry.register::<aids::Block>("baton.block");
    registry.register::<aids::Fail>("baton.fail");
    registry.add(authors);
    registry
}
