//! `baton explain`: explains why a process does not advance. It asks the database, and the worker that holds the process.

use baton_common::exit;
use baton_common::state::Place;
use baton_common::store::explain::Facts;
use baton_common::store::query::WorkerState;
use serde_json::{Value, json};

use super::status;
use crate::cli::{Global, Output, Pids};
use crate::client::{Client, absent, read_ids};
use crate::condition::{Answer, Explanation, explain};
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(global: &Global, arguments: Pids) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let mut all = Vec::new();
    for pid in read_ids(&arguments.pids)? {
        let facts = client.store.facts(pid).await?.ok_or_else(|| absent(pid))?;
        let answer = answer(&client, &facts).await;
        let explanation = explain(&facts, &answer, client.store.is_embedded());
        all.push((facts, explanation));
    }
    client.close().await;
    match global.output {
        Output::Json => {
            let values = all.iter().map(|(facts, explanation)| json_of(facts, explanation));
            output::print_json(&Value::Array(values.collect()))?;
        }
        Output::Ids => {
            all.iter().try_for_each(|(facts, _)| output::print(&facts.details.summary.pid.to_string()))?;
        }
        Output::Table => all.iter().try_for_each(|(facts, explanation)| output::print(&text(facts, explanation)))?,
    }
    Ok(exit::OK)
}

/// Asks the holder, or for a queued process only whether the broker is reachable. A worker without heartbeats is not asked.
async fn answer(client: &Client, facts: &Facts) -> Answer {
    match facts.details.summary.place {
        Place::Held => match facts.holder.as_ref().map(|holder| holder.state()) {
            Some(WorkerState::Live | WorkerState::Draining) => status::ask(client, &facts.details.summary).await,
            Some(WorkerState::Silent | WorkerState::Gone) | None => Ok(None),
        },
        Place::Queued => client.broker().await.map(|_| None),
        Place::Parked | Place::Ended => Ok(None),
    }
}

fn json_of(facts: &Facts, explanation: &Explanation) -> Value {
    let summary = &facts.details.summary;
    json!({
        "pid": summary.pid,
        "name": summary.name,
        "state": summary.state.word(),
        "place": summary.place.word(),
        "status": output::status_word(summary),
        "condition": explanation.condition,
        "text": explanation.text,
        "remedy": explanation.remedy,
        "facts": explanation.facts,
    })
}

fn text(facts: &Facts, explanation: &Explanation) -> String {
    let summary = &facts.details.summary;
    let remedy = explanation.remedy.as_ref().map(|remedy| format!("\n    {remedy}")).unwrap_or_default();
    format!("{}  {}  {}\n    {}{remedy}", summary.pid, summary.name, output::state_text(summary), explanation.text)
}
