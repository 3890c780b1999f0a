//! Processes that do nothing but advance: how many a second, and how long one takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_common::store::bare::BareTables;
use baton_common::store::measure::Sums;
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use serde_json::json;

use super::cost::{self, Cost, Reading};
use super::fleet::Fleet;
use super::limits::{self, Combined, Limits, Path, PathTimes};
use super::{Bench, Report, Times, noop, per_second, process, rounded};
use crate::cli::bench::{AdvancesArguments, FleetArguments, LatencyArguments, ThroughputArguments};
use crate::failure::Failure;
use crate::output;

/// Processes that go through before anything is measured: connections open, statements are prepared, caches fill.
const WARM_UP: u32 = 500;

/// How long a connection of PostgreSQL keeps, at most, what its statistics shall know, if it is used or has ended.
const STATISTICS_PAUSE: Duration = Duration::from_millis(1_100);

/// How often it is looked at whether all have ended; the database's times decide how long that took.
const LOOK: Duration = Duration::from_millis(100);

/// By how much the first look at the next process comes earlier or later than that at the last.
const STEP: Duration = Duration::from_micros(20);

/// Processes between two measurements of the limits of one that is alone, and how long each of these takes. A machine that
/// others use as well may be half as fast a second later, and then both are.
const PART: u32 = 50;
const PATH_EACH: Duration = Duration::from_millis(100);

/// How long nothing may happen.
const STALL_LIMIT: Duration = Duration::from_secs(120);

/// For how long each point of the limits is measured beside another benchmark.
const EACH: Duration = Duration::from_secs(1);

pub(super) async fn throughput(bench: &Bench, arguments: &ThroughputArguments) -> Result<Report, Failure> {
    let combined = Combined { count: arguments.count, steps: 1 };
    let limits = limits_of(bench, &arguments.fleet, Some(combined)).await?;
    let make = |session: &str| noop(&bench.queue, session);
    let mut report = Box::pin(load(bench, &arguments.fleet, arguments.count, make)).await?;
    report.bench = "throughput";
    report.of = "processes of one advance";
    if let Some(limits) = limits {
        report.ratios.insert("messages_per_s", rounded(report.rate_per_s / limits.messages_per_s));
        if let Some(combined) = limits.combined_per_s {
            report.ratios.insert("combined_per_s", rounded(report.rate_per_s / combined));
        }
        report.limits = Some(limits);
    }
    Ok(report)
}

pub(super) async fn advances(bench: &Bench, arguments: &AdvancesArguments) -> Result<Report, Failure> {
    let combined = Combined { count: arguments.count, steps: arguments.steps };
    let limits = limits_of(bench, &arguments.fleet, Some(combined)).await?;
    let with = json!({"advances": arguments.steps});
    let make = |session: &str| process(&bench.queue, session, "baton.count", with.clone());
    let mut report = Box::pin(load(bench, &arguments.fleet, arguments.count, make)).await?;
    report.bench = "advances";
    report.of = "durable advances";
    let processes_per_s = report.rate_per_s;
    report.count *= u64::from(arguments.steps);
    report.rate_per_s = rounded(processes_per_s * f64::from(arguments.steps));
    if let Some(limits) = limits {
        report.ratios.insert("advances_to_rows_per_s", rounded(report.rate_per_s / limits.rows_per_s));
        if let Some(rows) = report.per_process.as_ref().and_then(|cost| cost.rows) {
            report.ratios.insert("rows_per_s", rounded(processes_per_s * rows / limits.rows_per_s));
        }
        if let Some(combined) = limits.combined_per_s {
            report.ratios.insert("combined_per_s", rounded(processes_per_s / combined));
        }
        report.limits = Some(limits);
    }
    Ok(report)
}

async fn limits_of(
    bench: &Bench,
    fleet: &FleetArguments,
    combined: Option<Combined>,
) -> Result<Option<Limits>, Failure> {
    if fleet.no_limits {
        return Ok(None);
    }
    Box::pin(limits::measure(bench, EACH, combined)).await.map(Some)
}

/// Runs processes through, and checks that each has come out as it should.
async fn load(
    bench: &Bench,
    arguments: &FleetArguments,
    count: u32,
    make: impl Fn(&str) -> NewProcess,
) -> Result<Report, Failure> {
    let fleet = Fleet::gather(bench, arguments).await?;
    // Their own connections end before the rows are counted.
    let store = Store::open(Location::parse(&bench.database_url)?).await?;
    let rows_before = if fleet.is_own() { Some(rows_written(bench).await?) } else { None };
    let warm_up = format!("{}-warm-up", bench.session());
    let n_warm_up = WARM_UP.min(count);
    pass(bench, &store, n_warm_up, || make(&warm_up)).await?;
    output::note(&format!("{count} processes, {} workers", fleet.len()));
    let session = bench.session();
    let before = Reading::take(bench, &fleet).await?;
    pass(bench, &store, count, || make(&session)).await?;
    let after = Reading::take(bench, &fleet).await?;
    let workers = fleet.len();
    fleet.stop().await?;
    store.close().await;
    let mut cost = before.until(&after, u64::from(count));
    if let Some(rows_before) = rows_before {
        // The lanes of a worker have reported nothing for sure before they end, so those that warmed up are counted as well.
        let n_rows = rows_written(bench).await?.saturating_sub(rows_before);
        cost.per_process.rows = Some(cost::ratio(n_rows, u64::from(count + n_warm_up)));
    }
    let sums = bench.store.watcher().await?.sums(&session).await?;
    let times_ms = times_of(&sums);
    if sums.good != u64::from(count) {
        return Err(Failure::failed(format!(
            "{} of {count} have ended well, in one attempt that has its row; `baton list --session {session}` \
             shows the others",
            sums.good
        )));
    }
    let seconds = Duration::from_micros(sums.span_us.cast_unsigned());
    Ok(Report {
        count: u64::from(count),
        workers,
        seconds: rounded(seconds.as_secs_f64()),
        rate_per_s: per_second(u64::from(count), seconds),
        times_ms,
        per_process: Some(cost.per_process),
        cpu_seconds: cost.cpu,
        ..Report::default()
    })
}

/// Rows written by all connections that have ended, and by that which asks.
async fn rows_written(bench: &Bench) -> Result<u64, Failure> {
    tokio::time::sleep(STATISTICS_PAUSE).await;
    // By this it reports, with the end of the transaction.
    bench.store.meters().await?;
    Ok(bench.store.meters().await?.rows)
}

/// A pause that is shorter than the timers of the runtime know.
#[expect(clippy::disallowed_methods, reason = "the thread of the command has nothing else to do")]
fn leave_alone(pause: Duration) {
    std::thread::sleep(pause);
}

/// How long processes have waited and worked, by the database's clock.
fn times_of(sums: &Sums) -> BTreeMap<&'static str, Times> {
    let times = |micros: &[i64]| {
        Times::of(micros.iter().map(|micros| Duration::from_micros((*micros).max(0).cast_unsigned())).collect())
    };
    BTreeMap::from([("accepted_to_claimed", times(&sums.waits_us)), ("claimed_to_ended", times(&sums.works_us))])
}

/// Submits, and waits until nothing of the queue is left.
async fn pass(bench: &Bench, store: &Store, count: u32, make: impl Fn() -> NewProcess) -> Result<(), Failure> {
    bench.submit(store, count, make).await?;
    let started = Instant::now();
    while store.is_busy(&bench.queue).await? {
        if started.elapsed() > STALL_LIMIT {
            return Err(Failure::failed(format!("not all have ended within {} s", STALL_LIMIT.as_secs())));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

pub(super) async fn latency(bench: &Bench, arguments: &LatencyArguments) -> Result<Report, Failure> {
    let limits = limits_of(bench, &arguments.fleet, None).await?;
    let fleet = Fleet::gather(bench, &arguments.fleet).await?;
    let warm_up = format!("{}-warm-up", bench.session());
    pass(bench, &bench.store, 20, || noop(&bench.queue, &warm_up)).await?;
    let tables = if limits.is_some() { Some(bench.bare_tables().await?) } else { None };
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

/// What became of processes of which each was alone.
struct OneByOne {
    /// From before it was submitted until its end was known.
    lives: Vec<Duration>,
    cost: Cost,
    path: Option<PathTimes>,
}

/// Runs one after the other, and measures the limits of one, if there are tables for that, between parts of them.
async fn one_by_one(
    bench: &Bench,
    fleet: &Fleet,
    tables: Option<&BareTables>,
    count: u32,
) -> Result<OneByOne, Failure> {
    let session = bench.session();
    let watcher = bench.store.watcher().await?;
    let mut path = match tables {
        Some(tables) => Some(Path::open(bench, tables).await?),
        None => None,
    };
    let (mut lives, mut costs) = (Vec::new(), Vec::new());
    // When a process is looked at first. Each look takes processor time from the broker, the worker and the database, and
    // one that comes late is measured as well; so it comes when half of them have ended.
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
                    return Err(Failure::failed(format!("{pid} has not ended within {} s", STALL_LIMIT.as_secs())));
                }
            }
            lives.push(one.elapsed());
            first_look = if looks == 1 { first_look.saturating_sub(STEP) } else { first_look + STEP };
        }
        costs.push(before.until(&Reading::take(bench, fleet).await?, u64::from(n_part)));
    }
    let path = match path {
        Some(path) => Some(path.close().await?),
        None => None,
    };
    Ok(OneByOne { lives, cost: Cost::of_parts(&costs), path })
}
