//! `baton run`: only Baton is installed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::{clean_environment, processes_with};
use baton_tests::scene::{Output, output};
use baton_tests::services::programs;
use baton_tests::witness::Witness;
use tokio::process::Command;

struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join("baton"));
        clean_environment(&mut command);
        command.args(arguments).current_dir(self.folder.path()).env("HOME", self.folder.path()).env("USER", "tester");
        command.stdin(std::process::Stdio::null()).kill_on_drop(true);
        command
    }

    async fn baton(&self, arguments: &[&str]) -> Output {
        output(self.command(arguments)).await
    }

    fn spec(&self, text: &str) -> String {
        std::fs::write(self.path("spec.yaml"), text).unwrap();
        "spec.yaml".into()
    }
}

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples").join(name).display().to_string()
}

#[tokio::test]
async fn program_with_its_own_processes_runs_one_without_services() {
    let home = Home::new();
    let mut command = Command::new(programs().join("own-process"));
    clean_environment(&mut command);
    command.args(["run", &example("own-process/own-pi.yaml"), "-o", "json"]).current_dir(home.folder.path());
    let ended = output(command).await.ok().json();
    assert_eq!((&ended["state"], &ended["kind"]), (&"finished".into(), &"own.pi".into()), "{ended}");
    assert!(ended["values"]["pi"].is_number(), "{ended}");
}

#[tokio::test]
async fn hello_runs_says_what_happened_and_where_the_files_are() {
    let home = Home::new();
    let output = home.baton(&["run", &example("hello.yaml")]).await.ok();
    assert!(output.stdout.to_lowercase().contains("hello"), "{output:?}");
    assert!(output.stderr.contains("finished [0]"), "{output:?}");
    let files = output.stderr.lines().find_map(|line| line.trim().strip_prefix("files   ")).unwrap();
    assert!(Path::new(files).join("greeting.txt").exists(), "{output:?}");
    let list = home.baton(&["list", "-o", "json"]).await.ok().json();
    assert_eq!(list[0]["state"], "finished");
    assert_eq!(list[0]["exit"], 0);
}

#[tokio::test]
async fn the_exit_code_is_the_process_own() {
    let home = Home::new();
    for (spec, code) in [
        ("script: exit 3", 3),
        ("{script: exit 3, ok: {exit: [3]}}", 3),
        ("script: kill -9 $$", 137),
        ("run: [there-is-no-such-program]", 127),
        ("call: baton.noop", 0),
        ("call: baton.fail", 8),
        ("{call: baton.fail, with: {how: panic}}", 8),
        ("{call: no.such.process}", 8),
    ] {
        let spec = home.spec(spec);
        let output = home.baton(&["run", &spec]).await;
        assert_eq!(output.code, code, "{output:?}");
        assert!(!output.stderr.contains("RUST_BACKTRACE") || code == 8, "{output:?}");
    }
}

#[tokio::test]
async fn killed_in_the_middle_of_a_count_it_goes_on_where_it_was() {
    let home = Home::new();
    let witness = home.path("witness");
    let spec = home
        .spec(&format!("{{call: baton.count, with: {{advances: 40, every: 20ms, witness: {}}}}}", witness.display()));
    let mut pid = None;
    for _ in 0..2 {
        let mut first = home.command(&["run", &spec]).spawn().unwrap();
        let lines = Witness::read(&witness).lines();
        eventually("ten more advances", Duration::from_secs(20), async || {
            let now = Witness::read(&witness).lines();
            if now >= lines + 10 { Ok(()) } else { Err(now) }
        })
        .await;
        first.kill().await.unwrap();
        let list = home.baton(&["list", "-o", "ids"]).await.ok().stdout;
        assert_eq!(*pid.get_or_insert(list.clone()), list, "a second process was started");
    }
    let output = home.baton(&["run", &spec]).await.ok();
    assert!(output.stderr.contains("resuming"), "{output:?}");
    let pid = pid.unwrap().trim().to_owned();
    // Each of the two kills may have cost one uncommitted advance.
    let lines = Witness::read(&witness).lines();
    assert!((40..=42).contains(&lines), "{lines}");
    let show = home.baton(&["show", &pid, "-o", "json"]).await.ok().json();
    assert_eq!(show[0]["values"]["advances"], 40);
    assert_eq!(show[0]["attempts"].as_array().unwrap().len(), 3);
    let again = home.baton(&["run", &spec, "--new", "-o", "ids"]).await.ok();
    assert_ne!(again.stdout.trim(), pid);
}

/// A crash as if by SIGKILL at each border of a commit, then a lost answer to the commit. `fault` happens on the second
/// pass.
#[tokio::test]
async fn it_crashes_at_each_border_of_a_commit_and_goes_on_where_it_was() {
    for border in ["submit-committed", "claim-committed", "advance-made", "checkpoint-committed", "departure-committed"]
    {
        let home = Home::new();
        let witness = home.path("witness");
        let spec = home.spec(&format!(
            "{{call: baton.count, with: {{advances: 4, every: 20ms, witness: {}}}}}",
            witness.display()
        ));
        let first =
            home.command(&["run", &spec]).env("FAILPOINTS", format!("{border}=1*return")).output().await.unwrap();
        assert_eq!(first.status.code(), None, "{border}: no crash: {first:?}");
        let list = home.baton(&["list", "-o", "ids"]).await.ok().stdout;
        assert_eq!(list.lines().count(), 1, "{border}: {list}");
        // If the end was committed, the process has ended, and the same file starts a new one.
        home.baton(&["run", &spec]).await.ok();
        let ids = home.baton(&["list", "-o", "ids", "-n", "0"]).await.ok().stdout;
        let pids: Vec<String> = ids.lines().map(str::to_owned).collect();
        let cut_off = pids.iter().cloned().collect();
        Witness::read(&witness).check(&pids, 4, &cut_off);
        for pid in &pids {
            let show = home.baton(&["show", pid, "-o", "json"]).await.ok().json();
            assert_eq!(
                (&show[0]["state"], &show[0]["values"]["advances"]),
                (&"finished".into(), &4.into()),
                "{border}: {show}"
            );
        }
        let check =
            "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('PRAGMA integrity_check').fetchone()[0])";
        let checked =
            Command::new("/usr/bin/python3").args(["-c", check]).arg(home.path(".baton/baton.db")).output().await;
        assert_eq!(checked.unwrap().stdout, b"ok\n", "{border}");
    }
}

#[tokio::test]
async fn a_second_run_in_the_same_home_is_refused_by_name_and_control_works_beside_it() {
    let home = Home::new();
    let spec = home.spec("script: 'echo begun; sleep 1731'");
    let mut first = home.command(&["run", &spec]).stdout(std::process::Stdio::null()).spawn().unwrap();
    let pid = eventually("it runs", Duration::from_secs(20), async || {
        let list = home.baton(&["list", "--state", "running", "-o", "ids"]).await;
        let pid = list.stdout.trim().to_owned();
        if pid.is_empty() { Err(list) } else { Ok(pid) }
    })
    .await;
    let second = home.baton(&["run", &example("hello.yaml")]).await.exits(5);
    assert!(second.stderr.contains("in use by `baton run` of tester"), "{second:?}");
    home.baton(&["pause", "--now", "--wait", &pid]).await.ok();
    eventually("its program has ended", Duration::from_secs(20), async || {
        let left = processes_with("sleep 1731");
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    home.baton(&["play", "--wait", &pid]).await.ok();
    eventually("it runs again", Duration::from_secs(20), async || {
        let now = processes_with("sleep 1731");
        if now.is_empty() { Err("no program") } else { Ok(()) }
    })
    .await;
    let killed = home.baton(&["kill", "--wait", "--reason", "enough", &pid, "-o", "json"]).await.ok().json();
    assert_eq!(killed[0]["outcome"], "killed");
    assert_eq!(first.wait().await.unwrap().code(), Some(8));
    assert!(processes_with("sleep 1731").is_empty());
    let show = home.baton(&["show", &pid, "-o", "json"]).await.ok().json();
    assert_eq!(show[0]["reason"].as_str().unwrap().split(':').next_back().unwrap().trim(), "enough");
    assert_eq!(home.baton(&["kill", &pid]).await.code, 5, "it has ended");
}

#[tokio::test]
async fn failures_are_tried_again_as_often_as_the_spec_says() {
    let home = Home::new();
    let spec = home.spec("{script: 'echo x >> ../../../count; exit 1', retry: {max: 3, wait: 10ms}}");
    home.baton(&["run", &spec, "-o", "ids"]).await.exits(1);
    let list = home.baton(&["list", "-o", "json"]).await.ok().json();
    assert_eq!(list[0]["try"], 3);
    let show = home.baton(&["show", list[0]["pid"].as_str().unwrap(), "-o", "json"]).await.ok().json();
    let how: Vec<&str> =
        show[0]["attempts"].as_array().unwrap().iter().map(|row| row["how"].as_str().unwrap()).collect();
    assert_eq!(how, ["error", "error", "error"]);
}

#[tokio::test]
async fn limits_of_time_and_of_progress_end_a_process_with_the_reason() {
    let home = Home::new();
    for (spec, code, reason) in [
        ("{script: sleep 60, needs: {time: 200ms}}", 143, "time limit of 200ms"),
        ("{call: baton.fail, with: {how: loop}}", 8, "without any progress"),
        ("{call: baton.sleep, with: {for: 60s}, timeout: {total: 1s}}", 8, "`timeout.total` expired"),
    ] {
        let spec = home.spec(spec);
        let output = home.baton(&["run", &spec, "-o", "json"]).await.exits(code);
        assert!(output.json()["reason"].as_str().unwrap().contains(reason), "{output:?}");
    }
}

#[tokio::test]
async fn programs_get_their_input_and_variables_and_their_output_is_kept() {
    let home = Home::new();
    let spec = home.spec("{script: 'cat; echo $COLOUR; echo oops >&2', stdin: \"in\\n\", vars: {COLOUR: red}}");
    let pid = home.baton(&["run", &spec, "-o", "ids"]).await.ok().stdout;
    std::fs::remove_dir_all(home.path(".baton/sandbox")).unwrap();
    let logs = home.baton(&["logs", pid.trim()]).await.ok();
    assert_eq!((logs.stdout.as_str(), logs.stderr.as_str()), ("in\nred\n", "oops\n"));
}

/// The files of an embedded database are next to it, for `run` and for the commands that use it.
#[tokio::test]
async fn files_of_a_process_are_kept_beside_the_database() {
    let home = Home::new();
    std::fs::write(home.path("input"), "content").unwrap();
    let digest = baton_common::digest::Digest::of(b"content").to_string();
    let object = home.path(&format!(".baton/objects/sha256/{}/{}", &digest[..2], &digest[2..]));
    let spec = home.spec("{run: [x], at: cluster, hold: true, in: ['client://input']}");
    let mut first = home.command(&["run", &spec]).spawn().unwrap();
    eventually("it is accepted", Duration::from_secs(20), async || {
        let list = home.baton(&["list", "-o", "ids"]).await;
        if list.stdout.is_empty() { Err(list) } else { Ok(()) }
    })
    .await;
    first.kill().await.unwrap();
    assert_eq!(std::fs::read_to_string(&object).unwrap(), "content");
    std::fs::write(home.path("input"), "other").unwrap();
    home.baton(&["submit", &spec]).await.ok();
    let stored = home.baton(&["gc", "--older-than", "1d", "-o", "json"]).await.ok().json();
    assert_eq!(stored["young"]["objects"], 4, "two contents and two manifests: {stored}");
}

/// The configured object store belongs to a fleet: a run neither stores files there nor reads them from there.
#[tokio::test]
async fn files_of_a_run_are_beside_its_database_whatever_is_configured() {
    let home = Home::new();
    let site = "objects.url = 'CONFIGURED'\n[sites.near]\ntransport = 'local'\nlauncher = 'fork'\npoll = '100ms'\nroot = 'SITE'\n";
    let site = site.replace("CONFIGURED", &home.path("configured").display().to_string());
    std::fs::write(home.path("baton.toml"), site.replace("SITE", &home.path("site").display().to_string())).unwrap();
    std::fs::write(home.path("input"), "content\n").unwrap();
    let spec = home.spec("{at: near, script: 'cp input made', in: ['client://input'], out: [made]}");
    let baton = async |arguments: &[&str]| {
        let mut command = home.command(arguments);
        command.env("BATON_OBJECTS_URL", home.path("named"));
        output(command).await.ok()
    };
    let pid = baton(&["run", &spec, "-o", "ids"]).await.stdout;
    baton(&["results", pid.trim(), "--get", "got"]).await;
    assert_eq!(std::fs::read_to_string(home.path("got/made")).unwrap(), "content\n");
    let kept = baton(&["gc", "--older-than", "1ms", "-o", "json"]).await.json();
    assert_eq!((&kept["needed"]["objects"], &kept["removed"]["objects"]), (&3.into(), &0.into()), "{kept}");
    assert!(!home.path("configured").exists() && !home.path("named").exists());
}

/// A run that cannot store its results ends, and the next one resumes: the program does not run again.
#[tokio::test]
async fn results_without_a_place_end_the_run_and_the_next_one_collects_them() {
    let home = Home::new();
    let site = "[sites.near]\ntransport = 'local'\nlauncher = 'fork'\npoll = '100ms'\nroot = 'SITE'\n";
    std::fs::write(home.path("baton.toml"), site.replace("SITE", &home.path("site").display().to_string())).unwrap();
    std::fs::create_dir_all(home.path("home/objects")).unwrap();
    std::fs::write(home.path("home/objects/sha256"), "in the way").unwrap();
    let script = format!("echo ran >> {}; echo result > made", home.path("runs").display());
    let spec = home.spec(&format!("at: near\nscript: '{script}'\nout: [made]\n"));
    let run = ["run", "--home", "home", &spec];
    let output = home.baton(&run).await.exits(8);
    assert!(output.stderr.contains("stage: ") && output.stderr.contains("run the same command again"), "{output:?}");
    std::fs::remove_file(home.path("home/objects/sha256")).unwrap();
    let output = home.baton(&run).await.ok();
    assert!(output.stderr.contains("resuming"), "{output:?}");
    assert_eq!(std::fs::read_to_string(home.path("runs")).unwrap(), "ran\n");
}

#[tokio::test]
async fn a_path_with_percent_signs_is_a_path() {
    let home = Home::new();
    for (folder, text) in [("a b", "one"), ("a%20b", "two"), ("a?mode=ro#x", "three")] {
        std::fs::create_dir(home.path(folder)).unwrap();
        let spec = home.spec(&format!("{{run: [echo, {text}]}}"));
        let run = |arguments: &[&str]| {
            let mut command = home.command(arguments);
            command.current_dir(home.path(folder));
            output(command)
        };
        run(&["run", &home.path(&spec).display().to_string()]).await.ok();
        assert!(home.path(folder).join(".baton/baton.db").is_file(), "{folder}");
        let list = run(&["list", "-o", "json"]).await.ok().json();
        assert_eq!(list.as_array().unwrap().len(), 1, "{folder}: {list}");
    }
}
