//! The report: the recovery time after each fault, the resource usage, and every promise that was broken.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use baton_tests::history::History;
use tokio::time::sleep;

use crate::fleet::Fleet;
use crate::load::{Due, Load};

/// The fleet must make progress within this time after a fault.
const GOES_ON: Duration = Duration::from_secs(10);

/// How long to wait for progress in order to report the recovery time.
const WAITED: Duration = Duration::from_secs(60);

/// Everything must have ended within this time after the last fault.
const ALL_ENDED: Duration = Duration::from_secs(180);

/// The resource usage of a worker.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    memory_kb: u64,
    threads: usize,
    files: usize,
    connections: usize,
}

impl Taken {
    /// Whether the usage exceeds the first one by more than the load of a moment explains.
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
    /// By fault: the count, and the longest recovery time.
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

    /// Waits until the fleet makes progress after a fault.
    pub(crate) async fn goes_on(&mut self, fleet: &Fleet, fault: &str) {
        let before = fleet.progress();
        let since = Instant::now();
        while fleet.progress() == before && since.elapsed() < WAITED {
            sleep(Duration::from_millis(50)).await;
        }
        let elapsed = since.elapsed();
        if elapsed > GOES_ON {
            self.violations.push(format!("after {fault} there was no progress for {:.1} s", elapsed.as_secs_f64()));
        }
        let (count, longest) = self.survived.entry(fault.to_owned()).or_default();
        *count += 1;
        *longest = elapsed.max(*longest);
    }

    /// Records the resource usage of the workers once they are warm.
    pub(crate) async fn warm_up(&mut self, fleet: &Fleet, time: Duration) {
        self.goes_on(fleet, "the start").await;
        sleep(time).await;
        for idx in 0..fleet.len() {
            self.taken.push((taken(fleet.seat(idx).await.worker.os_pid()), Taken::default()));
        }
    }

    /// Records the resource usage at the end. Without faults, more than at first is a leak.
    pub(crate) async fn cool_down(&mut self, fleet: &Fleet, is_quiet: bool) {
        for idx in 0..fleet.len() {
            let last = taken(fleet.seat(idx).await.worker.os_pid());
            let first = self.taken[idx].0;
            self.taken[idx].1 = last;
            if is_quiet && last.exceeds(first) {
                self.violations.push(format!("I6: a worker leaks: it uses {last:?}, at first {first:?}"));
            }
        }
    }

    /// Waits until everything that was accepted has ended, and checks it for violations.
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
                self.violations.push(format!("I7: {verb} of {pid} was confirmed but is not in the history"));
            }
        }
        for idx in 0..fleet.len() {
            let log = fleet.seat(idx).await.worker.log();
            self.violations
                .extend(log.lines().filter(|line| line.contains("panicked")).map(|line| format!("panic: {line}")));
        }
    }
}

/// Returns the current resource usage of a process.
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
        writeln!(out, "\n{:<44} {:>6} {:>20}", "fault", "times", "longest recovery")?;
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
        writeln!(out, "\nprocesses: {ended}; failed commands: {}", self.n_refused)?;
        writeln!(out, "row versions checked: {}", self.n_versions)?;
        match self.violations.len() {
            0 => writeln!(out, "\nverdict: all promises kept"),
            count => {
                writeln!(out, "\nverdict: {count} violations of promises")?;
                self.violations.iter().take(40).try_for_each(|violation| writeln!(out, "  {violation}"))
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
fn kb_as_mb(kb: u64) -> f64 {
    kb as f64 / 1024.0
}
