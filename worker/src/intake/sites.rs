//! Processes that wait for a site, claimed when the site is available. A loop for each site runs once a second and after
//! every change.

use std::sync::Arc;
use std::time::Duration;

use baton_common::store::submit::ByQueue;
use tokio::task::JoinSet;
use tracing::debug;

use crate::intake::claims::Claims;
use crate::site::watch::Watch;
use crate::site::{Site, launcher};

/// Pause between two rounds.
const ROUND: Duration = Duration::from_secs(1);

/// The shortest pause between two rounds: each costs a few statements.
const PAUSE: Duration = Duration::from_millis(50);

/// Processes that are claimed in one round: their claims share a commit or two.
const TAKEN_MAX: usize = 64;

/// Runs until it is dropped.
pub(crate) async fn run(claims: Arc<Claims>, site: Arc<Site>) {
    let word = launcher::word(site.config.launcher);
    let mut is_announced = false;
    let mut watch = Watch::default();
    loop {
        if !is_announced {
            let slots = site.pool.slots();
            is_announced = site.store.announce_site(&site.name, word, &site.config.root, slots).await.is_ok();
        }
        if is_announced {
            look(&claims, &site, &mut watch).await;
        }
        site.pool.maintain();
        tokio::time::sleep(PAUSE).await;
        let _ = tokio::time::timeout(ROUND, site.changed.notified()).await;
    }
}

async fn look(claims: &Arc<Claims>, site: &Site, watch: &mut Watch) {
    let work = match site.store.site_work(&site.name).await {
        Ok(work) => work,
        Err(error) => {
            debug!(site = site.name, %error, "could not look for work");
            return;
        }
    };
    if work.is_down {
        watch.give_up(site).await;
        return;
    }
    watch.look(site, work.has_jobs).await;
    if !claims.execution.gate.takes_tasks() {
        return;
    }
    // If processes wait and this worker has no usable session, it tries to open one; otherwise other workers take them.
    // The worker with the watch makes room for jobs, but without jobs there is no watch.
    let needs_session = work.waits_for_slot || (work.waits_for_room && !work.has_jobs);
    if needs_session && site.pool.n_young() == 0 {
        drop(site.pool.channel().await);
    }
    let free = site.pool.free_channels().min(claims.slots.available_permits()).min(TAKEN_MAX);
    if work.waits_for_slot {
        take_up(claims, site, &site.slot(), free).await;
    }
    if work.waits_for_room && free > 0 {
        let room = site.store.room(&site.name, site.config.limits).await.unwrap_or(0);
        take_up(claims, site, &site.room(), free.min(usize::try_from(room).unwrap_or(usize::MAX))).await;
    }
}

/// Wakes and claims the processes that have waited longest, without messages, on the worker that can serve them.
async fn take_up(claims: &Arc<Claims>, site: &Site, waits_for: &str, most: usize) {
    let most = u32::try_from(most).unwrap_or(u32::MAX);
    let woken = match site.store.wake_waiting(waits_for, &claims.queues, most).await {
        Ok(woken) => woken,
        Err(error) => {
            debug!(site = site.name, %error, "could not wake the waiting processes");
            return;
        }
    };
    let mut taking = JoinSet::new();
    let mut left = ByQueue::new();
    for (queue, rows) in woken {
        for told in rows {
            let permit = Arc::clone(&claims.slots).try_acquire_owned().ok();
            let guard = permit.and_then(|permit| Some((permit, claims.execution.leases.begin_claim(told.pid)?)));
            match guard {
                Some((permit, guard)) => {
                    taking.spawn(Arc::clone(claims).take(told.pid, queue.clone(), permit, guard));
                }
                None => left.entry(queue.clone()).or_default().push(told),
            }
        }
    }
    site.outbox.announce_all(left).await;
    taking.join_all().await;
}
