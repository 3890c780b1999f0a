//! `baton workers`: lists workers.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use baton_common::exit;
use baton_common::store::query::{Summary, WorkerRow, WorkerState};
use baton_common::store::worker::{BEAT, LEASE};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use crate::cli::{Global, Output, WorkersArguments};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, age, span};
use crate::overview::Overview;

/// Maximum number of processes that are shown for a worker: one screen.
const HELD_MAX: u32 = 20;

/// Clears the screen and moves the cursor to its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(crate) async fn run(global: &Global, arguments: WorkersArguments) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let first = Look::new(&client, &arguments).await?;
    if let Some(name) = arguments.names.iter().find(|name| !first.rows.iter().any(|(row, _)| is_called(row, name))) {
        let failure = Failure::new(exit::NOT_FOUND, format!("there is no worker {name}"));
        return Err(if arguments.all {
            failure
        } else {
            failure.with_remedy("`--all` includes workers that are gone")
        });
    }
    if !arguments.watch {
        first.print(global.output)?;
        return Ok(exit::OK);
    }
    tokio::select! {
        failed = watch(&client, &arguments, first, global.output) => failed.map(|()| exit::OK),
        _ = interrupt.recv() => Ok(exit::OK),
    }
}

/// Refreshes with every heartbeat; returns only on failure.
async fn watch(client: &Client, arguments: &WorkersArguments, first: Look, how: Output) -> Result<(), Failure> {
    let is_terminal = std::io::stdout().is_terminal();
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut look = first;
    loop {
        match how {
            Output::Json => output::print(&look.json().to_string())?,
            Output::Table | Output::Ids if is_terminal => output::print(&format!("{CLEAR}{}", look.text(how)))?,
            Output::Table | Output::Ids => output::print(&format!("{}\n", look.text(how)))?,
        }
        ticks.tick().await;
        look = Look::new(client, arguments).await?;
    }
}

fn is_called(row: &WorkerRow, name: &str) -> bool {
    row.name == name || row.id.to_string() == name
}

/// State of the workers at one moment.
struct Look {
    overview: Overview,
    /// Workers and, if they were named, the processes that they hold.
    rows: Vec<(WorkerRow, Option<Vec<Summary>>)>,
    /// Why a worker cannot use the object store of the fleet, by its name.
    without_objects: BTreeMap<String, String>,
}

impl Look {
    async fn new(client: &Client, arguments: &WorkersArguments) -> Result<Self, Failure> {
        let overview = Overview::look(&client.store).await?;
        let mut rows = Vec::new();
        for row in client.store.workers(&arguments.names, arguments.all).await? {
            let held = match arguments.names[..] {
                [] => None,
                [..] => Some(client.store.list_held(row.id, HELD_MAX).await?),
            };
            rows.push((row, held));
        }
        let without_objects = client.store.without_objects().await?.into_iter().collect();
        Ok(Self { overview, rows, without_objects })
    }

    fn print(&self, how: Output) -> Result<(), Failure> {
        match how {
            Output::Json => output::print_json(&self.json()),
            Output::Ids if self.rows.is_empty() => Ok(()),
            Output::Table | Output::Ids => output::print(&self.text(how)),
        }
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|(row, held)| {
            let mut value = json_of(row, held.as_deref());
            value["objects"] = json!(self.without_objects.get(&row.name));
            value
        });
        Value::Array(rows.collect())
    }

    fn text(&self, how: Output) -> String {
        if how == Output::Ids {
            return self.rows.iter().map(|(row, _)| row.id.to_string()).collect::<Vec<_>>().join("\n");
        }
        let mut lines = self.overview.remarks();
        let mut table = output::table(&[
            "NAME", "HOST", "OS-PID", "STATE", "HELD", "SLOTS", "QUEUES", "VERSION", "UP", "LEASE", "DETAIL",
        ]);
        for (row, _) in &self.rows {
            table.add_row([
                row.name.clone(),
                row.host.clone(),
                row.os_pid.to_string(),
                row.state().word().to_owned(),
                row.held.to_string(),
                row.slots.to_string(),
                row.queues.clone(),
                row.version.clone(),
                age(row.gone_at.unwrap_or(row.now) - row.started_at),
                lease(row),
                detail(row),
            ]);
        }
        lines.push(table.trim_fmt());
        for (row, _) in self.rows.iter().filter(|(row, _)| row.gone_at.is_none()) {
            let why = self.without_objects.get(&row.name);
            lines.extend(why.map(|why| format!("{} does not run processes with files: {why}", row.name)));
        }
        for (row, held) in &self.rows {
            lines.extend(held.iter().map(|held| held_text(row, held)));
        }
        lines.join("\n")
    }
}

/// Formats how much of its lease has passed since the last heartbeat.
fn lease(row: &WorkerRow) -> String {
    match row.state() {
        WorkerState::Live | WorkerState::Draining | WorkerState::Silent => {
            format!("{} of {} s", tenths(row.silence()), LEASE.as_secs())
        }
        WorkerState::Gone => String::new(),
    }
}

fn tenths(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64())
}

fn detail(row: &WorkerRow) -> String {
    if let Some(gone_at) = row.gone_at {
        return format!("gone {} ago", age(row.now - gone_at));
    }
    let lacks = row.lacks.as_ref().map(ToString::to_string);
    let blocked = row.blocked.as_ref().map(|blocked| format!("blocked by {blocked}"));
    lacks.into_iter().chain(blocked).collect::<Vec<_>>().join("; ")
}

fn held_text(row: &WorkerRow, held: &[Summary]) -> String {
    let mut table = output::table(&["  PID", "KIND", "STATE", "SINCE", "NAME"]);
    for process in held {
        table.add_row([
            format!("  {}", process.pid),
            process.kind.clone(),
            output::status_word(process),
            format!("{} ago", span(process.now - process.changed_at)),
            process.name.clone(),
        ]);
    }
    let n_more = row.held - i64::try_from(held.len()).unwrap_or(i64::MAX);
    let more = if n_more > 0 { format!("\n  and {n_more} more") } else { String::new() };
    let table = if held.is_empty() { String::new() } else { format!("\n{}", table.trim_fmt()) };
    format!("\n{} ({}) holds {}{table}{more}", row.name, row.id, row.held)
}

fn json_of(row: &WorkerRow, held: Option<&[Summary]>) -> Value {
    let mut value = json!(row);
    value["state"] = json!(row.state().word());
    value["beat_at"] = json!(output::timestamp(row.beat_at));
    value["beat_ago_ms"] = json!(u64::try_from(row.silence().as_millis()).unwrap_or(u64::MAX));
    value["lease_ms"] = json!(u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX));
    value["started_at"] = json!(output::timestamp(row.started_at));
    value["gone_at"] = json!(row.gone_at.map(output::timestamp));
    if let Some(held) = held {
        let processes = held.iter().map(|process| {
            json!({
                "pid": process.pid,
                "name": process.name,
                "kind": process.kind,
                "status": output::status_word(process),
                "since": output::timestamp(process.changed_at),
            })
        });
        value["holds"] = json!({"total": row.held, "processes": processes.collect::<Vec<_>>()});
    }
    value
}
