//! `baton pause`, `play` and `kill`: recorded before it is sent, and true whether or not the broker is there.

use std::time::{Duration, Instant};

use baton_common::communicator::ReplyTo;
use baton_common::id::Pid;
use baton_common::message::{Control, Reply, Select};
use baton_common::state::{Desired, Place, State};
use baton_common::store::control::{Answer, Controlled, Request};
use baton_common::store::query::Filter;
use baton_worker::cli::exit;
use serde_json::{Value, json};

use crate::cli::{ControlArguments, Global, Output, PauseArguments};
use crate::client::{Client, read_ids, whoami};
use crate::failure::{Failure, exit_code_of_many};
use crate::output;

/// How long the holder may take to answer.
const HOLDER_LIMIT: Duration = Duration::from_secs(3);

/// Pause between two looks at the row while waiting.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) async fn pause(global: &Global, arguments: PauseArguments) -> Result<u8, Failure> {
    run(global, arguments.control, Desired::Pause, arguments.now).await
}

pub(crate) async fn play(global: &Global, arguments: ControlArguments) -> Result<u8, Failure> {
    run(global, arguments, Desired::Run, false).await
}

pub(crate) async fn kill(global: &Global, arguments: ControlArguments) -> Result<u8, Failure> {
    run(global, arguments, Desired::Kill, false).await
}

/// What became of one request.
struct Done {
    pid: Pid,
    outcome: String,
    code: u8,
    nudged: bool,
}

async fn run(global: &Global, arguments: ControlArguments, verb: Desired, urgent: bool) -> Result<u8, Failure> {
    let pids = read_ids(&arguments.pids.pids)?;
    let client = Client::open(global).await?;
    let request = Request { verb, urgent, by: whoami(), reason: arguments.reason };
    let mut all = Vec::new();
    for pid in pids {
        let mut done = ask(&client, pid, &request).await?;
        if arguments.wait && done.code == exit::OK {
            wait(&client, &mut done, verb, arguments.timeout).await?;
        }
        all.push(done);
    }
    client.close().await;
    match global.output {
        Output::Json => {
            let values = all.iter().map(|done| {
                json!({"pid": done.pid, "outcome": done.outcome, "ok": done.code == exit::OK, "nudged": done.nudged})
            });
            output::print_json(&Value::Array(values.collect()))?;
        }
        Output::Ids => all.iter().try_for_each(|done| output::print(&done.pid.to_string()))?,
        Output::Table => {
            all.iter().try_for_each(|done| output::print(&format!("{}  {}", done.pid, done.outcome)))?;
        }
    }
    Ok(exit_code_of_many(all.iter().map(|done| done.code)))
}

async fn ask(client: &Client, pid: Pid, request: &Request) -> Result<Done, Failure> {
    let done = |outcome: &str, code, nudged| Done { pid, outcome: outcome.to_owned(), code, nudged };
    let row = match client.store.control(pid, request).await? {
        Answer::Recorded(row) => row,
        Answer::Ended(state) => return Ok(done(state.word(), exit::CONFLICT, true)),
        Answer::Dying => return Ok(done("killing", exit::CONFLICT, true)),
        Answer::Absent => return Ok(done("no such process", exit::NOT_FOUND, true)),
    };
    let (outcome, nudged) = match nudge(client, &row, request).await {
        Ok(outcome) => (outcome, true),
        Err(reason) => {
            output::warn(&format!(
                "recorded, but nobody was told ({reason}); it takes effect at the holder's next beat"
            ));
            (pending(request.verb).to_owned(), false)
        }
    };
    Ok(done(&outcome, exit::OK, nudged))
}

/// Tells whoever has to act on the row; says what happened.
async fn nudge(client: &Client, row: &Controlled, request: &Request) -> Result<String, String> {
    if let Some((queue, told)) = &row.told {
        client.tell(&[(queue.clone(), vec![told.clone()])].into(), false).await?;
    }
    let word = match (request.verb, row.was_so) {
        (Desired::Pause, true) => "already_paused",
        (Desired::Pause, false) => "paused",
        (Desired::Run, true) => "already_running",
        (Desired::Run, false) => "playing",
        (Desired::Kill, _) => "killed",
    };
    let Some(owner) = row.owner else {
        answer_end(client, row).await;
        return Ok(word.to_owned());
    };
    let queue = client.store.control_queue_of(owner).await.map_err(|error| error.to_string())?;
    // A holder that has died obeys when it is freed.
    let Some(queue) = queue else { return Ok(pending(request.verb).to_owned()) };
    let Some(communicator) = client.broker().await? else { return Ok(pending(request.verb).to_owned()) };
    let select = Select { pids: vec![row.pid], ..Select::default() };
    let control = Control::Obey { verb: request.verb, select, reason: request.reason.clone() };
    let reply = communicator.request(&queue, control, HOLDER_LIMIT).await.map_err(|error| error.to_string())?;
    match reply.outcome.as_deref() {
        // It has left its holder just now: what it is, the row says.
        Some("not_held") | None => {
            Ok(current(client, row.pid).await.unwrap_or_else(|| pending(request.verb).to_owned()))
        }
        Some(outcome) => Ok(outcome.to_owned()),
    }
}

/// Answers whoever has launched it with `wait` and was waiting for its end.
async fn answer_end(client: &Client, row: &Controlled) {
    let reply_to = row.reply_to.as_deref().and_then(ReplyTo::from_bytes);
    if let (Some(to), Ok(Some(communicator))) = (reply_to, client.broker().await) {
        let reply = Reply { pid: Some(row.pid), state: Some(row.state.word().to_owned()), ..Reply::default() };
        // It is only an answer; the row is what counts.
        let _ = communicator.reply(&to, &reply).await;
    }
}

async fn current(client: &Client, pid: Pid) -> Option<String> {
    let filter = Filter { pids: vec![pid], ..Filter::default() };
    let summary = client.store.list(&filter).await.ok()?.pop()?;
    Some(summary.state.word().to_owned())
}

fn pending(verb: Desired) -> &'static str {
    match verb {
        Desired::Run => "playing",
        Desired::Pause => "pausing",
        Desired::Kill => "killing",
    }
}

/// Waits until the row says that the request is applied.
async fn wait(client: &Client, done: &mut Done, verb: Desired, limit: Duration) -> Result<(), Failure> {
    let started = Instant::now();
    let filter = Filter { pids: vec![done.pid], ..Filter::default() };
    loop {
        let Some(row) = client.store.list(&filter).await?.pop() else { return Ok(()) };
        let is_applied = match verb {
            Desired::Run => row.desired == Desired::Run && !matches!(row.state, State::Paused(_)),
            Desired::Pause => matches!(row.state, State::Paused(_)),
            Desired::Kill => row.state.is_final(),
        };
        if is_applied {
            if verb != Desired::Run {
                done.outcome = row.state.word().to_owned();
            }
            return Ok(());
        }
        let is_superseded = row.desired != verb || (row.place == Place::Ended && verb != Desired::Kill);
        if is_superseded {
            done.outcome = if row.place == Place::Ended { row.state.word().into() } else { "superseded".into() };
            done.code = exit::CONFLICT;
            return Ok(());
        }
        if started.elapsed() >= limit {
            done.code = exit::WAIT_TIMED_OUT;
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}
