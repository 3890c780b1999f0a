//! Processes of every kind, and requests of operators, all the time and regardless of failed commands.

use std::sync::Mutex;
use std::time::Duration;

use baton_tests::dice::Dice;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::fleet::Fleet;

/// The number of processes that advance until they are killed at the end; they show that the fleet works.
const HEARTS: u32 = 20;

/// How a process has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Finished, by itself.
    Finished,
    /// Excepted, by itself.
    Excepted,
    /// Killed by a request at the end of the run.
    Killed,
}

/// The accepted processes, and the requests about them.
#[derive(Default)]
pub(crate) struct Book {
    /// Pids, each with the required end.
    pub(crate) accepted: Vec<(String, Due)>,
    /// Requests that the command reported as recorded: pid and verb.
    pub(crate) asked: Vec<(String, &'static str)>,
    /// The number of failed commands, for the report.
    pub(crate) n_refused: usize,
}

pub(crate) struct Load {
    dice: Dice,
    book: Mutex<Book>,
}

impl Load {
    pub(crate) fn new(dice: Dice) -> Self {
        Self { dice, book: Mutex::default() }
    }

    pub(crate) fn book<T>(&self, look: impl FnOnce(&mut Book) -> T) -> T {
        look(&mut self.book.lock().expect("no thread panics while it holds the lock"))
    }

    /// Submits processes until told to stop.
    pub(crate) async fn give(&self, fleet: &Fleet, stop: &CancellationToken) {
        let mut dice = self.dice.of(1);
        let witness = fleet.scene.path("witness").display().to_string();
        let counting = |advances: u64, every: &str| {
            format!("{{call: baton.count, with: {{advances: {advances}, every: {every}, witness: {witness}}}}}")
        };
        self.submit(fleet, &counting(100_000_000, "200ms"), HEARTS, Due::Killed).await;
        while !stop.is_cancelled() {
            let count = u32::try_from(1 + dice.next(8)).expect("few");
            match dice.next(6) {
                0 => self.submit(fleet, "call: baton.noop", count * 5, Due::Finished).await,
                1 => self.submit(fleet, &counting(3 + dice.next(20), "50ms"), count, Due::Finished).await,
                2 => self.submit(fleet, &counting(2 + dice.next(3), "1200ms"), count, Due::Finished).await,
                3 => self.submit(fleet, "script: 'sleep 0.3; echo done'", count, Due::Finished).await,
                4 => self.submit(fleet, "{call: baton.sleep, with: {for: 1500ms}}", count, Due::Finished).await,
                _ => {
                    let fails = "{call: baton.fail, retry: {max: 3, wait: 500ms}}";
                    self.submit(fleet, fails, 1, Due::Excepted).await;
                }
            }
            sleep(dice.time(100, 1_500)).await;
        }
    }

    async fn submit(&self, fleet: &Fleet, spec: &str, count: u32, due: Due) {
        let spec = fleet.scene.spec("chaos.yaml", spec).display().to_string();
        let output = fleet.scene.baton(&["submit", &spec, "--count", &count.to_string(), "-o", "ids"]).await;
        // Every printed pid was accepted, even if the command failed.
        let pids = output.stdout.lines().map(|pid| (pid.to_owned(), due)).collect::<Vec<_>>();
        self.book(|book| {
            book.n_refused += usize::from(output.code != 0);
            book.accepted.extend(pids);
        });
    }

    /// Sends `pause` and `play` to random processes until told to stop.
    pub(crate) async fn ask(&self, fleet: &Fleet, stop: &CancellationToken) {
        let mut dice = self.dice.of(2);
        let mut paused: Vec<String> = Vec::new();
        while !stop.is_cancelled() {
            sleep(dice.time(300, 2_000)).await;
            let pids = self.book(|book| book.accepted.iter().map(|(pid, _)| pid.clone()).collect::<Vec<_>>());
            if pids.is_empty() {
                continue;
            }
            match dice.next(8) {
                0..3 => {
                    // The last processes are likely not to have ended.
                    let recent = &pids[pids.len().saturating_sub(40)..];
                    let pid = dice.pick(recent).clone();
                    self.request(fleet, "pause", &pid).await;
                    paused.push(pid);
                }
                3..7 => {
                    if let Some(pid) = paused.pop() {
                        self.request(fleet, "play", &pid).await;
                    }
                }
                _ => {
                    for verb in ["pause", "play"] {
                        let output = fleet.scene.baton(&[verb, "--all", "--yes"]).await;
                        self.book(|book| book.n_refused += usize::from(output.code != 0));
                        sleep(dice.time(0, 1_000)).await;
                    }
                }
            }
        }
    }

    async fn request(&self, fleet: &Fleet, verb: &'static str, pid: &str) {
        let output = fleet.scene.baton(&[verb, pid, "-o", "json"]).await;
        let is_recorded = output.code == 0;
        // No request is recorded for a process that has ended.
        let has_ended = output.stdout.contains("finished") || output.stdout.contains("excepted");
        self.book(|book| {
            book.n_refused += usize::from(!is_recorded && !has_ended);
            if is_recorded && !has_ended {
                book.asked.push((pid.to_owned(), verb));
            }
        });
    }

    /// Plays what is paused, and kills the processes that would never end.
    pub(crate) async fn end(&self, fleet: &Fleet) {
        let hearts = self.book(|book| {
            let hearts = book.accepted.iter().filter(|(_, due)| *due == Due::Killed);
            hearts.map(|(pid, _)| pid.clone()).collect::<Vec<_>>()
        });
        for arguments in [vec!["play", "--fleet"], vec!["play", "--all", "--yes"]] {
            baton_tests::eventually("the fleet accepts requests", Duration::from_secs(60), async || {
                let output = fleet.scene.baton(&arguments).await;
                if output.code == 0 { Ok(()) } else { Err(output) }
            })
            .await;
        }
        let mut kill = vec!["kill"];
        kill.extend(hearts.iter().map(String::as_str));
        if !hearts.is_empty() {
            fleet.scene.baton(&kill).await;
        }
    }
}
