//! Requests to many processes: one update selects them, one broadcast follows, and every worker answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use baton_common::communicator::Communicator;
use baton_common::exit;
use baton_common::id::{Incarnation, Pid, RequestId};
use baton_common::message::{Control, Reply};
use baton_common::select::Select;
use baton_common::state::{Desired, Place};
use baton_common::store::control::Request;
use baton_common::store::worker::Peer;
use serde_json::{Value, json};

use crate::cli::control::ControlArguments;
use crate::cli::{Global, Output};
use crate::client::Client;
use crate::failure::Failure;
use crate::output;

/// Time limit for the answers of the workers. A worker waits one second for its processes, then reports what is pending.
const ANSWERS_LIMIT: Duration = Duration::from_secs(2);

/// Pause between two queries while waiting.
const LOOK: Duration = Duration::from_millis(100);

/// A request to many processes.
pub(crate) struct Many {
    pub(crate) select: Select,
    pub(crate) request: Request,
    pub(crate) dry_run: bool,
    pub(crate) yes: bool,
    /// How long to wait until the request is applied to all.
    pub(crate) wait: Option<Duration>,
}

/// The result of a request to many processes.
#[derive(Default)]
struct Outcome {
    /// Processes without a holder, to which the request was applied in the database.
    unheld: u64,
    /// By holder: number of its processes in the request, and number of those still pending.
    held: BTreeMap<Incarnation, (u64, u64)>,
    workers: Vec<Peer>,
    answers: BTreeMap<Incarnation, (Reply, Duration)>,
    nudged: bool,
    /// Number of processes to which the request is not applied yet.
    pending: usize,
}

pub(crate) async fn many(global: &Global, many: Many) -> Result<u8, Failure> {
    let Many { select, request, dry_run, yes, wait } = many;
    select.check().map_err(Failure::usage)?;
    let client = Client::open(global).await?;
    let verb = request.verb.verb();
    if dry_run || (request.verb == Desired::Kill && !yes) {
        let counts = client.store.count_selected(&select, request.verb).await?;
        let total: u64 = counts.values().sum();
        if dry_run {
            return dry(global, verb, total, &counts);
        }
        output::confirm(verb, total)?;
    }
    let broker = client.broker_or_warning().await;
    client.free_orphans().await?;
    let id = RequestId::generate();
    let mut outcome = Outcome::default();
    // Only held processes: at most as many as the fleet has slots.
    let mut owners: HashMap<Pid, Incarnation> = HashMap::new();
    let mut n_changed = 0;
    if let Some(mut many) = client.store.control_many(id, &select, &request).await? {
        while let Some(page) = many.next().await? {
            client.follow(&page).await;
            n_changed += page.len();
            for row in &page {
                match row.owner {
                    Some(owner) if row.place == Place::Held || request.force => {
                        outcome.held.entry(owner).or_default().0 += 1;
                        owners.insert(row.pid, owner);
                    }
                    Some(_) | None => outcome.unheld += 1,
                }
            }
            if global.output == Output::Ids {
                page.iter().try_for_each(|row| output::print(&row.pid.to_string()))?;
            }
        }
    }
    outcome.workers = client.store.peers().await?;
    let control = Control::Obey { verb: request.verb, select, reason: request.reason.clone() };
    gather(broker, control, &mut outcome).await;
    if let Some(limit) = wait {
        client.while_watching(wait_applied(&client, id, limit)).await?;
    }
    let pending = client.store.pending(id).await?;
    for owner in pending.iter().filter_map(|pid| owners.get(pid)) {
        outcome.held.entry(*owner).or_default().1 += 1;
    }
    outcome.pending = pending.len();
    client.close().await;
    match global.output {
        Output::Json => output::print_json(&json_of(verb, id, n_changed, &outcome))?,
        Output::Ids => {}
        Output::Table => output::print(&text_of(verb, n_changed, &outcome))?,
    }
    Ok(if wait.is_some() && outcome.pending > 0 { exit::WAIT_TIMED_OUT } else { exit::OK })
}

/// Pauses or resumes the fleet.
pub(crate) async fn fleet(global: &Global, arguments: ControlArguments, request: Request) -> Result<u8, Failure> {
    let request = Request { reason: arguments.reason, ..request };
    let client = Client::open(global).await?;
    let broker = client.broker_or_warning().await;
    client.store.control_fleet(RequestId::generate(), &request).await?;
    let mut outcome = Outcome { workers: client.store.peers().await?, ..Outcome::default() };
    let control = Control::Fleet { verb: request.verb, reason: request.reason.clone() };
    gather(broker, control, &mut outcome).await;
    client.close().await;
    let is_paused = request.verb == Desired::Pause;
    let answered = outcome.answers.len();
    match global.output {
        Output::Json => output::print_json(&json!({
            "fleet": if is_paused { "paused" } else { "playing" },
            "workers": outcome.workers.len(),
            "answered": answered,
            "nudged": outcome.nudged,
        }))?,
        Output::Ids => {}
        Output::Table => {
            let what = if is_paused { "the fleet is paused" } else { "the fleet is playing" };
            let silent = names_of_silent(&outcome);
            let rest = if silent.is_empty() { String::new() } else { format!("; no answer from {silent}") };
            output::print(&format!("{what}; {answered} of {} workers confirmed{rest}", outcome.workers.len()))?;
        }
    }
    Ok(exit::OK)
}

fn dry(global: &Global, verb: &str, total: u64, counts: &BTreeMap<String, u64>) -> Result<u8, Failure> {
    match global.output {
        Output::Json => output::print_json(&json!({"verb": verb, "dry_run": true, "selected": total, "by": counts}))?,
        Output::Ids => {}
        Output::Table => {
            let by: Vec<String> = counts.iter().map(|(place, count)| format!("{count} {place}")).collect();
            let by = if by.is_empty() { String::new() } else { format!(": {}", by.join(", ")) };
            output::print(&format!("{verb} would select {}{by}", output::processes(total)))?;
        }
    }
    Ok(exit::OK)
}

/// Publishes the broadcast and collects answers until every live worker has answered or the limit has passed.
async fn gather(broker: Option<&Communicator>, control: Control, outcome: &mut Outcome) {
    let Some(broker) = broker else { return };
    let sent = Instant::now();
    let mut replies = match broker.broadcast(control).await {
        Ok(replies) => replies,
        Err(error) => {
            output::warn(&format!(
                "recorded, but the workers were not notified ({error}); they apply the request at their next heartbeat"
            ));
            return;
        }
    };
    outcome.nudged = true;
    let mut silent: BTreeSet<Incarnation> = outcome.workers.iter().map(|worker| worker.id).collect();
    let deadline = tokio::time::Instant::now() + ANSWERS_LIMIT;
    while !silent.is_empty()
        && let Ok(Some(reply)) = tokio::time::timeout_at(deadline, replies.recv()).await
    {
        if let Some(id) = reply.incarnation {
            silent.remove(&id);
            outcome.answers.insert(id, (reply, sent.elapsed()));
        }
    }
}

/// Waits until the request is applied to every process, or until the limit has passed.
async fn wait_applied(client: &Client, id: RequestId, limit: Duration) -> Result<(), Failure> {
    let started = Instant::now();
    while !client.store.pending(id).await?.is_empty() && started.elapsed() < limit {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn names_of_silent(outcome: &Outcome) -> String {
    let silent = outcome.workers.iter().filter(|worker| !outcome.answers.contains_key(&worker.id));
    silent.map(|worker| worker.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn json_of(verb: &str, id: RequestId, selected: usize, outcome: &Outcome) -> Value {
    let workers = outcome.workers.iter().map(|worker| {
        let answer = outcome.answers.get(&worker.id);
        let (asked, pending) = outcome.held.get(&worker.id).copied().unwrap_or_default();
        json!({
            "worker": worker.name,
            "incarnation": worker.id,
            "asked": asked,
            "done": asked - pending,
            "pending": pending,
            "answered": answer.is_some(),
            "error": answer.and_then(|(reply, _)| reply.error.as_ref()),
            "elapsed_ms": answer.map(|(_, elapsed)| elapsed.as_secs_f64() * 1e3),
        })
    });
    json!({
        "verb": verb,
        "request": id,
        "selected": selected,
        "applied_in_database": outcome.unheld,
        "workers": workers.collect::<Vec<_>>(),
        "nudged": outcome.nudged,
        "pending": outcome.pending,
    })
}

fn text_of(verb: &str, selected: usize, outcome: &Outcome) -> String {
    let mut table = output::table(&["HOLDER", "SELECTED", "APPLIED", "PENDING", "ANSWER"]);
    let unheld = outcome.unheld.to_string();
    table.add_row(["none".to_owned(), unheld.clone(), unheld, "0".into(), "applied in the database".into()]);
    for worker in &outcome.workers {
        let (asked, pending) = outcome.held.get(&worker.id).copied().unwrap_or_default();
        let answer = match outcome.answers.get(&worker.id) {
            Some((Reply { error: Some(error), .. }, _)) => error.clone(),
            Some((_, elapsed)) => format!("after {:.0} ms", elapsed.as_secs_f64() * 1e3),
            None if outcome.nudged => {
                format!("none within {} s; applied at its next heartbeat, or after a takeover", ANSWERS_LIMIT.as_secs())
            }
            None => "not notified; applied at its next heartbeat".into(),
        };
        table.add_row([
            worker.name.clone(),
            asked.to_string(),
            (asked - pending).to_string(),
            pending.to_string(),
            answer,
        ]);
    }
    let rest = match outcome.pending {
        0 => "applied to all".to_owned(),
        pending => format!("{pending} pending"),
    };
    format!("{verb}: {}\n\n{}\n\n{rest}", output::processes(selected as u64), table.trim_fmt())
}
