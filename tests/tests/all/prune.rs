//! Lists of many processes, page by page, and pruning of processes that ended long ago.

use std::collections::HashSet;
use std::time::Duration;

use baton_common::id::Pid;
use baton_tests::eventually;
use baton_tests::scene::Scene;
use serde_json::{Value, json};

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_list_goes_on_where_its_hint_says_and_prints_everything_if_asked() {
    let scene = Scene::new().await;
    let submitted = scene.submit("{call: baton.noop, hold: true, labels: {note: it's night}}", 2_100).await;
    let newest: Vec<&str> = submitted.iter().rev().map(String::as_str).collect();
    let ids = scene.baton(&["list", "-n", "0", "-o", "ids"]).await.ok();
    assert_eq!((ids.stdout.lines().collect::<Vec<_>>(), ids.stderr.as_str()), (newest.clone(), ""));
    let all = scene.baton(&["list", "-n", "0", "-o", "json"]).await.ok().json();
    let pids: Vec<&str> = all.as_array().unwrap().iter().map(|row| row["pid"].as_str().unwrap()).collect();
    assert_eq!(pids, newest);
    let table = scene.baton(&["list", "-n", "0"]).await.ok();
    let shown: Vec<&str> = table.stdout.lines().filter(|line| line.contains("baton.noop")).collect();
    assert_eq!(shown.len(), 2_100);
    let columns: HashSet<Option<usize>> = shown.iter().map(|line| line.find("baton.noop")).collect();
    assert_eq!(columns.len(), 1, "pages have the same columns");
    assert!(table.stdout.contains("2100 in total: 2100 paused"), "{}", table.stdout);
    assert_eq!(table.stderr, "");

    let first = scene.baton(&["list", "--label", "note=it's night", "-n", "10"]).await.ok();
    let hint = first.stderr.trim().strip_prefix("next page: ").expect("a hint").to_owned();
    assert_eq!(hint, format!(r"baton list --label 'note=it'\''s night' -n 10 --after {}", newest[9]));
    let second = scene.baton(&["list", "--label", "note=it's night", "-n", "10", "--after", newest[9]]).await.ok();
    let lines = second.stdout.lines().filter(|line| line.contains("baton.noop"));
    assert!(lines.zip(&newest[10..20]).all(|(line, pid)| line.contains(pid)), "{}", second.stdout);
    let json = scene.baton(&["list", "-n", "10", "-o", "json"]).await.ok();
    assert_eq!((json.json().as_array().unwrap().len(), json.stderr.as_str()), (10, ""));
    assert_eq!(scene.baton(&["list", "--state", "killed", "-o", "json"]).await.ok().json(), json!([]));
    scene.baton(&["list", "--older-than", "1ms", "--after", &Pid::generate().to_string()]).await.exits(3);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_has_ended_is_pruned_and_its_launch_does_not_run_again() {
    let scene = Scene::new().await;
    let _worker = scene.worker("w1", &[]).await;
    let amqp = scene.amqp().await;
    let live = scene.submit("{call: baton.noop, hold: true}", 1).await.remove(0);
    // The exchange exists once a process was submitted and announced.
    let other = scene.submit("call: baton.noop", 1).await.remove(0);
    let launch = |spec: Value| {
        let pid = Pid::generate().to_string();
        let message = json!({"version": 1, "type": "launch", "pid": pid, "spec": spec});
        (pid, message)
    };
    let witness = scene.path("witness");
    let (pid, message) = launch(json!({"call": "baton.count", "with": {"advances": 1, "witness": witness}}));
    let ends = async |pid: &str| {
        eventually("it finishes", Duration::from_secs(20), async || {
            let show = scene.baton(&["show", pid, "-o", "json"]).await;
            if show.code == 0 && show.json()[0]["state"] == "finished" { Ok(()) } else { Err(show) }
        })
        .await;
    };
    ends(&other).await;
    amqp.publish_json("baton.task", "default", &message).await;
    ends(&pid).await;

    let dry = scene.baton(&["prune", "--older-than", "1h", "--dry-run"]).await.ok().stdout;
    assert_eq!(dry, "0 processes would be pruned\n");
    let dry = scene.baton(&["prune", "--older-than", "1ms", "--dry-run", "-o", "json"]).await.ok().json();
    assert_eq!(dry, json!({"dry_run": true, "selected": 2, "by": {"finished": 2}}));
    let refused = scene.baton(&["prune", "--older-than", "1ms"]).await.exits(4);
    assert!(refused.stderr.contains("--yes"), "{refused:?}");
    scene.baton(&["prune", "--yes"]).await.exits(2);
    scene.baton(&["prune", "--older-than", "1ms", "--state", "paused", "--yes"]).await.exits(2);
    let killed = scene.baton(&["prune", "--older-than", "1ms", "--state", "killed", "--yes"]).await.ok().stdout;
    assert_eq!(killed, "0 processes pruned\n");
    scene.baton(&["show", &pid]).await.ok();
    assert_eq!(scene.baton(&["prune", "--older-than", "1ms", "--yes", "-o", "json"]).await.ok().json()["pruned"], 2);
    scene.baton(&["show", &pid]).await.exits(3);
    scene.baton(&["show", &live]).await.ok();

    amqp.publish_json("baton.task", "default", &message).await;
    let dead = async || scene.baton(&["dead", "list", "-o", "json"]).await.ok().json();
    let letter = eventually("it is dead", Duration::from_secs(20), async || {
        let letters = dead().await;
        if letters.as_array().unwrap().len() == 1 { Ok(letters[0].clone()) } else { Err(letters) }
    })
    .await;
    assert_eq!(letter["pid"], pid.as_str());
    assert!(
        letter["reason"].as_str().unwrap().contains("launched longer ago than ended processes are kept"),
        "{letter}"
    );
    scene.baton(&["show", &pid]).await.exits(3);
    assert_eq!(std::fs::read_to_string(&witness).unwrap().lines().count(), 1);

    let (fresh, message) = launch(json!({"call": "baton.noop"}));
    amqp.publish_json("baton.task", "default", &message).await;
    ends(&fresh).await;
}
