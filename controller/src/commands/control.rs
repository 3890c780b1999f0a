//! `baton pause`, `play` and `kill`: record the request before sending it, so that it applies even without the broker.

use std::time::{Duration, Instant};

use baton_common::communicator::Communicator;
use baton_common::exit;
use baton_common::id::{Pid, RequestId};
use baton_common::message::{Control, Effect};
use baton_common::select::Select;
use baton_common::state::{Desired, State};
use baton_common::store::control::{Answer, Controlled, Request, Settled};
use baton_common::store::query::Filter;
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::broadcast;
use crate::cli::control::{ControlArguments, KillArguments, PauseArguments, PlayArguments};
use crate::cli::{Global, Output};
use crate::client::{Client, read_ids, whoami};
use crate::failure::{Failure, exit_code_of_many};
use crate::output;

/// Time limit for the answer of the holder.
const HOLDER_LIMIT: Duration = Duration::from_secs(2);

/// Maximum number of requests in progress; enough to keep the database busy.
const UNDER_WAY_MAX: usize = 16;

/// Pause between two queries while waiting.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) async fn pause(global: &Global, arguments: PauseArguments) -> Result<u8, Failure> {
    let PauseArguments { control, now, fleet } = arguments;
    let request = Request { urgent: now, ..Request::new(Desired::Pause, whoami()) };
    if fleet { broadcast::fleet(global, control, request).await } else { run(global, control, request).await }
}

pub(crate) async fn play(global: &Global, arguments: PlayArguments) -> Result<u8, Failure> {
    let PlayArguments { control, fleet } = arguments;
    let request = Request::new(Desired::Run, whoami());
    if fleet { broadcast::fleet(global, control, request).await } else { run(global, control, request).await }
}

pub(crate) async fn kill(global: &Global, arguments: KillArguments) -> Result<u8, Failure> {
    let KillArguments { control, force } = arguments;
    run(global, control, Request { force, ..Request::new(Desired::Kill, whoami()) }).await
}

/// The result of one request.
pub(crate) struct Done {
    pid: Pid,
    pub(crate) effect: Effect,
    /// The later request that superseded it.
    detail: Option<String>,
    event: Option<RequestId>,
    code: u8,
    nudged: bool,
    elapsed: Duration,
}

async fn run(global: &Global, arguments: ControlArguments, request: Request) -> Result<u8, Failure> {
    let ControlArguments { pids: texts, all, selection, reason, dry_run, yes, wait, timeout } = arguments;
    let request = Request { reason, ..request };
    let pids = read_ids(&texts)?;
    let conditions = selection.select()?;
    let wait = wait.then_some(timeout);
    if texts.is_empty() || !conditions.is_all() || dry_run {
        if texts.is_empty() && conditions.is_all() && !all {
            let verb = request.verb.verb();
            return Err(Failure::usage(format!(
                "no processes are selected; use `baton {verb} PID…`, `--all` or a selection"
            )));
        }
        if pids.is_empty() && !texts.is_empty() {
            // `-` with nothing on standard input means none, not all.
            return Ok(exit::OK);
        }
        let select = Select { pids: (!texts.is_empty()).then_some(pids), ..conditions };
        return broadcast::many(global, broadcast::Many { select, request, dry_run, yes, wait }).await;
    }
    let client = Client::open(global).await?;
    let broker = client.broker_or_warning().await;
    client.free_orphans().await?;
    let asked = futures_util::stream::iter(pids)
        .map(|pid| {
            let (client, request) = (&client, &request);
            async move {
                let started = Instant::now();
                let mut done = ask(client, broker, pid, request).await?;
                if let Some(limit) = wait {
                    client.while_watching(wait_for(client, &mut done, request.verb, limit)).await?;
                }
                Ok(Done { elapsed: started.elapsed(), ..done })
            }
        })
        .buffered(UNDER_WAY_MAX)
        .collect::<Vec<Result<Done, Failure>>>()
        .await;
    client.close().await;
    let all = asked.into_iter().collect::<Result<Vec<_>, _>>()?;
    report(global.output, &all)?;
    Ok(exit_code_of_many(all.iter().map(|done| done.code)))
}

fn report(how: Output, all: &[Done]) -> Result<(), Failure> {
    match how {
        Output::Json => {
            let values = all.iter().map(|done| {
                json!({
                    "pid": done.pid,
                    "outcome": done.effect,
                    "detail": done.detail,
                    "ok": done.code == exit::OK,
                    "nudged": done.nudged,
                    "elapsed_ms": done.elapsed.as_secs_f64() * 1e3,
                })
            });
            output::print_json(&Value::Array(values.collect()))
        }
        Output::Ids => all.iter().try_for_each(|done| output::print(&done.pid.to_string())),
        Output::Table => all.iter().try_for_each(|done| {
            let detail = done.detail.as_ref().map(|detail| format!("  {detail}")).unwrap_or_default();
            let word = if done.effect == Effect::Absent { "no such process" } else { done.effect.word() };
            output::print(&format!("{}  {word}{detail}", done.pid))
        }),
    }
}

/// Records a request to one process and notifies its holder.
///
/// # Errors
/// The database does not answer.
pub(crate) async fn ask(
    client: &Client,
    broker: Option<&Communicator>,
    pid: Pid,
    request: &Request,
) -> Result<Done, Failure> {
    let refused = |effect, code| Done {
        pid,
        effect,
        detail: None,
        event: None,
        code,
        nudged: broker.is_some(),
        elapsed: Duration::ZERO,
    };
    let row = match client.store.control(pid, request).await? {
        Answer::Recorded(row) => row,
        Answer::Ended(state) => return Ok(refused(Effect::ended(state), exit::CONFLICT)),
        Answer::Dying => return Ok(refused(Effect::Killing, exit::CONFLICT)),
        Answer::Absent => return Ok(refused(Effect::Absent, exit::NOT_FOUND)),
    };
    client.follow(std::slice::from_ref(&row)).await;
    let recorded = Done { effect: row.effect, event: Some(row.event), ..refused(row.effect, exit::OK) };
    let Some(broker) = broker else { return Ok(recorded) };
    match nudge(client, broker, &row, request).await {
        Ok(effect) => Ok(Done { effect, ..recorded }),
        Err(reason) => {
            output::warn(&format!(
                "{pid}: recorded, but its holder was not notified ({reason}); it applies the request at its next heartbeat"
            ));
            Ok(Done { nudged: false, ..recorded })
        }
    }
}

/// Asks the holder to read the row. Returns the effect.
async fn nudge(client: &Client, broker: &Communicator, row: &Controlled, request: &Request) -> Result<Effect, String> {
    let Some(owner) = row.owner else { return Ok(row.effect) };
    let queue = client.store.control_queue_of(owner).await.map_err(|error| error.to_string())?;
    // If the holder has died, the request is applied when the process is freed.
    let Some(queue) = queue else { return Ok(row.effect) };
    let control = Control::Obey { verb: request.verb, select: Select::one(row.pid), reason: request.reason.clone() };
    let reply = broker.request(&queue, control, HOLDER_LIMIT).await.map_err(|error| error.to_string())?;
    match reply.outcome {
        _ if request.force => Ok(row.effect),
        // The process has just left its holder; the row has its state.
        Some(Effect::NotHeld) | None => {
            let filter = Filter::of(vec![row.pid]);
            let row = client.store.list(&filter).await.map_err(|error| error.to_string())?.pop();
            Ok(row.map_or(Effect::Absent, |row| match row.state {
                State::Paused(_) => Effect::Paused,
                State::Finished | State::Excepted | State::Killed => Effect::ended(row.state),
                State::Created | State::Running | State::Waiting => Effect::pending(request.verb),
            }))
        }
        Some(effect) => Ok(effect),
    }
}

/// Waits until the request is settled.
async fn wait_for(client: &Client, done: &mut Done, verb: Desired, limit: Duration) -> Result<(), Failure> {
    let Some(event) = done.event else { return Ok(()) };
    let started = Instant::now();
    loop {
        match client.store.settled(event).await? {
            Some(Settled::Applied) => {
                if matches!(done.effect, Effect::Pausing | Effect::Killing) {
                    done.effect = Effect::applied(verb);
                }
                return Ok(());
            }
            Some(Settled::Superseded) => {
                done.effect = Effect::Superseded;
                let events = client.store.show(done.pid).await?.map(|details| details.events).unwrap_or_default();
                done.detail = events.last().map(|last| format!("by {} of {}", last.what, last.by));
                done.code = exit::CONFLICT;
                return Ok(());
            }
            Some(Settled::Ended) => {
                let row = client.store.list(&Filter::of(vec![done.pid])).await?.pop();
                done.effect = row.map_or(Effect::Absent, |row| Effect::ended(row.state));
                done.code = exit::CONFLICT;
                return Ok(());
            }
            None if started.elapsed() >= limit => {
                done.code = exit::WAIT_TIMED_OUT;
                return Ok(());
            }
            None => tokio::time::sleep(LOOK).await,
        }
    }
}
