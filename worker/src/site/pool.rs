//! Pool of the sessions that this worker has with a site.
//!
//! An SSH session multiplexes several channels, and each command needs one. So the pooled object of `deadpool` is a channel.
//! `deadpool` limits the number of channels, lends them, queues the processes that wait for one, and records when each was last
//! used. The channels of a session share it through an `Arc`, whose strong count is the number of its channels. When the last
//! of them is dropped, the session is closed, and then its slot is released.
//!
//! - `create` adds a channel to the youngest session that has room for one. Otherwise it opens a session: with a slot of the
//!   fleet (`slot/SITE/N`), and at least `min_reconnect` after the last session that the fleet opened.
//! - `recycle` refuses a channel if its session is broken or too old, or has more channels than the server allows. An old session
//!   keeps its slot while it is in use, by a long transfer for example; `create` adds channels to it if no other session can be
//!   opened.
//! - The channel that was returned last is lent first, so that surplus sessions become idle and are closed.
//!
//! `deadpool` does not hold the number of channels that the server allows for each session, which `narrow` and `maintain`
//! change. A pool has one size for all sessions, and `Pool::resize` removes only objects that exist: a pool of size 8 that has
//! created one object still lends 8 after `resize(2)`.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use baton_common::config;
use baton_common::id::Incarnation;
use baton_common::store::Store;
use deadpool::Runtime;
use deadpool::managed::{self, Metrics, Object, PoolError, QueueMode, RecycleError, RecycleResult, Timeouts};
use tracing::{debug, info};

use self::sessions::{NoChannel, PooledChannel, Sessions, Shared};
use super::Closed;
use crate::transport::Session;

mod sessions;
#[cfg(test)]
mod tests;

/// How long a process waits in memory for a channel. Parking it costs two commits.
const CHANNEL_WAIT: Duration = Duration::from_secs(5);

/// One for the watch, and one for everything else.
const CHANNELS_MIN: usize = 2;

/// Pause before a narrowed session is tried with one more channel. The server counts a channel until its command has ended,
/// so it may have refused one only because it was busy.
const WIDEN_AFTER: Duration = Duration::from_secs(30);

/// How long the holder of a channel of an old session may keep it before it looks for a younger one.
const FADES_AFTER: Duration = Duration::from_secs(60);

/// A channel that the pool has lent; derefs to its session.
pub(crate) struct Channel(Object<Manager>);

impl Deref for Channel {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.0.session()
    }
}

/// See the module.
pub(crate) struct Pool {
    channels: managed::Pool<Manager>,
    sessions: Arc<Sessions>,
}

struct Manager(Arc<Sessions>);

impl managed::Manager for Manager {
    type Type = PooledChannel;
    type Error = NoChannel;

    async fn create(&self) -> Result<PooledChannel, NoChannel> {
        let Self(sessions) = self;
        if let Some(channel) = sessions.channel(Sessions::young) {
            return Ok(channel);
        }
        let _one_at_a_time = sessions.opening.lock().await;
        if let Some(channel) = sessions.channel(Sessions::young) {
            return Ok(channel);
        }
        match sessions.open().await {
            Err(NoChannel::Closed(Closed::Busy)) => {
                sessions.channel(Sessions::lending).ok_or(NoChannel::Closed(Closed::Busy))
            }
            opened => opened,
        }
    }

    async fn recycle(&self, channel: &mut PooledChannel, _: &Metrics) -> RecycleResult<NoChannel> {
        if !self.0.is_fresh(channel) {
            return Err(RecycleError::message("the session is broken or too old"));
        }
        if self.0.is_surplus(channel) {
            return Err(RecycleError::message("the server allows fewer channels"));
        }
        Ok(())
    }
}

impl Pool {
    pub(crate) fn new(site: &str, ssh: Option<config::Ssh>, store: &Store, me: Incarnation) -> Self {
        let n_sessions = ssh.as_ref().map_or(1, |ssh| ssh.max_connections).max(1) as usize;
        let sessions = Arc::new(Sessions::new(site, ssh, store, me));
        let channels = managed::Pool::builder(Manager(Arc::clone(&sessions)))
            .max_size(sessions.channels_max() * n_sessions)
            .queue_mode(QueueMode::Lifo)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait: Some(CHANNEL_WAIT), create: None, recycle: None })
            .build()
            .expect("a pool with a runtime has what its limits need");
        Self { channels, sessions }
    }

    /// Lends a channel. Waits for one for 5 s if all are in use.
    ///
    /// # Errors
    /// See [`Closed`].
    ///
    /// # Cancel safety
    /// Cancel safe: the next caller gets the session that is being opened.
    pub(crate) async fn channel(&self) -> Result<Channel, Closed> {
        let channels = self.channels.clone();
        // A task, so that no caller that is cancelled interrupts a login and leaves a slot taken. The task ends with the login.
        let lending = self.sessions.home.spawn(async move { Box::pin(channels.get()).await });
        match lending.await {
            Ok(Ok(channel)) => Ok(Channel(channel)),
            Ok(Err(PoolError::Backend(NoChannel::Closed(closed)))) => Err(closed),
            Ok(Err(PoolError::Backend(NoChannel::Store(error)))) => {
                debug!(site = self.sessions.site, %error, "no session: the database does not answer");
                Err(Closed::Busy)
            }
            Ok(Err(
                PoolError::Timeout(_)
                | PoolError::Closed
                | PoolError::NoRuntimeSpecified
                | PoolError::PostCreateHook(_),
            ))
            | Err(_) => Err(Closed::Busy),
        }
    }

    /// The number of free channels of open sessions.
    pub(crate) fn free_channels(&self) -> usize {
        let list = self.sessions.lock();
        let free = |session: &Arc<Shared>| session.channels_allowed().saturating_sub(self.in_use(session));
        self.sessions.lending(&list).iter().map(free).sum()
    }

    /// The number of sessions that the whole fleet may have.
    pub(crate) fn slots(&self) -> i64 {
        self.sessions.ssh.as_ref().map_or(0, |ssh| i64::from(ssh.max_connections))
    }

    /// Whether the holder of a channel should return it because its session is too old.
    pub(crate) fn is_fading(&self, channel: &Channel) -> bool {
        self.sessions.is_fading(&channel.0, Object::metrics(&channel.0).last_used())
    }

    /// The number of open sessions that are not too old.
    pub(crate) fn n_young(&self) -> usize {
        let list = self.sessions.lock();
        self.sessions.young(&list).len()
    }

    /// Lowers the limit of channels after the server has refused one.
    pub(crate) fn narrow(&self) {
        let list = self.sessions.lock();
        for session in &self.sessions.lending(&list) {
            let channels = self.in_use(session).saturating_sub(1).max(CHANNELS_MIN);
            if session.narrow(channels) {
                info!(site = self.sessions.site, channels, "the server allows fewer channels than configured");
            }
        }
    }

    /// Drops idle channels of broken sessions.
    pub(crate) fn discard_broken(&self) {
        self.channels.retain(|channel, _| !channel.session().is_broken());
    }

    /// Widens narrowed sessions, and drops channels that are idle for too long or whose session is broken or too old. To be
    /// called about once a second.
    pub(crate) fn maintain(&self) {
        let list = self.sessions.lock();
        for session in &self.sessions.lending(&list) {
            session.widen(self.sessions.channels_max());
        }
        drop(list);
        let idle_close = self.sessions.ssh.as_ref().map_or(Duration::MAX, |ssh| ssh.idle_close);
        self.channels.retain(|channel, metrics| self.sessions.is_fresh(channel) && metrics.last_used() < idle_close);
    }

    /// Closes all sessions, even if their channels are lent, and releases their slots.
    pub(crate) async fn close(&self) {
        self.channels.close();
        self.sessions.close().await;
    }

    /// The number of channels of a session that are lent. To be called while the list of sessions is locked.
    fn in_use(&self, session: &Arc<Shared>) -> usize {
        let mut n_idle = 0;
        self.channels.retain(|channel, _| {
            n_idle += usize::from(channel.is_of(session));
            true
        });
        session.n_channels().saturating_sub(n_idle)
    }
}
