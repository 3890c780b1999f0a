//! Tests of the pool, with sessions of this machine and a database in a file.

use std::path::Path;
use std::time::Instant;

use baton_common::store::Location;
use baton_common::store::worker::NewWorker;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::sessions::Slot;
use super::*;

const SLOT: &str = "slot/s/0";

/// The pool of a worker for a site on this port of the local machine.
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
    let section = format!("host = '127.0.0.1'\nport = {port}\n{more}");
    Pool::new("s", Some(toml::from_str(&section).unwrap()), &store, me)
}

async fn slot(pool: &Pool) -> Option<Slot> {
    pool.sessions.take_slot(pool.sessions.ssh.as_ref().unwrap()).await.unwrap()
}

/// A session that was opened so long ago, with the next slot.
async fn opened(pool: &Pool, age: Duration) -> PooledChannel {
    let slot = slot(pool).await;
    assert!(slot.is_some(), "no free slot");
    pool.sessions.enter(Session::local(), slot, Instant::now().checked_sub(age).unwrap())
}

/// Whether the fleet may have another session, once this worker has released what it no longer uses.
async fn is_slot_free(pool: &Pool) -> bool {
    pool.sessions.closing.wait().await;
    let other = Incarnation::generate();
    let is_free = pool.sessions.store.take_permit(SLOT, other).await.unwrap();
    pool.sessions.store.give_permit(SLOT, other).await.unwrap();
    is_free
}

fn n_open(pool: &Pool) -> usize {
    pool.sessions.lending(&pool.sessions.lock()).len()
}

#[tokio::test]
async fn session_that_is_being_opened_keeps_its_slot_when_its_caller_is_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    // Accepts a connection and stays silent until it is dropped.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pool = pool(folder.path(), silent.local_addr().unwrap().port(), "max_connections = 1").await;
    let connected = tokio::select! {
        connected = silent.accept() => connected.unwrap(),
        _ = pool.channel() => panic!("there is no session"),
    };
    let next = timeout(Duration::from_millis(500), pool.channel()).await;
    assert!(next.is_err(), "the next caller waits for the same session");
    let other = Incarnation::generate();
    assert!(!pool.sessions.store.take_permit(SLOT, other).await.unwrap());
    drop(connected);
    assert!(pool.channel().await.is_err());
    assert!(is_slot_free(&pool).await);
}

#[tokio::test]
async fn session_that_is_being_closed_keeps_its_slot() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path(), 9, "max_connections = 1").await;
    drop(opened(&pool, Duration::ZERO).await);
    assert!(slot(&pool).await.is_none(), "this worker still has it");
    assert!(pool.sessions.channel(Sessions::lending).is_none());
    assert!(is_slot_free(&pool).await);
    assert!(slot(&pool).await.is_some());
}

#[tokio::test]
async fn old_session_lends_channels_until_another_can_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path(), 9, "max_connections = 2\nmax_age = '0s'").await;
    let older = opened(&pool, Duration::ZERO).await;
    let younger = opened(&pool, Duration::ZERO).await;
    let transfer = pool.channel().await.unwrap();
    assert!(transfer.0.is_same_session(&younger), "the younger one lends");
    assert_eq!((pool.n_young(), pool.free_channels(), pool.is_fading(&transfer)), (0, 6, false));
    assert!(pool.sessions.is_fading(&transfer.0, FADES_AFTER));

    // The slot of the older session is free, so another is tried and cannot be reached. The younger lends no more channels.
    drop(older);
    drop(younger);
    assert!(matches!(pool.channel().await, Err(Closed::Down(_))));
    drop(transfer);
    assert_eq!(n_open(&pool), 1, "its channel is idle");
    pool.maintain();
    assert!(is_slot_free(&pool).await);
    assert_eq!(n_open(&pool), 0);
}

#[tokio::test]
async fn idle_channel_of_an_old_session_is_not_lent_when_there_is_a_younger_session() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path(), 9, "max_connections = 1\nmax_age = '30s'").await;
    let old = opened(&pool, Duration::from_secs(60)).await;
    let idle = pool.channel().await.unwrap();
    assert!(idle.0.is_same_session(&old), "no other session can be opened");
    drop((idle, old));
    let young = pool.sessions.enter(Session::local(), None, Instant::now());
    let lent = pool.channel().await.unwrap();
    assert!(lent.0.is_same_session(&young));
    assert_eq!(n_open(&pool), 1);
    assert!(is_slot_free(&pool).await, "the old session is closed");
}

#[tokio::test]
async fn narrowed_session_lends_as_many_channels_as_the_server_allows() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path(), 9, "max_connections = 1\nchannels = 4").await;
    let session = opened(&pool, Duration::ZERO).await;
    let lent = [pool.channel().await.unwrap(), pool.channel().await.unwrap(), pool.channel().await.unwrap()];
    drop(session);
    assert_eq!(pool.free_channels(), 1);
    pool.narrow();
    assert_eq!(pool.free_channels(), 0);
    drop(lent);
    assert_eq!(pool.free_channels(), 2);
    let _lent = [pool.channel().await.unwrap(), pool.channel().await.unwrap()];
    assert!(matches!(pool.channel().await, Err(Closed::Busy)), "a third channel");
    assert_eq!((n_open(&pool), pool.free_channels()), (1, 0));
}

#[tokio::test]
async fn closing_the_pool_releases_the_slots_of_sessions_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path(), 9, "max_connections = 1").await;
    let session = opened(&pool, Duration::ZERO).await;
    let lent = pool.channel().await.unwrap();
    pool.close().await;
    assert!(is_slot_free(&pool).await);
    assert!(matches!(pool.channel().await, Err(Closed::Busy)));
    drop((lent, session));
    assert!(is_slot_free(&pool).await);
}
