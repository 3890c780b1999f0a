//! Batches of the writer.

use baton_common::state::{Place, State};
use baton_common::store::Error;
use baton_common::store::blob::Checkpoint;
use baton_common::store::writer::{Attempt, Claim, Fenced, How};

use crate::{Scene, end};

on_both! {
    two_writers_with_overlapping_rows_do_not_deadlock
    refused_write_does_not_affect_its_batch
}

async fn two_writers_with_overlapping_rows_do_not_deadlock(scene: Scene) {
    let mut pids = Vec::new();
    for _ in 0..40 {
        pids.push(scene.submit("call: baton.noop").await);
    }
    let other = Scene::writer(&scene.store, scene.me).await;
    let forward = futures_util::future::join_all(pids.iter().map(|pid| scene.claim(*pid)));
    let backward = futures_util::future::join_all(
        pids.iter().rev().map(|pid| async { other.claim(*pid, "default".into(), None).await.unwrap() }),
    );
    let (forward, backward) = tokio::join!(forward, backward);
    let claimed = forward.iter().chain(&backward).filter(|claim| matches!(claim, Claim::Claimed(_))).count();
    assert_eq!(claimed, 40);
}

async fn refused_write_does_not_affect_its_batch(scene: Scene) {
    let refusal = if scene.store.is_embedded() {
        "CREATE TRIGGER refusal BEFORE INSERT ON attempt WHEN NEW.reason = 'refuse' BEGIN SELECT RAISE(ABORT, 'no'); END"
    } else {
        "ALTER TABLE attempt ADD CONSTRAINT refusal CHECK (reason <> 'refuse')"
    };
    scene.sql(refusal).await;
    let mut fences = Vec::new();
    for _ in 0..3 {
        let pid = scene.submit("call: baton.noop").await;
        fences.push(scene.claimed(pid).await.fence);
    }
    let queued = scene.submit("call: baton.noop").await;
    let ending = |fence, reason: &str| Fenced {
        fence,
        verb: end(State::Finished),
        checkpoint: None,
        try_number: 1,
        ended: Some(Attempt { started_at: 1, how: How::Ok, reason: Some(reason.into()) }),
        outputs: vec![],
    };
    let checkpoint = Checkpoint { advances: 1, ..Checkpoint::default() };
    // The writer is idle, so all of these go to one lane.
    let (claim, refused, ended, kept) = tokio::join!(
        scene.writer.claim(queued, "default".into(), None),
        scene.writer.write(ending(fences[0], "refuse")),
        scene.writer.write(ending(fences[1], "done")),
        scene.writer.checkpoint(fences[2], &checkpoint),
    );
    assert!(matches!(refused, Err(Error::Database(_))), "{refused:?}");
    assert!(matches!(claim.unwrap(), Claim::Claimed(claimed) if claimed.fence.pid == queued));
    assert_eq!(ended.unwrap().unwrap().place, Place::Ended);
    assert_eq!(kept.unwrap().unwrap().place, Place::Held);
    assert_eq!(scene.state(fences[0].pid).await.0, Place::Held);
}
