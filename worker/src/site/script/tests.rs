//! Tests of a job's script, run by the shells of this machine.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use super::super::launcher;
use super::*;

fn site(launcher: &str, lines: &str) -> config::Site {
    toml::from_str(&format!("transport = 'local'\nlauncher = '{launcher}'\nroot = '/r'\n{lines}")).unwrap()
}

fn spec(what: Work) -> Spec {
    Spec { on_site: Some(OnSite { at: "x".into(), ..OnSite::default() }), ..Spec::new(what) }
}

fn script(text: &str) -> Spec {
    spec(Work::Script { text: text.to_owned() })
}

/// Writes the files of a job and runs it as its launcher does.
fn run_at(spec: &Spec, site: &config::Site, dir: &Path) -> Output {
    std::fs::create_dir_all(dir.join(FOLDER)).unwrap();
    let script = Script {
        spec,
        on_site: spec.on_site.as_ref().unwrap(),
        site,
        launcher: launcher::of(site.launcher),
        dir: &dir.display().to_string(),
        token: "baton-1-1",
        pid: "the-pid",
        try_number: "7",
    };
    for (path, content) in script.files() {
        std::fs::write(dir.join(path), content).unwrap();
    }
    let mut command = Command::new("setsid");
    command.arg("-w").arg("/bin/sh").arg(dir.join(FOLDER).join("run.sh")).env("SLURM_JOB_ID", "12");
    command.output().unwrap()
}

fn run(spec: &Spec, dir: &Path) -> Output {
    run_at(spec, &site("fork", "pre = ['GREETING=hello']"), dir)
}

fn done(dir: &Path) -> Option<Done> {
    let text = std::fs::read(dir.join(FOLDER).join("done.json")).ok()?;
    Some(serde_json::from_slice(&text).unwrap())
}

fn said(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(FOLDER).join(file)).unwrap_or_default()
}

/// A folder, and a program that adds a line to a file in it at each start.
fn witness(more: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("echo x >> '{}/ran'\n{more}", dir.path().display());
    (dir, text)
}

fn times_run(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("ran")).unwrap_or_default().lines().count()
}

#[test]
fn a_script_runs_its_program_once_and_reports_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("with 'quotes' and $signs = more");
    let argv = ["sh", "-c", "cat; echo \"$0 $GREETING $MORE\"; echo x >> ran; exit 3", "it's"].map(str::to_owned);
    let spec = Spec {
        vars: [("MORE".to_owned(), "a $HOME 'b'".to_owned())].into(),
        stdin: Some("in\n".into()),
        ..spec(Work::Run { argv: argv.to_vec() })
    };
    assert_eq!(run(&spec, &dir).status.code(), Some(3));
    let first = done(&dir).unwrap();
    assert_eq!((first.exit, first.phase.as_str(), first.signal()), (3, "program", None));
    assert_eq!(said(&dir, "stdout"), "in\nit's  a $HOME 'b'\n");
    let second = run(&spec, &dir);
    assert!(second.status.success() && String::from_utf8_lossy(&second.stderr).contains("nothing is run"));
    assert_eq!(std::fs::read_to_string(dir.join("ran")).unwrap(), "x\n");
}

/// Changes of `pre` to its shell, environment or processes do not reach Baton's own commands.
#[test]
fn the_lines_of_pre_cannot_break_the_end_of_a_job() {
    let lines = [
        "export PATH=/nowhere",
        "unset PATH HOME",
        "export LD_LIBRARY_PATH=/nowhere LD_PRELOAD=/nowhere/lib.so",
        "set -eu",
        "set -e; trap 'exit 9' EXIT",
        "trap 'exit 0' EXIT",
        "trap '' TERM HUP INT",
        "trap : TERM",
        "IFS=0123456789/",
        "cd /",
        "exec > /dev/null",
        "exec >&- 2>&- <&-",
        "exec 2>/dev/full",
        "mv() { false; }; date() { false; }; mkdir() { false; }; printf() { false; }; sleep() { false; }",
        "baton() { false; }; env() { false; }; nice() { false; }",
        "alias mv=false date=false printf=false baton=false",
        "baton_dir=/nowhere baton_started=x baton_over=true baton_phase=pre baton_exit=5",
        "export baton_dir baton_over baton_phase",
        "set -- a b c; set -f; set -C; umask 777",
        "ulimit -f 0",
        "readonly PATH; set -a",
        "export LC_ALL=nonsense POSIXLY_CORRECT=1 TZ=nonsense",
    ];
    for (launcher, shell) in [("fork", ""), ("slurm", ""), ("fork", "shell = '/bin/bash -l'")] {
        for line in lines {
            let (dir, text) = witness("exit 7");
            let mut spec = spec(Work::Run { argv: vec!["/bin/sh".into(), "-c".into(), text] });
            if line.contains("ulimit") {
                // This program cannot write a line either.
                spec.what = Work::Run { argv: vec!["/bin/sh".into(), "-c".into(), "exit 7".into()] };
                std::fs::write(dir.path().join("ran"), "x\n").unwrap();
            }
            spec.on_site.as_mut().unwrap().pre = vec![line.to_owned()];
            run_at(&spec, &site(launcher, shell), dir.path());
            let said = done(dir.path()).map(|done| (done.exit, done.phase, done.timed_out));
            let expected = Some((7, "program".to_owned(), Some(false)));
            assert_eq!((said, times_run(dir.path())), (expected, 1), "{launcher} {shell} {line}");
        }
    }
}

#[test]
fn a_failure_before_the_program_is_reported_with_the_message_of_the_shell() {
    let lines = [
        ("false", 1, ""),
        ("exit 5", 5, ""),
        ("exit 0", 0, ""),
        ("set -e; false", 1, ""),
        ("if true; then", 2, "yntax error"),
        ("echo 'unbalanced", 2, "nterminated"),
        (")", 2, "yntax error"),
        ("}", 2, "yntax error"),
        ("module load qe", 127, "module"),
        ("set -u; echo \"$never_set\"", 2, "never_set"),
        ("exec /bin/false", 1, ""),
        ("set -n", 0, ""),
        ("kill 0; sleep 60", 143, ""),
        ("kill -KILL $$", 137, ""),
        ("rm -rf .baton/stdin .baton/program; false", 1, ""),
    ];
    for (line, exit, text) in lines {
        let (dir, program) = witness("");
        let mut spec = script(&program);
        spec.on_site.as_mut().unwrap().pre = vec![line.to_owned(), "true # a word".to_owned()];
        run(&spec, dir.path());
        let done = done(dir.path()).unwrap_or_else(|| panic!("{line}"));
        assert_eq!((done.phase.as_str(), done.exit, times_run(dir.path())), ("pre", exit, 0), "{line}");
        assert!(said(dir.path(), "stderr").contains(text), "{line}: {}", said(dir.path(), "stderr"));
    }
}

/// Under Slurm both layers share the process group of the program.
#[test]
fn a_program_that_signals_its_whole_group_keeps_its_exit_code() {
    for (text, exit) in [
        ("trap '' TERM; kill 0; exit 7", 7),
        ("kill 0; sleep 60", 143),
        ("trap 'exit 5' INT; kill -INT 0; sleep 60", 5),
        ("trap 'kill 0' EXIT; trap '' TERM; exit 3", 3),
    ] {
        let (dir, text) = witness(text);
        run_at(&script(&text), &site("slurm", ""), dir.path());
        let done = done(dir.path()).unwrap_or_else(|| panic!("{text}"));
        assert_eq!((done.exit, done.signalled, times_run(dir.path())), (exit, true, 1), "{text}");
    }
    let (dir, text) = witness("exit 7");
    run_at(&script(&text), &site("slurm", ""), dir.path());
    assert!(!done(dir.path()).unwrap().signalled);
}

/// Only root can mount a small disk.
#[test]
fn a_script_without_disk_space_runs_nothing_and_does_not_take_the_try() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "nr_inodes=10", "tmpfs"]).arg(dir.path()).output();
    if !mount.unwrap().status.success() {
        return;
    }
    let (outer, text) = witness("");
    std::fs::create_dir(dir.path().join(FOLDER)).unwrap();
    for name in ["run.sh", "program", "script"] {
        std::fs::write(dir.path().join(FOLDER).join(name), "").unwrap();
    }
    let n_more = (0..10).take_while(|number| std::fs::write(dir.path().join(number.to_string()), "").is_ok()).count();
    let output = run_at(&script(&text), &site("fork", ""), dir.path());
    assert!(Command::new("umount").arg("-l").arg(dir.path()).status().unwrap().success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), times_run(outer.path())), (Some(1), 0), "{n_more} {stderr}");
    assert!(stderr.contains("nothing is run: ") && stderr.contains("No space left on device"), "{stderr}");
}

#[test]
fn a_line_of_pre_may_change_the_folder_and_the_environment() {
    let elsewhere = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut spec = script("cat > here; echo \"$WHAT\" >> here; exit 7");
    spec.stdin = Some("in".into());
    let pre = ["set -eu", &format!("cd '{}'", elsewhere.path().display()), "# nothing", "WHAT=a\r", "export WHAT"];
    spec.on_site.as_mut().unwrap().pre = pre.map(str::to_owned).to_vec();
    run(&spec, dir.path());
    assert_eq!(done(dir.path()).unwrap().exit, 7);
    assert_eq!(std::fs::read_to_string(elsewhere.path().join("here")).unwrap(), "ina\n");
}

#[test]
fn variables_of_any_name_reach_only_the_program() {
    let names =
        ["my-var", "X; touch f; Y", "-u", "-", "a b", "1", "é", "$(touch f)", "'", "a\nb", "PATH", "IFS", "baton_over"];
    let vars = names.map(|name| (name.to_owned(), format!("the {name} 'of' $HOME\n")));
    for shell in ["/bin/sh", "/bin/bash -l"] {
        let dir = tempfile::tempdir().unwrap();
        let argv =
            ["/usr/bin/python3", "-c", "import os, json; print(json.dumps(dict(os.environ)))"].map(str::to_owned);
        let mut spec = spec(Work::Run { argv: argv.to_vec() });
        spec.vars = vars.clone().into();
        spec.vars.insert("BATON_PID".into(), "forged".into());
        run_at(&spec, &site("fork", &format!("shell = '{shell}'")), dir.path());
        assert_eq!(done(dir.path()).unwrap().exit, 0, "{}", said(dir.path(), "stderr"));
        let seen: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&said(dir.path(), "stdout")).unwrap();
        for (name, value) in &vars {
            assert_eq!(seen[name], serde_json::json!(value), "{name}");
        }
        assert_eq!((&seen["BATON_PID"], &seen["BATON_TRY"]), (&"the-pid".into(), &"7".into()));
        assert_eq!(seen["BATON_SANDBOX"], serde_json::json!(dir.path().display().to_string()));
        let mut files: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files.pop().unwrap(), FOLDER);
        assert!(files.is_empty(), "{files:?}");
    }
}

#[test]
fn a_program_that_is_not_found_counts_as_started() {
    for (argv, path) in [(["nothing-of-this-name"], None), (["date"], Some("/opt/qe/bin:$PATH")), (["a=b"], None)] {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(Work::Run { argv: argv.map(str::to_owned).to_vec() });
        spec.vars.extend(path.map(|path| ("PATH".to_owned(), path.to_owned())));
        run(&spec, dir.path());
        let done = done(dir.path()).unwrap();
        assert_eq!((done.exit, done.phase.as_str()), (127, "program"), "{argv:?}");
        assert!(said(dir.path(), "stderr").contains(argv[0]), "{argv:?}: {}", said(dir.path(), "stderr"));
    }
}

#[test]
fn the_words_of_a_program_are_literal() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("x=y");
    std::fs::write(&bin, "#!/bin/sh\nprintf '%s|' \"$@\"\n").unwrap();
    std::fs::set_permissions(&bin, std::fs::Permissions::from_mode(0o755)).unwrap();
    for program in [bin.display().to_string(), "./x=y".to_owned()] {
        let argv = [&program, "", "*", "a\nb", "-n", "$HOME", "~", "!", "\\", "if", "\t"].map(str::to_owned);
        let at = tempfile::tempdir_in(dir.path()).unwrap();
        std::fs::copy(&bin, at.path().join("x=y")).unwrap();
        run(&spec(Work::Run { argv: argv.to_vec() }), at.path());
        assert_eq!(said(at.path(), "stdout"), "|*|a\nb|-n|$HOME|~|!|\\|if|\t|", "{}", said(at.path(), "stderr"));
    }
}

#[test]
fn a_script_is_run_by_the_interpreter_of_its_first_line() {
    let python = "import sys; print(sys.argv[0].endswith('.baton/script'), sys.stdin.read())\n";
    for (text, expected) in [
        (format!("#!/usr/bin/env python3\n{python}"), "True in\n"),
        (format!("#! /usr/bin/python3\r\n{}", python.replace('\n', "\r\n")), "True in\n"),
        ("#!/bin/bash\na=(1 2 3); echo ${#a[@]}\n".to_owned(), "3\n"),
        ("#!/bin/sh -e -u\necho $-\n".to_owned(), ""),
        ("#!/bin/sh -eu\t \nfalse\necho never\n".to_owned(), ""),
        ("#!/usr/bin/awk -f\nBEGIN { print 1 + 1 }\n".to_owned(), "2\n"),
        ("#!\necho plain\n".to_owned(), "plain\n"),
        ("echo plain\r\ntrue\r\n".to_owned(), "plain\n"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec { stdin: Some("in".into()), ..script(&text) };
        run(&spec, dir.path());
        assert_eq!(said(dir.path(), "stdout"), expected, "{text}: {}", said(dir.path(), "stderr"));
    }
    assert_eq!(interpreter("#!/bin/x  -a -b \n"), Some(vec!["/bin/x".into(), "-a -b".into()]));
    assert_eq!(interpreter("#!x"), Some(vec!["./x".into()]));
    assert_eq!((interpreter("#! \n"), interpreter("echo\n#!/bin/x")), (None, None));
}

#[test]
fn the_shell_of_a_site_runs_pre_and_scripts() {
    let pre = "arrays=(1 2); source /dev/null; f() { echo of-pre; }; export -f f";
    let dir = tempfile::tempdir().unwrap();
    let mut spec = script("f; shopt -q login_shell || echo plain");
    spec.on_site.as_mut().unwrap().pre = vec![pre.into(), "shopt -q login_shell".into()];
    run_at(&spec, &site("fork", "shell = '/bin/bash -l'"), dir.path());
    let done = done(dir.path()).unwrap();
    assert_eq!((done.exit, done.phase.as_str()), (0, "program"), "{}", said(dir.path(), "stderr"));
    assert!(said(dir.path(), "stdout").ends_with("of-pre\nplain\n"));
    for wrong in ["shell = ''", "shell = '-l'", "shell = 3"] {
        let text = format!("transport = 'local'\nlauncher = 'fork'\nroot = '/r'\n{wrong}");
        toml::from_str::<config::Site>(&text).unwrap_err();
    }
    let dir = tempfile::tempdir().unwrap();
    run_at(&spec, &site("fork", "shell = '/nowhere/shell'"), dir.path());
    assert!(said(dir.path(), "stderr").contains("/nowhere/shell"), "{}", said(dir.path(), "stderr"));
    assert_eq!(super::tests::done(dir.path()).unwrap().phase, "pre");
}

#[test]
fn a_passed_time_limit_is_known_from_the_script() {
    let limit = Some(Duration::from_secs(1));
    let cases = [
        ("exec sleep 60", limit, 124, true),
        ("trap '' TERM; sleep 60 & wait; sleep 60", limit, 124, true),
        ("trap 'exit 0' TERM; sleep 60 & wait", limit, 124, true),
        ("trap 'sleep 1; : > kept; exit 0' TERM; sleep 60 & wait", limit, 124, true),
        ("exit 124", Some(Duration::from_secs(60)), 124, false),
        ("exit 137", Some(Duration::from_secs(60)), 137, false),
        ("kill -KILL $$", Some(Duration::from_secs(60)), 137, false),
        ("exit 124", None, 124, false),
    ];
    for (text, time, exit, is_timed_out) in cases {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec { time, ..script(text) };
        run(&spec, dir.path());
        let done = done(dir.path()).unwrap();
        assert_eq!(
            (done.exit, done.is_timed_out(launcher::of(config::Launcher::Fork), &spec)),
            (exit, is_timed_out),
            "{text}"
        );
        // Files that the program writes on TERM exist before its end is reported.
        assert_eq!(dir.path().join("kept").exists(), text.contains("kept"), "{text}");
    }
    let old = r#"{"exit":124,"phase":"program","started_at":1,"ended_at":2}"#;
    let old: Done = serde_json::from_str(old).unwrap();
    assert!(old.is_timed_out(launcher::of(config::Launcher::Fork), &Spec { time: limit, ..script("true") }));
}

#[test]
fn the_end_of_a_program_that_removes_its_folder_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let spec = script("find . -mindepth 1 -delete; exit 3");
    run(&spec, dir.path());
    let done = done(dir.path()).unwrap();
    assert_eq!((done.exit, done.phase.as_str()), (3, "program"));
    assert!(run(&spec, dir.path()).status.success(), "the try stays taken");
}

#[test]
fn the_traces_of_a_job_say_whether_its_program_was_started() {
    let (dir, text) = witness("kill -KILL $(ps -o sid= -p $$ | xargs ps -o pid= -s)");
    let ask = |script: String| {
        let output = Command::new("/bin/sh").arg("-c").arg(script).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let path = dir.path().display().to_string();
    assert_eq!(ask(look_for_start(&path)), "");
    run(&script(&text), dir.path());
    assert!(done(dir.path()).is_none());
    assert_eq!(ask(look_for_start(&path)), "begun\nran\n");
    assert_eq!(ask(prevent_start(&path)), "ran\n");
    std::fs::remove_file(dir.path().join(".baton/running")).unwrap();
    assert_eq!(ask(look_for_start(&path)), "begun\n");
    assert_eq!(ask(prevent_start(&path)), "");
    let again = Command::new("/bin/sh").arg(dir.path().join(".baton/program")).status().unwrap();
    assert!(!again.success());
    assert_eq!(times_run(dir.path()), 1, "it was prevented");
    std::fs::write(dir.path().join(".baton/done.json.part"), "   \n").unwrap();
    assert_eq!(ask(look_for_start(&path)), "begun\nran\n", "a script of an earlier version");
}

#[test]
fn a_requeued_job_leaves_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(Work::Run { argv: vec!["true".into()] });
    run(&spec, dir.path());
    run(&spec, dir.path());
    assert!(!dir.path().join(".baton/again").exists(), "another job");
    let dir = tempfile::tempdir().unwrap();
    run_at(&spec, &site("slurm", ""), dir.path());
    run_at(&spec, &site("slurm", ""), dir.path());
    assert!(dir.path().join(".baton/again").exists());
}
