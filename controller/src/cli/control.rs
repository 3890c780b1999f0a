//! The options of `baton pause`, `play` and `kill`.

use std::time::Duration;

use baton_common::duration;
use clap::Args;

use super::selection::Selection;

/// Options that select single processes. A request to the fleet rejects them, because it would ignore them.
const NOT_OF_A_FLEET: [&str; 8] = ["label", "session", "queue", "kind", "state", "worker", "older_than", "dry_run"];

#[derive(Args, Debug)]
pub(crate) struct PauseArguments {
    /// Do not wait for the end of the advance: terminate the local program now, and repeat the advance after `play`
    #[arg(long)]
    pub(crate) now: bool,
    /// Pause the fleet: workers claim no more processes; held processes continue
    #[arg(long, group = "whom", conflicts_with_all = NOT_OF_A_FLEET, conflicts_with = "now")]
    pub(crate) fleet: bool,
    #[command(flatten)]
    pub(crate) control: ControlArguments,
}

#[derive(Args, Debug)]
pub(crate) struct PlayArguments {
    /// Resume the fleet: workers claim processes again
    #[arg(long, group = "whom", conflicts_with_all = NOT_OF_A_FLEET)]
    pub(crate) fleet: bool,
    #[command(flatten)]
    pub(crate) control: ControlArguments,
}

#[derive(Args, Debug)]
pub(crate) struct KillArguments {
    /// End the process in the database now; its worker terminates the program when it receives the request, or at the
    /// latest when its lease expires
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) control: ControlArguments,
}

#[derive(Args, Debug)]
pub(crate) struct ControlArguments {
    /// Process ids; `-` reads them from standard input
    #[arg(group = "whom")]
    pub(crate) pids: Vec<String>,
    /// All processes
    #[arg(long, group = "whom")]
    pub(crate) all: bool,
    /// Reason to record in the history of the process
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Only print the number of matches
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask for confirmation; only `baton kill` with a selection asks
    #[arg(long)]
    pub(crate) yes: bool,
    /// Wait until the request is applied
    #[arg(long)]
    pub(crate) wait: bool,
    /// Maximum time to wait, such as 30s or 1h30m
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION", default_value = "1m")]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) selection: Selection,
}
