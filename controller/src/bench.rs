//! `baton bench`: what this installation can do at best, what Baton makes of it, and what that costs.

mod cost;
mod cpu;
mod fleet;
mod latency;
mod limits;
mod load;
mod recover;
mod requests;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_common::communicator::Communicator;
use baton_common::communicator::baseline::{self, BaselineQueue};
use baton_common::exit;
use baton_common::id::Pid;
use baton_common::spec::{Spec, Work};
use baton_common::state::Place;
use baton_common::store::baseline::BaselineTables;
use baton_common::store::query::WorkerRow;
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use baton_common::telemetry::new_traceparent;
use serde::Serialize;
use serde_json::{Value, json};

use self::cost::PerProcess;
use self::limits::{Combined, Limits};
use crate::cli::bench::BenchCommand;
use crate::cli::{Global, Output};
use crate::client::{Client, whoami};
use crate::failure::Failure;
use crate::output;
use crate::submission::submit;

/// How long processes may take to be held before anything is asked of them, and how often that is looked at.
const HOLD_LIMIT: Duration = Duration::from_secs(300);
const HOLD_LOOK: Duration = Duration::from_millis(100);

/// What an advance that does nothing surely does not take.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// What every benchmark works with.
struct Bench {
    /// Tells this run's queues, session and schema from those of others.
    id: String,
    queue: String,
    client: Client,
    store: Store,
    communicator: Communicator,
    database_url: String,
    broker_urls: Vec<String>,
    /// Everything that it has submitted.
    submitted: Mutex<Vec<Pid>>,
}

/// What a benchmark has found. Times are in milliseconds, rates in things a second.
#[derive(Debug, Default, Serialize)]
struct Report {
    bench: &'static str,
    /// Of what there were `count`.
    of: &'static str,
    count: u64,
    workers: usize,
    seconds: f64,
    rate_per_s: f64,
    /// Times by what they are of.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    times_ms: BTreeMap<&'static str, Times>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_process: Option<PerProcess>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    cpu_seconds: cpu::Seconds,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
    /// What was reached of each limit; for a time, how often the limit fits into it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    ratios: BTreeMap<&'static str, f64>,
}

/// A distribution of times, in milliseconds.
#[derive(Debug, Serialize)]
struct Times {
    count: usize,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

pub(crate) async fn run(global: &Global, command: BenchCommand) -> Result<u8, Failure> {
    let bench = Bench::open(global, &command).await?;
    let measured = match command {
        BenchCommand::Limits(arguments) => {
            let of = Combined { count: arguments.count, steps: arguments.steps };
            let combined = arguments.combined.then_some(of);
            limits::measure(&bench, arguments.each, combined)
                .await
                .map(|limits| json!({"bench": "limits", "limits": limits}))
        }
        BenchCommand::Throughput(arguments) => Box::pin(load::throughput(&bench, &arguments)).await.map(value),
        BenchCommand::Advances(arguments) => Box::pin(load::advances(&bench, &arguments)).await.map(value),
        BenchCommand::Latency(arguments) => Box::pin(latency::run(&bench, &arguments)).await.map(value),
        BenchCommand::Control(arguments) => Box::pin(requests::run(&bench, &arguments)).await.map(value),
        BenchCommand::Recover(arguments) => Box::pin(recover::run(&bench, &arguments)).await.map(value),
    };
    let cleaned = bench.clean_up().await;
    let measured = measured?;
    match global.output {
        Output::Json => output::print_json(&measured)?,
        Output::Table | Output::Ids => print_table(&measured)?,
    }
    cleaned?;
    Ok(exit::OK)
}

fn value(report: Report) -> Value {
    serde_json::to_value(report).expect("a report is plain data")
}

impl Bench {
    async fn open(global: &Global, command: &BenchCommand) -> Result<Self, Failure> {
        let resolved = global.connection.resolve()?;
        let remedy = "name both, with BATON_DATABASE_URL and BATON_BROKER_URL, in baton.toml, or by their options";
        let missing = |what: &str| Failure::usage(format!("a benchmark needs {what}")).with_remedy(remedy);
        let database_url = resolved.database_url.ok_or_else(|| missing("a database"))?;
        let location = Location::parse(&database_url)?;
        if matches!(location, Location::Sqlite(_)) {
            return Err(missing("PostgreSQL"));
        }
        let client = Client::open(global).await?;
        let store = client.store.clone();
        let Some(communicator) = client.broker().await.map_err(Failure::unreachable)?.cloned() else {
            return Err(missing("a broker"));
        };
        let pid = uuid::Uuid::from(Pid::generate()).simple().to_string();
        let id = pid[pid.len() - 8..].to_owned();
        let queue = match command.fleet() {
            Some(fleet) if fleet.workers == 0 => fleet.queue.clone(),
            Some(_) | None => format!("bench-{id}"),
        };
        Ok(Self {
            id,
            queue,
            client,
            store,
            communicator,
            database_url,
            broker_urls: resolved.broker_urls,
            submitted: Mutex::default(),
        })
    }

    /// The session of this run's processes.
    fn session(&self) -> String {
        format!("bench-{}", self.id)
    }

    async fn bare_queue(&self) -> Result<BaselineQueue, Failure> {
        Ok(BaselineQueue::declare(&self.broker_urls, &format!("baton.bench.{}", self.id)).await?)
    }

    /// Tables with nothing around them.
    async fn bare_tables(&self) -> Result<BaselineTables, Failure> {
        Ok(BaselineTables::create(&self.store, &format!("baton_bench_{}", self.id)).await?)
    }

    /// The workers that take what is told to the run's queue.
    async fn serving(&self) -> Result<Vec<WorkerRow>, Failure> {
        let rows = self.store.workers(&[], false).await?;
        Ok(rows.into_iter().filter(|row| row.takes_work() && row.serves(&self.queue)).collect())
    }

    /// Gives processes to the fleet as `baton submit` does.
    async fn submit(&self, store: &Store, count: u32, make: impl Fn() -> NewProcess) -> Result<(), Failure> {
        let told = submit(
            store,
            count,
            make,
            async |queued| self.client.publish(queued, true).await,
            |page| {
                self.submitted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(page.iter().map(|process| process.pid));
            },
        );
        if let Err(reason) = told.await? {
            // Recorded they are, and workers find them; but this is not what was to be measured.
            output::warn(&format!("the broker was not told of all ({reason}); the rate is not that of a sound broker"));
        }
        Ok(())
    }

    /// Has so many processes held, each between two advances for ever.
    async fn hold(&self, count: u32) -> Result<Vec<Pid>, Failure> {
        let pids = std::cell::RefCell::new(Vec::new());
        let with = json!({"advances": 1_000_000, "every": "1h", "stay": true});
        let make = || {
            let process = process(&self.queue, &self.session(), "baton.count", with.clone());
            pids.borrow_mut().push(process.pid);
            process
        };
        self.submit(&self.store, count, make).await?;
        self.until(Place::Held, count, HOLD_LIMIT, HOLD_LOOK).await?;
        // The last of them have yet to make their first advance.
        tokio::time::sleep(SETTLE_PAUSE).await;
        Ok(pids.into_inner())
    }

    /// Waits until so many of the run's processes are in this place.
    async fn until(&self, place: Place, count: u32, limit: Duration, look: Duration) -> Result<(), Failure> {
        let watcher = self.store.watcher().await?;
        let started = Instant::now();
        loop {
            let reached = watcher.count_in(&self.session(), place).await?;
            if reached == u64::from(count) {
                return Ok(());
            }
            if started.elapsed() > limit {
                let text = format!("{reached} of {count} are {} after {} s", place.word(), limit.as_secs());
                return Err(Failure::failed(text));
            }
            tokio::time::sleep(look).await;
        }
    }

    /// Removes what the run has made: its processes, and the queues if they were its own.
    async fn clean_up(self) -> Result<(), Failure> {
        let pids = self.submitted.into_inner().unwrap_or_else(PoisonError::into_inner);
        if self.store.erase(&pids).await? < pids.len() as u64 {
            // Its workers have stopped, or were killed if it failed: nobody has to be asked.
            requests::kill(&self.store, &pids).await?;
            self.store.erase(&pids).await?;
        }
        if self.queue == format!("bench-{}", self.id) {
            baseline::remove_task_queues(&self.broker_urls, &self.queue).await?;
        }
        self.client.close().await;
        Ok(())
    }
}

/// A process that ends at once.
fn noop(queue: &str, session: &str) -> NewProcess {
    process(queue, session, "baton.noop", json!({}))
}

fn process(queue: &str, session: &str, kind: &str, with: Value) -> NewProcess {
    let mut spec = Spec::new(Work::Call { name: kind.to_owned(), with });
    queue.clone_into(&mut spec.queue);
    spec.session = Some(session.to_owned());
    NewProcess {
        pid: Pid::generate(),
        spec,
        created_by: whoami(),
        traceparent: Some(new_traceparent()),
        reply_to: None,
        run_key: None,
    }
}

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: usize| {
            let idx = (times.len() * share / 100).min(times.len().saturating_sub(1));
            milliseconds(times.get(idx).copied().unwrap_or_default())
        };
        Self { count: times.len(), p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

fn median_ms(times: Vec<Duration>) -> f64 {
    Times::of(times).p50
}

fn milliseconds(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1e3)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn per_second(count: u64, time: Duration) -> f64 {
    rounded(count as f64 / time.as_secs_f64().max(1e-9))
}

/// To three decimals: a benchmark has no more to say.
fn rounded(number: f64) -> f64 {
    (number * 1e3).round() / 1e3
}

/// A line for each number, with the path to it.
fn print_table(value: &Value) -> Result<(), Failure> {
    let mut table = output::table(&["WHAT", "VALUE"]);
    let mut rows = Vec::new();
    flatten("", value, &mut rows);
    for (path, text) in rows {
        table.add_row([path, text]);
    }
    output::print(&table.to_string())
}

fn flatten(path: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&path, field, rows);
            }
        }
        Value::Null => rows.push((path.to_owned(), "unknown".to_owned())),
        Value::String(text) => rows.push((path.to_owned(), text.clone())),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) => rows.push((path.to_owned(), value.to_string())),
    }
}
