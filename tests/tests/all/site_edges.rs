//! What a spec, a scheduler or other jobs may do to a job at a real site.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::scene::Scene;
use baton_tests::slurm::Slurm;

use crate::sites::{ended, finished, runs, witness};

const LIMIT: Duration = Duration::from_secs(60);

const BOTH: [&str; 2] = ["cluster", "plain"];

/// Submits each spec to both launchers, in the order of the specs.
async fn submit_to_both(scene: &Scene, slurm: &Slurm, specs: &[String]) -> Vec<(String, String)> {
    let mut pids = Vec::new();
    for spec in specs {
        for at in BOTH {
            let spec = format!("at: {at}\n{spec}");
            pids.push((slurm.submit(scene, &spec, 1).await.remove(0), spec));
        }
    }
    pids
}

async fn shown(scene: &Scene, pid: &str) -> (String, i64, i64, String) {
    let shown = scene.show(pid).await;
    let text = |key: &str| shown[key].as_str().unwrap_or_default().to_owned();
    (text("state"), shown["exit"].as_i64().unwrap_or(-1), shown["try"].as_i64().unwrap_or(-1), text("reason"))
}

/// The exit and the outputs come back, whatever the environment does to the commands of a shell.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_path_set_for_the_program_does_not_break_the_job() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "settle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let runs_at = scene.path("runs");
    let program = format!(
        "script: |\n  echo run >> {}\n  echo said\n  echo kept > kept\n  exit 3\nok: {{exit: [3]}}\nout: [kept]\n",
        runs_at.display()
    );
    let environments = [
        "vars: {PATH: '/opt/qe/bin:$PATH'}",
        "vars: {LD_LIBRARY_PATH: /nowhere, LD_PRELOAD: /nowhere.so, IFS: '0123/', baton_dir: x, HOME: /nowhere}",
        "pre: ['export PATH=/nowhere']",
        "pre: ['set -eu', 'export LD_PRELOAD=/nowhere.so', 'mv() { false; }', 'date() { false; }']",
        "pre: ['trap \"exit 0\" EXIT', 'cd .', 'exec 2>/dev/null']",
    ];
    let specs: Vec<String> = environments.iter().map(|lines| format!("{program}{lines}\n")).collect();
    let pids = submit_to_both(&scene, &slurm, &specs).await;
    let all: Vec<String> = pids.iter().map(|(pid, _)| pid.clone()).collect();
    ended(&scene, &all, LIMIT).await;
    for (pid, spec) in &pids {
        let (state, exit, tries, reason) = shown(&scene, pid).await;
        assert_eq!((state.as_str(), exit, tries), ("finished", 3, 1), "{reason}\n{spec}");
        assert_eq!(slurm.baton(&scene, &["logs", pid]).await.ok().stdout, "said\n", "{spec}");
        assert!(slurm.baton(&scene, &["results", pid]).await.ok().stdout.contains("kept"), "{spec}");
    }
    assert_eq!(runs(&runs_at), pids.len());
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_wrong_before_the_program_fails_one_try_with_what_the_shell_said() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "settle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, _) = witness(&scene, "plain", "");
    let program = format!("script: echo run >> {}\n", path.display());
    let lines = [
        ("'if true; then'", "yntax error"),
        ("'module load qe'", "module"),
        ("'exit 0'", "exit 0"),
        ("'kill 0; sleep 60'", ""),
        ("'set -u; echo $never_set'", "never_set"),
    ];
    let specs: Vec<String> = lines.iter().map(|(line, _)| format!("{program}pre: [{line}]\n")).collect();
    let pids = submit_to_both(&scene, &slurm, &specs).await;
    let all: Vec<String> = pids.iter().map(|(pid, _)| pid.clone()).collect();
    ended(&scene, &all, LIMIT).await;
    for ((pid, spec), (_, said)) in pids.iter().zip(lines.iter().flat_map(|line| [line, line])) {
        let (state, _, tries, reason) = shown(&scene, pid).await;
        assert_eq!((state.as_str(), tries), ("excepted", 1), "{reason}\n{spec}");
        assert!(reason.starts_with("env: ") && reason.contains(said), "{reason}\n{spec}");
    }
    assert_eq!(runs(&path), 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_variable_of_any_name_and_a_script_of_any_language_work_at_a_site_as_here() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = r##"script: |
  #!/usr/bin/env python3
  import os, sys
  print([os.environ[name] for name in ("my-var", "X; touch f; Y", "a b")], os.listdir("."), sys.stdin.read())
stdin: in
vars: {my-var: "1 $HOME", "X; touch f; Y": "it's", "a b": ""}
"##;
    let mut pids = submit_to_both(&scene, &slurm, &[spec.to_owned()]).await;
    pids.push((slurm.submit(&scene, spec, 1).await.remove(0), "here".to_owned()));
    let all: Vec<String> = pids.iter().map(|(pid, _)| pid.clone()).collect();
    finished(&scene, &all, LIMIT).await;
    for (pid, spec) in &pids {
        let stdout = slurm.baton(&scene, &["logs", pid]).await.ok().stdout;
        assert_eq!(stdout, "['1 $HOME', \"it's\", ''] ['.baton'] in\n", "{spec}");
    }
}

/// The process waits, shows the reason, and is submitted as the same try when it is accepted.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_submission_that_is_refused_for_now_waits_and_says_why() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '5s'\nsettle = '3s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "true");
    let go = slurm.file("go");
    slurm.replace(
        "sbatch",
        &format!(
            "[ ! -e {} ] || exec $REAL \"$@\"
             echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
             echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2
             exit 1",
            go.display()
        ),
    );
    let pids = slurm.submit(&scene, &spec, 3).await;
    for pid in &pids {
        eventually("the reason of the wait is shown", LIMIT, async || {
            let explained = slurm.baton(&scene, &["explain", pid]).await.ok().stdout;
            if explained.contains("QOSMaxSubmitJobPerUserLimit") { Ok(()) } else { Err(explained) }
        })
        .await;
    }
    eventually("lists show the reason", LIMIT, async || {
        let listed = slurm.baton(&scene, &["list"]).await.ok().stdout;
        if listed.contains("refused by cluster") { Ok(()) } else { Err(listed) }
    })
    .await;
    assert_eq!(scene.sql("SELECT count(*) FROM job").await.trim(), "0", "no job exists, and no slot is taken");
    std::fs::write(&go, "").unwrap();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (3, 3));
    slurm.is_empty().await;
}

/// A process that waits for acceptance is killed at once, and one that is rejected permanently fails once.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_refusal_that_stays_fails_and_a_kill_does_not_wait_for_one_that_passes() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "true");
    let refuse = |text: &str| format!("echo 'sbatch: error: {text}' >&2; exit 1");
    slurm.replace("sbatch", &refuse("Batch job submission failed: Resource temporarily unavailable"));
    let waiting = slurm.submit(&scene, &spec, 1).await;
    eventually("it waits", LIMIT, async || {
        let explained = slurm.baton(&scene, &["explain", &waiting[0], "-o", "json"]).await.ok().stdout;
        if explained.contains("refused_by_site") { Ok(()) } else { Err(explained) }
    })
    .await;
    slurm.baton(&scene, &["kill", &waiting[0]]).await.ok();
    ended(&scene, &waiting, LIMIT).await;
    slurm.replace("sbatch", &refuse("QOSMaxWallDurationPerJobLimit"));
    let pids = slurm.submit(&scene, &spec, 1).await;
    ended(&scene, &[waiting, pids.clone()].concat(), LIMIT).await;
    let (state, _, tries, reason) = shown(&scene, &pids[0]).await;
    assert_eq!((state.as_str(), tries, runs(&path)), ("excepted", 1, 0), "{reason}");
    assert!(reason.contains("QOSMaxWallDurationPerJobLimit"), "{reason}");
}

/// Jobs of the same user, outside Baton, whose names look like lines of a list.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn jobs_of_others_do_not_blind_the_watch_whatever_they_are_called() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "settle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "sleep 3");
    let pids = slurm.submit(&scene, &spec, 2).await;
    let forged = format!("x\n7|FAILED|baton-{}-1|1|N/A|None\n7|FAILED", pids[0]);
    let names = ["two\nlines", &forged, &format!("baton-{}-1\nx", pids[1]), "x|y", "\u{e9}\u{1}", "baton-"];
    let foreign: Vec<String> = names.iter().map(|name| submit_foreign(&slurm, name)).collect();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (2, 2));
    assert_eq!(
        scene.sql("SELECT count(*) FROM job WHERE status <> 'ENDED' AND status <> 'COMPLETED'").await.trim(),
        "0"
    );
    let running = slurm.jobs("RUNNING").join("\n");
    for id in foreign {
        assert!(running.contains(&format!("{id} ")), "a foreign job was ended: {id} of {running}");
    }
}

fn submit_foreign(slurm: &Slurm, name: &str) -> String {
    let mut command = Command::new("sbatch");
    command.env("SLURM_CONF", slurm.file("slurm.conf")).current_dir(slurm.file(""));
    let output = command.args(["--parsable", "-J", name, "--wrap", "sleep 600"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A program may write to the file of its own job only.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_program_that_overwrites_what_its_job_left_blinds_nobody() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "settle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "plain", "printf 'a\\nb|c' > .baton/started/job; sleep 4");
    let (_, plain) = witness(&scene, "plain", "sleep 1");
    let mut pids = slurm.submit(&scene, &spec, 1).await;
    pids.extend(slurm.submit(&scene, &plain, 2).await);
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (3, 3));
}

/// Only a real timeout counts as one; a program that ignores the signal is killed, and this is reported.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_exit_124_is_no_time_limit_and_a_killed_program_has_one() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let mut spec = "at: plain\nscript: exit 124\n".to_owned();
    writeln!(spec, "needs: {{time: 5m}}").unwrap();
    let by_itself = slurm.submit(&scene, &spec, 1).await;
    let spec = "at: plain\nscript: \"trap '' TERM; sleep 600 & wait; sleep 600\"\nneeds: {time: 2s}\n";
    let killed = slurm.submit(&scene, spec, 1).await;
    ended(&scene, &[by_itself.clone(), killed.clone()].concat(), LIMIT).await;
    let (_, exit, _, reason) = shown(&scene, &by_itself[0]).await;
    assert!(exit == 124 && !reason.contains("walltime"), "{exit} {reason}");
    let (_, exit, _, reason) = shown(&scene, &killed[0]).await;
    assert!(exit == 124 && reason.starts_with("walltime: "), "{exit} {reason}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_site_says_which_shell_runs_what_comes_before_a_program() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "shell = '/bin/bash -l'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = "pre: ['source /dev/null', 'words=(one two)', 'f() { echo ${#words[@]} $WHAT; }', 'export -f f', 'export WHAT=x']
script: |
  f; [[ a == a ]] && echo bash
";
    let pids = submit_to_both(&scene, &slurm, &[spec.to_owned()]).await;
    let all: Vec<String> = pids.iter().map(|(pid, _)| pid.clone()).collect();
    finished(&scene, &all, LIMIT).await;
    for pid in &all {
        let stdout = slurm.baton(&scene, &["logs", pid]).await.ok().stdout;
        assert!(stdout.ends_with("0 x\nbash\n"), "{stdout}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_program_that_empties_its_folder_has_ended_all_the_same() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "settle = '3s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, _) = witness(&scene, "plain", "");
    let spec = format!("script: echo run >> {}; find . -mindepth 1 -delete; exit 3\n", path.display());
    let pids = submit_to_both(&scene, &slurm, &[spec]).await;
    let all: Vec<String> = pids.iter().map(|(pid, _)| pid.clone()).collect();
    ended(&scene, &all, LIMIT).await;
    for pid in &all {
        let (state, exit, tries, reason) = shown(&scene, pid).await;
        assert_eq!((state.as_str(), exit, tries), ("finished", 3, 1), "{reason}");
    }
    assert!(runs(Path::new(&path)) == 2);
}
