//! Bad input gives one clear line with the remedy and the right exit code, and has no partial effect.

use baton_tests::scene::Scene;

fn is_clear(stderr: &str) -> bool {
    stderr.starts_with("error: ") && !stderr.contains("panicked") && !stderr.contains("stack backtrace")
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn each_mistake_has_its_own_message_and_exit_code() {
    let scene = Scene::new().await;
    let absent = "01940000-0000-7000-8000-000000000000";
    let unknown_key = scene.spec("unknown.yaml", "name: x\nrnu: [\"true\"]\n").display().to_string();
    let unsupported = scene.spec("env.yaml", "run: [\"true\"]\nenv: qe\n").display().to_string();
    let impossible = scene.spec("retry.yaml", "run: [\"true\"]\nretry: {max: 0}\n").display().to_string();
    let cases: [(&[&str], i32, &str); 10] = [
        (&["submit", &unknown_key], 2, "line 2"),
        (&["submit", &unknown_key], 2, "`run`"),
        (&["submit", &unsupported], 2, "`env` is not supported by this version"),
        (&["submit", &impossible], 2, "retry"),
        (&["submit", "no-such-file.yaml"], 3, "no-such-file.yaml"),
        (&["show", absent], 3, "there is no process"),
        (&["show", "42"], 2, "`42` is not a process id"),
        (&["kill", absent], 3, ""),
        (&["logs", absent], 3, "there is no process"),
        (&["--config", "no-such.toml", "list"], 2, "no-such.toml"),
    ];
    for (arguments, code, text) in cases {
        let output = scene.baton(arguments).await.exits(code);
        assert!(output.stderr.contains(text), "{arguments:?}: {output:?}");
        assert!(text.is_empty() || is_clear(&output.stderr), "{arguments:?}: {output:?}");
    }
    assert_eq!(scene.count("true").await, 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_missing_or_refusing_server_is_named_without_its_password() {
    let scene = Scene::new().await;
    let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    let run = async |variables: &[(&str, &str)], arguments: &[&str]| {
        let output = scene.baton_in(scene.folder(), variables, arguments).await;
        assert!(!output.stderr.contains("s3cret") && !output.stdout.contains("s3cret"), "{output:?}");
        output
    };
    let nowhere = "postgres://u:s3cret@127.0.0.1:9/x";
    let output = run(&[("BATON_DATABASE_URL", nowhere)], &["submit", &spec]).await.exits(7);
    assert!(is_clear(&output.stderr), "{output:?}");
    let database = format!("{}nope", scene.services().database);
    let output = run(&[("BATON_DATABASE_URL", &database)], &["list"]).await.exits(4);
    assert!(output.stderr.contains("does not exist"), "{output:?}");
    run(&[("BATON_DATABASE_URL", "mysql://x")], &["list"]).await.exits(2);
    let output = run(&[("BATON_DATABASE_URL", "postgres://u:s3cret#x@127.0.0.1:9/x")], &["list"]).await.exits(2);
    assert!(output.stderr.contains("%23"), "{output:?}");
    // An unwritable log does not fail a command.
    let mut list = scene.command(&["list"]);
    list.env("BATON_LOG", "trace").stdout(std::process::Stdio::null());
    list.stderr(std::fs::File::options().write(true).open("/dev/full").unwrap());
    assert!(list.status().await.unwrap().success());

    // Without a broker a submit is just as durable, and prints that the announcement is missing.
    let output = run(&[("BATON_BROKER_URL", "amqp://u:s3cret@127.0.0.1:9/x")], &["submit", &spec]).await.ok();
    assert!(output.stderr.contains("recorded, but not announced"), "{output:?}");
    assert_eq!(scene.count("place = 0").await, 1);

    let wrong = scene.broker_url().replace("guest:guest", "guest:s3cret");
    let output = run(&[("BATON_BROKER_URL", &wrong)], &["doctor"]).await.exits(4);
    assert!(output.stdout.contains("rejected the credentials of user guest"), "{output:?}");
    let output = run(&[("BATON_BROKER_URL", "amqp://127.0.0.1:9")], &["doctor"]).await.exits(7);
    assert!(output.stdout.contains("start RabbitMQ"), "{output:?}");
    let output = scene.baton(&["doctor"]).await.ok();
    assert!(output.stdout.contains("objects"), "{output:?}");
    std::fs::write(scene.path("file"), "no folder").unwrap();
    let file = scene.path("file").display().to_string();
    let output = run(&[("BATON_OBJECTS_URL", &file)], &["doctor"]).await;
    assert!(output.code != 0, "{output:?}");
    assert!(output.stdout.contains("fail  objects") && output.stdout.contains("Not a directory"), "{output:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_its_broker_does_not_let_in_is_named() {
    let scene = Scene::new().await;
    scene.baton(&["list"]).await.ok();
    let wrong = scene.broker_url().replace("guest:guest", "guest:s3cret");
    let _worker = scene.worker_with(&[("BATON_BROKER_URL", &wrong)], "w1", &[]);
    baton_tests::eventually("the fault is named", std::time::Duration::from_secs(30), async || {
        let workers = scene.baton(&["workers"]).await;
        if workers.stdout.contains("lacks a broker") { Ok(()) } else { Err(workers) }
    })
    .await;
    let doctor = scene.baton(&["doctor"]).await.exits(1);
    assert!(doctor.stdout.contains("rejected the credentials of user guest"), "{doctor:?}");
    assert!(!doctor.stdout.contains("s3cret"), "{doctor:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_schema_that_breaks_older_programs_is_refused() {
    let scene = Scene::new().await;
    scene.baton(&["list"]).await.ok();
    scene.sql("INSERT INTO seaql_migrations (version, applied_at) VALUES ('m29990101_000001_breaking_later', 0)").await;
    let output = scene.baton(&["list"]).await.exits(4);
    assert!(output.stderr.contains("newer than this program"), "{output:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_dry_run_and_a_completion_script_touch_nothing() {
    let scene = Scene::new().await;
    let spec = scene.spec("noop.yaml", "call: baton.noop").display().to_string();
    let output = scene.baton(&["submit", &spec, "--dry-run"]).await.ok();
    assert_eq!(output.json()["queue"], "default");
    for shell in ["bash", "zsh", "fish"] {
        assert!(scene.baton(&["completion", shell]).await.ok().stdout.contains("baton"));
    }
}
