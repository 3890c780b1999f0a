//! Dead workers: what becomes of the processes that they held.

use baton_common::id::Incarnation;
use baton_common::state::{Desired, Live, State};
use baton_common::store::blob::Checkpoint;
use baton_common::store::control::Settled;
use baton_common::store::worker::{Beat, Load};
use baton_common::store::writer::{Claim, Writer};

use crate::{Scene, worker};

on_both! {
    five_deaths_without_a_checkpoint_except_the_process
    quarantined_process_is_claimed_alone
    gone_worker_cannot_beat
    freed_process_obeys_the_request_that_its_dead_holder_did_not
}

/// A worker that will die, and its writer.
async fn doomed(scene: &Scene) -> (Incarnation, Writer) {
    let me = Incarnation::generate();
    scene.store.register(me, &worker("doomed")).await.unwrap();
    (me, Scene::writer(&scene.store, me).await)
}

async fn five_deaths_without_a_checkpoint_except_the_process(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    for death in 1..=5 {
        let (me, writer) = doomed(&scene).await;
        assert!(matches!(writer.claim(pid, "default".into(), None).await.unwrap(), Claim::Claimed(_)));
        assert!(scene.store.declare_gone(me, 0).await.unwrap());
        let freed = scene.store.free().await.unwrap();
        assert_eq!(freed.ended.len(), usize::from(death == 5));
    }
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert_eq!(details.summary.state, State::Excepted);
    assert_eq!(details.attempts.len(), 5);
    assert!(details.summary.outcome.unwrap().reason.unwrap().contains("died 5 times"));
}

async fn quarantined_process_is_claimed_alone(scene: Scene) {
    let pids = [scene.submit("call: baton.noop").await, scene.submit("call: baton.noop").await];
    for _ in 0..2 {
        let (me, writer) = doomed(&scene).await;
        for pid in pids {
            assert!(matches!(writer.claim(pid, "default".into(), None).await.unwrap(), Claim::Claimed(_)));
        }
        scene.store.declare_gone(me, 0).await.unwrap();
        scene.store.free().await.unwrap();
    }
    // Either of them may have killed the workers; claimed together, each would be charged with the other's deaths.
    let (first, second) = tokio::join!(scene.claim(pids[0]), scene.claim(pids[1]));
    let (claimed, refused) = if matches!(first, Claim::Claimed(_)) { (first, second) } else { (second, first) };
    assert!(matches!(refused, Claim::Quarantined), "{refused:?}");
    let Claim::Claimed(claimed) = claimed else { panic!("{claimed:?}") };
    assert!(claimed.is_quarantined());
    let other = if claimed.fence.pid == pids[0] { pids[1] } else { pids[0] };
    scene
        .writer
        .checkpoint(claimed.fence, &Checkpoint { advances: 1, ..Checkpoint::default() })
        .await
        .unwrap()
        .unwrap();
    // A checkpoint ends the quarantine.
    assert!(scene.claimed(other).await.is_quarantined());
    assert!(matches!(scene.claim(other).await, Claim::NotQueued), "it is held");
}

async fn gone_worker_cannot_beat(scene: Scene) {
    let alive = Beat::Alive { beat: 1, drain: false, is_fleet_paused: false };
    assert_eq!(scene.store.beat(scene.me, &Load::default()).await.unwrap(), alive);
    let seen = scene.store.peers().await.unwrap();
    assert_eq!((seen.len(), seen[0].beat), (1, 1));
    assert!(!scene.store.declare_gone(scene.me, 0).await.unwrap(), "its beat has moved since");
    assert!(scene.store.declare_gone(scene.me, 1).await.unwrap());
    assert_eq!(scene.store.beat(scene.me, &Load::default()).await.unwrap(), Beat::Gone);
    assert!(scene.store.peers().await.unwrap().is_empty());
}

async fn freed_process_obeys_the_request_that_its_dead_holder_did_not(scene: Scene) {
    for (verb, state) in [(Desired::Pause, State::Paused(Live::Running)), (Desired::Kill, State::Killed)] {
        let (me, writer) = doomed(&scene).await;
        let pid = scene.submit("call: baton.noop").await;
        assert!(matches!(writer.claim(pid, "default".into(), None).await.unwrap(), Claim::Claimed(_)));
        let asked = scene.recorded(pid, verb).await;
        assert!(scene.store.declare_gone(me, 0).await.unwrap());
        assert_eq!(scene.store.free().await.unwrap().count(), 1);
        assert_eq!(scene.state(pid).await.1, state);
        assert_eq!(scene.store.settled(asked.event).await.unwrap(), Some(Settled::Applied));
    }
}
