//! `baton submit`: processes are durable once their ids are printed, whether or not the broker is reachable.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_common::exit;
use baton_common::id::Pid;
use baton_common::objects::Objects;
use baton_common::sharing;
use baton_common::spec::Spec;
use baton_common::store::submit::NewProcess;
use baton_common::telemetry::new_traceparent;
use serde_json::json;

use crate::capture::Plan;
use crate::cli::{Global, Output, SubmitArguments};
use crate::client::{Client, Document, check_site, read_spec, whoami};
use crate::failure::Failure;
use crate::submission::submit;
use crate::{capture, dry_run, follow, output};

pub(crate) async fn run(global: &Global, arguments: SubmitArguments) -> Result<u8, Failure> {
    let Document { spec, folder } = read_spec(&arguments.file)?;
    let resolved = global.connection.resolve()?;
    check_site(&spec, &resolved.config.sites)?;
    // Missing files are reported before anything is stored.
    let plan = capture::plan(&spec, &folder)?;
    if arguments.dry_run {
        Box::pin(dry_run::show(global, &resolved, &spec, &plan, arguments.count)).await?;
        return Ok(exit::OK);
    }
    let client = Client::open(global).await?;
    let spec = if plan.files.is_empty() { spec } else { capture_files(&client, &spec, plan).await? };
    let pids = submit_all(global, &client, &spec, arguments.count).await?;
    let code = if arguments.wait { wait(global, &client, &pids, arguments.timeout).await? } else { exit::OK };
    client.close().await;
    Ok(code)
}

/// Puts the client files into the object store, if it is the one that the fleet shares.
async fn capture_files(client: &Client, spec: &Spec, plan: Plan) -> Result<Spec, Failure> {
    // Check an existing store first, so that no local folder is created if the fleet uses another store.
    let existing = Objects::open_existing(&client.objects)?;
    sharing::look(&client.store, existing.as_ref()).await?.map_or(Ok(()), |foreign| Err(Failure::from(foreign)))?;
    let objects = Objects::open(&client.objects)?;
    sharing::join(&client.store, &objects).await?.map_or(Ok(()), |foreign| Err(Failure::from(foreign)))?;
    objects.add_owner(client.store.identity().await?).await?;
    capture::capture(spec, plan, &objects).await
}

/// Submits the processes and prints their ids.
///
/// # Errors
/// The database failed. If it failed after some processes were accepted, their ids are printed.
async fn submit_all(global: &Global, client: &Client, spec: &Spec, count: u32) -> Result<Vec<Pid>, Failure> {
    let by = whoami();
    let make = || NewProcess {
        pid: Pid::generate(),
        spec: spec.clone(),
        created_by: by.clone(),
        traceparent: Some(new_traceparent()),
        reply_to: None,
        run_key: None,
    };
    let mut pids: Vec<Pid> = Vec::new();
    let submitted = submit(
        &client.store,
        count,
        make,
        async |queued| client.publish(queued, true).await,
        |page| pids.extend(page.iter().map(|process| process.pid)),
    );
    match submitted.await {
        Ok(announced) => {
            if let Err(reason) = &announced {
                output::warn(&format!(
                    "recorded, but not announced ({reason}); workers find the processes in the database, which takes longer"
                ));
            }
            print(global, &pids, announced.is_ok())?;
            Ok(pids)
        }
        Err(failure) if pids.is_empty() => Err(failure),
        Err(failure) => {
            print(global, &pids, true)?;
            let text = format!("only {} of {count} processes were submitted: {}", pids.len(), failure.text());
            Err(Failure::new(exit::SOME_FAILED, text))
        }
    }
}

/// Waits until all processes have ended and prints how many ended in each way.
async fn wait(global: &Global, client: &Client, pids: &[Pid], limit: Option<Duration>) -> Result<u8, Failure> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let waiting = follow::wait_ended(&client.store, pids, limit, |row| {
        if row.state.is_final() {
            *counts.entry(output::status_word(row)).or_default() += 1;
        }
    });
    let tally = waiting.await?;
    if global.output == Output::Table {
        let parts: Vec<String> = counts.into_iter().map(|(word, count)| format!("{count} {word}")).collect();
        output::note(&parts.join(", "));
    }
    Ok(tally.exit_code())
}

fn print(global: &Global, pids: &[Pid], is_announced: bool) -> Result<(), Failure> {
    match global.output {
        Output::Json => output::print_json(&json!({"pids": pids, "nudged": is_announced})),
        Output::Table | Output::Ids => pids.iter().try_for_each(|pid| output::print(&pid.to_string())),
    }
}
