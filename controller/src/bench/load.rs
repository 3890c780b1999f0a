//! Measures how many processes per second the fleet runs when all are submitted at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_common::store::measure::Sums;
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use serde_json::json;

use super::cost::{self, Reading};
use super::fleet::Fleet;
use super::limits::{self, Combined, Limits};
use super::{Bench, Report, Times, noop, per_second, process, rounded};
use crate::cli::bench::{AdvancesArguments, FleetArguments, ThroughputArguments};
use crate::failure::Failure;
use crate::output;

/// Number of processes that run before the measurement, to open connections, prepare statements and fill caches.
const WARM_UP: u32 = 500;

/// Longest delay until PostgreSQL adds the statistics of a connection that is in use or has ended.
const STATISTICS_PAUSE: Duration = Duration::from_millis(1_100);

/// Pause between two queries whether all have ended. The measured time comes from the timestamps in the database.
const LOOK: Duration = Duration::from_millis(100);

/// Time limit without progress.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(120);

/// Duration of each point of the limits when they accompany another benchmark.
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

pub(super) async fn limits_of(
    bench: &Bench,
    fleet: &FleetArguments,
    combined: Option<Combined>,
) -> Result<Option<Limits>, Failure> {
    if fleet.no_limits {
        return Ok(None);
    }
    Box::pin(limits::measure(bench, EACH, combined)).await.map(Some)
}

/// Runs the processes and checks that each one succeeded in one attempt.
async fn load(
    bench: &Bench,
    arguments: &FleetArguments,
    count: u32,
    make: impl Fn(&str) -> NewProcess,
) -> Result<Report, Failure> {
    let fleet = Fleet::gather(bench, arguments).await?;
    // A separate store, because its connections must end before the rows are counted.
    let store = Store::open(Location::parse(&bench.database_url)?).await?;
    let rows_before = if fleet.is_own() { Some(rows_written(bench).await?) } else { None };
    let warm_up = format!("{}-warm-up", bench.session());
    let n_warm_up = WARM_UP.min(count);
    pass(bench, &store, n_warm_up, || make(&warm_up)).await?;
    output::note(&format!("processes: {count}; workers: {}", fleet.len()));
    let session = bench.session();
    let before = Reading::take(bench, &fleet).await?;
    pass(bench, &store, count, || make(&session)).await?;
    let after = Reading::take(bench, &fleet).await?;
    let workers = fleet.len();
    fleet.stop().await?;
    store.close().await;
    let mut cost = before.until(&after, u64::from(count));
    if let Some(rows_before) = rows_before {
        // The connections of workers report reliably only at their end, so the warm-up is included in the count.
        let n_rows = rows_written(bench).await?.saturating_sub(rows_before);
        cost.per_process.rows = Some(cost::ratio(n_rows, u64::from(count + n_warm_up)));
    }
    let sums = bench.store.watcher().await?.sums(&session).await?;
    let times_ms = times_of(&sums);
    if sums.good != u64::from(count) {
        return Err(Failure::failed(format!(
            "{} of {count} processes succeeded in one recorded attempt; `baton list --session {session}` shows the \
             others",
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

/// Returns the rows written by all ended connections and by this one.
async fn rows_written(bench: &Bench) -> Result<u64, Failure> {
    tokio::time::sleep(STATISTICS_PAUSE).await;
    // The end of this transaction reports the statistics of this connection.
    bench.store.meters().await?;
    Ok(bench.store.meters().await?.rows)
}

/// Returns how long processes waited and ran, by the clock of the database.
pub(super) fn times_of(sums: &Sums) -> BTreeMap<&'static str, Times> {
    let times = |micros: &[i64]| {
        Times::of(micros.iter().map(|micros| Duration::from_micros((*micros).max(0).cast_unsigned())).collect())
    };
    BTreeMap::from([("accepted_to_claimed", times(&sums.waits_us)), ("claimed_to_ended", times(&sums.works_us))])
}

/// Submits processes and waits until the queue is empty.
pub(super) async fn pass(
    bench: &Bench,
    store: &Store,
    count: u32,
    make: impl Fn() -> NewProcess,
) -> Result<(), Failure> {
    bench.submit(store, count, make).await?;
    let started = Instant::now();
    while store.is_busy(&bench.queue).await? {
        if started.elapsed() > STALL_LIMIT {
            return Err(Failure::failed(format!("not all processes ended within {} s", STALL_LIMIT.as_secs())));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
