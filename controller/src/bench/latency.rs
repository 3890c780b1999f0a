//! Measures how long a process of one advance takes, with one process at a time.

use std::time::{Duration, Instant};

use super::baseline::database::BaselineTables;
use super::cost::{Cost, Reading};
use super::fleet::Fleet;
use super::limits::{Path, PathTimes};
use super::load::{STALL_LIMIT, limits_of, pass, times_of};
use super::{Bench, Report, Times, noop, per_second, rounded};
use crate::cli::bench::LatencyArguments;
use crate::failure::Failure;

/// Largest and smallest step by which the first query for a process moves. Steps shrink with the number of processes
/// (stochastic approximation, Robbins and Monro, 1951).
const STEP_MAX: Duration = Duration::from_millis(2);
const STEP_MIN: Duration = Duration::from_micros(20);

/// Number of processes between two measurements of the limits of a single process, and the duration of each measurement.
/// The speed of a shared machine may halve within a second; interleaving exposes both measurements to it.
const PART: u32 = 50;
const PATH_EACH: Duration = Duration::from_millis(100);

pub(super) async fn run(bench: &Bench, arguments: &LatencyArguments) -> Result<Report, Failure> {
    let limits = limits_of(bench, &arguments.fleet, None).await?;
    let fleet = Fleet::gather(bench, &arguments.fleet).await?;
    let warm_up = format!("{}-warm-up", bench.session());
    pass(bench, &bench.store, 20, || noop(&bench.queue, &warm_up)).await?;
    let tables = if limits.is_some() { Some(bench.baseline_tables().await?) } else { None };
    let measured = one_by_one(bench, &fleet, tables.as_ref(), arguments.count).await;
    if let Some(tables) = tables {
        tables.remove().await?;
    }
    let OneByOne { lives, cost, path } = measured?;
    let workers = fleet.len();
    fleet.stop().await?;
    let elapsed = lives.iter().sum();
    let mut report = Report {
        bench: "latency",
        of: "processes of one advance, one after the other",
        count: u64::from(arguments.count),
        workers,
        seconds: rounded(Duration::as_secs_f64(&elapsed)),
        rate_per_s: per_second(u64::from(arguments.count), elapsed),
        times_ms: times_of(&bench.store.watcher().await?.sums(&bench.session()).await?),
        per_process: Some(cost.per_process),
        cpu_seconds: cost.cpu,
        ..Report::default()
    };
    let lives = Times::of(lives);
    if let (Some(mut limits), Some(path)) = (limits, path) {
        report.ratios.insert("three_commits_and_a_confirm", rounded(lives.p50 / path.sum_ms()));
        limits.path = path;
        report.limits = Some(limits);
    }
    report.times_ms.insert("submitted_to_ended", lives);
    Ok(report)
}

/// Results of processes that ran one at a time.
struct OneByOne {
    /// Time from before the submission until the end was seen, for each process.
    lives: Vec<Duration>,
    cost: Cost,
    path: Option<PathTimes>,
}

/// Runs processes one after another. With tables, measures the limits of a single process in between.
async fn one_by_one(
    bench: &Bench,
    fleet: &Fleet,
    tables: Option<&BaselineTables>,
    count: u32,
) -> Result<OneByOne, Failure> {
    let session = bench.session();
    let watcher = bench.store.watcher().await?;
    let mut path = match tables {
        Some(tables) => Some(Path::open(bench, tables).await?),
        None => None,
    };
    let (mut lives, mut costs) = (Vec::new(), Vec::new());
    // Delay of the first query for a process. A query costs processor time of broker, worker and database, and a late query
    // adds to the measured time. The delay converges to where half of the processes have ended.
    let mut first_look = Duration::ZERO;
    for begun in (0..count).step_by(PART as usize) {
        let n_part = PART.min(count - begun);
        if let Some(path) = &mut path {
            path.measure(PATH_EACH).await?;
        }
        let before = Reading::take(bench, fleet).await?;
        for _ in 0..n_part {
            let process = noop(&bench.queue, &session);
            let pid = process.pid;
            let one = Instant::now();
            bench.submit(&bench.store, 1, || process.clone()).await?;
            leave_alone(first_look.saturating_sub(one.elapsed()));
            let mut looks = 1;
            while !watcher.has_ended(pid).await? {
                looks += 1;
                if one.elapsed() > STALL_LIMIT {
                    return Err(Failure::failed(format!("{pid} did not end within {} s", STALL_LIMIT.as_secs())));
                }
            }
            lives.push(one.elapsed());
            let step = (STEP_MAX / u32::try_from(lives.len()).unwrap_or(u32::MAX)).max(STEP_MIN);
            first_look = if looks == 1 { first_look.saturating_sub(step) } else { first_look + step };
        }
        costs.push(before.until(&Reading::take(bench, fleet).await?, u64::from(n_part)));
    }
    let path = match path {
        Some(path) => Some(path.close().await?),
        None => None,
    };
    Ok(OneByOne { lives, cost: Cost::of_parts(&costs), path })
}

/// Sleeps for less than the resolution of the runtime's timers.
#[expect(clippy::disallowed_methods, reason = "the thread of the command has nothing else to do")]
fn leave_alone(pause: Duration) {
    std::thread::sleep(pause);
}
