//! What a process costs, in counts. Times are measured by `baton bench` and asserted nowhere.

use baton_tests::scene::Scene;
use baton_tests::services::programs;
use serde_json::Value;

/// Services of its own, since counters of a server are of everybody on it.
async fn scene() -> Scene {
    let scene = Scene::private().await;
    scene.sql("CREATE EXTENSION pg_stat_statements SCHEMA public").await;
    scene
}

async fn bench(scene: &Scene, arguments: &[&str]) -> Value {
    let program = programs().join("baton-worker");
    let mut all = vec!["bench"];
    all.extend(arguments);
    if !arguments.contains(&"limits") {
        all.extend(["--worker-program", program.to_str().unwrap()]);
    }
    all.extend(["-o", "json"]);
    scene.baton(&all).await.ok().json()
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {report}"))
}

/// A benchmark leaves nothing behind.
async fn is_clean(scene: &Scene) {
    for table in ["process", "spec", "label", "attempt", "output"] {
        assert_eq!(scene.sql(&format!("SELECT count(*) FROM {table}")).await.trim(), "0", "{table}");
    }
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'baton_bench%'";
    assert_eq!(scene.sql(schemas).await.trim(), "0");
    let queues: Vec<String> = scene.queues().await.iter().map(|queue| queue["name"].to_string()).collect();
    assert!(!queues.iter().any(|name| name.contains("bench")), "{queues:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn one_process_after_the_other_costs_three_commits_of_a_statement_each_and_one_confirm() {
    const COUNT: u32 = 100;
    let scene = scene().await;
    scene.sql("SELECT public.pg_stat_statements_reset()").await;
    let report = bench(&scene, &["latency", "-n", &COUNT.to_string(), "--workers", "1", "--no-limits"]).await;
    assert_eq!(number(&report, "/per_process/confirms"), 1.0, "{report}");
    // The beats of a second or two are in it.
    let commits = number(&report, "/per_process/commits");
    assert!((3.0..3.5).contains(&commits), "{report}");
    assert!(number(&report, "/per_process/ack_frames") <= 1.0, "{report}");
    // Those that warm up come at once, and share some. Statements over the rows of a batch are the hot path, and there is no
    // other of it.
    let calls = "SELECT sum(calls) FROM public.pg_stat_statements
                 WHERE query LIKE '%unnest%' AND (query LIKE '%INSERT INTO process%' OR query LIKE '%UPDATE process%')";
    let n_calls: u32 = scene.sql(calls).await.trim().parse().unwrap();
    assert!((3 * COUNT + 3..=3 * COUNT + 60).contains(&n_calls), "{n_calls}");
    is_clean(&scene).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn many_at_once_share_commits_and_acknowledgements() {
    let scene = scene().await;
    let report = bench(&scene, &["throughput", "-n", "3000", "--workers", "1", "--no-limits"]).await;
    assert_eq!(number(&report, "/per_process/confirms"), 1.0, "{report}");
    assert!(number(&report, "/per_process/message_bytes") < 80.0, "{report}");
    // Alone it would be three commits. How many share one depends on how fast they are told beside how fast they are taken,
    // since no more than a page waits to be told.
    for (path, max) in [("commits", 0.75), ("ack_frames", 0.3), ("event_messages", 0.3), ("rows", 5.3)] {
        assert!(number(&report, &format!("/per_process/{path}")) <= max, "{path} in {report}");
    }
    is_clean(&scene).await;
    let report = bench(&scene, &["advances", "-n", "200", "--steps", "10", "--workers", "1", "--no-limits"]).await;
    // Eleven that stay, and one that comes and one that goes.
    assert!(number(&report, "/per_process/rows") <= 20.0, "{report}");
    assert!(number(&report, "/per_process/commits") <= 6.0, "{report}");
    is_clean(&scene).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn every_other_benchmark_comes_to_its_end_and_cleans_up() {
    let scene = scene().await;
    let report = bench(&scene, &["limits", "--combined", "-n", "1000", "--each", "500ms"]).await;
    for field in ["messages_per_s", "rows_per_s", "combined_per_s", "commit_ms", "confirm_ms", "accept_ms", "end_ms"] {
        assert!(number(&report, &format!("/limits/{field}")) > 0.0, "{report}");
    }
    is_clean(&scene).await;
    let report = bench(&scene, &["control", "-n", "50", "--requests", "10"]).await;
    assert_eq!(number(&report, "/times_ms/rpc_pause/count"), 10.0, "{report}");
    assert!(number(&report, "/times_ms/broadcast_play/max") > 0.0, "{report}");
    is_clean(&scene).await;
    let report = bench(&scene, &["recover", "-n", "20"]).await;
    assert!(number(&report, "/times_ms/killed_to_held/max") > 0.0, "{report}");
    is_clean(&scene).await;
    let failed = scene.baton(&["bench", "throughput", "-n", "10", "--no-limits"]).await;
    assert!(failed.stderr.contains("--workers 1"), "{failed:?}");
}
