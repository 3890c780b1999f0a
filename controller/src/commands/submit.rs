//! `baton submit`: durable when it says so, whether or not the broker can be reached.

use std::collections::BTreeMap;

use baton_common::exit;
use baton_common::id::Pid;
use baton_common::objects::Objects;
use baton_common::sharing;
use baton_common::store::submit::NewProcess;
use baton_common::telemetry::new_traceparent;
use serde_json::json;

use crate::cli::{Global, Output, SubmitArguments};
use crate::client::{Client, Document, check_site, read_spec, whoami};
use crate::failure::Failure;
use crate::submission::submit;
use crate::{capture, dry_run, follow, output};

pub(crate) async fn run(global: &Global, arguments: SubmitArguments) -> Result<u8, Failure> {
    let Document { spec, folder } = read_spec(&arguments.file)?;
    let resolved = global.connection.resolve()?;
    check_site(&spec, &resolved.config.sites)?;
    // Before anything is stored, or anybody is asked.
    let plan = capture::plan(&spec, &folder)?;
    if arguments.dry_run {
        Box::pin(dry_run::show(global, &resolved, &spec, &plan, arguments.count)).await?;
        return Ok(exit::OK);
    }
    let client = Client::open(global).await?;
    let spec = if plan.files.is_empty() {
        spec
    } else {
        // A folder of this machine is not made only to find that the fleet has its files elsewhere.
        let existing = Objects::open_existing(&client.objects)?;
        sharing::look(&client.store, existing.as_ref()).await?.map_or(Ok(()), |foreign| Err(Failure::from(foreign)))?;
        let objects = Objects::open(&client.objects)?;
        sharing::join(&client.store, &objects).await?.map_or(Ok(()), |foreign| Err(Failure::from(foreign)))?;
        objects.add_owner(client.store.identity().await?).await?;
        capture::capture(&spec, plan, &objects).await?
    };
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
        arguments.count,
        make,
        async |queued| client.publish(queued, true).await,
        |page| pids.extend(page.iter().map(|process| process.pid)),
    );
    let told = match submitted.await {
        Ok(told) => told,
        Err(failure) if pids.is_empty() => return Err(failure),
        Err(failure) => {
            print(global, &pids, true)?;
            return Err(Failure::new(
                exit::SOME_FAILED,
                format!("{} of {} are recorded; then: {}", pids.len(), arguments.count, failure.text()),
            ));
        }
    };
    if let Err(reason) = &told {
        output::warn(&format!(
            "recorded, but not announced ({reason}); workers find it in the database, which takes longer"
        ));
    }
    print(global, &pids, told.is_ok())?;
    let code = if arguments.wait {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let tally = follow::wait_ended(&client.store, &pids, arguments.timeout, |row| {
            if row.state.is_final() {
                *counts.entry(output::status_word(row)).or_default() += 1;
            }
        });
        let tally = tally.await?;
        if global.output == Output::Table {
            let parts: Vec<String> = counts.into_iter().map(|(word, count)| format!("{count} {word}")).collect();
            output::note(&parts.join(", "));
        }
        tally.exit_code()
    } else {
        exit::OK
    };
    client.close().await;
    Ok(code)
}

fn print(global: &Global, pids: &[Pid], is_told: bool) -> Result<(), Failure> {
    match global.output {
        Output::Json => output::print_json(&json!({"pids": pids, "nudged": is_told})),
        Output::Table | Output::Ids => pids.iter().try_for_each(|pid| output::print(&pid.to_string())),
    }
}
