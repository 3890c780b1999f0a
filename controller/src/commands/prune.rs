//! `baton prune`: removes processes that ended long ago, page by page.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use baton_common::exit;
use baton_common::select::Select;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::{Global, Output, PruneArguments};
use crate::client::Client;
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(global: &Global, arguments: PruneArguments) -> Result<u8, Failure> {
    let PruneArguments { older_than, facts, state, dry_run, yes } = arguments;
    let select = Select { states: (!state.is_empty()).then_some(state), ..facts.select()? };
    let client = Client::open(global).await?;
    // Without a question and a progress bar, as under cron, counting is not needed.
    let is_shown = std::io::stderr().is_terminal();
    let counts = if dry_run || !yes || is_shown {
        client.store.count_prunable(&select, older_than).await?
    } else {
        BTreeMap::new()
    };
    let total: u64 = counts.values().sum();
    if dry_run {
        return dry(global.output, total, &counts);
    }
    if !yes {
        output::confirm("prune", total)?;
    }
    let bar = if is_shown { bar(total) } else { ProgressBar::hidden() };
    let n_pruned = prune(&client, &select, older_than, &bar).await?;
    bar.finish_and_clear();
    match global.output {
        Output::Json => output::print_json(&json!({"pruned": n_pruned}))?,
        Output::Ids => {}
        Output::Table => output::print(&format!("{} pruned", output::processes(n_pruned)))?,
    }
    Ok(exit::OK)
}

async fn prune(client: &Client, select: &Select, older_than: Duration, bar: &ProgressBar) -> Result<u64, Failure> {
    let mut n_pruned = 0;
    let mut pruning = client.store.prune(select, older_than).await?;
    while let Some(count) = pruning.next().await? {
        n_pruned += count;
        bar.set_position(n_pruned);
    }
    Ok(n_pruned)
}

fn dry(how: Output, total: u64, counts: &BTreeMap<String, u64>) -> Result<u8, Failure> {
    match how {
        Output::Json => output::print_json(&json!({"dry_run": true, "selected": total, "by": counts}))?,
        Output::Ids => {}
        Output::Table => {
            let by: Vec<String> = counts.iter().map(|(state, count)| format!("{count} {state}")).collect();
            let by = if by.is_empty() { String::new() } else { format!(": {}", by.join(", ")) };
            output::print(&format!("{} would be pruned{by}", output::processes(total)))?;
        }
    }
    Ok(exit::OK)
}

fn bar(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} pruned, {elapsed}").expect("the template is right");
    ProgressBar::new(total).with_style(style)
}
