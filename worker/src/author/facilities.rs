//! What a worker offers to the processes that it holds, the same to all of them.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_common::id::Incarnation;
use baton_common::store::writer::Writer;
use tokio::runtime::Handle;

/// Which worker this is.
pub(crate) struct Identity {
    pub(crate) me: Incarnation,
    /// Its label, for people.
    pub(crate) name: String,
    pub(crate) host: String,
}

/// What a process may use of its worker, by its context.
pub(crate) struct Facilities {
    pub(crate) identity: Arc<Identity>,
    /// The folder below which sandboxes are made.
    pub(crate) root: PathBuf,
    pub(crate) grace: Duration,
    pub(crate) blocking: Handle,
    pub(crate) writer: Writer,
    /// The worker's sites. Their type is known where they are, in a room above this one, and so is `Context::site`.
    pub(crate) sites: Arc<dyn Any + Send + Sync>,
}
