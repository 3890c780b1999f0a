//! The cost of a process, in counts. `baton bench` measures times; no test asserts them.

use baton_tests::scene::Scene;
use baton_tests::services::programs;
use serde_json::Value;

/// Private services, since the counters of a server include all its clients.
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

/// A benchmark leaves nothing.
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
    // Includes the heartbeats of a second or two.
    let commits = number(&report, "/per_process/commits");
    assert!((3.0..3.5).contains(&commits), "{report}");
    assert!(number(&report, "/per_process/ack_frames") <= 1.0, "{report}");
    // The warm-up processes are submitted together, and share some statements. Only the hot path has statements over
    // the rows of a batch.
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
    // A single process takes three commits. How many processes share one depends on the speed of announcing relative to
    // that of claiming, since at most one page waits to be announced.
    for (path, max) in [("commits", 0.75), ("ack_frames", 0.3), ("event_messages", 0.3), ("rows", 5.3)] {
        assert!(number(&report, &format!("/per_process/{path}")) <= max, "{path} in {report}");
    }
    is_clean(&scene).await;
    let report = bench(&scene, &["advances", "-n", "200", "--steps", "10", "--workers", "1", "--no-limits"]).await;
    // Eleven rows stay; one is inserted and deleted.
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
