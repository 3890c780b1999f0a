//! Tests of local programs with real processes: how they end, and that none of their processes is left.

#![expect(clippy::unwrap_used, reason = "the functions that the tests share are tests too")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_common::id::Pid;
use baton_common::lack::Lack;
use baton_worker::internals::{
    Capture, Command, Ended, EndedBy, Error, Order, Program, Programs, Report, Running, Sandbox,
};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

const EXE: &str = env!("CARGO_BIN_EXE_baton-worker");
const LIMIT: Duration = Duration::from_secs(20);

/// Three generations: a child in its own session with closed pipes that ignores TERM, its child, and the shell itself.
const STUBBORN: &str = r#"
setsid sh -c 'trap "" TERM; exec </dev/null >/dev/null 2>&1; sleep 1000 & echo > daemon; while :; do sleep 1; done' &
while [ ! -e daemon ]; do sleep 0.01; done
echo ready
"#;

/// The programs of a worker, a lease that does not end, and a folder.
struct Bench {
    programs: Programs,
    _lease: watch::Sender<u64>,
    root: TempDir,
}

impl Bench {
    fn new() -> Self {
        let (lease_tx, lease) = watch::channel(0);
        let programs = Programs::start(EXE.into(), lease, Duration::from_secs(600)).unwrap();
        Self { programs, _lease: lease_tx, root: TempDir::new().unwrap() }
    }

    fn program(&self, command: Command) -> Program {
        Program {
            command,
            vars: BTreeMap::new(),
            stdin: None,
            time_limit: None,
            grace: Duration::from_millis(300),
            sandbox: Sandbox::create(self.root.path(), Pid::generate(), 1, 1).unwrap(),
        }
    }

    fn run(&self, argv: &[&str]) -> Program {
        self.program(Command::Run(argv.iter().map(|&text| text.to_owned()).collect()))
    }

    fn script(&self, text: &str) -> Program {
        self.program(Command::Script(text.to_owned()))
    }

    /// Runs a program to its end and returns its result and its two streams.
    async fn end_of(&self, program: Program) -> (Ended, String, String) {
        let sandbox = program.sandbox.clone();
        let ended = self.programs.launch(program).await.unwrap().wait().await.unwrap();
        let recorded: Ended = serde_json::from_slice(&fs::read(sandbox.done()).unwrap()).unwrap();
        assert_eq!(recorded, ended, "done.json has the reported result");
        assert_nothing_left(&sandbox);
        (ended, text(&sandbox.stdout()), text(&sandbox.stderr()))
    }

    /// Starts a program and waits until it has written `ready`.
    async fn ready(&self, program: Program) -> Running {
        let stdout = program.sandbox.stdout();
        let running = self.programs.launch(program).await.unwrap();
        eventually("the program says ready", || text(&stdout).contains("ready")).await;
        running
    }
}

/// A shim without a worker: the test holds its pipe.
struct Bare {
    child: Child,
    input: ChildStdin,
    reports: Lines<BufReader<ChildStdout>>,
    sandbox: Sandbox,
}

impl Bare {
    async fn start(root: &Path, script: &str, lease_ms: u64, adjust: impl FnOnce(&mut Order)) -> Self {
        Self::start_with(root, script, lease_ms, adjust, "exec \"$0\" shim").await
    }

    /// A shell starts the shim, which is its `$0`.
    async fn start_with(
        root: &Path,
        script: &str,
        lease_ms: u64,
        adjust: impl FnOnce(&mut Order),
        start: &str,
    ) -> Self {
        let sandbox = Sandbox::create(root, Pid::generate(), 1, 1).unwrap();
        let mark = ("BATON_SANDBOX".to_owned(), sandbox.path().to_str().unwrap().to_owned());
        let mut order = Order {
            argv: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            script: None,
            user: None,
            env: BTreeMap::from([mark, ("PATH".to_owned(), std::env::var("PATH").unwrap())]),
            cwd: sandbox.path().to_owned(),
            stdin: None,
            stdout: sandbox.stdout(),
            stderr: sandbox.stderr(),
            done: sandbox.done(),
            time_limit_ms: None,
            grace_ms: 300,
            lease_ms,
            leased_at_ms: boottime_ms(),
            open_files: None,
        };
        adjust(&mut order);
        let mut child = tokio::process::Command::new("/bin/sh")
            .args(["-c", start, EXE])
            .env_clear()
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let reports = BufReader::new(child.stdout.take().unwrap()).lines();
        input.write_all(format!("{}\n", serde_json::to_string(&order).unwrap()).as_bytes()).await.unwrap();
        Self { child, input, reports, sandbox }
    }

    async fn report(&mut self) -> Report {
        let line = self.reports.next_line().await.unwrap().expect("the shim says something before it ends");
        serde_json::from_str(&line).unwrap()
    }

    async fn ended(&mut self) -> Ended {
        loop {
            match self.report().await {
                Report::Ended(ended) => return ended,
                Report::Started { .. } => {}
                Report::Failed { message, .. } => panic!("{message}"),
            }
        }
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap() * 1000 + u64::try_from(now.tv_nsec).unwrap() / 1_000_000
}

/// The command lines of all processes with the mark of the sandbox.
fn left_of(sandbox: &Sandbox) -> Vec<String> {
    let wanted = format!("BATON_SANDBOX={}", sandbox.path().display());
    let is_wanted = |dir: &Path| {
        let environment = fs::read(dir.join("environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    process_dirs().filter(|dir| is_wanted(dir)).map(|dir| text(&dir.join("cmdline")).replace('\0', " ")).collect()
}

fn process_dirs() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_str().unwrap().parse::<u32>().is_ok()).map(|entry| entry.path())
}

fn assert_nothing_left(sandbox: &Sandbox) {
    assert_eq!(left_of(sandbox), Vec::<String>::new());
}

/// The parent of a process.
fn parent_of(pid: u32) -> i32 {
    let status = text(Path::new(&format!("/proc/{pid}/status")));
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn signal(pid: i32, signal: Signal) {
    kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[tokio::test]
async fn an_exit_code_and_both_streams_are_returned() {
    let bench = Bench::new();
    let (ended, stdout, stderr) = bench.end_of(bench.run(&["sh", "-c", "echo out; echo err >&2; exit 3"])).await;
    assert_eq!((ended.exit, ended.signal, ended.ended_by), (Some(3), None, EndedBy::Own));
    assert_eq!((&*stdout, &*stderr), ("out\n", "err\n"));
    assert!(ended.started_at <= ended.ended_at && ended.not_started.is_none() && ended.left_behind == 0, "{ended:?}");
}

#[tokio::test]
async fn a_death_by_a_signal_is_reported() {
    let bench = Bench::new();
    let (ended, ..) = bench.end_of(bench.run(&["sh", "-c", "kill -SEGV $$"])).await;
    assert_eq!((ended.exit, ended.signal, ended.ended_by), (None, Some(Signal::SEGV.as_raw()), EndedBy::Own));
}

#[tokio::test]
async fn a_program_that_exceeds_its_time_limit_is_ended() {
    let bench = Bench::new();
    let mut program = bench.script(&format!("{STUBBORN} trap '' TERM; while :; do sleep 0.1; done"));
    program.time_limit = Some(Duration::from_millis(200));
    let (ended, ..) = bench.end_of(program).await;
    assert!(ended.timed_out(), "{ended:?}");
    assert_eq!(ended.signal, Some(Signal::KILL.as_raw()));
}

#[tokio::test]
async fn a_program_may_exit_by_itself_during_the_grace() {
    let bench = Bench::new();
    let mut program = bench.script("trap 'echo saved; exit 7' TERM; echo ready; while :; do sleep 0.01; done");
    program.grace = LIMIT;
    let sandbox = program.sandbox.clone();
    let ended = bench.ready(program).await.terminate().await.unwrap();
    assert_eq!((ended.exit, ended.ended_by), (Some(7), EndedBy::Term));
    assert_eq!(text(&sandbox.stdout()), "ready\nsaved\n");
}

#[tokio::test]
async fn the_children_of_a_program_have_the_grace_too() {
    let bench = Bench::new();
    let child = "trap 'sleep 0.2; echo saved; exit' TERM; echo ready; while :; do sleep 0.01; done";
    let mut program = bench.script(&format!("sh -c \"{child}\"; exit 0"));
    program.grace = LIMIT;
    let sandbox = program.sandbox.clone();
    bench.ready(program).await.terminate().await.unwrap();
    assert_eq!(text(&sandbox.stdout()), "ready\nsaved\n");
}

#[tokio::test]
async fn a_stopped_program_can_be_terminated() {
    let bench = Bench::new();
    let mut program = bench.script("trap 'exit 7' TERM; echo ready; kill -STOP $$; while :; do sleep 0.01; done");
    program.grace = LIMIT;
    let mut running = bench.ready(program).await;
    let status = PathBuf::from(format!("/proc/{}/status", running.pid()));
    eventually("the program is stopped", || text(&status).contains("T (stopped)")).await;
    assert_eq!(running.terminate().await.unwrap().exit, Some(7));
}

#[tokio::test]
async fn standard_input_is_the_given_text_or_empty() {
    let bench = Bench::new();
    let mut program = bench.run(&["cat"]);
    let long = "x".repeat(1_000_000);
    program.stdin = Some(long.clone());
    assert_eq!(bench.end_of(program).await.1, long);
    assert_eq!(bench.end_of(bench.run(&["cat"])).await.1, "");
}

#[tokio::test]
async fn a_script_is_run_by_the_shell_or_by_its_interpreter() {
    let bench = Bench::new();
    let (_, stdout, _) = bench.end_of(bench.script("pwd\necho $0")).await;
    assert!(stdout.lines().next().is_some_and(|cwd| cwd.ends_with("/1.1")), "{stdout}");
    let (_, stdout, _) = bench.end_of(bench.script("#!/bin/cat\nas it is\n")).await;
    assert_eq!(stdout, "#!/bin/cat\nas it is\n");
}

#[tokio::test]
async fn a_program_has_its_own_variables_and_none_of_the_workers_secrets() {
    let bench = Bench::new();
    let mut program = bench.run(&["env"]);
    program.vars = BTreeMap::from([("ANSWER".to_owned(), "42".to_owned())]);
    let (_, stdout, _) = bench.end_of(program).await;
    let names: Vec<&str> = stdout.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    let expected = "PATH HOME LANG TZ USER TMPDIR BATON_PID BATON_TRY BATON_SANDBOX ANSWER";
    assert!(names.iter().all(|name| expected.split(' ').any(|known| known == *name)), "{stdout}");
    assert!(stdout.contains("ANSWER=42\n") && stdout.contains("BATON_TRY=1\n"), "{stdout}");
}

#[tokio::test]
async fn a_program_has_the_given_limit_of_open_files() {
    let root = TempDir::new().unwrap();
    let mut shim = Bare::start(root.path(), "ulimit -S -n", 600_000, |order| order.open_files = Some(333)).await;
    assert_eq!(shim.ended().await.exit, Some(0));
    assert_eq!(text(&shim.sandbox.stdout()), "333\n");
}

#[tokio::test]
async fn the_environment_is_in_no_argument() {
    let bench = Bench::new();
    let mut program = bench.script("echo ready; sleep 1000");
    let secret = format!("secret-{}", Pid::generate());
    program.vars = BTreeMap::from([("TOKEN".to_owned(), secret.clone())]);
    program.stdin = Some(secret.clone());
    let mut running = bench.ready(program).await;
    for dir in process_dirs() {
        assert!(!text(&dir.join("cmdline")).contains(&secret), "{}", dir.display());
    }
    running.kill().await.unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_be_executed_ends_as_in_a_shell() {
    let bench = Bench::new();
    let (ended, _, stderr) = bench.end_of(bench.run(&["no-such-program"])).await;
    assert_eq!(ended.exit, Some(127));
    assert!(ended.not_started.as_ref().is_some_and(|why| stderr == format!("baton: {why}\n")), "{ended:?} {stderr}");
    assert!(stderr.contains("`no-such-program` not found"), "{stderr}");
    let (ended, _, stderr) = bench.end_of(bench.run(&["/etc/passwd"])).await;
    assert_eq!(ended.exit, Some(126), "{stderr}");
    assert!(stderr.contains("ermission denied"), "{stderr}");
}

#[tokio::test]
async fn replaced_libraries_of_a_program_do_not_break_the_shim() {
    let bench = Bench::new();
    let mut program = bench.run(&["/bin/sh", "-c", "exit 5"]);
    fs::write(program.sandbox.path().join("libgcc_s.so.1"), "no library").unwrap();
    let here = program.sandbox.path().to_str().unwrap().to_owned();
    program.vars = BTreeMap::from([("LD_LIBRARY_PATH".to_owned(), here)]);
    assert_eq!(bench.end_of(program).await.0.exit, Some(5));
}

#[tokio::test]
async fn the_error_of_a_sandbox_names_its_path() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("sandbox"), "a file").unwrap();
    let error = Sandbox::create(root.path(), Pid::generate(), 1, 1).unwrap_err();
    assert!(matches!(&error, Error::Sandbox { path, .. } if path.starts_with(root.path())), "{error}");
}

#[tokio::test]
async fn without_its_working_directory_a_program_is_not_started() {
    let bench = Bench::new();
    let program = bench.run(&["true"]);
    fs::remove_dir_all(program.sandbox.path()).unwrap();
    let error = bench.programs.launch(program).await.unwrap_err();
    assert!(
        matches!(&error, Error::NotStarted { shortage } if shortage.lack == Lack::Root && shortage.text.contains("stdout")),
        "{error}"
    );

    let root = TempDir::new().unwrap();
    let mut shim = Bare::start(root.path(), "true", 600_000, |order| order.cwd = "/nonexistent".into()).await;
    assert!(matches!(shim.report().await, Report::Failed { message, .. } if message.contains("/nonexistent")));
}

#[tokio::test]
async fn a_program_that_removes_its_folder_keeps_its_exit_code() {
    let bench = Bench::new();
    let program = bench.script(&format!("{STUBBORN} rm -r .baton; exit 3"));
    let sandbox = program.sandbox.clone();
    let ended = bench.programs.launch(program).await.unwrap().wait().await.unwrap();
    assert_eq!((ended.exit, ended.ended_by), (Some(3), EndedBy::Own));
    assert_nothing_left(&sandbox);
}

#[tokio::test]
async fn a_program_is_not_started_on_a_full_disk() {
    let bench = Bench::new();
    let program = bench.script("echo > ran");
    // The file that is renamed to `done.json` cannot be written.
    std::os::unix::fs::symlink("/dev/full", program.sandbox.done().with_extension("part")).unwrap();
    let sandbox = program.sandbox.clone();
    let error = bench.programs.launch(program).await.unwrap_err();
    assert!(matches!(&error, Error::NotStarted { shortage } if shortage.lack == Lack::Disk), "{error}");
    assert!(!sandbox.path().join("ran").exists());
}

#[tokio::test]
async fn a_shim_without_open_files_starts_nothing_and_reports_the_shortage() {
    let root = TempDir::new().unwrap();
    let too_many = Some(Errno::MFILE.raw_os_error());
    for limit in [4, 5, 6] {
        let start = format!("ulimit -n {limit}; exec \"$0\" shim");
        let mut shim = Bare::start_with(root.path(), "echo > ran", 600_000, |_| {}, &start).await;
        let report = shim.report().await;
        assert!(matches!(&report, Report::Failed { errno, .. } if *errno == too_many), "{report:?}");
        assert!(!shim.sandbox.path().join("ran").exists());
    }
}

#[tokio::test]
async fn arguments_that_are_too_long_end_the_program_with_the_reason() {
    let bench = Bench::new();
    let (ended, _, stderr) = bench.end_of(bench.run(&["true", &"x".repeat(200_000)])).await;
    assert_eq!(ended.exit, Some(126));
    assert!(stderr.contains("longer than the system passes on"), "{stderr}");
}

#[tokio::test]
async fn processes_that_a_program_leaves_are_killed() {
    let bench = Bench::new();
    let (ended, stdout, _) = bench.end_of(bench.script(&format!("{STUBBORN} exit 4"))).await;
    assert_eq!((ended.exit, ended.ended_by, &*stdout), (Some(4), EndedBy::Own, "ready\n"));
}

#[tokio::test]
async fn terminating_ends_hidden_processes_too() {
    let bench = Bench::new();
    let program = bench.script(&format!("{STUBBORN} sleep 1000"));
    let sandbox = program.sandbox.clone();
    let mut running = bench.ready(program).await;
    assert!(running.memory_bytes() > 100_000, "{}", running.memory_bytes());
    assert!(left_of(&sandbox).len() >= 4, "{:?}", left_of(&sandbox));
    let ended = running.terminate().await.unwrap();
    assert_eq!((ended.signal, ended.ended_by), (Some(Signal::TERM.as_raw()), EndedBy::Term));
    assert_nothing_left(&sandbox);
    assert_eq!(running.wait().await.unwrap(), ended, "it returns the result after the end too");
    assert_eq!(running.terminate().await.unwrap(), ended);
}

#[tokio::test]
async fn a_program_that_has_just_started_receives_term() {
    let bench = Bench::new();
    for _ in 0..20 {
        let mut program = bench.script("sleep 1000 & sleep 1000");
        program.grace = LIMIT * 10;
        let mut running = bench.programs.launch(program).await.unwrap();
        let ended = tokio::time::timeout(LIMIT, running.terminate()).await.expect("it needs no KILL").unwrap();
        assert_eq!(ended.signal, Some(Signal::TERM.as_raw()));
    }
}

#[tokio::test]
async fn dropping_a_handle_or_a_launch_leaves_no_process() {
    let bench = Bench::new();
    let program = bench.script(&format!("{STUBBORN} sleep 1000"));
    let sandbox = program.sandbox.clone();
    drop(bench.ready(program).await);
    eventually("nothing is left", || left_of(&sandbox).is_empty()).await;

    let program = bench.script("sleep 1000");
    let sandbox = program.sandbox.clone();
    let done = sandbox.done();
    tokio::select! {
        biased;
        // It returns at once only if this thread was delayed; then the handle is dropped here.
        _ = bench.programs.launch(program) => {}
        () = std::future::ready(()) => {}
    }
    eventually("the program without a handle has ended", || done.exists()).await;
    assert_nothing_left(&sandbox);
}

#[tokio::test]
async fn a_wait_can_be_dropped_and_repeated() {
    let bench = Bench::new();
    let mut running = bench.ready(bench.script("echo ready; while [ ! -e go ]; do sleep 0.01; done; exit 6")).await;
    for _ in 0..3 {
        assert!(tokio::time::timeout(Duration::from_millis(5), running.wait()).await.is_err());
    }
    let cwd = fs::read_link(format!("/proc/{}/cwd", running.pid())).unwrap();
    fs::write(cwd.join("go"), "").unwrap();
    assert_eq!(running.wait().await.unwrap().exit, Some(6));
}

#[tokio::test]
async fn stopping_ends_every_program_before_it_returns() {
    let bench = Bench::new();
    let (one, two) = (bench.script(&format!("{STUBBORN} sleep 1000")), bench.script("echo ready; sleep 1000"));
    let sandboxes = [one.sandbox.clone(), two.sandbox.clone()];
    let mut running = [bench.ready(one).await, bench.ready(two).await];
    bench.programs.stop().await;
    sandboxes.iter().for_each(assert_nothing_left);
    for running in &mut running {
        assert_eq!(running.wait().await.unwrap().ended_by, EndedBy::WorkerGone);
    }
}

#[tokio::test]
async fn a_killed_worker_leaves_no_process() {
    let root = TempDir::new().unwrap();
    let shim = Bare::start(root.path(), &format!("{STUBBORN} sleep 1000"), 600_000, |_| {}).await;
    let stdout = shim.sandbox.stdout();
    eventually("the program says ready", || text(&stdout).contains("ready")).await;
    // The kernel closes the pipes of a killed process, which is all that a shim notices.
    let Bare { mut child, input, reports, sandbox } = shim;
    drop((input, reports));
    child.wait().await.unwrap();
    assert_nothing_left(&sandbox);
    let ended: Ended = serde_json::from_slice(&fs::read(sandbox.done()).unwrap()).unwrap();
    assert_eq!(ended.ended_by, EndedBy::WorkerGone);
}

#[tokio::test]
async fn a_frozen_worker_leaves_no_process() {
    let root = TempDir::new().unwrap();
    let mut shim = Bare::start(root.path(), &format!("{STUBBORN} sleep 1000"), 500, |_| {}).await;
    let start = Instant::now();
    assert_eq!(shim.ended().await.ended_by, EndedBy::Lease);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_nothing_left(&shim.sandbox);
}

#[tokio::test]
async fn a_renewed_lease_keeps_a_program() {
    let root = TempDir::new().unwrap();
    let mut shim = Bare::start(root.path(), "sleep 3; exit 8", 2000, |_| {}).await;
    let ended = loop {
        let renewal = format!("renew {}\n", boottime_ms());
        shim.input.write_all(renewal.as_bytes()).await.unwrap();
        if let Ok(ended) = tokio::time::timeout(Duration::from_millis(100), shim.ended()).await {
            break ended;
        }
    };
    assert_eq!((ended.exit, ended.ended_by), (Some(8), EndedBy::Own));
}

#[tokio::test]
async fn the_workers_renewals_reach_the_shim_and_end_with_the_lease() {
    let (beat, lease) = watch::channel(0);
    let programs = Programs::start(EXE.into(), lease, Duration::from_millis(2000)).unwrap();
    let bench = Bench { programs, _lease: beat, root: TempDir::new().unwrap() };
    let program = bench.script("echo ready; sleep 1000");
    let sandbox = program.sandbox.clone();
    let mut running = bench.ready(program).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(3500) {
        bench._lease.send_modify(|beat| *beat += 1);
        sleep(Duration::from_millis(100)).await;
    }
    assert!(!left_of(&sandbox).is_empty(), "a renewed lease keeps the program");
    assert_eq!(running.wait().await.unwrap().ended_by, EndedBy::Lease);
}

#[tokio::test]
async fn a_program_dies_with_its_killed_shim() {
    let root = TempDir::new().unwrap();
    // A child of the program would not die with it; the worker kills it (see the next test).
    let mut shim = Bare::start(root.path(), "exec sleep 1000", 600_000, |_| {}).await;
    let sandbox = shim.sandbox.clone();
    eventually("the program runs", || left_of(&sandbox).iter().any(|line| line.contains("sleep"))).await;
    shim.child.start_kill().unwrap();
    eventually("the program has died with its shim", || left_of(&shim.sandbox).is_empty()).await;
}

#[tokio::test]
async fn the_worker_kills_the_processes_of_a_killed_shim() {
    let bench = Bench::new();
    let program = bench.script(&format!("{STUBBORN} sleep 1000"));
    let sandbox = program.sandbox.clone();
    let mut running = bench.ready(program).await;
    signal(parent_of(running.pid()), Signal::KILL);
    assert!(matches!(running.wait().await, Err(Error::Vanished { has_started: true })));
    assert_nothing_left(&sandbox);
}

#[tokio::test]
async fn a_fork_bomb_is_cleaned_up() {
    let bench = Bench::new();
    let program = bench.script(
        "setsid sh comet 60 &\nfor i in 1 2 3 4 5 6 7 8 9 10; do sh tree 2 & sh comet 60 & done\nsleep 0.3\necho ready\nexit 0",
    );
    let here = program.sandbox.path();
    // A comet lives only in its newest child; a tree has three branches on each level.
    fs::write(here.join("comet"), "[ $1 -gt 0 ] && { sh comet $(($1 - 1)) & exit; }\nsleep 1000").unwrap();
    fs::write(here.join("tree"), "for i in 1 2 3; do [ $1 -gt 0 ] && setsid sh tree $(($1 - 1)) & done; sleep 1000")
        .unwrap();
    let (ended, stdout, _) = bench.end_of(program).await;
    assert_eq!((ended.exit, ended.left_behind, &*stdout), (Some(0), 0, "ready\n"));
}

#[tokio::test]
async fn the_head_and_tail_of_long_output_are_captured() {
    let bench = Bench::new();
    let program = bench.script("i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i + 1)); done");
    let sandbox = program.sandbox.clone();
    bench.end_of(program).await;
    let capture = Capture::read(&sandbox.stdout()).unwrap();
    assert!(capture.head.starts_with(b"line 0\n") && capture.omitted_bytes() > 0);
    assert_eq!(capture.last_line().as_deref(), Some("line 29999"));
}

#[tokio::test]
async fn processor_time_includes_the_children_of_a_program() {
    let bench = Bench::new();
    let busy = "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done";
    let (ended, ..) = bench.end_of(bench.script(&format!("sh -c '{busy}'; exit 0"))).await;
    assert!(ended.user_ms > 0, "{ended:?}");
}
