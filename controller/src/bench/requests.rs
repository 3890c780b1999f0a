//! Measures requests while many processes are held: to one process by RPC, and to all by a broadcast.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_common::id::{Pid, RequestId};
use baton_common::message::{Control, Effect};
use baton_common::select::Select;
use baton_common::state::{Desired, Place};
use baton_common::store::Store;
use baton_common::store::control::Request;

use super::fleet::Fleet;
use super::{Bench, Report, Times, per_second, rounded};
use crate::cli::bench::ControlBenchArguments;
use crate::client::whoami;
use crate::commands::control::ask;
use crate::failure::Failure;
use crate::output;

/// Pause between two queries whether the request is applied to all.
const LOOK: Duration = Duration::from_millis(10);

/// Time limit until a request is applied to all.
const OBEY_LIMIT: Duration = Duration::from_secs(120);

pub(super) async fn run(bench: &Bench, arguments: &ControlBenchArguments) -> Result<Report, Failure> {
    let fleet = Fleet::gather(bench, &arguments.fleet.holding(arguments.count, 1).map_err(Failure::usage)?).await?;
    output::note(&format!("held processes: {}; workers: {}", arguments.count, fleet.len()));
    let pids = bench.hold(arguments.count).await?;
    let mut times = BTreeMap::new();
    let started = Instant::now();
    for (verb, name) in [(Desired::Pause, "rpc_pause"), (Desired::Run, "rpc_play")] {
        times.insert(name, Times::of(one_by_one(bench, &pids, arguments.requests, verb).await?));
    }
    let elapsed = started.elapsed();
    bench.until(Place::Held, arguments.count, OBEY_LIMIT, LOOK).await?;
    for (verb, name, place) in
        [(Desired::Pause, "broadcast_pause", Place::Parked), (Desired::Run, "broadcast_play", Place::Held)]
    {
        let started = Instant::now();
        to_all(bench, verb).await?;
        bench.until(place, arguments.count, OBEY_LIMIT, LOOK).await?;
        times.insert(name, Times::of(vec![started.elapsed()]));
    }
    let report = Report {
        bench: "control",
        of: "live processes",
        count: u64::from(arguments.count),
        workers: fleet.len(),
        seconds: rounded(elapsed.as_secs_f64()),
        rate_per_s: per_second(u64::from(2 * arguments.requests), elapsed),
        times_ms: times,
        ..Report::default()
    };
    fleet.stop().await?;
    Ok(report)
}

/// Kills the processes in the database, without notifying their holders.
pub(super) async fn kill(store: &Store, pids: &[Pid]) -> Result<(), Failure> {
    let select = Select::of(pids.to_vec());
    let request = Request { force: true, ..Request::new(Desired::Kill, whoami()) };
    if let Some(mut many) = store.control_many(RequestId::generate(), &select, &request).await? {
        while many.next().await?.is_some() {}
    }
    Ok(())
}

/// Returns for each process the time from the request to the answer with its effect.
async fn one_by_one(bench: &Bench, pids: &[Pid], requests: u32, verb: Desired) -> Result<Vec<Duration>, Failure> {
    let request = Request::new(verb, whoami());
    let mut times = Vec::new();
    for pid in pids.iter().take(requests as usize) {
        let started = Instant::now();
        let done = ask(&bench.client, Some(&bench.communicator), *pid, &request).await?;
        times.push(started.elapsed());
        // On a busy machine, a holder may answer before the request is applied.
        if ![Effect::applied(verb), Effect::pending(verb)].contains(&done.effect) {
            return Err(Failure::failed(format!(
                "{pid}: unexpected effect of `{}`: {}",
                verb.verb(),
                done.effect.word()
            )));
        }
    }
    Ok(times)
}

async fn to_all(bench: &Bench, verb: Desired) -> Result<(), Failure> {
    let select = Select { session: Some(bench.session()), ..Select::default() };
    let request = Request::new(verb, whoami());
    if let Some(mut many) = bench.store.control_many(RequestId::generate(), &select, &request).await? {
        while let Some(page) = many.next().await? {
            bench.client.follow(&page).await;
        }
    }
    // The answers are not awaited; the rows show when the request is applied.
    bench.communicator.broadcast(Control::Obey { verb, select, reason: None }).await?;
    Ok(())
}
