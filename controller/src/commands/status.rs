//! `baton status`: prints the live status from the holder of a process, or its state in the database if it has no holder.

use std::time::Duration;

use baton_common::communicator::RequestError;
use baton_common::exit;
use baton_common::message::{Control, Status};
use baton_common::store::query::{Filter, Summary};
use serde_json::{Value, json};

use crate::cli::{Global, Output, Pids};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;
use crate::output;

/// Time limit for the answer of a worker.
const LIMIT: Duration = Duration::from_secs(5);

pub(crate) async fn run(global: &Global, arguments: Pids) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let mut answers = Vec::new();
    for pid in read_ids(&arguments.pids)? {
        let filter = Filter::of(vec![pid]);
        let summary = client.store.list(&filter).await?.pop().ok_or_else(|| absent(pid))?;
        let live = ask(&client, &summary).await;
        answers.push((summary, live));
    }
    match global.output {
        Output::Json => {
            let values = answers.iter().map(|(summary, live)| {
                let mut value = output::summary_json(summary);
                match live {
                    Ok(live) => value["live"] = json!(live),
                    Err(reason) => value["unanswered"] = json!(reason),
                }
                value
            });
            output::print_json(&Value::Array(values.collect()))?;
        }
        Output::Ids => answers.iter().try_for_each(|(summary, _)| output::print(&summary.pid.to_string()))?,
        Output::Table => {
            for (summary, live) in &answers {
                let live = match live {
                    Ok(Some(live)) => text(live),
                    Ok(None) => output::detail(summary),
                    Err(reason) => format!("{}; {reason}", output::detail(summary)),
                };
                output::print(&format!("{}  {}  {live}", summary.pid, output::state_text(summary)))?;
            }
        }
    }
    client.close().await;
    Ok(exit::OK)
}

/// Asks the holder; `None` if there is no holder, or if the process has left it meanwhile.
///
/// # Errors
/// The reason why the holder did not answer.
pub(crate) async fn ask(client: &Client, summary: &Summary) -> Result<Option<Status>, String> {
    let Some(owner) = summary.owner else { return Ok(None) };
    let queue = client.store.control_queue_of(owner).await.map_err(|error| error.to_string())?;
    let (Some(queue), Some(communicator)) = (queue, client.broker().await?) else { return Ok(None) };
    match communicator.request(&queue, Control::Status(summary.pid), LIMIT).await {
        Ok(reply) => Ok(reply.status),
        Err(RequestError::Unroutable(_)) => Err("its worker has no control queue and may have just died".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn text(live: &Status) -> String {
    let mut text = format!(
        "{} for {} on {} (epoch {}), {} advances",
        live.stage,
        output::seconds(Duration::from_millis(live.stage_ms)),
        live.worker,
        live.epoch,
        live.advances
    );
    if let Some(blocked_ms) = live.blocked_ms {
        text.push_str(&format!(", blocks its thread for {}", output::seconds(Duration::from_millis(blocked_ms))));
    }
    if let Some(child) = live.child {
        let memory = live.memory_bytes.map(|bytes| format!(", {} MiB", bytes / (1024 * 1024))).unwrap_or_default();
        text.push_str(&format!(", program {child}{memory}"));
    }
    if let Some(line) = &live.last_line {
        text.push_str(&format!("\n    {line}"));
    }
    text
}
