//! `baton show`: prints everything about processes.

use baton_common::exit;
use baton_common::store::control::Settled;
use baton_common::store::query::{Details, EventRow};
use serde_json::{Value, json};

use crate::cli::{Global, Output, Pids};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;
use crate::output::{self, because, clock, timestamp};

pub(crate) async fn run(global: &Global, arguments: Pids) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let mut all = Vec::new();
    for pid in read_ids(&arguments.pids)? {
        all.push(client.store.show(pid).await?.ok_or_else(|| absent(pid))?);
    }
    match global.output {
        Output::Json => output::print_json(&Value::Array(all.iter().map(json_of).collect()))?,
        Output::Ids => all.iter().try_for_each(|details| output::print(&details.summary.pid.to_string()))?,
        Output::Table => {
            for details in &all {
                output::print(&text_of(details))?;
            }
        }
    }
    Ok(exit::OK)
}

fn json_of(details: &Details) -> Value {
    let mut value = output::summary_json(&details.summary);
    let attempts: Vec<Value> = details
        .attempts
        .iter()
        .map(|attempt| {
            json!({
                "epoch": attempt.epoch,
                "try": attempt.try_number,
                "worker": attempt.worker,
                "started_at": timestamp(attempt.started_at),
                "ended_at": timestamp(attempt.ended_at),
                "how": attempt.how,
                "reason": attempt.reason,
            })
        })
        .collect();
    let events: Vec<Value> = details
        .events
        .iter()
        .map(|event| {
            json!({
                "at": timestamp(event.at),
                "what": event.what,
                "by": event.by,
                "login": event.login,
                "reason": event.reason,
                "request": event.request,
                "outcome": event.outcome,
                "settled_at": event.settled_at.map(timestamp),
            })
        })
        .collect();
    let checkpoint = details.checkpoint.as_ref();
    value["created_by"] = json!(details.created_by);
    value["labels"] = json!(details.spec.as_ref().map(|spec| &spec.labels));
    value["session"] = json!(details.spec.as_ref().map(|spec| &spec.session));
    value["spec"] = json!(details.spec);
    value["unreadable"] = json!(details.unreadable);
    value["failures"] = json!(checkpoint.map_or(0, |checkpoint| checkpoint.failures));
    value["progress"] = json!(checkpoint.and_then(|checkpoint| checkpoint.progress.as_ref()));
    value["attempts"] = Value::Array(attempts);
    value["jobs"] = Value::Array(details.jobs.iter().map(output::job_json).collect());
    value["events"] = Value::Array(events);
    value
}

fn text_of(details: &Details) -> String {
    let summary = &details.summary;
    let mut lines = vec![
        format!("{}  {}", summary.pid, summary.name),
        format!("  state      {}  {}", output::state_text(summary), output::detail(summary)),
        format!("  kind       {}, queue {}", summary.kind, summary.queue),
    ];
    if let Some(progress) = details.checkpoint.as_ref().and_then(|checkpoint| checkpoint.progress.as_ref()) {
        let total = progress.total.map(|total| format!(" of {total}")).unwrap_or_default();
        lines.push(format!("  progress   {}{total}", progress.done));
    }
    lines.push(format!("  advances   {}", summary.advances));
    for job in &details.jobs {
        lines.push(format!("  job        {}", output::job_text(job, summary.now)));
    }
    if let Some(unreadable) = &details.unreadable {
        lines.push(format!("  unreadable {unreadable}"));
    }
    if let Some(outcome) = &summary.outcome {
        if !outcome.values.is_empty() {
            lines.push(format!("  values     {}", Value::Object(outcome.values.clone())));
        }
        if let Some(sandbox) = &outcome.sandbox {
            lines.push(format!("  files      {sandbox}"));
        }
        if outcome.results.is_some() {
            lines.push(format!("  results    baton results {}", summary.pid));
        }
    }
    lines.push("  timeline".into());
    let mut timeline = vec![(summary.created_at, format!("accepted from {}", details.created_by))];
    for attempt in &details.attempts {
        let reason = because(attempt.reason.as_deref());
        timeline.push((
            attempt.started_at,
            format!("claimed by {} (epoch {}, try {})", attempt.worker, attempt.epoch, attempt.try_number),
        ));
        timeline.push((
            attempt.ended_at,
            format!("{} on {} (epoch {}){reason}", attempt.how, attempt.worker, attempt.epoch),
        ));
    }
    for event in &details.events {
        timeline.extend(request(event));
    }
    if let Some(ended_at) = summary.ended_at {
        timeline.push((ended_at, summary.state.word().to_owned()));
    }
    timeline.sort_by_key(|(at, _)| *at);
    lines.extend(timeline.into_iter().map(|(at, what)| format!("    {}  {what}", clock(at))));
    lines.join("\n")
}

/// Resolution of the printed times: one millisecond. Closer times are printed as equal.
const SHOWN_US: i64 = 1_000;

/// Returns the lines of a request in the timeline: one when it was made, one when it was settled. A request that was settled
/// at once has one line.
fn request(event: &EventRow) -> Vec<(i64, String)> {
    let many = event.request.map(|request| format!(", request {request}")).unwrap_or_default();
    let reason = because(event.reason.as_deref());
    let requested = format!("{} requested by {} ({}{many}){reason}", event.what, event.by, event.login);
    let EventRow { outcome: Some(outcome), settled_at: Some(settled_at), .. } = event else {
        return vec![(event.at, format!("{requested}; not applied yet"))];
    };
    if settled_at - event.at < SHOWN_US {
        return vec![(event.at, format!("{requested}; {outcome}"))];
    }
    let settled = match Settled::from_word(outcome) {
        Some(Settled::Applied) => "applied",
        Some(Settled::Superseded) => "superseded by a later request",
        Some(Settled::Ended) => "too late, the process had ended",
        None => outcome,
    };
    vec![(event.at, requested), (*settled_at, format!("{} of {}: {settled}", event.what, event.by))]
}
