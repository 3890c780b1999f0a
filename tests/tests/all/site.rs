//! `baton site`, and the sessions of workers with a site, on a real OpenSSH server.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::clean_environment;
use baton_tests::scene::{Output, Scene, output};
use baton_tests::services::programs;
use baton_tests::slurm::Slurm;
use baton_tests::sshd::Sshd;
use tokio::process::Command;

use crate::sites::finished;

/// The time from submission to end that a job may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(40);

/// A server whose user has a folder of the test as home, and sites on it.
struct Sites {
    sshd: Sshd,
}

impl Sites {
    fn start() -> Self {
        let sshd = Sshd::start();
        // Commands there find these before any that this machine may have.
        sshd.kill();
        sshd.start_again(&format!("SetEnv SHLVL=5 PATH={}:/usr/bin:/bin", sshd.file("bin").display()));
        std::fs::create_dir(sshd.file("bin")).unwrap();
        for (name, script) in [
            ("sbatch", "#!/bin/sh\necho slurm 1.2.3\n"),
            ("squeue", "#!/bin/sh\necho slurm 1.2.3\n"),
            ("scancel", "#!/bin/sh\necho nothing is configured >&2\nexit 1\n"),
        ] {
            std::fs::write(sshd.file("bin").join(name), script).unwrap();
            std::fs::set_permissions(sshd.file("bin").join(name), Permissions::from_mode(0o755)).unwrap();
        }
        let section = sshd.section();
        let text = format!(
            "[sites]
here = {{transport = 'local', launcher = 'fork', root = '{0}/here'}}
there = {{transport = {{ssh = 'login'}}, launcher = 'fork', root = '{0}/there'}}
batch = {{transport = {{ssh = 'login'}}, launcher = 'slurm', root = '{0}/there'}}
down = {{transport = {{ssh = 'down'}}, launcher = 'fork', root = '{0}/there'}}
lost = {{transport = {{ssh = 'nobody'}}, launcher = 'fork', root = '{0}/there'}}
closed = {{transport = 'local', launcher = 'fork', root = '/proc/closed'}}
[ssh]
login = {{host = '127.0.0.1', port = {1}, key = '~/id_ed25519', known_hosts = '~/known_hosts', config = '/dev/null'}}
down = {{host = '127.0.0.1', port = 9, key = '~/id_ed25519', known_hosts = '~/known_hosts', config = '/dev/null'}}
",
            sshd.file("").display().to_string().trim_end_matches('/'),
            section.port.unwrap()
        );
        std::fs::write(sshd.file("sites.toml"), text).unwrap();
        Self { sshd }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.sshd.file(name)
    }

    async fn baton(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(programs().join("baton"));
        clean_environment(&mut command);
        command.arg("site").args(arguments).current_dir(self.file("")).env("HOME", self.file(""));
        command.env("BATON_CONFIG", self.file("sites.toml"));
        output(command).await
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_command_is_as_if_it_ran_here() {
    let sites = Sites::start();
    for site in ["here", "there"] {
        let output = sites.baton(&["exec", site, "--", "echo out; echo err >&2; exit 42"]).await.exits(42);
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
        let output = sites.baton(&["exec", site, "--", "printf", "%s|", "a b", "$HOME", "it's"]).await.ok();
        assert_eq!(output.stdout, "a b|$HOME|it's|");
        let output = sites.baton(&["exec", site, "--", "kill -9 $$"]).await.exits(1);
        assert!(output.stderr.contains("KILL"), "{output:?}");
        sites.baton(&["exec", site, "--timeout", "1s", "--", "sleep 20"]).await.exits(6);
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_file_is_below_the_root_and_the_same_when_it_comes_back() {
    let sites = Sites::start();
    let content = "line\n".repeat(300_000);
    std::fs::write(sites.file("data.txt"), &content).unwrap();
    for site in ["here", "there"] {
        sites.baton(&["put", site, "data.txt", "a b/c/copy.txt"]).await.ok();
        assert!(std::fs::read_to_string(sites.file(site).join("a b/c/copy.txt")).unwrap() == content);
        sites.baton(&["put", site, "data.txt", "folder/"]).await.ok();
        std::fs::create_dir_all(sites.file("back")).unwrap();
        sites.baton(&["get", site, "folder/data.txt", "back"]).await.ok();
        assert!(std::fs::read_to_string(sites.file("back/data.txt")).unwrap() == content);

        // The part of an earlier try may belong to another file.
        std::fs::write(sites.file(site).join("wrong.txt.part"), "other\n").unwrap();
        let output = sites.baton(&["put", site, "data.txt", "wrong.txt"]).await.exits(1);
        assert!(output.stderr.contains("wrong.txt differed from the source"), "{output:?}");
        assert!(!sites.file(site).join("wrong.txt").exists());
        sites.baton(&["put", site, "data.txt", "wrong.txt"]).await.ok();

        let output = sites.baton(&["get", site, "missing", "."]).await.exits(1);
        assert!(output.stderr.contains("missing"), "{output:?}");
        let output = sites.baton(&["put", site, "missing", "x"]).await.exits(1);
        assert!(output.stderr.contains("missing"), "{output:?}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_test_says_what_works_and_what_does_not() {
    let sites = Sites::start();
    let output = sites.baton(&["test", "there"]).await.ok();
    let words: Vec<_> = output.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    let steps: Vec<_> = words.iter().map(|words| (words[0], words[1])).collect();
    assert_eq!(steps, ["connect", "command", "shell", "root", "files", "tools"].map(|what| ("ok", what)), "{output:?}");
    assert_eq!(std::fs::read_dir(sites.file("there")).unwrap().count(), 0, "nothing is left");
    sites.baton(&["test", "here"]).await.ok();

    let output = sites.baton(&["test", "batch", "-o", "json"]).await.exits(1);
    let steps = output.json();
    let failed: Vec<_> = steps.as_array().unwrap().iter().filter(|step| step["verdict"] == "fail").collect();
    assert_eq!(failed.iter().map(|step| &step["what"]).collect::<Vec<_>>(), ["scancel"]);
    assert!(failed[0]["text"].as_str().unwrap().contains("nothing is configured"), "{failed:?}");

    let output = sites.baton(&["test", "closed"]).await.exits(1);
    assert!(output.stdout.lines().any(|line| line.starts_with("fail  root")), "{output:?}");
    let output = sites.baton(&["test", "down"]).await.exits(1);
    assert!(output.stdout.starts_with("fail  connect") && output.stdout.lines().count() == 1, "{output:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_wrong_has_its_own_exit_code() {
    let sites = Sites::start();
    let output = sites.baton(&["exec", "ther", "--", "true"]).await.exits(3);
    assert!(output.stderr.contains("no site `ther`") && output.stderr.contains("there"), "{output:?}");
    let output = sites.baton(&["exec", "lost", "--", "true"]).await.exits(2);
    assert!(output.stderr.contains("[ssh.nobody]"), "{output:?}");
    sites.baton(&["exec", "down", "--", "true"]).await.exits(7);
    std::fs::write(sites.file("known_hosts"), "").unwrap();
    let output = sites.baton(&["exec", "there", "--", "true"]).await.exits(4);
    assert!(output.stderr.contains("SHA256:") && output.stderr.contains("ssh-keyscan"), "{output:?}");
}

/// The only session that the fleet may have is too old, and its user needs it for a long time.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_old_session_that_is_in_use_keeps_nobody_from_its_site() {
    let scene = Scene::new().await;
    let ssh = "max_connections = 1\nmin_reconnect = '1s'\nmax_age = '3s'";
    let slurm = Slurm::start(&scene, "submit_timeout = '10m'", ssh, "");
    let (first, go) = (slurm.file("first"), slurm.file("go"));
    let wait = format!("while [ ! -e {} ]; do sleep 0.2; done", go.display());
    slurm.replace("sbatch", &format!("if mkdir {} 2>/dev/null; then {wait}; fi; exec $REAL \"$@\"", first.display()));
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = "at: cluster\nscript: 'true'\n";
    let long = slurm.submit(&scene, spec, 1).await;
    eventually("it is being submitted", LIMIT, async || if first.exists() { Ok(()) } else { Err(()) }).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let others = slurm.submit(&scene, spec, 3).await;
    finished(&scene, &others, LIMIT).await;
    assert_eq!((scene.count("place = 3").await, slurm.sshd.logged("Accepted publickey")), (3, 1));

    std::fs::write(&go, "").unwrap();
    eventually("all have ended", LIMIT, async || match scene.count("place = 3").await {
        4 => Ok(()),
        count => Err(count),
    })
    .await;
    finished(&scene, &long, LIMIT).await;
    eventually("the old session is closed", LIMIT, async || {
        let slots = scene.sql("SELECT name FROM permit WHERE name LIKE 'slot/%'").await;
        if slots.trim().is_empty() { Ok(()) } else { Err(slots) }
    })
    .await;
}
