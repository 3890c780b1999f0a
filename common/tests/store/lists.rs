//! Lists are read page by page, and every row is in exactly one page.

use std::time::Duration;

use baton_common::id::{Pid, RequestId};
use baton_common::select::Select;
use baton_common::state::Desired;
use baton_common::store::query::{Cursor, Filter, Listing};
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::Verb;

use crate::{Scene, new_process};

on_both! {
    every_row_is_in_exactly_one_page_with_each_filter
    rare_matches_of_two_common_conditions_are_found
    page_begins_after_a_deleted_process
    explicit_processes_are_paged_and_narrowed
    labels_belong_to_the_spec_that_was_accepted
    counts_are_by_state_and_by_queue
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn labels(labels: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Forty processes of many kinds and states, in the order of their acceptance, which is not that of their ids.
async fn forty(scene: &Scene) -> Vec<Pid> {
    let mut ids: Vec<Pid> = (0..40).map(|_| Pid::generate()).collect();
    ids.rotate_left(7);
    for (n, pid) in ids.iter().enumerate() {
        let (queue, kind) = (["default", "gpu"][n % 2], ["baton.noop", "baton.sleep"][usize::from(n % 3 == 0)]);
        let hold = n % 8 == 5;
        let session = if n % 4 < 2 { ", session: night" } else { "" };
        let with = if kind == "baton.sleep" { ", with: {for: 1s}" } else { "" };
        let spec = format!(
            "{{call: {kind}, queue: {queue}, hold: {hold}{session}{with}, labels: {{all: 'yes', five: '{}', \"o'dd\": \"a\\\"b\"}}}}",
            n / 5
        );
        // No two are accepted at the same time: SQLite's clock counts milliseconds.
        let now = scene.store.now().await.unwrap();
        while scene.store.now().await.unwrap() <= now {}
        scene.store.submit(&[NewProcess { pid: *pid, ..new_process(&spec) }]).await.unwrap();
        if n % 8 == 0 {
            let fence = scene.claimed(*pid).await.fence;
            if n % 16 == 0 {
                scene.write(fence, Verb::Park { wake_in: Duration::from_secs(3600) }).await.unwrap();
            }
        }
        if n % 8 == 3 {
            scene.recorded(*pid, Desired::Kill).await;
        }
    }
    ids
}

async fn every_row_is_in_exactly_one_page_with_each_filter(scene: Scene) {
    let accepted = forty(&scene).await;
    let mut by_id = accepted.clone();
    by_id.sort();
    by_id.reverse();
    let is = |of: &dyn Fn(usize) -> bool| -> Vec<Pid> {
        let n_of = |pid: &Pid| accepted.iter().position(|other| other == pid).unwrap();
        by_id.iter().copied().filter(|pid| of(n_of(pid))).collect()
    };
    let paused = |n: usize| n % 8 == 5;
    let killed = |n: usize| n % 8 == 3;
    let waiting = |n: usize| n.is_multiple_of(16);
    let running = |n: usize| n % 16 == 8;
    let created = |n: usize| !paused(n) && !killed(n) && !waiting(n) && !running(n);
    let all = Select::default();
    let cases = [
        (all.clone(), is(&|_| true)),
        (Select { states: Some(words(&["created"])), ..all.clone() }, is(&created)),
        (Select { states: Some(words(&["paused", "killed"])), ..all.clone() }, is(&|n| paused(n) || killed(n))),
        (
            Select { states: Some(words(&["waiting", "created", "running", "waiting"])), ..all.clone() },
            is(&|n| waiting(n) || created(n) || running(n)),
        ),
        (Select { states: Some(words(&["finished", "excepted"])), ..all.clone() }, vec![]),
        (Select { pids: Some(vec![]), ..all.clone() }, vec![]),
        (Select { labels: Some(labels(&[])), ..all.clone() }, vec![]),
        (Select { states: Some(vec![]), ..all.clone() }, vec![]),
        (Select { session: Some(String::new()), states: Some(words(&["created"])), ..all.clone() }, vec![]),
        (Select { session: Some("night".into()), ..all.clone() }, is(&|n| n % 4 < 2)),
        (Select { session: Some("nix".into()), ..all.clone() }, vec![]),
        (Select { queue: Some("gpu".into()), ..all.clone() }, is(&|n| n % 2 == 1)),
        (Select { kind: Some("baton.sleep".into()), ..all.clone() }, is(&|n| n % 3 == 0)),
        (Select { worker: Some("w1".into()), ..all.clone() }, is(&running)),
        (Select { worker: Some("nix".into()), ..all.clone() }, vec![]),
        (Select { labels: Some(labels(&[("all", "yes")])), ..all.clone() }, is(&|_| true)),
        (Select { labels: Some(labels(&[("o'dd", "a\"b")])), ..all.clone() }, is(&|_| true)),
        (Select { labels: Some(labels(&[("all", "no")])), ..all.clone() }, vec![]),
        (Select { labels: Some(labels(&[("all", "yes"), ("five", "3")])), ..all.clone() }, is(&|n| n / 5 == 3)),
        (
            Select {
                states: Some(words(&["created", "paused"])),
                kind: Some("baton.noop".into()),
                labels: Some(labels(&[("five", "3")])),
                ..all.clone()
            },
            is(&|n| n / 5 == 3 && n % 3 != 0 && (created(n) || paused(n))),
        ),
        (Select { session: Some("night".into()), queue: Some("gpu".into()), ..all.clone() }, is(&|n| n % 4 == 1)),
        (
            Select { kind: Some("baton.sleep".into()), states: Some(words(&["killed"])), ..all.clone() },
            is(&|n| n % 3 == 0 && killed(n)),
        ),
        (Select { session: Some("night".into()), states: Some(words(&["finished"])), ..all.clone() }, vec![]),
        (
            Select {
                states: Some(words(&["created", "running", "waiting", "paused", "killed"])),
                session: Some("night".into()),
                queue: Some("default".into()),
                kind: Some("baton.noop".into()),
                labels: Some(labels(&[("all", "yes"), ("o'dd", "a\"b")])),
                ..all.clone()
            },
            is(&|n| n % 4 == 0 && n % 3 != 0),
        ),
        (
            Select { worker: Some("w1".into()), kind: Some("baton.noop".into()), ..all.clone() },
            is(&|n| running(n) && n % 3 != 0),
        ),
        (Select { older_than: Some(Duration::from_secs(3600)), ..all.clone() }, vec![]),
        (Select { older_than: Some(Duration::ZERO), ..all.clone() }, accepted.iter().rev().copied().collect()),
        (
            Select { older_than: Some(Duration::ZERO), states: Some(words(&["created", "killed"])), ..all.clone() },
            (0..40).rev().filter(|n| created(*n) || killed(*n)).map(|n| accepted[n]).collect(),
        ),
    ];
    for (select, expected) in cases {
        for limit in [1, 7, 20, 100] {
            // With one listing for all pages, and with a new query for each page.
            let mut listing = Listing::new(&select, None);
            let (mut read, mut paged) = (Vec::new(), Vec::new());
            loop {
                let page = listing.next(&scene.store, limit).await.unwrap();
                assert!(page.len() <= limit as usize);
                if page.is_empty() {
                    break;
                }
                read.extend(page.iter().map(|row| row.pid));
            }
            let mut after = None;
            loop {
                let filter = Filter { select: select.clone(), after, limit };
                let page = scene.store.list(&filter).await.unwrap();
                let Some(last) = page.last() else { break };
                after = Some(scene.store.cursor(last.pid).await.unwrap().unwrap());
                paged.extend(page.iter().map(|row| row.pid));
            }
            assert_eq!(read, expected, "{select:?} by {limit}");
            assert_eq!(paged, expected, "{select:?} by {limit}");
        }
        let asked = scene.store.count_selected(&select, Desired::Pause).await.unwrap();
        let n = expected.iter().filter(|pid| !is(&|n| killed(n) || paused(n)).contains(pid)).count();
        assert_eq!(asked.values().sum::<u64>(), n as u64, "{select:?}");
    }
}

/// Each process has one of two labels; a few of the oldest and of the newest have both.
async fn rare_matches_of_two_common_conditions_are_found(scene: Scene) {
    let labels_of = |n: usize| match n {
        0..3 | 1_500 | 2_995.. => "{a: 'yes', b: 'yes'}",
        _ if n.is_multiple_of(2) => "{a: 'yes'}",
        _ => "{b: 'yes'}",
    };
    let processes: Vec<NewProcess> =
        (0..3_000).map(|n| new_process(&format!("{{call: baton.noop, labels: {}}}", labels_of(n)))).collect();
    for page in processes.chunks(1_000) {
        scene.store.submit(page).await.unwrap();
    }
    let both = Select { labels: Some(labels(&[("a", "yes"), ("b", "yes")])), ..Select::default() };
    let expected: Vec<Pid> = [0, 1, 2, 1_500, 2_995, 2_996, 2_997, 2_998, 2_999].map(|n| processes[n].pid).into();
    for limit in [1, 3, 8, 20] {
        let mut listing = Listing::new(&both, None);
        let mut listed = Vec::new();
        loop {
            let page = listing.next(&scene.store, limit).await.unwrap();
            if page.is_empty() {
                break;
            }
            listed.extend(page.iter().map(|row| row.pid));
        }
        listed.reverse();
        assert_eq!(listed, expected, "by {limit}");
    }
    let killed = scene.ask_many(RequestId::generate(), &both, Desired::Kill).await.unwrap();
    assert_eq!(killed, expected);
}

async fn page_begins_after_a_deleted_process(scene: Scene) {
    let mut pids = Vec::new();
    for _ in 0..5 {
        pids.push(scene.submit("call: baton.noop").await);
    }
    scene.recorded(pids[2], Desired::Kill).await;
    assert_eq!(scene.store.erase(&[pids[2]]).await.unwrap(), 1);
    assert_eq!(scene.store.cursor(pids[2]).await.unwrap(), None);
    let after = Some(Cursor { pid: pids[2], created_at: 0 });
    let page = scene.store.list(&Filter { select: Select::default(), after, limit: 9 }).await.unwrap();
    assert_eq!(page.iter().map(|row| row.pid).collect::<Vec<_>>(), [pids[1], pids[0]]);
}

async fn explicit_processes_are_paged_and_narrowed(scene: Scene) {
    let processes: Vec<NewProcess> = (0..1_500).map(|_| new_process("call: baton.noop")).collect();
    for page in processes.chunks(1_000) {
        scene.store.submit(page).await.unwrap();
    }
    let mut pids: Vec<Pid> = processes.iter().map(|process| process.pid).collect();
    let last = *pids.last().unwrap();
    scene.recorded(pids[0], Desired::Pause).await;
    // Some twice, one that does not exist, in any order.
    let asked: Vec<Pid> = pids.iter().chain(&pids[100..200]).copied().chain([Pid::generate()]).rev().collect();
    pids.reverse();
    let list = async |states: &[&str], after: Option<Pid>, limit| {
        let select = Select {
            pids: Some(asked.clone()),
            states: (!states.is_empty()).then(|| words(states)),
            ..Select::default()
        };
        let after = after.map(|pid| Cursor { pid, created_at: 0 });
        let rows = scene.store.list(&Filter { select, after, limit }).await.unwrap();
        rows.into_iter().map(|row| row.pid).collect::<Vec<_>>()
    };
    assert_eq!(list(&[], None, 5_000).await, pids);
    assert_eq!(list(&[], Some(last), 10).await, pids[1..11]);
    assert_eq!(list(&[], pids.last().copied(), 10).await, []);
    // The only match is in the last chunk of ids.
    assert_eq!(list(&["paused"], None, 10).await, pids[1_499..]);
    let select = Select { pids: Some(asked.clone()), ..Select::default() };
    let counts = scene.store.count_selected(&select, Desired::Pause).await.unwrap();
    assert_eq!(counts, [("queued".to_owned(), 1_499)].into());
    let killed = scene.ask_many(RequestId::generate(), &select, Desired::Kill).await.unwrap();
    assert_eq!(killed.len(), 1_500);
}

async fn labels_belong_to_the_spec_that_was_accepted(scene: Scene) {
    let first = new_process("{call: baton.noop, labels: {a: first}}");
    let second = NewProcess { pid: first.pid, ..new_process("{call: baton.noop, labels: {a: second}}") };
    scene.store.submit(std::slice::from_ref(&first)).await.unwrap();
    scene.store.submit(&[second]).await.unwrap();
    for (value, count) in [("first", 1), ("second", 0)] {
        let select = Select { labels: Some(labels(&[("a", value)])), ..Select::default() };
        let rows = scene.store.list(&Filter { select, after: None, limit: 9 }).await.unwrap();
        assert_eq!(rows.len(), count, "{value}");
    }
}

async fn counts_are_by_state_and_by_queue(scene: Scene) {
    assert!(scene.store.count_by_state().await.unwrap().is_empty());
    assert!(scene.store.backlogs().await.unwrap().is_empty());
    forty(&scene).await;
    let counts = scene.store.count_by_state().await.unwrap();
    let expected = [("created", 25), ("killed", 5), ("paused", 5), ("running", 2), ("waiting", 3)];
    assert_eq!(counts, expected.map(|(word, n)| (word.to_owned(), n)).into());
    let backlogs = scene.store.backlogs().await.unwrap();
    let counts: Vec<(&str, i64)> = backlogs.iter().map(|backlog| (backlog.queue.as_str(), backlog.count)).collect();
    assert_eq!(counts, [("default", 15), ("gpu", 10)]);
    let mut queues = scene.store.queues_in_use().await.unwrap();
    queues.sort();
    assert_eq!(queues, ["default", "gpu"]);
}
