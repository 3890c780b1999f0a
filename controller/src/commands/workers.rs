//! `baton workers`.

use baton_common::store::query::WorkerRow;
use baton_worker::cli::exit;
use serde_json::{Value, json};

use crate::cli::{Global, Output, WorkersArguments};
use crate::client::Client;
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(global: &Global, arguments: WorkersArguments) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let rows = client.store.workers(arguments.all).await?;
    let now = client.store.now().await?;
    match global.output {
        Output::Json => output::print_json(&Value::Array(rows.iter().map(json_of).collect()))?,
        Output::Ids => rows.iter().try_for_each(|row| output::print(&row.id.to_string()))?,
        Output::Table => {
            let mut table = output::table(&[
                "NAME", "HOST", "OS PID", "STATE", "HELD", "SLOTS", "QUEUES", "VERSION", "UP", "DETAIL",
            ]);
            for row in &rows {
                table.add_row([
                    row.name.clone(),
                    row.host.clone(),
                    row.os_pid.to_string(),
                    if row.gone_at.is_some() { "gone".into() } else { "live".into() },
                    row.held.to_string(),
                    row.slots.to_string(),
                    row.queues.clone(),
                    row.version.clone(),
                    output::age(row.gone_at.unwrap_or(now) - row.started_at),
                    row.blocked.as_ref().map(|blocked| format!("blocked by {blocked}")).unwrap_or_default(),
                ]);
            }
            output::print(&table.trim_fmt())?;
        }
    }
    Ok(exit::OK)
}

fn json_of(row: &WorkerRow) -> Value {
    let mut value = json!(row);
    value["started_at"] = json!(output::timestamp(row.started_at));
    value["gone_at"] = json!(row.gone_at.map(output::timestamp));
    value
}
