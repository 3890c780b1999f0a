//! `baton bench`: measures the limits of this installation, the performance of Baton, and its cost.

mod baseline;
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
use baton_common::communicator::removal::remove_task_queues;
use baton_common::exit;
use baton_common::id::Pid;
use baton_common::spec::{Spec, Work};
use baton_common::state::Place;
use baton_common::store::query::WorkerRow;
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use baton_common::telemetry::new_traceparent;
use serde::Serialize;
use serde_json::{Value, json};

use self::baseline::broker::BaselineQueue;
use self::baseline::database::BaselineTables;
use self::cost::PerProcess;
use self::limits::{Combined, Limits};
use crate::cli::bench::BenchCommand;
use crate::cli::{Global, Output};
use crate::client::{Client, whoami};
use crate::failure::Failure;
use crate::output;
use crate::submission::submit;

/// Time limit until all processes are held.
const HOLD_LIMIT: Duration = Duration::from_secs(300);

/// Pause between two queries for it.
const HOLD_LOOK: Duration = Duration::from_millis(100);

/// Longer than any advance without work takes.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// The environment of a benchmark.
struct Bench {
    /// Distinguishes the queues, session and schema of this run from those of others.
    id: String,
    queue: String,
    client: Client,
    store: Store,
    communicator: Communicator,
    database_url: String,
    broker_urls: Vec<String>,
    /// All processes submitted by this run.
    submitted: Mutex<Vec<Pid>>,
}

/// The result of a benchmark. Times are in milliseconds, rates are per second.
#[derive(Debug, Default, Serialize)]
struct Report {
    bench: &'static str,
    /// What `count` counts.
    of: &'static str,
    count: u64,
    workers: usize,
    seconds: f64,
    rate_per_s: f64,
    /// Distributions of times, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    times_ms: BTreeMap<&'static str, Times>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_process: Option<PerProcess>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    cpu_seconds: cpu::Seconds,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
    /// Ratio of each result to its limit.
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
        let remedy =
            "configure both: BATON_DATABASE_URL and BATON_BROKER_URL, baton.toml, or --database-url and --broker-url";
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

    /// Returns the session of the processes of this run.
    fn session(&self) -> String {
        format!("bench-{}", self.id)
    }

    async fn baseline_queue(&self) -> Result<BaselineQueue, Failure> {
        BaselineQueue::declare(&self.broker_urls, &format!("baton.bench.{}", self.id)).await
    }

    /// Creates the tables for the baseline.
    async fn baseline_tables(&self) -> Result<BaselineTables, Failure> {
        Ok(BaselineTables::create(&self.store, &format!("baton_bench_{}", self.id)).await?)
    }

    /// Returns the workers that claim from the queue of this run.
    async fn serving(&self) -> Result<Vec<WorkerRow>, Failure> {
        let rows = self.store.workers(&[], false).await?;
        Ok(rows.into_iter().filter(|row| row.takes_work() && row.serves(&self.queue)).collect())
    }

    /// Submits processes as `baton submit` does.
    async fn submit(&self, store: &Store, count: u32, make: impl Fn() -> NewProcess) -> Result<(), Failure> {
        let submitted = submit(
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
        if let Err(reason) = submitted.await? {
            // Workers find the processes in the database, but that is not what the benchmark measures.
            output::warn(&format!("not all processes were announced ({reason}); the measured rate is too low"));
        }
        Ok(())
    }

    /// Submits `count` processes that stay held between two advances, and waits until all are held.
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
        // The last processes may still be in their first advance.
        tokio::time::sleep(SETTLE_PAUSE).await;
        Ok(pids.into_inner())
    }

    /// Waits until `count` processes of this run are in this place.
    async fn until(&self, place: Place, count: u32, limit: Duration, look: Duration) -> Result<(), Failure> {
        let watcher = self.store.watcher().await?;
        let started = Instant::now();
        loop {
            let reached = watcher.count_in(&self.session(), place).await?;
            if reached == u64::from(count) {
                return Ok(());
            }
            if started.elapsed() > limit {
                let text = format!("{reached} of {count} processes were {} after {} s", place.word(), limit.as_secs());
                return Err(Failure::failed(text));
            }
            tokio::time::sleep(look).await;
        }
    }

    /// Removes the processes of this run, and its queues if it created them.
    async fn clean_up(self) -> Result<(), Failure> {
        let pids = self.submitted.into_inner().unwrap_or_else(PoisonError::into_inner);
        if self.store.erase(&pids).await? < pids.len() as u64 {
            // The workers have stopped, or were killed after a failure, so no worker has to be notified.
            requests::kill(&self.store, &pids).await?;
            self.store.erase(&pids).await?;
        }
        if self.queue == format!("bench-{}", self.id) {
            remove_task_queues(&self.broker_urls, &self.queue).await?;
        }
        self.client.close().await;
        Ok(())
    }
}

/// Returns a process that ends at once.
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

/// Rounds to three decimals, the precision of a benchmark.
fn rounded(number: f64) -> f64 {
    (number * 1e3).round() / 1e3
}

/// Prints one line for each number, with its path in the report.
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
