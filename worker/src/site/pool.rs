//! The sessions that this worker has with a site, shared by its processes.
//!
//! What the pool lends is one channel of a session; as many processes use a session at once as it has channels, and the
//! rest wait in order. The youngest session that is well is used first, so the oldest are the first that nobody uses; one
//! that is too old, broken, or unused for long is closed. A session is opened only with a permit of the fleet's
//! (`slot/SITE/N`), and no sooner after another than the configuration says, whichever worker opened that.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_common::config;
use baton_common::id::Incarnation;
use baton_common::store::Store;
use baton_common::store::site::Door;
use deadpool::Runtime;
use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult, Timeouts};
use tracing::{debug, info};

use super::Closed;
use crate::transport::{self, Session};

/// How long a process waits in memory for a channel. A parked one costs two commits.
const CHANNEL_WAIT: Duration = Duration::from_secs(5);

/// One for the watch, and one for everything else.
const CHANNELS_MIN: usize = 2;

/// After so long a session that was found to have fewer channels is tried with one more: a server counts a channel until
/// its command has ended, so it may only have been busy.
const WIDEN_AFTER: Duration = Duration::from_secs(30);

/// Commands that run at once at a site that is this machine.
const LOCAL_CHANNELS: u32 = 8;

/// A channel of a session; derefs to the session.
pub(crate) struct Lease(Object<Manager>);

impl Deref for Lease {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0.live.session
    }
}

/// See the module.
pub(crate) struct Pool {
    channels: managed::Pool<Manager>,
    shared: Arc<Shared>,
}

struct Shared {
    site: String,
    ssh: Option<config::Ssh>,
    store: Store,
    me: Incarnation,
    /// Where sessions live: a process's thread may be blocked, or end.
    home: tokio::runtime::Handle,
    live: Mutex<Vec<Arc<Live>>>,
    opening: tokio::sync::Mutex<()>,
}

/// A session.
struct Live {
    session: Session,
    slot: Option<String>,
    opened: Instant,
    /// How many channels it has, and when that was last found out or tried.
    most: AtomicUsize,
    narrowed: Mutex<Instant>,
    lent: AtomicUsize,
    used: Mutex<Instant>,
}

/// One of the things that the pool lends.
struct Channel {
    live: Arc<Live>,
}

struct Manager(Arc<Shared>);

/// Why there is no channel.
#[derive(Debug)]
enum NoChannel {
    Closed(Closed),
    Store(baton_common::store::Error),
}

impl managed::Manager for Manager {
    type Type = Channel;
    type Error = NoChannel;

    async fn create(&self) -> Result<Channel, NoChannel> {
        if let Some(channel) = self.0.free_channel() {
            return Ok(channel);
        }
        let _one_at_a_time = self.0.opening.lock().await;
        if let Some(channel) = self.0.free_channel() {
            return Ok(channel);
        }
        let shared = Arc::clone(&self.0);
        // Whoever asked may go; the session is there for the next.
        let opening = self.0.home.spawn(async move { shared.open().await });
        opening.await.unwrap_or(Err(NoChannel::Closed(Closed::Busy)))?;
        self.0.free_channel().ok_or(NoChannel::Closed(Closed::Busy))
    }

    async fn recycle(&self, channel: &mut Channel, _: &Metrics) -> RecycleResult<NoChannel> {
        if channel.live.session.is_broken() || self.0.is_old(&channel.live) {
            return Err(RecycleError::message("closed"));
        }
        Ok(())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.live.lent.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    pub(crate) fn new(site: &str, ssh: Option<config::Ssh>, store: &Store, me: Incarnation) -> Self {
        let n_channels = ssh.as_ref().map_or(LOCAL_CHANNELS, |ssh| ssh.channels).max(1) as usize;
        let n_sessions = ssh.as_ref().map_or(1, |ssh| ssh.max_connections).max(1) as usize;
        let shared = Arc::new(Shared {
            site: site.to_owned(),
            ssh,
            store: store.clone(),
            me,
            home: tokio::runtime::Handle::current(),
            live: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        });
        let channels = managed::Pool::builder(Manager(Arc::clone(&shared)))
            .max_size(n_channels * n_sessions)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait: Some(CHANNEL_WAIT), create: None, recycle: None })
            .build()
            .expect("a pool with a runtime has what its limits need");
        Self { channels, shared }
    }

    /// A channel, as soon as there is one.
    pub(crate) async fn lease(&self) -> Result<Lease, Closed> {
        match self.channels.get().await {
            Ok(channel) => {
                channel.live.touch();
                Ok(Lease(channel))
            }
            Err(PoolError::Backend(NoChannel::Closed(closed))) => Err(closed),
            Err(PoolError::Backend(NoChannel::Store(error))) => {
                debug!(site = self.shared.site, %error, "no session: the database does not answer");
                Err(Closed::Busy)
            }
            Err(
                PoolError::Timeout(_)
                | PoolError::Closed
                | PoolError::NoRuntimeSpecified
                | PoolError::PostCreateHook(_),
            ) => Err(Closed::Busy),
        }
    }

    /// Channels that are free in sessions that are open.
    pub(crate) fn free_channels(&self) -> usize {
        let free = |live: &Arc<Live>| live.most.load(Ordering::Acquire).saturating_sub(self.in_use(live));
        self.shared.usable().iter().map(free).sum()
    }

    /// Sessions that the whole fleet may have.
    pub(crate) fn slots(&self) -> i64 {
        self.shared.ssh.as_ref().map_or(0, |ssh| i64::from(ssh.max_connections))
    }

    /// Whether a session takes nothing new, because of its age.
    pub(crate) fn is_fading(&self, lease: &Lease) -> bool {
        self.shared.is_old(&lease.0.live)
    }

    /// Sessions that are open.
    pub(crate) fn n_open(&self) -> usize {
        self.shared.lock().len()
    }

    fn in_use(&self, live: &Live) -> usize {
        // What the pool keeps ready counts as lent to it; nobody uses it.
        let ready = self.channels.status().available;
        live.lent.load(Ordering::Acquire).saturating_sub(ready)
    }

    /// The server has refused a channel: its sessions have fewer than they are said to have.
    pub(crate) fn narrow(&self) {
        for live in self.shared.usable() {
            let now = self.in_use(&live).saturating_sub(1).max(CHANNELS_MIN);
            *live.narrowed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            if now < live.most.fetch_min(now, Ordering::AcqRel) {
                info!(site = self.shared.site, channels = now, "the server allows fewer channels than it is said to");
            }
        }
        self.channels.retain(|_, _| false);
    }

    /// Drops what is broken at once, so that nobody is given it.
    pub(crate) fn discard_broken(&self) {
        self.channels.retain(|channel, _| !channel.live.session.is_broken());
    }

    /// Closes what is broken, too old, or not used; run now and then.
    pub(crate) async fn tend(&self) {
        let shared = &self.shared;
        for live in shared.usable() {
            let mut narrowed = live.narrowed.lock().unwrap_or_else(PoisonError::into_inner);
            if narrowed.elapsed() >= WIDEN_AFTER && live.most.load(Ordering::Acquire) < shared.channels() {
                live.most.fetch_add(1, Ordering::AcqRel);
                *narrowed = Instant::now();
            }
        }
        let idle_close = shared.ssh.as_ref().map_or(Duration::MAX, |ssh| ssh.idle_close);
        self.channels.retain(|channel, _| {
            let live = &channel.live;
            !live.session.is_broken() && !shared.is_old(live) && live.used().elapsed() < idle_close
        });
        let closed: Vec<Arc<Live>> = {
            let mut sessions = shared.lock();
            let (kept, closed) = sessions.drain(..).partition(|live: &Arc<Live>| {
                let is_unused = live.lent.load(Ordering::Acquire) == 0;
                let is_idle = live.used().elapsed() >= idle_close;
                !(is_unused && (live.session.is_broken() || shared.is_old(live) || is_idle))
            });
            *sessions = kept;
            closed
        };
        for live in closed {
            shared.close(&live).await;
        }
    }

    /// Closes everything.
    pub(crate) async fn close(&self) {
        self.channels.close();
        let sessions = std::mem::take(&mut *self.shared.lock());
        for live in sessions {
            self.shared.close(&live).await;
        }
    }
}

impl Live {
    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn used(&self) -> Instant {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channels(&self) -> usize {
        self.ssh.as_ref().map_or(LOCAL_CHANNELS, |ssh| ssh.channels).max(1) as usize
    }

    fn is_old(&self, live: &Live) -> bool {
        self.ssh.as_ref().is_some_and(|ssh| live.opened.elapsed() >= ssh.max_age)
    }

    /// Sessions that take something new, the youngest first.
    fn usable(&self) -> Vec<Arc<Live>> {
        let sessions = self.lock();
        sessions.iter().rev().filter(|live| !live.session.is_broken() && !self.is_old(live)).cloned().collect()
    }

    fn free_channel(&self) -> Option<Channel> {
        self.usable().into_iter().find_map(|live| {
            let most = live.most.load(Ordering::Acquire);
            let take = |lent: usize| (lent < most).then_some(lent + 1);
            live.lent.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
            Some(Channel { live })
        })
    }

    /// Opens a session, if the fleet may have one more and not too soon.
    async fn open(&self) -> Result<(), NoChannel> {
        let Some(ssh) = &self.ssh else {
            // One is enough: its channels are processes of this machine.
            if self.lock().is_empty() {
                self.enter(Session::local(), None);
            }
            return Ok(());
        };
        let Some(slot) = self.take_slot(ssh).await? else { return Err(NoChannel::Closed(Closed::Busy)) };
        let min_reconnect = i64::try_from(ssh.min_reconnect.as_micros()).unwrap_or(i64::MAX);
        match self.store.knock(&self.site, min_reconnect).await {
            Ok(Door::Open) => {}
            Ok(Door::TooSoon) => {
                self.give_slot(&slot).await;
                return Err(NoChannel::Closed(Closed::Busy));
            }
            Ok(Door::Down) => {
                self.give_slot(&slot).await;
                return Err(NoChannel::Closed(Closed::Down("the site cannot be reached".into())));
            }
            Err(error) => return Err(NoChannel::Store(error)),
        }
        match transport::connect(ssh).await {
            Ok(session) => {
                info!(site = self.site, slot, "a session is open");
                self.enter(session, Some(slot));
                self.store.note_site(&self.site, None).await.map_err(NoChannel::Store)
            }
            Err(error) => {
                self.give_slot(&slot).await;
                let text = error.to_string();
                info!(site = self.site, error = text, "the site cannot be reached");
                self.store.note_site(&self.site, Some(&text)).await.map_err(NoChannel::Store)?;
                Err(NoChannel::Closed(Closed::Down(text)))
            }
        }
    }

    fn enter(&self, session: Session, slot: Option<String>) {
        let live = Live {
            session,
            slot,
            opened: Instant::now(),
            most: AtomicUsize::new(self.channels()),
            narrowed: Mutex::new(Instant::now()),
            lent: AtomicUsize::new(0),
            used: Mutex::new(Instant::now()),
        };
        self.lock().push(Arc::new(live));
    }

    /// A permit that this worker does not use already.
    async fn take_slot(&self, ssh: &config::Ssh) -> Result<Option<String>, NoChannel> {
        let taken: Vec<String> = self.lock().iter().filter_map(|live| live.slot.clone()).collect();
        for idx in 0..ssh.max_connections {
            let slot = format!("slot/{}/{idx}", self.site);
            if !taken.contains(&slot) && self.store.take_permit(&slot, self.me).await.map_err(NoChannel::Store)? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    async fn give_slot(&self, slot: &str) {
        if let Err(error) = self.store.give_permit(slot, self.me).await {
            debug!(slot, %error, "a permit is given back when this worker is gone");
        }
    }

    async fn close(&self, live: &Live) {
        live.session.close().await;
        if let Some(slot) = &live.slot {
            info!(site = self.site, slot, "a session is closed");
            self.give_slot(slot).await;
        }
    }
}
