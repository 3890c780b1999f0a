//! The open sessions of this worker with a site.
//!
//! A session that is closed, or is being closed, has no channels any more. It has its slot until it is closed.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use baton_common::config;
use baton_common::id::Incarnation;
use baton_common::store::site::Door;
use baton_common::store::{self, Store};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use super::{Closed, FADES_AFTER, WIDEN_AFTER};
use crate::transport::{self, Session};

/// Commands that run at once at a site that is this machine.
const LOCAL_CHANNELS: u32 = 8;

/// How long a session may take to say goodbye. A server that does not answer must not keep the slot.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Sessions {
    pub(super) site: String,
    pub(super) ssh: Option<config::Ssh>,
    pub(super) store: Store,
    me: Incarnation,
    /// Runs sessions. The thread of a process may be blocked, or end.
    pub(super) home: Handle,
    list: Mutex<List>,
    /// Held while a session is opened.
    pub(super) opening: tokio::sync::Mutex<()>,
    /// Closes sessions and releases slots. Closed from the start, so `wait` returns whenever no task is left.
    pub(super) closing: TaskTracker,
}

#[derive(Default)]
pub(super) struct List {
    /// The oldest first.
    sessions: Vec<Weak<Shared>>,
    /// Slots of this worker. The database grants a slot to its owner again, so it cannot say that the slot is in use.
    slots: BTreeSet<String>,
}

/// A session that its channels share.
pub(super) struct Shared {
    session: Session,
    /// None on the local machine.
    slot: Option<Slot>,
    opened: Instant,
    limit: Mutex<Limit>,
}

/// How many channels the server allows, and when that last changed.
struct Limit {
    channels: usize,
    since: Instant,
}

/// A channel of a session.
pub(super) struct PooledChannel {
    shared: Arc<Shared>,
}

/// A permit for a session. Dropping it releases it.
pub(super) struct Slot {
    name: String,
    sessions: Arc<Sessions>,
}

/// Why there is no channel.
#[derive(Debug)]
pub(super) enum NoChannel {
    Closed(Closed),
    Store(store::Error),
}

impl PooledChannel {
    pub(super) fn session(&self) -> &Session {
        &self.shared.session
    }

    pub(super) fn is_of(&self, session: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, session)
    }

    #[cfg(test)]
    pub(super) fn is_same_session(&self, other: &Self) -> bool {
        self.is_of(&other.shared)
    }
}

impl Shared {
    fn limit(&self) -> MutexGuard<'_, Limit> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn channels_allowed(&self) -> usize {
        self.limit().channels
    }

    /// The number of channels. To be called while the list of sessions is locked, with the only other reference.
    pub(super) fn n_channels(self: &Arc<Self>) -> usize {
        Arc::strong_count(self) - 1
    }

    /// Lowers the limit to this number; false if it is as low already.
    pub(super) fn narrow(&self, channels: usize) -> bool {
        let mut limit = self.limit();
        let is_lower = channels < limit.channels;
        *limit = Limit { channels: channels.min(limit.channels), since: Instant::now() };
        is_lower
    }

    /// Raises the limit by one if it has been below the maximum for long enough.
    pub(super) fn widen(&self, channels_max: usize) {
        let mut limit = self.limit();
        if limit.channels < channels_max && limit.since.elapsed() >= WIDEN_AFTER {
            *limit = Limit { channels: limit.channels + 1, since: Instant::now() };
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A local session has nothing to close.
        let Some(slot) = self.slot.take() else { return };
        let (session, sessions) = (self.session.clone(), Arc::clone(&slot.sessions));
        let close = async move {
            let _ = timeout(CLOSE_LIMIT, session.close()).await;
            info!(site = slot.sessions.site, slot = slot.name, "session closed");
            drop(slot);
        };
        sessions.closing.spawn_on(close, &sessions.home);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (name, sessions) = (std::mem::take(&mut self.name), Arc::clone(&self.sessions));
        let release = async move { sessions.release(&name).await };
        self.sessions.closing.spawn_on(release, &self.sessions.home);
    }
}

impl Sessions {
    pub(super) fn new(site: &str, ssh: Option<config::Ssh>, store: &Store, me: Incarnation) -> Self {
        let closing = TaskTracker::new();
        closing.close();
        Self {
            site: site.to_owned(),
            ssh,
            store: store.clone(),
            me,
            home: Handle::current(),
            list: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            closing,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configured number of channels of a session.
    pub(super) fn channels_max(&self) -> usize {
        self.ssh.as_ref().map_or(LOCAL_CHANNELS, |ssh| ssh.channels).max(1) as usize
    }

    fn is_old(&self, session: &Shared) -> bool {
        self.ssh.as_ref().is_some_and(|ssh| session.opened.elapsed() >= ssh.max_age)
    }

    /// Whether the session of a channel is neither broken nor too old.
    pub(super) fn is_fresh(&self, channel: &PooledChannel) -> bool {
        !channel.session().is_broken() && !self.is_old(&channel.shared)
    }

    /// Whether the session of a channel has more channels than the server allows.
    pub(super) fn is_surplus(&self, channel: &PooledChannel) -> bool {
        // Only who has locked the list has a reference that is no channel's.
        let _list = self.lock();
        Arc::strong_count(&channel.shared) > channel.shared.channels_allowed()
    }

    /// Whether a channel that was lent so long ago should be returned because its session is too old.
    pub(super) fn is_fading(&self, channel: &PooledChannel, lent_for: Duration) -> bool {
        self.is_old(&channel.shared) && lent_for >= FADES_AFTER
    }

    /// Sessions that are neither broken nor too old, the youngest first.
    pub(super) fn young(&self, list: &List) -> Vec<Arc<Shared>> {
        let well = Self::well(list);
        well.filter(|session| !self.is_old(session)).collect()
    }

    /// The same; the youngest of the old ones if there is none.
    pub(super) fn lending(&self, list: &List) -> Vec<Arc<Shared>> {
        let young = self.young(list);
        if young.is_empty() { Self::well(list).take(1).collect() } else { young }
    }

    fn well(list: &List) -> impl Iterator<Item = Arc<Shared>> {
        list.sessions.iter().rev().filter_map(Weak::upgrade).filter(|shared| !shared.session.is_broken())
    }

    /// Adds a channel to the first of some sessions that allows one more.
    pub(super) fn channel(&self, among: impl Fn(&Self, &List) -> Vec<Arc<Shared>>) -> Option<PooledChannel> {
        let list = self.lock();
        let has_room = |session: &Arc<Shared>| session.n_channels() < session.channels_allowed();
        let shared = among(self, &list).into_iter().find(has_room)?;
        Some(PooledChannel { shared })
    }

    /// Opens a session if a slot is free and the rate limit allows it; returns its first channel.
    ///
    /// # Cancel safety
    /// Not cancel safe: the slot would stay taken until this worker is gone.
    pub(super) async fn open(self: &Arc<Self>) -> Result<PooledChannel, NoChannel> {
        let Some(ssh) = &self.ssh else {
            // One is enough: its channels are processes of this machine.
            let has_none = self.lending(&self.lock()).is_empty();
            let enter = || self.enter(Session::local(), None, Instant::now());
            return has_none.then(enter).ok_or(NoChannel::Closed(Closed::Busy));
        };
        // A slot that is being released is free then.
        self.closing.wait().await;
        let slot = self.take_slot(ssh).await?.ok_or(NoChannel::Closed(Closed::Busy))?;
        let min_reconnect = i64::try_from(ssh.min_reconnect.as_micros()).unwrap_or(i64::MAX);
        match self.store.knock(&self.site, min_reconnect).await.map_err(NoChannel::Store)? {
            Door::Open => {}
            Door::TooSoon => return Err(NoChannel::Closed(Closed::Busy)),
            Door::Down => return Err(NoChannel::Closed(Closed::Down("the site cannot be reached".into()))),
        }
        match transport::connect(ssh).await {
            Ok(session) => {
                info!(site = self.site, slot = slot.name, "session opened");
                let channel = self.enter(session, Some(slot), Instant::now());
                if let Err(error) = self.store.note_site(&self.site, None).await {
                    debug!(site = self.site, %error, "could not record that the site is up");
                }
                Ok(channel)
            }
            Err(error) => {
                let text = error.to_string();
                info!(site = self.site, error = text, "the site cannot be reached");
                self.store.note_site(&self.site, Some(&text)).await.map_err(NoChannel::Store)?;
                Err(NoChannel::Closed(Closed::Down(text)))
            }
        }
    }

    /// Lists a session and returns its first channel.
    pub(super) fn enter(&self, session: Session, slot: Option<Slot>, opened: Instant) -> PooledChannel {
        let limit = Mutex::new(Limit { channels: self.channels_max(), since: opened });
        let shared = Arc::new(Shared { session, slot, opened, limit });
        let mut list = self.lock();
        list.sessions.retain(|session| session.strong_count() > 0);
        list.sessions.push(Arc::downgrade(&shared));
        PooledChannel { shared }
    }

    /// Takes a slot that this worker does not use already.
    pub(super) async fn take_slot(self: &Arc<Self>, ssh: &config::Ssh) -> Result<Option<Slot>, NoChannel> {
        for idx in 0..ssh.max_connections {
            let name = format!("slot/{}/{idx}", self.site);
            if self.lock().slots.contains(&name) {
                continue;
            }
            if self.store.take_permit(&name, self.me).await.map_err(NoChannel::Store)? {
                self.lock().slots.insert(name.clone());
                return Ok(Some(Slot { name, sessions: Arc::clone(self) }));
            }
        }
        Ok(None)
    }

    /// The name stays in the list until the permit is given back: else this worker could take the permit for another session
    /// in between, and give that one's back.
    async fn release(&self, name: &str) {
        if let Err(error) = self.store.give_permit(name, self.me).await {
            debug!(slot = name, %error, "the slot is free when this worker is gone");
        }
        self.lock().slots.remove(name);
    }

    /// Closes all sessions, even if their channels are lent.
    pub(super) async fn close(&self) {
        let sessions: Vec<Session> = Self::well(&self.lock()).map(|shared| shared.session.clone()).collect();
        for session in sessions {
            let _ = timeout(CLOSE_LIMIT, session.close()).await;
        }
        self.closing.wait().await;
        // Of sessions whose channels are still lent.
        let slots = self.lock().slots.clone();
        for name in &slots {
            self.release(name).await;
        }
    }
}
