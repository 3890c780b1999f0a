//! Jobs at a site: a real Slurm behind a real OpenSSH server.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::history::History;
use baton_tests::journal;
use baton_tests::scene::Scene;
use baton_tests::slurm::Slurm;
use baton_tests::sshd::Sshd;
use tokio::io::AsyncWriteExt;

/// The time from submission to end that a few jobs may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Borders of a job's life; at each of them a worker dies, in a separate test.
macro_rules! borders {
    ($($name:ident: $border:literal)*) => {
        pub(crate) const BORDERS: &[&str] = &[$($border),*];

        mod a_worker_dies {
            $(
                #[tokio::test]
                #[ignore = "needs services: run tests/run"]
                async fn $name() {
                    super::a_worker_that_dies_at_any_border_costs_no_second_run($border).await;
                }
            )*
        }
    };
}

borders! {
    staged: "job-staged"
    intended: "job-intended"
    never: "job-never"
    submitted: "job-submitted"
    given_up: "job-given-up"
    known: "job-known"
    seen: "job-seen"
    collected: "job-collected"
    cancelled: "job-cancelled"
}

/// A program that records its run in a file that all of them share.
pub(crate) fn witness(scene: &Scene, at: &str, more: &str) -> (PathBuf, String) {
    let path = scene.path("runs");
    let script = format!("echo $$ >> {}; {more}", path.display());
    (path, format!("at: {at}\nscript: |\n  {script}\n"))
}

/// The number of programs that have run so far.
pub(crate) fn runs(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

pub(crate) async fn ended(scene: &Scene, pids: &[String], limit: Duration) {
    eventually("all have ended", limit, async || {
        let count = scene.count("place = 3").await;
        if count >= pids.len() as u64 { Ok(()) } else { Err((count, scene.sql("SELECT * FROM job").await)) }
    })
    .await;
}

/// All have finished with exit 0.
pub(crate) async fn finished(scene: &Scene, pids: &[String], limit: Duration) {
    ended(scene, pids, limit).await;
    for pid in pids {
        let shown = scene.show(pid).await;
        assert_eq!((&shown["state"], &shown["exit"]), (&"finished".into(), &0.into()), "{shown:#}");
    }
}

/// A file system shows the file with the program's exit late.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_end_that_shows_late_is_waited_for() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let done = r#"{"exit":0,"phase":"program","started_at":1,"ended_at":2}"#;
    let late = "setsid sh -c 'sleep 8; mv late .baton/done.json' > /dev/null 2>&1 & kill -9 $(ps -o sid= -p $$)";
    let (path, spec) = witness(&scene, "plain", &format!("echo '{done}' > late; {late}"));
    let pids = slurm.submit(&scene, &spec, 1).await;
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.sql("SELECT try FROM process").await.trim()), (1, "1"));
}

/// The outputs of a job cannot be read, since its file system is unavailable: they are not treated as missing.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_sandbox_that_is_away_pauses_its_process() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let mut worker = slurm.worker(&scene, "w1", &[("FAILPOINTS", "job-seen=return")]).await;
    let (path, spec) = witness(&scene, "plain", "echo said");
    let pids = slurm.submit(&scene, &spec, 1).await;
    worker.ended(LIMIT).await;
    let (folder, away) = (scene.path(&format!("site/p/{}/1/.baton", pids[0])), scene.path("away"));
    std::fs::rename(&folder, &away).unwrap();
    let _worker = slurm.worker(&scene, "w2", &[]).await;
    eventually("it is paused", LIMIT, async || {
        let shown = scene.show(&pids[0]).await;
        let reason = shown["paused_reason"].as_str().unwrap_or_default();
        if reason.contains("its folder at the site is missing") { Ok(()) } else { Err(shown) }
    })
    .await;
    std::fs::rename(&away, &folder).unwrap();
    slurm.baton(&scene, &["play", &pids[0]]).await.ok();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!(runs(&path), 1);
    assert_eq!(slurm.baton(&scene, &["logs", &pids[0]]).await.ok().stdout, "said\n");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_job_is_submitted_watched_and_collected() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "pre = ['export FROM=site']", "", "");
    let worker = slurm.worker(&scene, "w1", &[]).await;
    for at in ["cluster", "plain"] {
        let spec = format!(
            "at: {at}
script: |
  cat; echo \"$FROM $MORE\"; echo wrong >&2; mkdir -p deep; echo one > deep/a.txt; echo two > b.txt
  echo '{{\"n\": 3}}' > values.json; exit 3
stdin: |
  from outside
vars: {{MORE: 'a b'}}
pre: ['FROM=\"$FROM+spec\"', 'MORE=lost']
ok: {{exit: [3]}}
values: values.json
out: ['**/*.txt', {{from: nothing, optional: true}}]
needs: {{time: 5m, cpus: 1}}
"
        );
        let pid = slurm.submit(&scene, &spec, 1).await.remove(0);
        ended(&scene, std::slice::from_ref(&pid), LIMIT).await;
        let shown = scene.show(&pid).await;
        assert_eq!(
            (&shown["state"], &shown["exit"], &shown["values"]["n"]),
            (&"finished".into(), &3.into(), &3.into())
        );
        let logs = slurm.baton(&scene, &["logs", &pid]).await.ok();
        assert!(logs.stdout.contains("from outside\nsite+spec a b\n"), "{logs:?}");
        let results = slurm.baton(&scene, &["results", &pid]).await.ok();
        assert!(results.stdout.contains("deep/a.txt"), "{results:?}");
        slurm.baton(&scene, &["results", &pid, "--get", scene.path(at).to_str().unwrap()]).await.ok();
        assert_eq!(std::fs::read_to_string(scene.path(at).join("deep/a.txt")).unwrap(), "one\n");
        assert_eq!(std::fs::read_to_string(scene.path(at).join("b.txt")).unwrap(), "two\n");
        scene.sql("DELETE FROM process").await;
    }
    drop(worker);
}

/// At each border a worker dies, and another one takes over: the program runs once, and no job is left.
async fn a_worker_that_dies_at_any_border_costs_no_second_run(border: &str) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '3s'", "min_reconnect = '1s'", "");
    slurm.baton(&scene, &["list"]).await.ok();
    journal::keep(&scene).await;
    let is_killed = border == "job-cancelled";
    if border == "job-given-up" {
        // The first submission does nothing and does not answer.
        let first = slurm.file("first");
        slurm.replace("sbatch", &format!("mkdir {} 2>/dev/null && sleep 60; exec $REAL \"$@\"", first.display()));
    }
    let (path, spec) = witness(&scene, "cluster", if is_killed { "sleep 600" } else { "sleep 1" });
    let pids = slurm.submit(&scene, &spec, 1).await;
    if border == "job-never" {
        // Another worker must have left an intent without a submission.
        let mut before = slurm.worker(&scene, "job-never-0", &[("FAILPOINTS", "job-intended=return")]).await;
        before.ended(LIMIT).await;
    }
    let variables = [("FAILPOINTS", format!("{border}=return"))];
    let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut crashing = slurm.worker(&scene, &format!("{border}-1"), &variables).await;
    if is_killed {
        eventually("it runs", LIMIT, async || if runs(&path) == 1 { Ok(()) } else { Err(()) }).await;
        slurm.baton(&scene, &["kill", &pids[0]]).await;
    }
    crashing.ended(LIMIT).await;
    let mut other = slurm.worker(&scene, &format!("{border}-2"), &[]).await;
    if is_killed {
        ended(&scene, &pids, LIMIT).await;
    } else {
        finished(&scene, &pids, LIMIT).await;
    }
    assert_eq!(runs(&path), 1, "{border}");
    slurm.is_empty().await;
    other.terminate().await;
    History::read(&scene, vec![]).await.accepting(&pids).check();
}

/// The lines come from the site while a worker collects the outputs, and from the database, but each only once.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn whoever_follows_a_job_sees_each_line_once() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    // The worker delays the end for several polls.
    let _worker = slurm.worker(&scene, "w1", &[("FAILPOINTS", "job-collected=sleep(4000)")]).await;
    let spec = "at: plain
script: |
  for i in 1 2 3 4 5 6; do echo line $i; echo wrong $i >&2; sleep 0.5; done; echo x > made
out: [made]
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let logs = slurm.baton(&scene, &["logs", "-f", &pid]).await.ok();
    let lines = |word: &str| (1..=6).map(|n| format!("{word} {n}\n")).collect::<String>();
    assert_eq!((logs.stdout, logs.stderr), (lines("line"), lines("wrong")));
}

/// The streams of each try start from the beginning, and the last lines of the previous try are not lost.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn whoever_follows_a_job_sees_its_second_try_from_the_beginning() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = "at: plain
script: |
  try=${PWD##*/}; for i in 1 2 3 4; do echo line $try $i; sleep 0.7; done; echo last $try; [ $try != 1 ]
retry: {max: 2, wait: 1s}
";
    let pid = slurm.submit(&scene, spec, 1).await.remove(0);
    let logs = slurm.baton(&scene, &["logs", "-f", &pid]).await.ok();
    let of_try = |n: u32| (1..=4).map(|i| format!("line {n} {i}\n")).collect::<String>() + &format!("last {n}\n");
    assert_eq!(logs.stdout, of_try(1) + &of_try(2));
}

/// One answer of the site has the end marker and both streams, complete or cut; none takes a byte of the next.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn of_what_a_job_writes_the_beginning_and_the_end_are_kept() {
    const PART: usize = 32 * 1024;
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let write = |n_bytes: usize| format!("printf a; yes b | tr -d '\\n' | head -c {}; printf '\\nc'", n_bytes - 3);
    let kept = |n_bytes: usize| match n_bytes {
        0 => String::new(),
        _ if n_bytes <= 2 * PART => format!("a{}\nc", "b".repeat(n_bytes - 3)),
        _ => format!(
            "a{}\n[… {} bytes omitted …]\n{}\nc",
            "b".repeat(PART - 1),
            n_bytes - 2 * PART,
            "b".repeat(PART - 2)
        ),
    };
    // If a program writes nothing to its standard output, Baton's own lines about the job may appear there.
    let lengths = [(3, 100_000), (2 * PART, 3), (2 * PART + 1, 0)];
    let stream = |n_bytes| if n_bytes == 0 { "true".to_owned() } else { write(n_bytes) };
    let mut pids = Vec::new();
    for (stdout, stderr) in lengths {
        let script = format!("{{ {}; }} >&2; {}", stream(stderr), stream(stdout));
        pids.extend(slurm.submit(&scene, &format!("at: plain\nscript: |\n  {script}\n"), 1).await);
    }
    finished(&scene, &pids, LIMIT).await;
    for (pid, (stdout, stderr)) in pids.iter().zip(lengths) {
        let logs = slurm.baton(&scene, &["logs", pid]).await.ok();
        for (written, n_bytes) in [(&logs.stdout, stdout), (&logs.stderr, stderr)] {
            assert!(*written == kept(n_bytes), "{n_bytes} bytes: {logs:?}");
        }
    }
}

/// Two workers in a row die after the try is given up, while its process is being killed: nothing waits for ever.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_kill_of_an_unanswered_submission_ends_whoever_dies_over_it() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '60s'", "min_reconnect = '1s'", "");
    slurm.replace("sbatch", "sleep 60");
    let (path, spec) = witness(&scene, "cluster", "true");
    let mut first = slurm.worker(&scene, "w1", &[("FAILPOINTS", "job-given-up=return")]).await;
    let pids = slurm.submit(&scene, &spec, 1).await;
    eventually("it is being submitted", LIMIT, async || {
        let taken = scene.path("site/p").join(&pids[0]).join("1/.baton/submit");
        if taken.exists() { Ok(()) } else { Err(scene.sql("SELECT * FROM job").await) }
    })
    .await;
    slurm.baton(&scene, &["kill", &pids[0]]).await;
    first.ended(LIMIT).await;
    let _second = slurm.worker(&scene, "w2", &[]).await;
    ended(&scene, &pids, LIMIT).await;
    assert_eq!((scene.count("state = 6").await, runs(&path)), (1, 0));
    slurm.is_empty().await;
}

/// Its worker dies when the try is given up, and the job starts and ends before another worker looks.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_job_that_comes_after_its_try_was_given_up_fails_nothing() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '2s'", "min_reconnect = '1s'", "");
    let go = slurm.file("go");
    slurm.replace(
        "sbatch",
        &format!(
            "case $PWD in */1) (setsid sh -c 'while [ ! -e {} ]; do sleep 0.2; done; \"$@\"' x $REAL \"$@\" \
             >/dev/null 2>&1 &); sleep 60 ;; esac; exec $REAL \"$@\"",
            go.display()
        ),
    );
    let (path, spec) = witness(&scene, "cluster", "true");
    let mut first = slurm.worker(&scene, "w1", &[("FAILPOINTS", "job-given-up=return")]).await;
    let pids = slurm.submit(&scene, &spec, 1).await;
    first.ended(LIMIT).await;
    std::fs::write(&go, "").unwrap();
    eventually("the late job has started", LIMIT, async || {
        if slurm.jobs("COMPLETED").is_empty() { Err(slurm.jobs("all")) } else { Ok(()) }
    })
    .await;
    let _second = slurm.worker(&scene, "w2", &[]).await;
    finished(&scene, &pids, LIMIT).await;
    let shown = scene.show(&pids[0]).await;
    assert_eq!((&shown["try"], &shown["failures"], runs(&path)), (&2.into(), &0.into(), 1), "{shown:#}");
}

/// The job's script took the try and died before it could identify itself: neither the process nor its kill waits for
/// ever.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_script_that_dies_before_its_mark_holds_nobody_up() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '4s'", "min_reconnect = '1s'", "");
    slurm.replace("sbatch", "case $PWD in */1) mkdir .baton/started; sleep 60 ;; esac; exec $REAL \"$@\"");
    let (path, spec) = witness(&scene, "cluster", "true");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let pids = slurm.submit(&scene, &spec, 2).await;
    eventually("both have begun", LIMIT, async || {
        let begun = pids.iter().filter(|pid| scene.path("site/p").join(pid).join("1/.baton/started").exists()).count();
        if begun == 2 { Ok(()) } else { Err(begun) }
    })
    .await;
    slurm.baton(&scene, &["kill", &pids[0]]).await;
    ended(&scene, &pids, LIMIT).await;
    assert_eq!((scene.count("state = 6").await, scene.count("state = 4 AND try = 2").await, runs(&path)), (1, 1, 1));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_forced_kill_is_made_up_for_when_the_site_is_back() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "min_reconnect = '1s'", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "sleep 600");
    let pids = slurm.submit(&scene, &spec, 1).await;
    eventually("it runs", LIMIT, async || if runs(&path) == 1 { Ok(()) } else { Err(()) }).await;
    slurm.sshd.kill();
    slurm.baton(&scene, &["kill", "--force", &pids[0]]).await.ok();
    assert_eq!(scene.count("state = 6").await, 1);
    assert_eq!(slurm.jobs("RUNNING").len(), 1);
    slurm.start_login();
    slurm.is_empty().await;
}

/// The controller is away for a while, gives invalid answers, and comes back; jobs end meanwhile.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_scheduler_that_is_away_or_talks_nonsense_costs_only_time() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '5s'", "", "");
    let worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "sleep 3");
    let mut pids = slurm.submit(&scene, &spec, 5).await;
    eventually("all run", LIMIT, async || if runs(&path) == 5 { Ok(()) } else { Err(()) }).await;
    slurm.stop_controller();
    worker.says("the launcher does not answer").await;
    pids.extend(slurm.submit(&scene, &spec, 2).await);
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(scene.count("place = 3").await, 0, "an invalid answer ended a process");
    slurm.start_controller();
    for answer in ["echo hello", "exit 0", "echo '1|ASLEEP|x|1|N/A|None'", "head -c 100000 /dev/zero"] {
        slurm.replace("squeue", answer);
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    slurm.mend("squeue");
    finished(&scene, &pids, LIMIT).await;
    assert_eq!(runs(&path), 7);
}

/// Three workers, a limit of jobs, two sessions: no limit is exceeded, and waiting processes are parked.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_fleet_keeps_to_the_limits_of_a_site() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "limits = {queued = 6}", "min_reconnect = '2s'", "MaxSessions 4;MaxStartups 2");
    let mut workers = Vec::new();
    for name in ["w1", "w2", "w3"] {
        workers.push(slurm.worker(&scene, name, &[]).await);
    }
    let (path, spec) = witness(&scene, "cluster", "sleep 1");
    let pids = slurm.submit(&scene, &spec, 40).await;
    let mut most = 0;
    eventually("all have ended", LIMIT * 2, async || {
        most = most.max(slurm.jobs("PENDING,RUNNING,COMPLETING").len());
        match scene.count("place = 3").await {
            40 => Ok(()),
            count => Err(count),
        }
    })
    .await;
    finished(&scene, &pids, LIMIT).await;
    assert!((2..=6).contains(&most), "{most} jobs at a time");
    assert_eq!(runs(&path), 40);
    let opened = slurm.sshd.logged("Accepted publickey");
    assert!(opened <= 2, "{opened} sessions");
}

/// The session is killed, and the site is unreachable for a while, while jobs run.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_session_that_is_killed_costs_only_time() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '5s'", "min_reconnect = '1s'", "");
    let worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "sleep 2");
    let pids = slurm.submit(&scene, &spec, 20).await;
    eventually("some run", LIMIT, async || if runs(&path) > 3 { Ok(()) } else { Err(()) }).await;
    slurm.sshd.kill();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(scene.count("place = 1").await, 0, "a process that waits for a site is held");
    slurm.start_login();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!(runs(&path), 20);
    drop(worker);
}

/// A worker that recorded the intent to submit, and then found no free channel, has submitted nothing.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_submission_that_the_server_refuses_a_channel_is_made_later_as_the_same_try() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let worker = slurm.worker(&scene, "w1", &[("FAILPOINTS", "submission-refused=3*return->off")]).await;
    let (path, spec) = witness(&scene, "cluster", "true");
    let pids = slurm.submit(&scene, &spec, 5).await;
    finished(&scene, &pids, LIMIT * 2).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (5, 5), "{}", scene.sql("SELECT * FROM job").await);
    assert!(worker.log().contains("the server allows fewer channels"), "{}", worker.log());
    History::read(&scene, vec![]).await.accepting(&pids).check();
}

/// One slot for three workers; the holder dies.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_slot_moves_when_its_worker_dies() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "max_connections = 1\nmin_reconnect = '1s'", "MaxSessions 4;MaxStartups 2");
    let mut workers = Vec::new();
    for name in ["w1", "w2", "w3"] {
        workers.push(slurm.worker(&scene, name, &[]).await);
    }
    let (path, spec) = witness(&scene, "plain", "true");
    let pids = slurm.submit(&scene, &spec, 60).await;
    eventually("some have run", LIMIT, async || if runs(&path) > 10 { Ok(()) } else { Err(runs(&path)) }).await;
    let sql = "SELECT w.name FROM permit t JOIN worker w ON w.id = t.owner WHERE t.name = 'slot/plain/0'";
    let owner = scene.sql(sql).await.trim().to_owned();
    workers.iter_mut().find(|worker| worker.name == owner).unwrap().kill();
    finished(&scene, &pids, LIMIT * 2).await;
    assert_eq!(runs(&path), 60);
    assert_ne!(scene.sql(sql).await.trim(), owner);
}

/// The login shell here knows only words and quotes, which every shell knows. OpenSSH's configuration is in the home
/// folder.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_shell_opens_in_the_folder_of_a_process_whatever_the_login_shell_is() {
    let scene = Scene::new().await;
    let sshd = Sshd::with("ForceCommand env -S \"${SSH_ORIGINAL_COMMAND#exec }\"");
    std::fs::copy(sshd.file("ssh_config"), scene.path("ssh_config")).unwrap();
    let config = format!(
        "[sites.far]\ntransport = {{ssh = 'login'}}\nlauncher = 'fork'\nroot = '{}'\n\
         [ssh.login]\nhost = 'login'\nconfig = '~/ssh_config'\n",
        scene.path("the site").display()
    );
    let config = scene.spec("sites.toml", &config).display().to_string();
    let pid = scene.submit("{run: [x], at: far, hold: true}", 1).await.remove(0);
    let attempt = scene.show(&pid).await["try"].to_string();
    let folder = scene.path("the site/p").join(&pid).join(attempt);
    std::fs::create_dir_all(&folder).unwrap();

    let mut command = scene.command(&["--config", &config, "open", &pid]);
    let mut running = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    running.stdin.take().unwrap().write_all(b"pwd\n").await.unwrap();
    let output = tokio::time::timeout(LIMIT, running.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", folder.display()), "{output:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_process_of_ones_own_waits_for_a_site_and_uses_it() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "min_reconnect = '1s'", "");
    slurm.sshd.kill();
    let _worker = slurm.worker_of(&scene, "own-process", "own", &["--queue", "own"]).await;
    let spec = "call: own.words\nqueue: own\nwith: {site: cluster, text: 'one two three'}\n";
    let pids = slurm.submit(&scene, spec, 1).await;
    eventually("it waits for a session", LIMIT, async || {
        let explained = slurm.baton(&scene, &["explain", &pids[0]]).await.ok().stdout;
        if explained.contains("is unreachable") { Ok(()) } else { Err(explained) }
    })
    .await;
    assert_eq!(
        scene.count("place = 2 AND try = 1 AND checkpoint IS NULL").await,
        1,
        "it is parked, and nothing was made of it"
    );
    slurm.start_login();
    ended(&scene, &pids, LIMIT).await;
    let shown = scene.show(&pids[0]).await;
    assert_eq!((&shown["exit"], &shown["values"]["words"]), (&0.into(), &"3".into()), "{shown:#}");
    let folder = scene.path("site/p").join(&pids[0]).join("1");
    assert_eq!(std::fs::read_to_string(folder.join("text")).unwrap(), "one two three");
}
