//! Pruning deletes processes that ended long ago, and nothing else.

use std::time::Duration;

use baton_common::id::Pid;
use baton_common::select::Select;
use baton_common::state::{Desired, State};
use baton_common::store::query::Filter;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::{Claim, Fenced, Output, Stream, Verb};
use uuid::Uuid;

use crate::{Scene, end, new_process, request};

on_both! {
    only_ended_processes_are_pruned_with_all_their_rows
    interrupted_pruning_is_completed_by_another
    a_selection_narrows_a_pruning
    launch_older_than_the_prune_horizon_is_refused_and_a_newer_one_runs
    erased_process_can_be_launched_again
    attempt_keeps_the_name_of_a_deleted_worker
}

/// An ended process with a row in every table.
async fn ended(scene: &Scene, yaml: &str, state: State) -> Pid {
    let pid = scene.submit(yaml).await;
    let fence = scene.claimed(pid).await.fence;
    let output = Output { stream: Stream::Stdout, head: b"a".to_vec(), tail: vec![], total_bytes: 1 };
    let fenced =
        Fenced { fence, verb: Verb::Keep, checkpoint: None, try_number: 1, ended: None, outputs: vec![output] };
    scene.writer.write(fenced).await.unwrap().unwrap();
    scene.recorded(pid, Desired::Pause).await;
    scene.write(fence, end(state)).await.unwrap();
    pid
}

async fn prune(scene: &Scene, select: &Select, age: Duration) -> u64 {
    let mut pruning = scene.store.prune(select, age).await.unwrap();
    let mut count = 0;
    while let Some(page) = pruning.next().await.unwrap() {
        count += page;
    }
    count
}

async fn is_there(scene: &Scene, pid: Pid) -> bool {
    let listed = !scene.store.list(&Filter::of(vec![pid])).await.unwrap().is_empty();
    assert_eq!(listed, scene.store.show(pid).await.unwrap().is_some());
    assert_eq!(listed, scene.store.cursor(pid).await.unwrap().is_some());
    listed
}

async fn only_ended_processes_are_pruned_with_all_their_rows(scene: Scene) {
    let spec = "{call: baton.noop, labels: {campaign: si, batch: '7'}}";
    let old = ended(&scene, spec, State::Finished).await;
    let queued = scene.submit(spec).await;
    let held = scene.submit(spec).await;
    scene.claimed(held).await;
    let paused = scene.submit(spec).await;
    scene.recorded(paused, Desired::Pause).await;
    let live = [queued, held, paused];

    assert_eq!(prune(&scene, &Select::default(), Duration::from_secs(3600)).await, 0, "it ended just now");
    assert!(is_there(&scene, old).await);
    let counts = scene.store.count_prunable(&Select::default(), Duration::ZERO).await.unwrap();
    assert_eq!(counts, [("finished".to_owned(), 1)].into());
    let unended = Select { states: Some(vec!["created".into(), "paused".into()]), ..Select::default() };
    assert_eq!(prune(&scene, &unended, Duration::ZERO).await, 0);
    assert_eq!(prune(&scene, &Select::default(), Duration::ZERO).await, 1);
    assert!(!is_there(&scene, old).await);
    for pid in live {
        assert!(is_there(&scene, pid).await);
    }
    assert_eq!(scene.rows_of(old).await, 0);
    assert_eq!(scene.rows_of(queued).await, 4, "process, spec and two labels");
    let si = Select { labels: Some([("campaign".to_owned(), "si".to_owned())].into()), ..Select::default() };
    let listed = scene.store.list(&Filter { select: si, after: None, limit: 9 }).await.unwrap();
    assert_eq!(listed.len(), 3);
}

async fn interrupted_pruning_is_completed_by_another(scene: Scene) {
    // More than two pages, with live processes in between.
    let processes: Vec<NewProcess> = (0..2_600).map(|_| new_process("{call: baton.noop, labels: {a: b}}")).collect();
    for page in processes.chunks(1_000) {
        scene.store.submit(page).await.unwrap();
    }
    let (live, doomed): (Vec<_>, Vec<_>) =
        processes.iter().map(|process| process.pid).enumerate().partition(|(n, _)| n % 1_000 == 0);
    let select = Select { pids: Some(doomed.iter().map(|(_, pid)| *pid).collect()), ..Select::default() };
    assert_eq!(
        scene.ask_many(baton_common::id::RequestId::generate(), &select, Desired::Kill).await.unwrap().len(),
        2_597
    );
    let mut interrupted = scene.store.prune(&Select::default(), Duration::ZERO).await.unwrap();
    let first = interrupted.next().await.unwrap().unwrap();
    assert!(first > 0 && first < 2_597, "{first}");
    drop(interrupted);
    assert_eq!(prune(&scene, &Select::default(), Duration::ZERO).await, 2_597 - first);
    assert_eq!(prune(&scene, &Select::default(), Duration::ZERO).await, 0);
    let listed = scene.store.list(&Filter { select: Select::default(), after: None, limit: 5_000 }).await.unwrap();
    let mut left: Vec<Pid> = listed.iter().map(|row| row.pid).collect();
    left.reverse();
    assert_eq!(left, live.into_iter().map(|(_, pid)| pid).collect::<Vec<_>>());
}

async fn a_selection_narrows_a_pruning(scene: Scene) {
    let night = ended(&scene, "{call: baton.noop, session: night}", State::Excepted).await;
    let day = ended(&scene, "{call: baton.noop, session: day}", State::Excepted).await;
    let finished = ended(&scene, "{call: baton.noop, session: night}", State::Finished).await;
    let select = Select { session: Some("night".into()), states: Some(vec!["excepted".into()]), ..Select::default() };
    assert_eq!(scene.store.count_prunable(&select, Duration::ZERO).await.unwrap(), [("excepted".to_owned(), 1)].into());
    assert_eq!(prune(&scene, &select, Duration::ZERO).await, 1);
    let there = [is_there(&scene, night).await, is_there(&scene, day).await, is_there(&scene, finished).await];
    assert_eq!(there, [false, true, true]);
}

async fn launch_older_than_the_prune_horizon_is_refused_and_a_newer_one_runs(scene: Scene) {
    let launch = new_process("{call: baton.noop, labels: {a: b}}");
    let claim = |launch: &NewProcess| scene.writer.claim(launch.pid, "default".into(), Some(launch.clone().into()));
    let Claim::Claimed(claimed) = claim(&launch).await.unwrap() else { panic!("not claimed") };
    scene.write(claimed.fence, end(State::Finished)).await.unwrap();
    assert!(matches!(claim(&launch).await.unwrap(), Claim::NotQueued));
    let late = new_process("call: baton.noop");
    while scene.store.now().await.unwrap() <= late.pid.made_at().unwrap() + 2_000 {}
    assert_eq!(prune(&scene, &Select::default(), Duration::ZERO).await, 1);

    assert!(matches!(claim(&launch).await.unwrap(), Claim::Pruned));
    assert_eq!(scene.rows_of(launch.pid).await, 0, "no row is left");
    assert!(matches!(claim(&late).await.unwrap(), Claim::Pruned));
    let fresh = new_process("call: baton.noop");
    // An old and a new launch in one batch.
    let (old, new) = tokio::join!(claim(&launch), claim(&fresh));
    assert!(matches!((old.unwrap(), new.unwrap()), (Claim::Pruned, Claim::Claimed(_))));
    let timeless = NewProcess { pid: Uuid::from_u128(7).into(), ..new_process("call: baton.noop") };
    assert!(matches!(claim(&timeless).await.unwrap(), Claim::Claimed(_)), "an id without a time is accepted");
    // A submission to the database is not checked against the horizon: its messages carry no spec and cannot repeat it.
    scene.store.submit(std::slice::from_ref(&launch)).await.unwrap();
    assert!(matches!(claim(&launch).await.unwrap(), Claim::Claimed(_)));
    // A pruning with a greater age does not lower the horizon.
    assert_eq!(prune(&scene, &Select::default(), Duration::from_secs(3600)).await, 0);
    assert!(matches!(claim(&late).await.unwrap(), Claim::Pruned));
}

async fn erased_process_can_be_launched_again(scene: Scene) {
    let launch = new_process("call: baton.noop");
    let claim = || scene.writer.claim(launch.pid, "default".into(), Some(launch.clone().into()));
    let Claim::Claimed(claimed) = claim().await.unwrap() else { panic!("not claimed") };
    let live = scene.submit("call: baton.noop").await;
    assert_eq!(scene.store.erase(&[launch.pid, live, Pid::generate()]).await.unwrap(), 0);
    scene.write(claimed.fence, end(State::Finished)).await.unwrap();
    assert_eq!(scene.store.erase(&[]).await.unwrap(), 0);
    assert!(is_there(&scene, launch.pid).await, "an empty list erases nothing");
    assert_eq!(scene.store.erase(&[launch.pid, live, launch.pid]).await.unwrap(), 1);
    assert_eq!(scene.rows_of(launch.pid).await, 0);
    assert!(is_there(&scene, live).await);
    assert!(matches!(claim().await.unwrap(), Claim::Claimed(_)));
}

async fn attempt_keeps_the_name_of_a_deleted_worker(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.write(fence, Verb::GiveBack).await.unwrap();
    scene.claimed(pid).await;
    scene.store.declare_gone(scene.me, 0).await.unwrap();
    scene.store.free().await.unwrap();
    let forced = scene.submit("call: baton.noop").await;
    scene.claimed(forced).await;
    let force = baton_common::store::control::Request { force: true, ..request(Desired::Kill) };
    scene.store.control(forced, &force).await.unwrap();
    scene.sql("UPDATE worker SET gone_at = gone_at - 100000000000").await;
    scene.store.forget_gone().await.unwrap();
    assert!(scene.store.workers(&[], true).await.unwrap().is_empty());
    for (pid, hows) in [(pid, vec!["ok", "lost"]), (forced, vec!["killed"])] {
        let attempts = scene.store.show(pid).await.unwrap().unwrap().attempts;
        assert_eq!(attempts.iter().map(|attempt| attempt.how.as_str()).collect::<Vec<_>>(), hows);
        assert!(attempts.iter().all(|attempt| attempt.worker == "w1"), "{attempts:?}");
    }
}
