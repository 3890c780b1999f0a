//! The sessions that this worker has with a site, shared by its processes.
//!
//! What the pool lends is one channel of a session; as many processes use a session at once as it has channels, and the
//! rest wait in order. The youngest session that is well is used first, so the oldest are the first that nobody uses; one
//! that is too old, broken, or unused for long is closed. A session is opened only with a permit of the fleet's
//! (`slot/SITE/N`), and no sooner after another than the configuration says, whichever worker opened that. An old one that
//! long transfers use has its permit until they are over; as long as no other session may be opened, it lends on.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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

/// Whoever is lent a channel of an old session may keep it for so long before looking for a younger one.
const FADES_AFTER: Duration = Duration::from_secs(60);

/// Commands that run at once at a site that is this machine.
const LOCAL_CHANNELS: u32 = 8;

/// A channel of a session; derefs to the session.
pub(crate) struct Lease {
    channel: Object<Manager>,
    since: Instant,
}

impl Deref for Lease {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.channel.live.session
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
    opening: Arc<tokio::sync::Mutex<()>>,
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
    /// It is lent no more, and has its slot until it is closed.
    is_closing: AtomicBool,
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
        if let Some(channel) = self.0.free_channel(Shared::young) {
            return Ok(channel);
        }
        let one_at_a_time = Arc::clone(&self.0.opening).lock_owned().await;
        if let Some(channel) = self.0.free_channel(Shared::young) {
            return Ok(channel);
        }
        let shared = Arc::clone(&self.0);
        // Whoever asked may go; the session is there for the next, who does not take its slot meanwhile.
        let opening = self.0.home.spawn(async move {
            let _one_at_a_time = one_at_a_time;
            shared.open().await
        });
        match opening.await.unwrap_or(Err(NoChannel::Closed(Closed::Busy))) {
            Ok(()) | Err(NoChannel::Closed(Closed::Busy)) => {}
            Err(error) => return Err(error),
        }
        self.0.free_channel(Shared::lending).ok_or(NoChannel::Closed(Closed::Busy))
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
            opening: Arc::default(),
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
                Ok(Lease { channel, since: Instant::now() })
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
        self.shared.lending(&self.shared.lock()).iter().map(free).sum()
    }

    /// Sessions that the whole fleet may have.
    pub(crate) fn slots(&self) -> i64 {
        self.shared.ssh.as_ref().map_or(0, |ssh| i64::from(ssh.max_connections))
    }

    /// Whether a session is to be left, because of its age.
    pub(crate) fn is_fading(&self, lease: &Lease) -> bool {
        self.shared.is_old(&lease.channel.live) && lease.since.elapsed() >= FADES_AFTER
    }

    /// Sessions that are open and not too old.
    pub(crate) fn n_young(&self) -> usize {
        self.shared.young(&self.shared.lock()).len()
    }

    fn in_use(&self, live: &Live) -> usize {
        // What the pool keeps ready counts as lent to it; nobody uses it.
        let ready = self.channels.status().available;
        live.lent.load(Ordering::Acquire).saturating_sub(ready)
    }

    /// The server has refused a channel: its sessions have fewer than they are said to have.
    pub(crate) fn narrow(&self) {
        let lending = self.shared.lending(&self.shared.lock());
        for live in lending {
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
        let lending = shared.lending(&shared.lock());
        for live in lending {
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
        shared.close(shared.unused(idle_close)).await;
    }

    /// Closes everything.
    pub(crate) async fn close(&self) {
        self.channels.close();
        let sessions = self.shared.lock().clone();
        self.shared.close(sessions).await;
    }
}

impl Live {
    fn is_well(&self) -> bool {
        !self.session.is_broken() && !self.is_closing.load(Ordering::Acquire)
    }

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
    fn young(&self, sessions: &[Arc<Live>]) -> Vec<Arc<Live>> {
        sessions.iter().rev().filter(|live| live.is_well() && !self.is_old(live)).cloned().collect()
    }

    /// The same; the youngest of the old ones if there is none. The others are closed when what they have lent is back.
    fn lending(&self, sessions: &[Arc<Live>]) -> Vec<Arc<Live>> {
        let young = self.young(sessions);
        if !young.is_empty() {
            return young;
        }
        sessions.iter().rev().find(|live| live.is_well()).cloned().into_iter().collect()
    }

    /// A channel of the first of some sessions that has one left.
    fn free_channel(&self, of: impl Fn(&Self, &[Arc<Live>]) -> Vec<Arc<Live>>) -> Option<Channel> {
        // As long as it is locked, none of them becomes one that is closed because nobody uses it.
        let sessions = self.lock();
        of(self, &sessions).into_iter().find_map(|live| {
            let most = live.most.load(Ordering::Acquire);
            let take = |lent: usize| (lent < most).then_some(lent + 1);
            live.lent.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
            Some(Channel { live })
        })
    }

    /// Sessions that nobody uses and nobody should; they are lent no more.
    fn unused(&self, idle_close: Duration) -> Vec<Arc<Live>> {
        let sessions = self.lock();
        let is_over = |live: &&Arc<Live>| {
            let is_unused = live.lent.load(Ordering::Acquire) == 0;
            let is_idle = live.used().elapsed() >= idle_close;
            is_unused && (live.session.is_broken() || self.is_old(live) || is_idle)
        };
        let over: Vec<Arc<Live>> = sessions.iter().filter(is_over).cloned().collect();
        for live in &over {
            live.is_closing.store(true, Ordering::Release);
        }
        over
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
            Err(error) => {
                self.give_slot(&slot).await;
                return Err(NoChannel::Store(error));
            }
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
            is_closing: AtomicBool::new(false),
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

    /// Each has its slot to the end: this worker would else take the permit for another, and then give that away.
    async fn close(&self, sessions: Vec<Arc<Live>>) {
        for live in sessions {
            live.session.close().await;
            if let Some(slot) = &live.slot {
                info!(site = self.site, slot, "a session is closed");
                self.give_slot(slot).await;
            }
            self.lock().retain(|other| !Arc::ptr_eq(other, &live));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use baton_common::store::Location;
    use baton_common::store::worker::NewWorker;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const SLOT: &str = "slot/s/0";

    /// The pool of a worker's site that listens at a port of this machine, and the fleet's database.
    async fn pool(folder: &Path, port: u16, more: &str) -> Pool {
        let store = Store::open(Location::parse(&format!("sqlite:{}/db", folder.display())).unwrap()).await.unwrap();
        let me = Incarnation::generate();
        let worker = NewWorker {
            name: "w".into(),
            host: "h".into(),
            os_pid: 1,
            version: "0".into(),
            queues: vec![],
            slots: 1,
            sites: vec![],
        };
        store.register(me, &worker).await.unwrap();
        store.announce_site("s", "fork", "/", 1).await.unwrap();
        let section = format!("host = '127.0.0.1'\nport = {port}\nmax_connections = 1\n{more}");
        Pool::new("s", Some(toml::from_str(&section).unwrap()), &store, me)
    }

    /// Whether the fleet may have another session.
    async fn is_slot_free(pool: &Pool) -> bool {
        let other = Incarnation::generate();
        let is_free = pool.shared.store.take_permit(SLOT, other).await.unwrap();
        pool.shared.store.give_permit(SLOT, other).await.unwrap();
        is_free
    }

    #[tokio::test]
    async fn a_session_that_is_being_opened_keeps_its_slot_when_whoever_asked_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        // It says nothing until it is dropped.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = pool(folder.path(), silent.local_addr().unwrap().port(), "").await;
        let connected = tokio::select! {
            connected = silent.accept() => connected.unwrap(),
            _ = pool.lease() => panic!("there is no session"),
        };
        assert!(
            timeout(Duration::from_millis(500), pool.lease()).await.is_err(),
            "the next waits for the same session"
        );
        assert!(!is_slot_free(&pool).await);
        drop(connected);
        assert!(pool.lease().await.is_err());
        assert!(is_slot_free(&pool).await);
    }

    #[tokio::test]
    async fn a_session_that_is_being_closed_keeps_its_slot() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(folder.path(), 9, "max_age = '0s'").await;
        let shared = &pool.shared;
        let ssh = shared.ssh.as_ref().unwrap();
        let slot = shared.take_slot(ssh).await.unwrap();
        assert_eq!(slot.as_deref(), Some(SLOT));
        shared.enter(Session::local(), slot);
        let over = shared.unused(Duration::MAX);
        assert_eq!(over.len(), 1);
        assert_eq!(shared.take_slot(ssh).await.unwrap(), None, "this worker has it still");
        assert!(shared.free_channel(Shared::lending).is_none());
        shared.close(over).await;
        assert!(is_slot_free(&pool).await);
        assert!(shared.lock().is_empty());
        assert_eq!(shared.take_slot(ssh).await.unwrap().as_deref(), Some(SLOT));
    }

    #[tokio::test]
    async fn an_old_session_lends_on_as_long_as_no_other_may_be_opened() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(folder.path(), 9, "max_age = '0s'").await;
        for idx in 0..2 {
            pool.shared.enter(Session::local(), Some(format!("slot/s/{idx}")));
        }
        let older = Arc::clone(&pool.shared.lock()[0]);
        let transfer = pool.lease().await.unwrap();
        assert_eq!((pool.n_young(), pool.free_channels(), pool.is_fading(&transfer)), (0, 7, false));
        assert_eq!(older.lent.load(Ordering::Acquire), 0, "it is the younger that lends");
        let before = Instant::now().checked_sub(FADES_AFTER).unwrap();
        assert!(pool.is_fading(&Lease { since: before, ..pool.lease().await.unwrap() }));
        pool.tend().await;
        assert_eq!(pool.shared.lock().len(), 1, "the older is closed");

        // Its slot is free, so that another is tried, which cannot be reached; the old one gets nothing new.
        assert!(matches!(pool.lease().await, Err(Closed::Down(_))));
        drop(transfer);
        pool.tend().await;
        assert!(pool.shared.lock().is_empty());
    }
}
