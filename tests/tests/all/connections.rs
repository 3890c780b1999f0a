//! The database connections that a fleet uses, and its behaviour when none is left.

use std::process::Stdio;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::scene::Scene;
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(60);

/// The database's URL for a role with a connection limit and rights on this schema only.
async fn role(scene: &Scene, n_connections: u32) -> String {
    let schema = scene.sql("SELECT current_schema").await.trim().to_owned();
    let user = format!("few_{schema}");
    scene.sql(&format!("CREATE ROLE {user} LOGIN CONNECTION LIMIT {n_connections}")).await;
    for what in [
        format!("SCHEMA {schema}"),
        format!("ALL TABLES IN SCHEMA {schema}"),
        format!("ALL SEQUENCES IN SCHEMA {schema}"),
    ] {
        scene.sql(&format!("GRANT ALL ON {what} TO {user}")).await;
    }
    scene.database_url().replacen("://baton@", &format!("://{user}@"), 1)
}

/// A program that holds a connection until it is dropped; the server then closes it, since the client is idle.
fn greedy(url: &str) -> Child {
    let mut psql = Command::new("psql");
    psql.arg(url).kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    psql.spawn().unwrap()
}

/// The number of connections with a worker's name.
async fn n_connections(scene: &Scene, worker: &str) -> u32 {
    let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'baton-worker {worker}'");
    scene.sql(&sql).await.trim().parse().unwrap()
}

async fn all_have_finished(scene: &Scene, count: usize) {
    eventually("all have finished", LIMIT, async || {
        let n_finished = scene.count("state = 4").await;
        if n_finished == count as u64 { Ok(()) } else { Err(n_finished) }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_busy_worker_has_four_connections_and_an_idle_one_two() {
    let scene = Scene::new().await;
    // Connections are counted by the worker's name, since other tests use the same server.
    let name = format!("w-{}", scene.sql("SELECT current_schema").await.trim());
    let _worker = scene.worker(&name, &["--slots", "100"]).await;
    let pids = scene.submit("{call: baton.count, with: {advances: 40, every: 20ms}}", 500).await;
    let mut most = 0;
    // Each check starts a program, so there are few checks.
    while scene.count("state = 4").await < pids.len() as u64 {
        most = most.max(n_connections(&scene, &name).await);
    }
    assert!((3..=4).contains(&most), "{most}");
    eventually("it has two connections", LIMIT, async || {
        let count = n_connections(&scene, &name).await;
        if count == 2 { Ok(()) } else { Err(count) }
    })
    .await;
    let doctor = scene.baton(&["doctor", "-o", "json"]).await.json();
    let found = doctor.as_array().unwrap().iter().find(|finding| finding["what"] == "connections").unwrap();
    assert!(found["text"].as_str().unwrap().contains("more workers"), "{found}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_without_a_connection_says_so_and_starts_when_one_is_free() {
    let scene = Scene::new().await;
    let first = scene.worker("w1", &[]).await;
    drop(first);
    // Two for the worker, and one for the command.
    let url = role(&scene, 3).await;
    let taken = [greedy(&url), greedy(&url), greedy(&url)];
    let user = url.split(['/', '@']).nth(2).unwrap();
    eventually("all connections are taken", LIMIT, async || {
        let count = scene.sql(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'")).await;
        if count.trim() == "3" { Ok(()) } else { Err(count) }
    })
    .await;
    let doctor = scene.baton_in(scene.folder(), &[("BATON_DATABASE_URL", &url)], &["doctor"]).await.exits(7);
    assert!(doctor.stdout.contains("max_connections"), "{doctor:?}");
    let mut worker = scene.worker_with(&[("BATON_DATABASE_URL", &url)], "w2", &[]);
    worker.says("no connection left").await;
    worker.says("max_connections").await;
    assert!(!worker.has_ended());
    // A command waits as well, and prints the reason.
    let said = scene.path("said");
    let mut list = scene.command(&["list"]);
    list.env("BATON_DATABASE_URL", &url).stderr(std::fs::File::create(&said).unwrap()).stdout(Stdio::null());
    let mut list = list.kill_on_drop(true).spawn().unwrap();
    eventually("the command prints what it waits for", LIMIT, async || {
        let text = std::fs::read_to_string(&said).unwrap();
        if text.contains("max_connections") && text.contains("waiting") { Ok(()) } else { Err(text) }
    })
    .await;
    drop(taken);
    assert!(list.wait().await.unwrap().success(), "{}", std::fs::read_to_string(&said).unwrap());
    worker.ready().await;
    assert!(worker.terminate().await.success());
}

/// The other workers do not use all their connections now, and would lack them later.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn one_worker_more_than_fits_waits_until_another_leaves() {
    let scene = Scene::private().await;
    // 13, not counting those reserved for superusers.
    scene.sql("ALTER SYSTEM SET max_connections = 16").await;
    tokio::task::block_in_place(|| scene.services().restart_database());
    let first = scene.worker("w1", &[]).await;
    drop(first);
    let worker_of = |name: &str| {
        let url = scene.database_url();
        let separator = if url.contains('?') { '&' } else { '?' };
        format!("{url}{separator}application_name=baton-worker%20{name}")
    };
    let busy = |name: &str| [(); 3].map(|()| greedy(&worker_of(name)));
    let (_others, leaving) = ([busy("busy1"), busy("busy2")], busy("busy3"));
    eventually("all of them are connected", LIMIT, async || {
        let count =
            scene.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'baton-worker busy%'").await;
        if count.trim() == "9" { Ok(()) } else { Err(count) }
    })
    .await;
    let mut worker = scene.worker_with(&[], "w2", &[]);
    worker.says("13 are usable, 3 workers need 12 of them").await;
    worker.says("max_connections").await;
    assert!(!worker.has_ended() && !worker.log().contains("worker ready"), "{}", worker.log());
    drop(leaving);
    worker.ready().await;
    assert!(worker.terminate().await.success());
}

/// The writer's connections also serve everything else if the worker's role has no more.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn too_few_connections_slow_down_and_stop_nobody() {
    let scene = Scene::new().await;
    journal::keep(&scene).await;
    let url = role(&scene, 2).await;
    let worker = scene.worker("w1", &["--database-url", &url, "--slots", "100"]).await;
    let witness = scene.path("witness").display().to_string();
    let spec = format!("{{call: baton.count, with: {{advances: 20, every: 20ms, witness: {witness}}}}}");
    let pids = scene.submit(&spec, 300).await;
    all_have_finished(&scene, pids.len()).await;
    History::read(&scene, vec![]).await.accepting(&pids).check();
    assert!(!worker.log().contains("panicked") && !worker.log().contains("declared gone"), "{}", worker.log());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_waits_for_its_database_obeys_a_signal() {
    let scene = Scene::new().await;
    let nobody = [("BATON_DATABASE_URL", "postgres://baton@127.0.0.1:9/baton")];
    let mut worker = scene.worker_with(&nobody, "w1", &[]);
    worker.says("does not answer").await;
    assert!(worker.terminate().await.success(), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs services: run tests/run"]
async fn a_worker_whose_database_is_gone_stops_and_names_the_cause() {
    let scene = Scene::private().await;
    let mut worker = scene.worker("w1", &["--grace", "2s"]).await;
    scene.submit("{run: [sleep, '600']}", 2).await;
    scene.submit("{call: baton.count, with: {advances: 100000, every: 50ms}}", 5).await;
    eventually("all processes are held", LIMIT, async || {
        let n_held = scene.count("place = 1").await;
        if n_held == 7 { Ok(()) } else { Err(n_held) }
    })
    .await;
    crate::busy::blocking(|| scene.services().kill_database()).await;
    worker.says("the database is away").await;
    assert!(worker.terminate().await.success(), "{}", worker.log());
    let log = worker.log();
    assert!(log.contains("the database does not answer") && !log.contains("block their thread"), "{log}");
}
