//! Waiting for processes, with progress on the terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use baton_common::id::Pid;
use baton_common::state::State;
use baton_common::store::Store;
use baton_common::store::query::{Filter, Summary};
use baton_worker::cli::exit;
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::absent;
use crate::failure::Failure;
use crate::output;

/// First and longest pause between two looks at the database.
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// Processes that one query asks for.
const PAGE: usize = 1_000;

/// Waits until all have ended; gives them back as they are then. `say` is called for each change of one.
///
/// # Errors
/// [`exit::NOT_FOUND`] when one is absent, [`exit::WAIT_TIMED_OUT`] after the limit.
pub(crate) async fn wait_ended(
    store: &Store,
    pids: &[Pid],
    limit: Option<Duration>,
    mut say: impl FnMut(&Summary),
) -> Result<Vec<Summary>, Failure> {
    let started = Instant::now();
    let mut pending = pids.to_vec();
    let mut ended = Vec::with_capacity(pids.len());
    let mut words = std::collections::HashMap::new();
    let mut pause = LOOK_MIN;
    let bar = bar(pids.len());
    loop {
        let mut still = Vec::new();
        for page in pending.chunks(PAGE) {
            let filter = Filter::of(page.to_vec());
            let rows = store.list(&filter).await?;
            if let Some(missing) = page.iter().find(|pid| !rows.iter().any(|row| row.pid == **pid)) {
                return Err(absent(*missing));
            }
            for row in rows {
                let word = (row.state, row.advances, row.attempt);
                if words.insert(row.pid, word) != Some(word) {
                    bar.suspend(|| say(&row));
                    pause = LOOK_MIN;
                }
                if row.state.is_final() {
                    bar.inc(1);
                    ended.push(row);
                } else {
                    still.push(row.pid);
                }
            }
        }
        pending = still;
        if pending.is_empty() {
            bar.finish_and_clear();
            return Ok(ended);
        }
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            bar.finish_and_clear();
            return Err(Failure::new(
                exit::WAIT_TIMED_OUT,
                format!(
                    "{} of {} have not ended within {}",
                    pending.len(),
                    pids.len(),
                    output::seconds(started.elapsed())
                ),
            )
            .with_remedy("they go on; `baton watch` waits again"));
        }
        let rest = limit.map_or(pause, |limit| limit.saturating_sub(started.elapsed()).min(pause));
        tokio::time::sleep(rest).await;
        pause = (pause * 2).min(LOOK_MAX);
    }
}

/// The exit code for processes that have ended.
pub(crate) fn exit_code(ended: &[Summary]) -> u8 {
    let failed = ended.iter().filter(|summary| !is_ok(summary)).count();
    match failed {
        0 => exit::OK,
        _ if failed == ended.len() => exit::PROCESS_FAILED,
        _ => exit::SOME_FAILED,
    }
}

/// Whether it came to a good end.
pub(crate) fn is_ok(summary: &Summary) -> bool {
    summary.state == State::Finished && summary.outcome.as_ref().is_some_and(|outcome| outcome.ok)
}

/// A bar, on a terminal and for more than one.
fn bar(count: usize) -> ProgressBar {
    if count < 2 || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} ended, {elapsed}").expect("the template is right");
    ProgressBar::new(count as u64).with_style(style)
}
