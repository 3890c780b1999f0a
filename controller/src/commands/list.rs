//! `baton list`.

use baton_common::store::query::Filter;
use baton_worker::cli::exit;
use serde_json::Value;

use crate::cli::{Global, ListArguments, Output};
use crate::client::{Client, read_ids};
use crate::failure::Failure;
use crate::output;
use crate::overview::Overview;

pub(crate) async fn run(global: &Global, arguments: ListArguments) -> Result<u8, Failure> {
    let pids = read_ids(&arguments.pids)?;
    if pids.is_empty() && !arguments.pids.is_empty() {
        // `-` with nothing on standard input means none, not all.
        return Ok(exit::OK);
    }
    let client = Client::open(global).await?;
    let limit = (arguments.limit > 0).then_some(arguments.limit);
    let filter = Filter { select: arguments.selection.of(pids), limit };
    let rows = client.store.list(&filter).await?;
    match global.output {
        Output::Json => output::print_json(&Value::Array(rows.iter().map(output::summary_json).collect()))?,
        Output::Ids => rows.iter().try_for_each(|row| output::print(&row.pid.to_string()))?,
        Output::Table => {
            let mut table = output::table(&["PID", "NAME", "STATE", "AGE", "CHANGED", "TRIES", "ADVANCES", "DETAIL"]);
            for row in &rows {
                table.add_row([
                    row.pid.to_string(),
                    row.name.clone(),
                    output::state_text(row),
                    output::age(row.now - row.created_at),
                    format!("{} ago", output::age(row.now - row.changed_at)),
                    row.attempt.to_string(),
                    row.advances.to_string(),
                    output::detail(row),
                ]);
            }
            output::print(&table.trim_fmt())?;
            output::print(&format!("\n{}", footer(&client).await?))?;
        }
    }
    Ok(exit::OK)
}

/// What is beside and behind the rows that are shown.
async fn footer(client: &Client) -> Result<String, Failure> {
    let counts = client.store.count_by_state().await?;
    let total: i64 = counts.values().sum();
    let parts: Vec<String> = counts.iter().map(|(word, count)| format!("{count} {word}")).collect();
    let mut lines = vec![format!("{total} in all{}{}", if total > 0 { ": " } else { "" }, parts.join(", "))];
    let overview = Overview::look(&client.store).await?;
    lines.extend(overview.load());
    lines.extend(overview.remarks());
    Ok(lines.join("\n"))
}
