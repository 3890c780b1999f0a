//! Processes that do nothing but advance: how many a second, and how long one takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_common::store::measure::Sums;
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use serde_json::json;

use super::cost::Reading;
use super::fleet::Fleet;
use super::limits::{self, Combined, Limits};
use super::{Bench, Report, Times, noop, per_second, process, rounded};
use crate::cli::bench::{AdvancesArguments, FleetArguments, LatencyArguments, ThroughputArguments};
use crate::failure::Failure;
use crate::output;

/// Processes that go through before anything is measured: connections open, statements are prepared, caches fill.
const WARM_UP: u32 = 500;

/// How long a connection of PostgreSQL keeps what its statistics shall know, at least.
const STATISTICS_PAUSE: Duration = Duration::from_millis(1_100);

/// How often it is looked at whether all have ended; the database's times decide how long that took.
const LOOK: Duration = Duration::from_millis(100);

/// For how long one that was just told is not looked at: less than the commits and the confirm take. Whoever looks all the
/// time takes processor time from the broker, the worker and the database.
const LEAVE_ALONE: Duration = Duration::from_micros(1_000);

/// Pause between two looks after that.
const GLANCE: Duration = Duration::from_micros(50);

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
    let warm_up = format!("{}-warm-up", bench.session());
    pass(bench, &store, WARM_UP.min(count), || make(&warm_up)).await?;
    // What a connection has written it reports with its next transaction, but not twice within this time.
    tokio::time::sleep(STATISTICS_PAUSE).await;
    pass(bench, &store, 1, || make(&warm_up)).await?;
    output::note(&format!("{count} processes, {} workers", fleet.len()));
    let session = bench.session();
    let before = Reading::take(bench, &fleet).await?;
    pass(bench, &store, count, || make(&session)).await?;
    let after = Reading::take(bench, &fleet).await?;
    let (workers, is_own) = (fleet.len(), fleet.is_own());
    fleet.stop().await?;
    store.close().await;
    let mut cost = before.until(&after, u64::from(count));
    if is_own {
        cost.per_process.rows = Some(before.rows_until(&bench.store.meters().await?, u64::from(count)));
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
    let session = bench.session();
    let watcher = bench.store.watcher().await?;
    let before = Reading::take(bench, &fleet).await?;
    let started = Instant::now();
    let mut lives = Vec::new();
    for _ in 0..arguments.count {
        let process = noop(&bench.queue, &session);
        let pid = process.pid;
        let one = Instant::now();
        bench.submit(&bench.store, 1, || process.clone()).await?;
        leave_alone(LEAVE_ALONE);
        while !watcher.has_ended(pid).await? {
            leave_alone(GLANCE);
            if one.elapsed() > STALL_LIMIT {
                return Err(Failure::failed(format!("{pid} has not ended within {} s", STALL_LIMIT.as_secs())));
            }
        }
        lives.push(one.elapsed());
    }
    let elapsed = started.elapsed();
    let after = Reading::take(bench, &fleet).await?;
    let workers = fleet.len();
    fleet.stop().await?;
    let cost = before.until(&after, u64::from(arguments.count));
    let mut report = Report {
        bench: "latency",
        of: "processes of one advance, one after the other",
        count: u64::from(arguments.count),
        workers,
        seconds: rounded(elapsed.as_secs_f64()),
        rate_per_s: per_second(u64::from(arguments.count), elapsed),
        times_ms: times_of(&watcher.sums(&session).await?),
        per_process: Some(cost.per_process),
        cpu_seconds: cost.cpu,
        ..Report::default()
    };
    let lives = Times::of(lives);
    if let Some(limits) = limits {
        let path_ms = limits.accept_ms + limits.confirm_ms + limits.claim_ms + limits.end_ms;
        report.ratios.insert("three_commits_and_a_confirm", rounded(lives.p50 / path_ms));
        report.limits = Some(limits);
    }
    report.times_ms.insert("submitted_to_ended", lives);
    Ok(report)
}
