//! What became of it: how long the fleet needed after each fault, what it takes, and every promise that was broken.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use baton_tests::history::History;
use tokio::time::sleep;

use crate::fleet::Fleet;
use crate::load::{Due, Load};

/// Within so long of a fault's end the fleet goes on.
const GOES_ON: Duration = Duration::from_secs(10);

/// How long after that it is still waited for, to say how long it took.
const WAITED: Duration = Duration::from_secs(60);

/// Within so long of the last fault all has ended.
const ALL_ENDED: Duration = Duration::from_secs(180);

/// What a worker takes of its host.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    memory_kb: u64,
    threads: usize,
    files: usize,
    connections: usize,
}

impl Taken {
    /// Whether this is more than that, beyond what comes and goes with the load of a moment.
    fn exceeds(self, first: Self) -> bool {
        const HANDLES: usize = 8;
        const MEMORY_KB: u64 = 5 * 1024;
        self.memory_kb > first.memory_kb * 5 / 4 + MEMORY_KB
            || self.threads > first.threads + HANDLES
            || self.files > first.files + HANDLES
            || self.connections > first.connections + HANDLES
    }
}

#[derive(Default)]
pub(crate) struct Report {
    /// By fault: how often, and the longest time until the fleet went on.
    survived: BTreeMap<String, (u32, Duration)>,
    taken: Vec<(Taken, Taken)>,
    ended: BTreeMap<String, u64>,
    n_refused: usize,
    n_versions: usize,
    violations: Vec<String>,
}

impl Report {
    pub(crate) fn is_good(&self) -> bool {
        self.violations.is_empty()
    }

    /// Waits until the fleet goes on after a fault.
    pub(crate) async fn goes_on(&mut self, fleet: &Fleet, fault: &str) {
        let before = fleet.progress();
        let since = Instant::now();
        while fleet.progress() == before && since.elapsed() < WAITED {
            sleep(Duration::from_millis(50)).await;
        }
        let elapsed = since.elapsed();
        if elapsed > GOES_ON {
            self.violations.push(format!("after {fault} nothing went on for {:.1} s", elapsed.as_secs_f64()));
        }
        let (count, longest) = self.survived.entry(fault.to_owned()).or_default();
        *count += 1;
        *longest = elapsed.max(*longest);
    }

    /// What the workers take once they are warm.
    pub(crate) async fn warm_up(&mut self, fleet: &Fleet, time: Duration) {
        self.goes_on(fleet, "the start").await;
        sleep(time).await;
        for idx in 0..fleet.len() {
            self.taken.push((taken(fleet.seat(idx).await.worker.os_pid()), Taken::default()));
        }
    }

    /// What they take now; more than at first is a leak, if nothing was thrown at them.
    pub(crate) async fn cool_down(&mut self, fleet: &Fleet, is_quiet: bool) {
        for idx in 0..fleet.len() {
            let last = taken(fleet.seat(idx).await.worker.os_pid());
            let first = self.taken[idx].0;
            self.taken[idx].1 = last;
            if is_quiet && last.exceeds(first) {
                self.violations.push(format!("I6: a worker takes {last:?} and took {first:?}"));
            }
        }
    }

    /// Waits for the end of all that was accepted, and looks for everything that is not as it should be.
    pub(crate) async fn judge(&mut self, fleet: &Fleet, load: &Load) {
        let since = Instant::now();
        let rest = loop {
            fleet.revive().await;
            let rest =
                fleet.scene.sql("SELECT place, state, count(*) FROM process WHERE place <> 3 GROUP BY 1, 2").await;
            if rest.is_empty() || since.elapsed() > ALL_ENDED {
                break rest;
            }
            sleep(Duration::from_millis(500)).await;
        };
        if !rest.is_empty() {
            self.violations.push(format!("I1, I5: not ended (place|state|count): {}", rest.trim().replace('\n', ", ")));
        }
        let (accepted, asked) = load.book(|book| (book.accepted.clone(), book.asked.clone()));
        self.n_refused = load.book(|book| book.n_refused);
        let pids = accepted.iter().map(|(pid, _)| pid.clone()).collect::<Vec<_>>();
        let history = History::read(&fleet.scene, vec![]).await.accepting(&pids);
        self.violations.extend(history.violations());
        for process in history.processes.values() {
            self.n_versions += process.versions.len();
            *self.ended.entry(process.state.clone()).or_default() += 1;
        }
        for (pid, due) in &accepted {
            let due = match due {
                Due::Finished => "finished",
                Due::Excepted => "excepted",
                Due::Killed => "killed",
            };
            let state = history.processes.get(pid).map_or("missing", |process| process.state.as_str());
            if state != due {
                self.violations.push(format!("{pid} should be {due} and is {state}"));
            }
        }
        for (pid, verb) in asked {
            let is_there = history
                .processes
                .get(&pid)
                .is_some_and(|process| process.events.iter().any(|event| event.what == verb));
            if !is_there {
                self.violations.push(format!("I7: {verb} of {pid} was confirmed, and nobody knows of it"));
            }
        }
        for idx in 0..fleet.len() {
            let log = fleet.seat(idx).await.worker.log();
            self.violations
                .extend(log.lines().filter(|line| line.contains("panicked")).map(|line| format!("panic: {line}")));
        }
    }
}

/// What a process takes now.
fn taken(os_pid: u32) -> Taken {
    let status = std::fs::read_to_string(format!("/proc/{os_pid}/status")).unwrap_or_default();
    let number = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let links = std::fs::read_dir(format!("/proc/{os_pid}/fd")).map_or(vec![], |files| {
        files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok()).collect::<Vec<_>>()
    });
    Taken {
        memory_kb: number("VmRSS:").unwrap_or(0),
        threads: usize::try_from(number("Threads:").unwrap_or(0)).unwrap_or(0),
        files: links.len(),
        connections: links.iter().filter(|link| link.to_string_lossy().starts_with("socket:")).count(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "\n{:<44} {:>6} {:>20}", "fault", "times", "went on after, at most")?;
        for (fault, (count, longest)) in &self.survived {
            writeln!(out, "{fault:<44} {count:>6} {:>18.1} s", longest.as_secs_f64())?;
        }
        writeln!(out, "\n{:<8} {:>20} {:>16} {:>16} {:>16}", "worker", "memory MB", "threads", "files", "sockets")?;
        for (idx, (first, last)) in self.taken.iter().enumerate() {
            let pair = |first: u64, last: u64| format!("{first} -> {last}");
            writeln!(
                out,
                "w{:<7} {:>20} {:>16} {:>16} {:>16}",
                idx + 1,
                format!("{:.1} -> {:.1}", kb_as_mb(first.memory_kb), kb_as_mb(last.memory_kb)),
                pair(first.threads as u64, last.threads as u64),
                pair(first.files as u64, last.files as u64),
                pair(first.connections as u64, last.connections as u64),
            )?;
        }
        let ended = self.ended.iter().map(|(state, count)| format!("{count} {state}")).collect::<Vec<_>>().join(", ");
        writeln!(out, "\nprocesses: {ended}; commands that were refused: {}", self.n_refused)?;
        writeln!(out, "versions of rows that were judged: {}", self.n_versions)?;
        match self.violations.len() {
            0 => writeln!(out, "\nverdict: every promise was kept"),
            count => {
                writeln!(out, "\nverdict: {count} promises BROKEN")?;
                self.violations.iter().take(40).try_for_each(|violation| writeln!(out, "  {violation}"))
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn kb_as_mb(kb: u64) -> f64 {
    kb as f64 / 1024.0
}
