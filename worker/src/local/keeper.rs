//! The thread of the local programs: one task for each program owns its shim.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use baton_common::lack::Shortage;

use super::sandbox::{MARK, Sandbox};
use super::{Command, Error, Launch, Program, REQUESTS_MAX, Running};
use crate::local::shim::policy::KILL_LIMIT;
use crate::local::shim::wire::{Ended, Order, Report, Request};
use crate::local::shim::{self, tree};
use crate::machine::clock::boottime_ms;
use crate::machine::{open_files, shortage};

/// How long a shim may take to report the start of its program: normally a millisecond, on a machine that swaps seconds.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a shim may take for an immediate action, such as reading a line or exiting.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Pause between two searches for the processes of a killed shim.
const SWEEP_INTERVAL: Duration = Duration::from_millis(20);

/// The worker's variables that a program inherits. The others may hold passwords.
const INHERITED: [&str; 6] = ["PATH", "HOME", "LANG", "TZ", "USER", "TMPDIR"];

/// The last report of a shim, or its absence.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Ended(Ended),
    Failed(Shortage),
    Vanished,
}

/// The parameters of the thread.
#[derive(Clone)]
pub(super) struct Keeper {
    /// The executable of shims.
    pub(super) shim: PathBuf,
    /// The runtime for blocking work.
    pub(super) blocking: Handle,
    /// The number of running programs.
    pub(super) running: watch::Sender<usize>,
}

/// The lease, as the shims need it.
#[derive(Clone)]
struct Lease {
    /// The time of the last renewal, on CLOCK_BOOTTIME.
    leased_at_ms: watch::Receiver<u64>,
    limit: Duration,
}

/// A running shim and the worker's ends of its pipes.
struct Shim {
    child: Child,
    /// Closing it makes the shim kill everything.
    input: Option<ChildStdin>,
    reports: Lines<BufReader<ChildStdout>>,
    /// When a shim counts as stuck that was asked to end its program.
    deadline: Option<Instant>,
}

/// Starts programs and serves them until no launcher is left or the lease has no owner; then kills the rest and waits for
/// them.
pub(super) async fn keep(
    keeper: Keeper,
    mut beat: watch::Receiver<u64>,
    lease_limit: Duration,
    mut launches: mpsc::Receiver<Launch>,
) {
    let (leased_at_tx, leased_at_ms) = watch::channel(boottime_ms());
    let lease = Lease { leased_at_ms, limit: lease_limit };
    let mut programs = JoinSet::new();
    loop {
        tokio::select! {
            launch = launches.recv() => match launch {
                Some(launch) => {
                    programs.spawn(keep_program(keeper.clone(), lease.clone(), launch));
                }
                None => break,
            },
            renewed = beat.changed() => match renewed {
                Ok(()) => {
                    leased_at_tx.send_replace(boottime_ms());
                }
                Err(_) => break,
            },
            // Keeps the set to running programs.
            Some(_) = programs.join_next() => {}
        }
    }
    drop(launches);
    drop(leased_at_tx);
    while programs.join_next().await.is_some() {}
}

/// Serves one program from its launch to its end.
async fn keep_program(keeper: Keeper, lease: Lease, launch: Launch) {
    let Launch { program, reply } = launch;
    let (grace, sandbox) = (program.grace, program.sandbox.clone());
    // If the receiver is gone, the handle is dropped here, which kills the program.
    match start(&keeper, &lease, program).await {
        Err(error) => {
            let _ = reply.send(Err(error));
        }
        Ok((mut shim, pid)) => {
            let (requests, requests_rx) = mpsc::channel(REQUESTS_MAX);
            let (outcome_tx, outcome) = watch::channel(None);
            let running = Running { pid, shim: shim.child.id().unwrap_or(0), requests, outcome };
            keeper.running.send_modify(|count| *count += 1);
            let _ = reply.send(Ok(running));
            let outcome = shim.run(lease, requests_rx, grace, sandbox.path()).await;
            shim.reap().await;
            // The pipes and the process are closed before the end is reported.
            drop(shim);
            if matches!(outcome, Outcome::Vanished) {
                sweep(&keeper.blocking, &sandbox).await;
            }
            keeper.running.send_modify(|count| *count -= 1);
            outcome_tx.send_replace(Some(outcome));
        }
    }
}

/// Starts a shim and sends it its order. Returns the program's process id too.
async fn start(keeper: &Keeper, lease: &Lease, program: Program) -> Result<(Shim, u32), Error> {
    let sandbox = program.sandbox.clone();
    let leased_at_ms = *lease.leased_at_ms.borrow();
    let lease_ms = whole_ms(lease.limit);
    let order = order(program, lease_ms, leased_at_ms);

    let mut child = tokio::process::Command::new(&keeper.shim)
        .arg0("baton")
        .arg(shim::COMMAND)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::Shim)?;
    let input = child.stdin.take();
    let output = child.stdout.take().expect("its standard output is piped");
    let mut shim = Shim { child, input, reports: BufReader::new(output).lines(), deadline: None };

    let mut line = serde_json::to_string(&order).expect("an order holds only text and numbers");
    line.push('\n');
    let first = timeout(START_LIMIT, async {
        shim.say(&line).await;
        shim.next_report().await
    });
    match first.await {
        Ok(Some(Report::Started { pid })) => Ok((shim, pid)),
        Ok(Some(Report::Failed { message, errno })) => {
            shim.reap().await;
            Err(Error::NotStarted { shortage: shortage::of_shim(message, errno, sandbox.path()) })
        }
        Ok(Some(Report::Ended(_)) | None) | Err(_) => {
            shim.kill();
            shim.reap().await;
            sweep(&keeper.blocking, &sandbox).await;
            Err(Error::Vanished { has_started: false })
        }
    }
}

impl Shim {
    /// Forwards requests and renewals until the shim reports the end of the program or is gone.
    async fn run(
        &mut self,
        mut lease: Lease,
        mut requests: mpsc::Receiver<Request>,
        grace: Duration,
        sandbox: &Path,
    ) -> Outcome {
        loop {
            let deadline = self.deadline;
            let stuck = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                report = self.next_report() => match report {
                    Some(Report::Ended(ended)) => return Outcome::Ended(ended),
                    Some(Report::Failed { message, errno }) => {
                        return Outcome::Failed(shortage::of_shim(message, errno, sandbox));
                    }
                    Some(Report::Started { .. }) => {}
                    None => {
                        self.kill();
                        return Outcome::Vanished;
                    }
                },
                request = requests.recv(), if self.input.is_some() => match request {
                    Some(request) => {
                        let limit = if request == Request::Term { grace + KILL_LIMIT } else { KILL_LIMIT };
                        self.deadline = Some(Instant::now() + limit + ANSWER_LIMIT);
                        self.say(&request.to_line()).await;
                    }
                    None => self.close(),
                },
                renewed = lease.leased_at_ms.changed(), if self.input.is_some() => match renewed {
                    Ok(()) => {
                        let leased_at_ms = *lease.leased_at_ms.borrow_and_update();
                        self.say(&Request::Renew { leased_at_ms }.to_line()).await;
                    }
                    Err(_) => self.close(),
                },
                () = stuck => self.kill(),
            }
        }
    }

    /// The next report; `None` at the end or if it is unreadable. Cancel safe.
    async fn next_report(&mut self) -> Option<Report> {
        serde_json::from_str(&self.reports.next_line().await.ok()??).ok()
    }

    /// Sends a line. A shim that lets the pipe fill up is stuck and is killed. A write error is ignored: the shim has
    /// ended, and its last report may still be in the pipe.
    async fn say(&mut self, line: &str) {
        let Some(input) = &mut self.input else { return };
        if timeout(ANSWER_LIMIT, input.write_all(line.as_bytes())).await.is_err() {
            self.kill();
        }
    }

    /// Closes the pipe, which makes the shim kill everything at once.
    fn close(&mut self) {
        self.input = None;
        self.deadline = Some(Instant::now() + KILL_LIMIT + ANSWER_LIMIT);
    }

    fn kill(&mut self) {
        // This fails only if the shim has ended.
        let _ = self.child.start_kill();
        self.deadline = None;
    }

    /// Waits for the end of the shim, and kills it if it takes too long.
    async fn reap(&mut self) {
        self.input = None;
        if timeout(ANSWER_LIMIT, self.child.wait()).await.is_err() {
            self.kill();
            // If it hangs in the kernel, the runtime reaps it later.
            let _ = timeout(ANSWER_LIMIT, self.child.wait()).await;
        }
    }
}

/// Kills the descendants of a program whose shim was killed; the program itself died with the shim.
async fn sweep(blocking: &Handle, sandbox: &Sandbox) {
    let deadline = Instant::now() + KILL_LIMIT;
    while Instant::now() < deadline {
        let sandbox = sandbox.clone();
        let kill = move || {
            let mark = sandbox.path().to_string_lossy();
            let as_user = sandbox.user().and_then(|user| user.ids.kill_marked(&mark).ok());
            as_user.unwrap_or_else(|| tree::kill_marked(MARK, &mark))
        };
        let n_found = match shortage::spawn_blocking(blocking, kill.clone()) {
            Ok(task) => task.await.unwrap_or(0),
            // Without another thread the work is done on this one.
            Err(_) => kill(),
        };
        if n_found == 0 {
            return;
        }
        sleep(SWEEP_INTERVAL).await;
    }
}

fn order(program: Program, lease_ms: u64, leased_at_ms: u64) -> Order {
    let Program { command, vars, stdin, time_limit, grace, sandbox } = program;
    let (script, argv) = match command {
        Command::Run(argv) => (None, argv),
        Command::Script(text) => {
            let (script, argv) = sandbox.script(text);
            (Some(script), argv)
        }
    };
    let user = sandbox.user();
    let worker = |name: &str| match (name, user) {
        ("HOME", Some(user)) => Some(user.home.to_string_lossy().into_owned()),
        ("USER", Some(user)) => Some(user.name.clone()),
        _ => std::env::var(name).ok(),
    };
    Order {
        argv,
        script,
        env: environment(worker, vars, sandbox.variables()),
        user: user.map(|user| user.ids.clone()),
        cwd: sandbox.path().to_owned(),
        stdin,
        stdout: sandbox.stdout(),
        stderr: sandbox.stderr(),
        done: sandbox.done(),
        time_limit_ms: time_limit.map(whole_ms),
        grace_ms: whole_ms(grace),
        lease_ms,
        leased_at_ms,
        open_files: open_files::of_children(),
    }
}

/// The program's whole environment. The spec cannot override Baton's variables: one of them identifies the program.
fn environment(
    worker: impl Fn(&str) -> Option<String>,
    vars: BTreeMap<String, String>,
    own: [(String, String); 3],
) -> BTreeMap<String, String> {
    let inherited = INHERITED.iter().filter_map(|&name| Some((name.to_owned(), worker(name)?)));
    inherited.chain(vars).chain(own).collect()
}

fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_inherits_few_variables_and_the_spec_overrides_them() {
        let worker = |name: &str| Some(format!("worker's {name}"));
        let vars = BTreeMap::from([("HOME".to_owned(), "/spec".to_owned()), (MARK.to_owned(), "forged".to_owned())]);
        let own =
            [("BATON_PID", "1"), ("BATON_TRY", "2"), (MARK, "/sandbox")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let environment = environment(worker, vars, own);
        assert_eq!(environment["PATH"], "worker's PATH");
        assert_eq!(environment["HOME"], "/spec");
        assert_eq!(environment[MARK], "/sandbox");
        assert_eq!(environment.len(), INHERITED.len() + 3);
    }
}
