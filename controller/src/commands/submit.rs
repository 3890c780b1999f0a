//! `baton submit`: durable when it says so, whether or not the broker can be reached.

use std::collections::BTreeMap;

use baton_common::id::Pid;
use baton_common::store::submit::NewProcess;
use baton_common::telemetry::new_traceparent;
use baton_worker::cli::exit;
use serde_json::json;

use crate::cli::{Global, Output, SubmitArguments};
use crate::client::{Client, read_spec, whoami};
use crate::failure::Failure;
use crate::{follow, output};

/// Processes that are committed and then published together. The rows of one big commit would look lost before the last
/// of them is published: the head rule has two seconds' patience with an empty queue.
const PAGE: u32 = 1_000;

pub(crate) async fn run(global: &Global, arguments: SubmitArguments) -> Result<u8, Failure> {
    let spec = read_spec(&arguments.file)?;
    if arguments.dry_run {
        let text = json!({
            "count": arguments.count,
            "kind": spec.kind(),
            "queue": spec.task_queue(),
            "spec": spec,
        });
        output::print_json(&text)?;
        return Ok(exit::OK);
    }
    let client = Client::open(global).await?;
    let by = whoami();
    let mut pids = Vec::new();
    let mut told = Ok(());
    let mut rest = arguments.count;
    while rest > 0 {
        let processes: Vec<NewProcess> = (0..rest.min(PAGE))
            .map(|_| NewProcess {
                pid: Pid::generate(),
                spec: spec.clone(),
                created_by: by.clone(),
                traceparent: Some(new_traceparent()),
                reply_to: None,
                run_key: None,
            })
            .collect();
        let accepted = match client.store.submit(&processes).await {
            Ok(accepted) => accepted,
            Err(error) if pids.is_empty() => return Err(error.into()),
            Err(error) => {
                print(global, &pids, &told)?;
                return Err(Failure::new(
                    exit::SOME_FAILED,
                    format!("{} of {} are recorded; then: {error}", pids.len(), arguments.count),
                ));
            }
        };
        rest -= u32::try_from(processes.len()).expect("a page");
        pids.extend(processes.iter().map(|process| process.pid));
        if told.is_ok() {
            told = client.tell(&accepted.queued, true).await;
        }
    }
    if let Err(reason) = &told {
        output::warn(&format!("recorded, but not announced ({reason}); workers find it when the broker is back"));
    }
    print(global, &pids, &told)?;
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

fn print(global: &Global, pids: &[Pid], told: &Result<(), String>) -> Result<(), Failure> {
    match global.output {
        Output::Json => output::print_json(&json!({"pids": pids, "nudged": told.is_ok()})),
        Output::Table | Output::Ids => pids.iter().try_for_each(|pid| output::print(&pid.to_string())),
    }
}
