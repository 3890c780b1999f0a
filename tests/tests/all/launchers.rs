//! The conformance tests of the launchers: every launcher passes the same tests on a real site.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_tests::eventually;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use baton_tests::slurm::Slurm;

use crate::sites::{ended, finished, runs, witness};

const LIMIT: Duration = Duration::from_secs(60);

/// A launcher, and how to break it.
struct Kind {
    /// Its site.
    at: &'static str,
    /// The command that prints its lists, and invalid answers of it.
    list: (&'static str, &'static [&'static str]),
    /// Whether the last of them is a failure of the list itself.
    is_list_gone: bool,
    /// The shortest time limit that it enforces.
    time: &'static str,
    /// Loses the job of a witness without ending it: takes away its machine or its processes.
    lose: fn(&Slurm, &Path),
}

const SLURM: Kind = Kind {
    at: "cluster",
    list: (
        "squeue",
        &["echo hello", "exit 0", "echo '1|ASLEEP|x|1|N/A|None'", "exit 3", "head -c 100000 /dev/zero", "exit 3"],
    ),
    is_list_gone: true,
    time: "1m",
    lose: |slurm, _| slurm.lose_node(),
};

const FORK: Kind = Kind {
    at: "plain",
    // Other files are read as usual: only the list is broken.
    list: ("cat", &["case $1 in */started/job) echo hello ;; *) exec $REAL \"$@\" ;; esac", "exit 3"]),
    is_list_gone: false,
    time: "2s",
    lose: |_, path| {
        let program = std::fs::read_to_string(path).unwrap();
        let program: i32 = program.lines().last().unwrap().parse().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{program}/stat")).unwrap();
        let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_owned();
        let killed = std::process::Command::new("pkill").args(["-KILL", "-s", &session]).status().unwrap();
        assert!(killed.success());
    },
};

/// Runs `how` in place of the first submission; `$REAL "$@"` is the submission.
fn submit_by(slurm: &Slurm, how: &str) {
    let first = slurm.file("first");
    let _ = std::fs::remove_dir(&first);
    slurm.replace(
        "timeout",
        &format!(
            "if [ \"$1 $2\" = '-k 5' ] && mkdir {} 2>/dev/null; then {how}; fi; exec $REAL \"$@\"",
            first.display()
        ),
    );
}

/// Waits until every program of a witness is gone.
async fn all_gone(path: &Path) {
    eventually("every program is gone", LIMIT, async || {
        let pids = std::fs::read_to_string(path).unwrap_or_default();
        let alive: Vec<&str> = pids.lines().filter(|pid| Path::new("/proc").join(pid).exists()).collect();
        if alive.is_empty() { Ok(()) } else { Err(alive.join(", ")) }
    })
    .await;
}

async fn all_accounted_for(scene: &Scene) {
    eventually("every job is accounted for", LIMIT, async || {
        match scene.sql("SELECT * FROM job WHERE ended_at IS NULL").await {
            open if open.trim().is_empty() => Ok(()),
            open => Err(open),
        }
    })
    .await;
}

async fn all_run(path: &Path, count: usize) {
    eventually("all run", LIMIT, async || if runs(path) == count { Ok(()) } else { Err(runs(path)) }).await;
}

async fn a_job_whose_submission_was_not_answered_is_adopted(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '20s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, kind.at, "sleep 3");
    submit_by(&slurm, "$REAL \"$@\" > /dev/null; sleep 60");
    let pids = slurm.submit(&scene, &spec, 1).await;
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.sql("SELECT try FROM process").await.trim()), (1, "1"));
    let known = scene.sql("SELECT external_id FROM job WHERE token LIKE 'baton-%-1' AND ended_at IS NOT NULL").await;
    assert!(!known.trim().is_empty(), "{}", scene.sql("SELECT * FROM job").await);
}

async fn a_submission_that_takes_effect_late_is_adopted_or_runs_nothing(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '6s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    for (late, tries) in [(4, 1), (20, 2)] {
        scene.sql("DELETE FROM process; DELETE FROM job").await;
        let (path, spec) = witness(&scene, kind.at, "sleep 1");
        let _ = std::fs::remove_file(&path);
        let came = slurm.file(&format!("came-{late}"));
        // Its job starts after it was given up.
        submit_by(
            &slurm,
            &format!(
                "(setsid sh -c 'sleep {late}; \"$@\"; touch {}' x $REAL \"$@\" > /dev/null 2>&1 &); sleep 60",
                came.display()
            ),
        );
        let pids = slurm.submit(&scene, &spec, 1).await;
        finished(&scene, &pids, LIMIT).await;
        eventually(
            "the late job has started",
            LIMIT,
            async || {
                if came.exists() { Ok(()) } else { Err(slurm.jobs("all")) }
            },
        )
        .await;
        slurm.is_empty().await;
        all_gone(&path).await;
        assert_eq!(runs(&path), 1, "{late}: {:?}", slurm.jobs("all"));
        assert_eq!(scene.sql("SELECT try FROM process").await.trim(), tries.to_string());
        all_accounted_for(&scene).await;
    }
}

/// While jobs wait and run, no command is started for a single job.
async fn many_jobs_are_watched_by_one_list(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, kind.at, "while [ ! -e go ]; do sleep 0.5; done; sleep 1");
    let spec = spec.replace("[ ! -e go ]", &format!("[ ! -e {} ]", scene.path("go").display()));
    let pids = slurm.submit(&scene, &spec, 16).await;
    eventually("all jobs are known and all processes parked", LIMIT, async || {
        let known = scene.sql("SELECT count(*) FROM job WHERE external_id IS NOT NULL AND status <> ''").await;
        let parked = scene.count("place = 2").await;
        if (known.trim(), parked) == ("16", 16) { Ok(()) } else { Err((known, parked)) }
    })
    .await;
    let polled = async || scene.sql(&format!("SELECT polled_at FROM site WHERE name = '{}'", kind.at)).await;
    let (before, first) = (slurm.sshd.logged("Starting session"), polled().await);
    for _ in 0..3 {
        let last = polled().await;
        eventually("the site is polled again", LIMIT, async || if polled().await == last { Err(()) } else { Ok(()) })
            .await;
    }
    assert_eq!(slurm.sshd.logged("Starting session"), before, "a poll starts no separate command; since {first}");
    std::fs::write(scene.path("go"), "").unwrap();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!(runs(&path), 16);
}

/// Kills running jobs, and jobs whose submission is in progress.
async fn a_kill_leaves_no_job(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '6s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, mut spec) = witness(&scene, kind.at, "sleep 600");
    // The timeout program may put the program into another process group.
    writeln!(spec, "needs: {{time: 20m}}").unwrap();
    let mut all = slurm.submit(&scene, &spec, 3).await;
    all_run(&path, 3).await;
    let go = scene.path("go");
    let until_go = format!("while [ ! -e '{}' ]; do sleep 0.1; done", go.display());
    slurm.replace("timeout", &format!("[ \"$1 $2\" != '-k 5' ] || {until_go}; exec $REAL \"$@\""));
    all.extend(slurm.submit(&scene, &spec, 2).await);
    eventually("they are being submitted", LIMIT, async || {
        match scene.sql("SELECT count(*) FROM job WHERE external_id IS NULL").await.trim() {
            "2" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await;
    let arguments: Vec<&str> = ["kill"].into_iter().chain(all.iter().map(String::as_str)).collect();
    slurm.baton(&scene, &arguments).await;
    eventually("the tries that are being submitted are given up", LIMIT, async || {
        let started = |pid: &String| scene.path("site").join("p").join(pid).join("1/.baton/started");
        if all[3..].iter().all(|pid| started(pid).is_symlink()) { Ok(()) } else { Err("not yet") }
    })
    .await;
    std::fs::write(&go, "").unwrap();
    ended(&scene, &all, LIMIT).await;
    assert_eq!(scene.count("state = 6").await, 5, "{}", scene.sql("SELECT * FROM process").await);
    slurm.is_empty().await;
    all_gone(&path).await;
    // Any submission in flight has arrived by now.
    tokio::time::sleep(Duration::from_secs(4)).await;
    slurm.is_empty().await;
    all_gone(&path).await;
    assert_eq!(runs(&path), 3, "a job that was killed before it was submitted ran");
    all_accounted_for(&scene).await;
}

async fn a_time_limit_is_kept_and_said(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, kind.at, "echo kept > kept; sleep 600");
    let mut spec = spec;
    writeln!(spec, "needs: {{time: {}}}\nout: [{{from: kept, when: always}}]", kind.time).unwrap();
    let pids = slurm.submit(&scene, &spec, 1).await;
    ended(&scene, &pids, LIMIT * 3).await;
    let shown = scene.show(&pids[0]).await;
    assert_eq!((&shown["state"], &shown["exit"]), (&"finished".into(), &124.into()), "{shown:#}");
    assert!(shown["reason"].as_str().unwrap().starts_with("walltime: "), "{shown:#}");
    let kept = slurm.baton(&scene, &["results", &pids[0]]).await.ok().stdout;
    assert!(kept.contains(" kept "), "{kept}");
    all_gone(&path).await;
}

/// It is unknown what its program has done, so only the spec can request a second run.
async fn a_job_that_the_site_loses_after_its_program_has_started_costs_a_try(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    for (retry, tries) in [("", 1), ("retry: {max: 2, wait: 1s}\n", 2)] {
        scene.sql("DELETE FROM process; DELETE FROM job").await;
        let (path, mut spec) = witness(&scene, kind.at, "[ \"$BATON_TRY\" != 1 ] || sleep 600");
        let _ = std::fs::remove_file(&path);
        spec.push_str(retry);
        let pids = slurm.submit(&scene, &spec, 1).await;
        all_run(&path, 1).await;
        (kind.lose)(&slurm, &path);
        ended(&scene, &pids, LIMIT * 2).await;
        let shown = scene.show(&pids[0]).await;
        assert_eq!((&shown["try"], &shown["failures"]), (&tries.into(), &(tries - 1).into()), "{shown:#}");
        if retry.is_empty() {
            assert!(shown["reason"].as_str().unwrap_or_default().starts_with("lost: "), "{shown:#}");
        } else {
            assert_eq!((&shown["state"], &shown["exit"]), (&"finished".into(), &0.into()), "{shown:#}");
        }
        all_gone(&path).await;
        assert_eq!(runs(&path), tries);
        all_accounted_for(&scene).await;
    }
}

/// A job is lost before its program starts: it is submitted again at no charge.
async fn a_job_that_the_site_loses_before_its_program_starts_is_submitted_again(kind: Kind) {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '3s'\nsettle = '5s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, mut spec) = witness(&scene, kind.at, "true");
    let before = scene.path("before");
    let wait = format!("case $PWD in */1) echo $$ >> {}; sleep 600 ;; esac", before.display());
    writeln!(spec, "pre: [\"{wait}\"]").unwrap();
    let pids = slurm.submit(&scene, &spec, 1).await;
    all_run(&before, 1).await;
    (kind.lose)(&slurm, &before);
    finished(&scene, &pids, LIMIT * 2).await;
    let shown = scene.show(&pids[0]).await;
    assert_eq!((&shown["try"], &shown["failures"], runs(&path)), (&2.into(), &0.into(), 1), "{shown:#}");
    all_gone(&before).await;
    all_accounted_for(&scene).await;
}

async fn an_answer_that_is_none_ends_nothing(kind: Kind) {
    let Running { scene, slurm, path, pids, worker } =
        running("submit_timeout = '3s'\nsettle = '30s'", kind.at, wait_for_go, 3).await;
    let (command, answers) = kind.list;
    for answer in answers {
        slurm.replace(command, answer);
        tokio::time::sleep(Duration::from_millis(2500)).await;
    }
    assert_eq!(scene.count("place = 3").await, 0, "an invalid answer ended a process");
    if kind.is_list_gone {
        worker.says("the launcher does not answer").await;
        let explained = slurm.baton(&scene, &["explain", &pids[0]]).await.ok().stdout;
        assert!(explained.contains("the jobs at the site cannot be listed: squeue: "), "{explained}");
    }
    slurm.mend(command);
    std::fs::write(scene.path("go"), "").unwrap();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (3, 3));
}

/// Running programs at a site.
struct Running {
    worker: Worker,
    slurm: Slurm,
    /// The file that they write when they start.
    path: PathBuf,
    pids: Vec<String>,
    scene: Scene,
}

/// Starts `count` programs at a site with these configuration lines, each of which runs `more`.
async fn running(lines: &str, at: &str, more: impl FnOnce(&Scene) -> String, count: u32) -> Running {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, lines, "", "");
    let worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, at, &more(&scene));
    let pids = slurm.submit(&scene, &spec, count).await;
    all_run(&path, count as usize).await;
    Running { worker, slurm, path, pids, scene }
}

fn wait_for_go(scene: &Scene) -> String {
    format!("while [ ! -e {} ]; do sleep 0.5; done", scene.path("go").display())
}

/// The script's shell is gone, but its program is not.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_program_that_outlives_its_shell_is_no_lost_job() {
    let Running { scene, slurm, path, pids, worker: _worker } =
        running("submit_timeout = '3s'\nsettle = '5s'", "plain", |_| "sleep 600".to_owned(), 1).await;
    let id = eventually("the job is known", LIMIT, async || {
        let id = scene.sql("SELECT external_id FROM job").await.trim().to_owned();
        if id.is_empty() { Err(()) } else { Ok(id) }
    })
    .await;
    let shell = id.split('.').next().unwrap();
    assert!(std::process::Command::new("kill").args(["-KILL", shell]).status().unwrap().success());
    // Several polls, none of which may treat it as lost.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!((runs(&path), scene.sql("SELECT try FROM process").await.trim()), (1, "1"));
    slurm.baton(&scene, &["kill", &pids[0]]).await.ok();
    ended(&scene, &pids, LIMIT).await;
    all_gone(&path).await;
    all_accounted_for(&scene).await;
}

/// Slurm's list is empty for much longer than a job may be missing, but the controller itself does not report the end.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_empty_list_loses_no_job() {
    let Running { scene, slurm, path, pids, worker: _worker } =
        running("submit_timeout = '2s'\nsettle = '2s'", "cluster", wait_for_go, 2).await;
    slurm.replace("squeue", "exit 0");
    eventually("both are missing in many lists", LIMIT, async || {
        match scene.sql("SELECT count(*) FROM job WHERE absent > 8").await.trim() {
            "2" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await;
    assert_eq!(scene.sql("SELECT count(*) FROM job WHERE ended_at IS NOT NULL").await.trim(), "0");
    slurm.mend("squeue");
    std::fs::write(scene.path("go"), "").unwrap();
    finished(&scene, &pids, LIMIT).await;
    assert_eq!((runs(&path), scene.count("try = 1").await), (2, 2));
}

/// The accounting knows jobs that the controller has forgotten. A job that reappears after it was recorded as gone is
/// cancelled.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_accounting_says_how_a_forgotten_job_has_ended() {
    let Running { scene, slurm, pids, path: _, worker: _worker } =
        running("submit_timeout = '2s'\nsettle = '2s'", "cluster", |_| "sleep 600".to_owned(), 1).await;
    slurm.replace("sacct", "echo '1|CANCELLED by 0'");
    let unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1";
    slurm.replace("squeue", &format!("case \" $* \" in *' -j '*) {unknown} ;; esac"));
    ended(&scene, &pids, LIMIT).await;
    let shown = scene.show(&pids[0]).await;
    assert!(shown["reason"].as_str().unwrap().contains("the job was cancelled at the site"), "{shown:#}");
    slurm.mend("squeue");
    // The site is polled while it has a job.
    let (_, spec) = witness(&scene, "cluster", "sleep 3");
    slurm.submit(&scene, &spec, 1).await;
    eventually("the job is cancelled", LIMIT, async || {
        let jobs = slurm.jobs("RUNNING");
        if jobs.iter().any(|job| job.contains(&pids[0])) { Err(jobs) } else { Ok(()) }
    })
    .await;
}

/// A kill when `scancel` fails and the list is empty: the job is ended as soon as possible.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_job_that_could_not_be_cancelled_is_not_taken_for_gone() {
    let Running { scene, slurm, path, pids, worker: _worker } =
        running("submit_timeout = '2s'\nsettle = '2s'", "cluster", |_| "sleep 600".to_owned(), 1).await;
    slurm.replace("scancel", "echo 'scancel: error: Socket timed out on send/recv operation' >&2; exit 1");
    slurm.replace("squeue", "exit 0");
    slurm.baton(&scene, &["kill", &pids[0]]).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(scene.sql("SELECT count(*) FROM job WHERE ended_at IS NULL").await.trim(), "1");
    slurm.mend("squeue");
    slurm.mend("scancel");
    ended(&scene, &pids, LIMIT).await;
    slurm.is_empty().await;
    all_gone(&path).await;
    all_accounted_for(&scene).await;
}

/// `sbatch` reports a rejection, but its job starts all the same: it runs nothing.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_job_whose_submission_was_taken_for_refused_runs_nothing() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "true");
    let came = slurm.file("came");
    slurm.replace(
        "sbatch",
        &format!(
            "(setsid sh -c 'sleep 3; \"$@\"; touch {}' x $REAL \"$@\" > /dev/null 2>&1 &)
             echo 'sbatch: error: a word that nobody knows' >&2; exit 1",
            came.display()
        ),
    );
    let pids = slurm.submit(&scene, &spec, 1).await;
    ended(&scene, &pids, LIMIT).await;
    eventually("the job has started", LIMIT, async || if came.exists() { Ok(()) } else { Err(slurm.jobs("all")) })
        .await;
    slurm.is_empty().await;
    assert_eq!(runs(&path), 0, "{:?}", slurm.jobs("all"));
    let shown = scene.show(&pids[0]).await;
    assert!(shown["reason"].as_str().unwrap().contains("a word that nobody knows"), "{shown:#}");
}

/// An option that Slurm does not know is a failure of the spec, and reported; a value may have blanks.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_option_that_slurm_refuses_is_told_and_one_with_blanks_is_not() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = |native: &str| format!("at: cluster\nrun: ['true']\nnative: {native}\n");
    let pids = slurm.submit(&scene, &spec("{acount: x}"), 1).await;
    ended(&scene, &pids, LIMIT).await;
    let shown = scene.show(&pids[0]).await;
    let reason = shown["reason"].as_str().unwrap_or_default();
    assert!(shown["state"] == "excepted" && reason.starts_with("scheduler: "), "{shown:#}");
    scene.sql("DELETE FROM process; DELETE FROM job").await;
    let pids = slurm.submit(&scene, &spec(r#"{comment: 'it is "two" words'}"#), 1).await;
    finished(&scene, &pids, LIMIT).await;
}

/// Slurm requeues the job after its first run was cut off: its program does not start a second time in the same try.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_job_that_slurm_starts_again_runs_its_program_once_a_try() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "submit_timeout = '2s'\nsettle = '3s'", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let (path, spec) = witness(&scene, "cluster", "[ \"$BATON_TRY\" != 1 ] || sleep 600");
    let once = slurm.submit(&scene, &spec, 1).await;
    let twice = slurm.submit(&scene, &format!("{spec}retry: {{max: 2, wait: 1s}}\n"), 1).await;
    all_run(&path, 2).await;
    // Slurm waits for two minutes.
    slurm.requeue_all();
    ended(&scene, &[once.clone(), twice.clone()].concat(), LIMIT * 3).await;
    let shown = scene.show(&once[0]).await;
    assert_eq!((&shown["state"], &shown["try"]), (&"excepted".into(), &1.into()), "{shown:#}");
    assert!(shown["reason"].as_str().unwrap_or_default().starts_with("lost: "), "{shown:#}");
    let shown = scene.show(&twice[0]).await;
    assert_eq!((&shown["exit"], &shown["try"], &shown["failures"]), (&0.into(), &2.into(), &1.into()), "{shown:#}");
    all_gone(&path).await;
    assert_eq!(runs(&path), 3);
    all_accounted_for(&scene).await;
}

/// Makes each of these a test of each launcher.
macro_rules! conform {
    ($($name:ident)*) => {
        mod slurm {
            $(
                #[tokio::test]
                #[ignore = "needs services: run tests/run"]
                async fn $name() {
                    super::$name(super::SLURM).await;
                }
            )*
        }
        mod fork {
            $(
                #[tokio::test]
                #[ignore = "needs services: run tests/run"]
                async fn $name() {
                    super::$name(super::FORK).await;
                }
            )*
        }
    };
}

conform! {
    a_job_whose_submission_was_not_answered_is_adopted
    a_submission_that_takes_effect_late_is_adopted_or_runs_nothing
    many_jobs_are_watched_by_one_list
    a_kill_leaves_no_job
    a_time_limit_is_kept_and_said
    a_job_that_the_site_loses_after_its_program_has_started_costs_a_try
    a_job_that_the_site_loses_before_its_program_starts_is_submitted_again
    an_answer_that_is_none_ends_nothing
}

/// A scheduler signals a job that it requeues. If `done.json` is seen first, the scheduler's word still counts, and an answer
/// that fails proves nothing.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_scheduler_says_whose_signal_ended_a_job() {
    let scene = Scene::new().await;
    let slurm = Slurm::start(&scene, "", "", "");
    let _worker = slurm.worker(&scene, "w1", &[]).await;
    let spec = "at: cluster\nscript: kill -TERM 0; sleep 600\n";
    // The signal reaches the script of the job too late, or not at all.
    let alone = "at: cluster\nscript: kill -TERM $$; sleep 600\n";
    // The lists of the watch lack the job, so that it reads `done.json`. Only a question about a single job has its name.
    let answer = |answer: &str| format!("case \"$*\" in *' -n '*) {answer} ;; *' -j '*) exec $REAL \"$@\" ;; esac");
    slurm.replace("squeue", &answer("$REAL \"$@\" | sed 's/COMPLETING\\|COMPLETED\\|FAILED\\|CANCELLED/PENDING/'"));
    let requeued = [slurm.submit(&scene, spec, 1).await, slurm.submit(&scene, alone, 1).await].concat();
    ended(&scene, &requeued, LIMIT).await;
    for pid in &requeued {
        let shown = scene.show(pid).await;
        assert!(shown["reason"].as_str().unwrap_or_default().starts_with("lost: "), "{shown:#}");
    }
    let asked = scene.path("asked");
    slurm.replace("squeue", &answer(&format!("echo x >> {}; exit 3", asked.display())));
    let signalled = slurm.submit(&scene, spec, 1).await;
    eventually("the scheduler is asked twice about the job", LIMIT, async || {
        let n_asked = std::fs::read_to_string(&asked).unwrap_or_default().lines().count();
        if n_asked >= 2 { Ok(()) } else { Err(n_asked) }
    })
    .await;
    assert_eq!(scene.count("place <> 3").await, 1, "a failed answer has ended the process");
    slurm.mend("squeue");
    ended(&scene, &[requeued, signalled.clone()].concat(), LIMIT).await;
    let shown = scene.show(&signalled[0]).await;
    assert_eq!((&shown["exit"], &shown["signal"]), (&143.into(), &15.into()), "{shown:#}");
}
