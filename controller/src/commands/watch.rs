//! `baton watch`: follows processes until they end.

use serde_json::Value;

use crate::cli::{Global, Output, WatchArguments};
use crate::client::{Client, read_ids};
use crate::failure::Failure;
use crate::{follow, output};

pub(crate) async fn run(global: &Global, arguments: WatchArguments) -> Result<u8, Failure> {
    let pids = read_ids(&arguments.pids.pids)?;
    let client = Client::open(global).await?;
    let mut ended = Vec::new();
    let tally = follow::wait_ended(&client.store, &pids, arguments.timeout, |row| {
        if row.state.is_final() && global.output != Output::Table {
            ended.push(row.clone());
        }
        if global.output == Output::Table {
            let line = format!(
                "{}  {}  {}  advance {}  {}",
                output::clock(row.now),
                row.pid,
                output::state_text(row),
                row.advances,
                output::detail(row)
            );
            // A closed pipe ends the command when it prints its result.
            let _ = output::print(line.trim_end());
        }
    })
    .await?;
    match global.output {
        Output::Json => output::print_json(&Value::Array(ended.iter().map(output::summary_json).collect()))?,
        Output::Ids => ended.iter().try_for_each(|row| output::print(&row.pid.to_string()))?,
        Output::Table => {}
    }
    Ok(tally.exit_code())
}
