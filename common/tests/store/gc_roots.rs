//! The garbage collection roots of rows.

use std::collections::BTreeSet;

use baton_common::digest::Digest;
use baton_common::state::State;
use baton_common::store::Error;
use baton_common::store::blob::Outcome;
use baton_common::store::writer::Verb;

use crate::{Scene, new_process};

on_both! {
    every_page_lists_sent_inputs_and_results
    roots_of_an_unreadable_row_are_an_error
}

async fn needed(scene: &Scene) -> Result<(BTreeSet<Digest>, BTreeSet<Digest>), Error> {
    let (mut manifests, mut objects) = (BTreeSet::new(), BTreeSet::new());
    let mut walking = scene.store.needed();
    while let Some(page) = walking.next().await? {
        manifests.extend(page.manifests);
        objects.extend(page.objects);
    }
    Ok((manifests, objects))
}

async fn every_page_lists_sent_inputs_and_results(scene: Scene) {
    assert_eq!(needed(&scene).await.unwrap(), (BTreeSet::new(), BTreeSet::new()));
    scene.submit("run: [x]").await;
    scene.submit("call: baton.noop").await;
    let digest = |n: u32| Digest::of(&n.to_be_bytes());
    let archive = digest(0);
    let processes: Vec<_> = (1..=450)
        .map(|n| {
            let inputs = format!("in: [{{from: 'store://{archive}', to: x, how: unpack}}, resource://r]");
            let mut process = new_process(&format!("run: [x]\nat: a\n{inputs}"));
            process.spec.on_site.as_mut().unwrap().staged = Some(digest(n));
            process
        })
        .collect();
    scene.store.submit(&processes).await.unwrap();
    let fence = scene.claimed(processes[7].pid).await.fence;
    let outcome = Outcome { exit: Some(0), results: Some(digest(1_000)), ..Outcome::default() };
    scene.write(fence, Verb::End { state: State::Finished, outcome }).await.unwrap();

    let mut manifests: BTreeSet<Digest> = (1..=450).map(digest).collect();
    manifests.insert(digest(1_000));
    assert_eq!(needed(&scene).await.unwrap(), (manifests, BTreeSet::from([archive])));
}

async fn roots_of_an_unreadable_row_are_an_error(scene: Scene) {
    scene.submit("run: [x]\nat: a").await;
    let bytes = if scene.store.is_embedded() { "x'ff80'" } else { "'\\xff80'::bytea" };
    scene.sql(&format!("UPDATE spec SET body = {bytes} RETURNING id")).await;
    assert!(matches!(needed(&scene).await, Err(Error::Newer { found: 255, .. })));
}
