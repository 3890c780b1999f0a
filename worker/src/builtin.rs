//! The kinds of processes that Baton brings along.

use std::sync::Arc;

use self::job::Job;
use self::program::{Local, Program};
use crate::author::registry::Registry;
use crate::site::Sites;

mod job;
pub(crate) mod program;
mod trial;

/// Baton's own kinds with what they need of their worker, and those of the program's author, who may replace any.
pub(crate) fn registry(authors: &Registry, local: &Arc<Local>, sites: &Arc<Sites>) -> Registry {
    let mut registry = Registry::new();
    let local = Arc::clone(local);
    registry.register_equipped("program", move |program: Program| program.with(Arc::clone(&local)));
    let sites = Arc::clone(sites);
    registry.register_equipped("job", move |job: Job| job.with(Arc::clone(&sites)));
    registry.register::<trial::Noop>("baton.noop");
    registry.register::<trial::Sleep>("baton.sleep");
    registry.register::<trial::Count>("baton.count");
    registry.register::<trial::Block>("baton.block");
    registry.register::<trial::Fail>("baton.fail");
    registry.add(authors);
    registry
}
