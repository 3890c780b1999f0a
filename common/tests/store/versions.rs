//! Rows that another build has written, and processes that need another build.

use std::time::Duration;

use baton_common::state::{Desired, Place, State};
use baton_common::store::blob::Checkpoint;
use baton_common::store::query::Refusal;
use baton_common::store::writer::{Fence, Verb};

use crate::{Scene, end};

on_both! {
    refused_process_waits_and_keeps_the_time_of_the_first_refusal
    refused_process_obeys_requests
    rows_of_a_newer_program_are_listed_and_claimed
}

/// A refusal, as by a worker of another build, that is due at the next sweep.
fn refuse(reason: &str) -> Verb {
    Verb::Refuse { wake_in: Duration::ZERO, reason: reason.into() }
}

/// Waits until the process is due, which on SQLite is in the next millisecond, and returns how many processes woke.
async fn woken(scene: &Scene) -> usize {
    loop {
        if let Some(woken) = scene.store.wake_due().await.unwrap().get("default") {
            return woken.len();
        }
    }
}

async fn refused(scene: &Scene, fence: Fence, reason: &str) -> (Place, State) {
    let written = scene.write_with(fence, refuse(reason), None).await.unwrap();
    (written.place, written.state)
}

async fn refused_process_waits_and_keeps_the_time_of_the_first_refusal(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let claimed = scene.claimed(pid).await;
    assert_eq!(claimed.refused_at, None);
    scene.write(claimed.fence, Verb::GiveBack).await.unwrap();
    let before = scene.claimed(pid).await;
    assert_eq!(refused(&scene, before.fence, "first").await, (Place::Parked, State::Waiting));
    let details = scene.store.show(pid).await.unwrap().unwrap();
    let since = details.summary.refusal.as_ref().unwrap().since;
    assert_eq!(details.checkpoint.unwrap().advances, 1, "the checkpoint is kept");
    let mut seen = Vec::new();
    for reason in ["second", "third"] {
        assert_eq!(woken(&scene).await, 1);
        let claimed = scene.claimed(pid).await;
        seen.push(claimed.refused_at);
        refused(&scene, claimed.fence, reason).await;
    }
    assert_eq!(seen, [Some(since), Some(since)]);
    let refusal = scene.store.show(pid).await.unwrap().unwrap().summary.refusal;
    assert_eq!(refusal, Some(Refusal { since, reason: "third".into() }));
    assert_eq!(woken(&scene).await, 1);
    let claimed = scene.claimed(pid).await;
    scene.write(claimed.fence, Verb::Park { wake_in: Duration::from_secs(60) }).await.unwrap();
    assert_eq!(scene.store.show(pid).await.unwrap().unwrap().summary.refusal, None, "a worker has run it");
}

async fn refused_process_obeys_requests(scene: Scene) {
    let [paused, killed] = [scene.submit("call: baton.noop").await, scene.submit("call: baton.noop").await];
    let fence = scene.claimed(paused).await.fence;
    scene.recorded(paused, Desired::Pause).await;
    assert_eq!(refused(&scene, fence, "r").await.0, Place::Parked);
    assert!(matches!(scene.state(paused).await.1, State::Paused(_)));
    let fence = scene.claimed(killed).await.fence;
    scene.recorded(killed, Desired::Kill).await;
    assert_eq!(refused(&scene, fence, "r").await.0, Place::Held, "its holder ends it");
    scene.write_with(fence, end(State::Killed), None).await.unwrap();
    assert_eq!(scene.state(killed).await, (Place::Ended, State::Killed));
}

async fn rows_of_a_newer_program_are_listed_and_claimed(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.write(fence, Verb::GiveBack).await.unwrap();
    // 255 is newer than any version.
    let bytes = if scene.store.is_embedded() { "x'ff80'" } else { "'\\xff80'::bytea" };
    scene.sql(&format!("UPDATE process SET checkpoint = {bytes}, outcome = {bytes} RETURNING id")).await;
    scene.sql(&format!("UPDATE spec SET body = {bytes} RETURNING id")).await;
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert!(details.spec.is_none() && details.checkpoint.is_none());
    assert!(details.unreadable.unwrap().contains("its spec: version 255 is newer"));
    assert!(details.summary.outcome.unwrap().reason.unwrap().contains("version 255 is newer"));
    let claimed = scene.claimed(pid).await;
    for error in [claimed.spec.unwrap_err(), claimed.checkpoint.unwrap().unwrap_err()] {
        assert!(error.to_string().contains("version 255 is newer"), "{error}");
    }
    assert!(Checkpoint::from_bytes(&[1, 0xff]).unwrap_err().to_string().contains("not what version 1 writes"));
}
