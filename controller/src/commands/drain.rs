//! `baton drain`: records the request before sending it, so that workers drain at their next heartbeat even without the
//! broker.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use baton_common::communicator::Communicator;
use baton_common::exit;
use baton_common::id::Incarnation;
use baton_common::message::Control;
use baton_common::state::Desired;
use baton_common::store::control::Request;
use baton_common::store::query::{WorkerRow, WorkerState};
use baton_common::store::worker::Peer;
use serde_json::{Value, json};

use crate::cli::{DrainArguments, Global, Output};
use crate::client::{Client, whoami};
use crate::failure::Failure;
use crate::output;

/// Time limit for the answer of a worker.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Pause between two queries while waiting.
const LOOK: Duration = Duration::from_millis(100);

/// The result for one name.
enum Asked {
    /// No live worker has this name.
    Absent(String),
    /// The request is recorded for this incarnation.
    Recorded { peer: Peer, nudged: bool },
}

pub(crate) async fn run(global: &Global, arguments: DrainArguments) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let started = Instant::now();
    // The verb is unused: draining is a request to a worker. Only the operator and the reason are recorded.
    let request = Request { reason: arguments.reason, ..Request::new(Desired::Run, whoami()) };
    let mut asked: Vec<Asked> = Vec::new();
    for name in &arguments.names {
        let peers = client.store.drain(name, &request).await?;
        if peers.is_empty() {
            if global.output == Output::Table {
                output::print(&format!("{name}  no such live worker"))?;
            }
            asked.push(Asked::Absent(name.clone()));
        }
        for peer in peers {
            if !asked.iter().any(|asked| asked.id() == Some(peer.id)) {
                asked.push(Asked::Recorded { peer, nudged: false });
            }
        }
    }
    if asked.iter().any(|asked| asked.id().is_some())
        && let Some(broker) = client.broker_or_warning().await
    {
        for asked in &mut asked {
            if let Asked::Recorded { peer, nudged } = asked {
                *nudged = nudge(broker, peer).await;
            }
        }
    }
    let limit = arguments.wait.then_some(arguments.timeout);
    let rows = follow(&client, &asked, limit, global.output).await?;
    client.close().await;
    report(global.output, &asked, &rows, started.elapsed())?;
    let codes: Vec<u8> = asked.iter().map(|asked| code(asked, &rows, arguments.wait)).collect();
    let failed: Vec<u8> = codes.iter().copied().filter(|code| *code != exit::OK).collect();
    Ok(match failed[..] {
        [] => exit::OK,
        [code, ..] if failed.len() == codes.len() => code,
        [..] => exit::SOME_FAILED,
    })
}

impl Asked {
    fn id(&self) -> Option<Incarnation> {
        match self {
            Asked::Absent(_) => None,
            Asked::Recorded { peer, .. } => Some(peer.id),
        }
    }
}

/// Asks the worker to drain now instead of at its next heartbeat. Returns whether it has answered.
async fn nudge(broker: &Communicator, peer: &Peer) -> bool {
    match broker.request(&peer.control_queue(), Control::Drain, ANSWER_LIMIT).await {
        Ok(_) => true,
        Err(error) => {
            output::warn(&format!(
                "{}: recorded, but the worker was not notified ({error}); it drains at its next heartbeat",
                peer.name
            ));
            false
        }
    }
}

/// Returns the rows of the workers; with a limit, waits until all have stopped. Prints what they hold meanwhile.
async fn follow(
    client: &Client,
    asked: &[Asked],
    limit: Option<Duration>,
    how: Output,
) -> Result<HashMap<Incarnation, WorkerRow>, Failure> {
    let ids: Vec<String> = asked.iter().filter_map(Asked::id).map(|id| id.to_string()).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let started = Instant::now();
    let mut said: HashMap<Incarnation, String> = HashMap::new();
    loop {
        let rows = client.store.workers(&ids, true).await?;
        for row in rows.iter().filter(|_| how == Output::Table) {
            let text = text(row);
            if said.get(&row.id) != Some(&text) {
                output::print(&text)?;
                said.insert(row.id, text);
            }
        }
        let has_stopped = rows.iter().all(|row| row.gone_at.is_some());
        if has_stopped || limit.is_none_or(|limit| started.elapsed() >= limit) {
            if let (false, Some(limit)) = (has_stopped, limit) {
                output::note(&format!(
                    "not all workers stopped within {}; they continue to drain",
                    output::seconds(limit)
                ));
            }
            return Ok(rows.into_iter().map(|row| (row.id, row)).collect());
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn report(
    how: Output,
    asked: &[Asked],
    rows: &HashMap<Incarnation, WorkerRow>,
    elapsed: Duration,
) -> Result<(), Failure> {
    match how {
        Output::Json => {
            let values = asked.iter().map(|asked| json_of(asked, rows, elapsed));
            output::print_json(&Value::Array(values.collect()))
        }
        Output::Ids => asked.iter().filter_map(Asked::id).try_for_each(|id| output::print(&id.to_string())),
        // It was printed while it happened.
        Output::Table => Ok(()),
    }
}

fn json_of(asked: &Asked, rows: &HashMap<Incarnation, WorkerRow>, elapsed: Duration) -> Value {
    match asked {
        Asked::Absent(name) => json!({"worker": name, "outcome": "absent", "nudged": false}),
        Asked::Recorded { peer, nudged } => {
            let row = rows.get(&peer.id);
            json!({
                "worker": peer.name,
                "incarnation": peer.id,
                "host": peer.host,
                "outcome": row.map_or("gone", outcome),
                "held": row.map_or(0, |row| row.held),
                "nudged": nudged,
                "elapsed_ms": elapsed.as_secs_f64() * 1e3,
            })
        }
    }
}

/// A drained worker holds nothing. The processes of a worker that died meanwhile are taken over by others.
fn outcome(row: &WorkerRow) -> &'static str {
    match row.state() {
        WorkerState::Gone if row.held == 0 => "drained",
        WorkerState::Gone => "gone",
        WorkerState::Live | WorkerState::Draining | WorkerState::Silent => "draining",
    }
}

fn text(row: &WorkerRow) -> String {
    let held = if row.held > 0 { format!(", holds {}", row.held) } else { String::new() };
    let silent = if row.state() == WorkerState::Silent { ", silent" } else { "" };
    format!("{}  {}{held}{silent}", row.name, outcome(row))
}

fn code(asked: &Asked, rows: &HashMap<Incarnation, WorkerRow>, wait: bool) -> u8 {
    match asked {
        Asked::Absent(_) => exit::NOT_FOUND,
        Asked::Recorded { peer, .. } => {
            let has_stopped = rows.get(&peer.id).is_none_or(|row| row.gone_at.is_some());
            if wait && !has_stopped { exit::WAIT_TIMED_OUT } else { exit::OK }
        }
    }
}
