//! What a worker offers to the processes that it holds. All of them share it.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_common::id::Incarnation;
use baton_common::store::writer::Writer;
use tokio::runtime::Handle;

use crate::author::clock::Clock;

/// The worker's identity.
pub(crate) struct Identity {
    pub(crate) me: Incarnation,
    /// Its name, for people.
    pub(crate) name: String,
    pub(crate) host: String,
}

/// What a process uses of its worker through its context.
pub(crate) struct Facilities {
    pub(crate) identity: Arc<Identity>,
    /// The folder below which sandboxes are made.
    pub(crate) root: PathBuf,
    pub(crate) grace: Duration,
    pub(crate) blocking: Handle,
    pub(crate) clock: Clock,
    /// `None` in the test kit, which has no database.
    pub(crate) writer: Option<Writer>,
    /// The worker's sites. Only the room above that has `Context::site` knows their type.
    pub(crate) sites: Arc<dyn Any + Send + Sync>,
}
