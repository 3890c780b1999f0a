//! Waits for processes to end, and shows progress on the terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use baton_common::exit;
use baton_common::id::Pid;
use baton_common::state::State;
use baton_common::store::Store;
use baton_common::store::query::{Filter, Summary};
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::absent;
use crate::failure::Failure;
use crate::output;

/// First and longest pause between two queries.
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// What is compared between two queries: state, advances and try number.
type Seen = (State, i64, i64);

/// Number of processes per query.
const PAGE: usize = 1_000;

/// How many processes have ended, and how many of them failed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    n_ended: usize,
    n_failed: usize,
}

/// Waits until all processes have ended. Calls `say` for each change of a process, the last time when it has ended, and
/// keeps only counts of ended processes.
///
/// # Errors
/// [`exit::NOT_FOUND`] if a process does not exist, [`exit::WAIT_TIMED_OUT`] after the limit.
pub(crate) async fn wait_ended(
    store: &Store,
    pids: &[Pid],
    limit: Option<Duration>,
    mut say: impl FnMut(&Summary),
) -> Result<Tally, Failure> {
    let started = Instant::now();
    let mut pending: Vec<(Pid, Option<Seen>)> = pids.iter().map(|pid| (*pid, None)).collect();
    let mut tally = Tally::default();
    let mut pause = LOOK_MIN;
    let bar = bar(pids.len());
    loop {
        let mut still = Vec::new();
        for page in pending.chunks(PAGE) {
            let filter = Filter::of(page.iter().map(|(pid, _)| *pid).collect());
            let rows = store.list(&filter).await?;
            let rows: HashMap<Pid, &Summary> = rows.iter().map(|row| (row.pid, row)).collect();
            for (pid, seen) in page {
                let row = rows.get(pid).ok_or_else(|| absent(*pid))?;
                let now = Some((row.state, row.advances, row.try_number));
                if *seen != now {
                    bar.suspend(|| say(row));
                    pause = LOOK_MIN;
                }
                if row.state.is_final() {
                    bar.inc(1);
                    tally.n_ended += 1;
                    tally.n_failed += usize::from(!is_ok(row));
                } else {
                    still.push((*pid, now));
                }
            }
        }
        pending = still;
        if pending.is_empty() {
            bar.finish_and_clear();
            return Ok(tally);
        }
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            bar.finish_and_clear();
            return Err(Failure::new(
                exit::WAIT_TIMED_OUT,
                format!(
                    "{} of {} processes did not end within {}",
                    pending.len(),
                    pids.len(),
                    output::seconds(started.elapsed())
                ),
            )
            .with_remedy("they continue; `baton watch` waits for them again"));
        }
        let rest = limit.map_or(pause, |limit| limit.saturating_sub(started.elapsed()).min(pause));
        tokio::time::sleep(rest).await;
        pause = (pause * 2).min(LOOK_MAX);
    }
}

impl Tally {
    /// Returns the exit code.
    pub(crate) fn exit_code(self) -> u8 {
        match self.n_failed {
            0 => exit::OK,
            n_failed if n_failed == self.n_ended => exit::PROCESS_FAILED,
            _ => exit::SOME_FAILED,
        }
    }
}

/// Returns whether the process succeeded.
pub(crate) fn is_ok(summary: &Summary) -> bool {
    summary.state == State::Finished && summary.outcome.as_ref().is_some_and(|outcome| outcome.ok)
}

/// Returns a progress bar, hidden for a single process and without a terminal.
fn bar(count: usize) -> ProgressBar {
    if count < 2 || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} ended, {elapsed}").expect("the template is right");
    ProgressBar::new(count as u64).with_style(style)
}
