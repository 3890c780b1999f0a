//! Measures how long it takes until other workers hold the processes of a killed worker.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_common::state::Place;

use super::fleet::Fleet;
use super::{Bench, Report, Times, per_second, rounded};
use crate::cli::bench::RecoverArguments;
use crate::failure::Failure;
use crate::output;

/// Pause between two queries for the places of the processes.
const LOOK: Duration = Duration::from_millis(10);

/// Time limit of the recovery: several leases.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);

pub(super) async fn run(bench: &Bench, arguments: &RecoverArguments) -> Result<Report, Failure> {
    let mut fleet = Fleet::gather(bench, &arguments.fleet.holding(arguments.count, 2).map_err(Failure::usage)?).await?;
    bench.hold(arguments.count).await?;
    let died = Instant::now();
    let (dead, orphans) = fleet.crash_busiest(bench).await?;
    let dead = dead.to_string();
    let held = async || {
        Ok::<_, Failure>(
            bench.store.workers(std::slice::from_ref(&dead), true).await?.first().map_or(0, |row| row.held),
        )
    };
    output::note(&format!(
        "held processes: {}; workers: {}; killed a worker with {orphans} processes",
        arguments.count,
        fleet.len()
    ));
    while held().await? > 0 {
        if died.elapsed() > RECOVERY_LIMIT {
            return Err(Failure::failed(format!(
                "the processes of the killed worker were not freed within {} s",
                RECOVERY_LIMIT.as_secs()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
    let freed = died.elapsed();
    bench.until(Place::Held, arguments.count, RECOVERY_LIMIT, LOOK).await?;
    let recovered = died.elapsed();
    let workers = fleet.len();
    fleet.stop().await?;
    Ok(Report {
        bench: "recover",
        of: "processes that a killed worker held",
        count: orphans.cast_unsigned(),
        workers,
        seconds: rounded(recovered.as_secs_f64()),
        rate_per_s: per_second(orphans.cast_unsigned(), recovered),
        times_ms: BTreeMap::from([
            ("killed_to_freed", Times::of(vec![freed])),
            ("killed_to_held", Times::of(vec![recovered])),
        ]),
        ..Report::default()
    })
}
