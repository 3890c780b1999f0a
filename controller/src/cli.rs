//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use baton_worker::cli::Connection;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs, submits, watches and controls processes that nothing loses.
#[derive(Parser, Debug)]
#[command(
    name = "baton",
    version,
    after_help = "Exit codes:
  0 ok   1 failed   2 usage   3 not found   4 refused   5 conflict   6 wait timed out
  7 broker or database unreachable and nothing recorded   8 the process itself failed   9 some of many failed

Examples:
  baton run examples/hello.yaml          run a process here and now, with nothing installed
  baton submit job.yaml --count 200      give 200 processes to the fleet
  baton list --state running             what is going on
  baton submit job.yaml -o ids | baton watch -"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    /// What is logged to standard error: error, warn, info, debug
    #[arg(long, global = true, env = "BATON_LOG", default_value = "error", value_name = "FILTER")]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// Where `baton run` keeps its state; other commands look there when no database is named
    #[arg(long, global = true, env = "BATON_HOME", default_value = ".baton", value_name = "DIR")]
    pub(crate) home: PathBuf,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs; fields are only ever added.
    Json,
    /// Process ids, one a line, for `-` of another command.
    Ids,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a process on this machine, to its end; run it again after an interruption and it goes on
    #[command(after_help = "Examples:
  baton run examples/hello.yaml
  baton run job.yaml --new               start another one although an unfinished one is there

The exit code is the process's own. State is kept in .baton/ of the current directory, or in --home.")]
    Run(RunArguments),
    /// Give processes to the fleet
    #[command(after_help = "Examples:
  baton submit job.yaml
  baton submit job.yaml --count 200 --wait
  baton submit job.yaml --dry-run        check it and show what would be submitted
  generate-spec | baton submit -         YAML from standard input")]
    Submit(SubmitArguments),
    /// List processes, the newest first
    #[command(after_help = "Examples:
  baton list
  baton list --state running,waiting -n 100
  baton list --state paused -o ids | baton play -")]
    List(ListArguments),
    /// Show everything about a process: what happened when, attempts and workers, its results
    Show(Pids),
    /// Ask the worker that holds a process what it does right now
    Status(Pids),
    /// Follow processes until they have ended
    #[command(after_help = "Examples:
  baton watch 01940000-0000-7000-8000-000000000000
  baton submit job.yaml -o ids | baton watch - --timeout 10m")]
    Watch(WatchArguments),
    /// Print what a process has written
    Logs(LogsArguments),
    /// Stop processes before their next advance
    #[command(after_help = "Examples:
  baton pause PID
  baton pause PID --now                  end its local program, and repeat that after `play`")]
    Pause(PauseArguments),
    /// Let paused processes go on where they were
    Play(ControlArguments),
    /// End processes
    Kill(ControlArguments),
    /// List the workers
    Workers(WorkersArguments),
    /// Look at messages that nobody could use; send them again once the cause is mended, or throw them away
    #[command(
        subcommand,
        after_help = "Examples:
  baton dead list
  baton dead show ID
  baton dead replay --all
  baton dead list -o ids | baton dead drop -"
    )]
    Dead(DeadCommand),
    /// Check what is reachable, which versions, what is wrong, and how to mend it
    Doctor,
    /// Print a completion script
    #[command(after_help = "Example:
  baton completion bash > /etc/bash_completion.d/baton")]
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Args, Debug)]
pub(crate) struct RunArguments {
    /// Spec of the process: YAML, JSON or TOML by its ending; `-` is YAML from standard input
    pub(crate) file: PathBuf,
    /// Start another one although an unfinished one of the same spec is there
    #[arg(long)]
    pub(crate) new: bool,
}

#[derive(Args, Debug)]
pub(crate) struct SubmitArguments {
    /// Spec of the process: YAML, JSON or TOML by its ending; `-` is YAML from standard input
    pub(crate) file: PathBuf,
    /// How many of it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) count: u32,
    /// Wait until all have ended
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
    /// Only check the spec and show what would be submitted
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// Only these processes; `-` reads ids from standard input
    pub(crate) pids: Vec<String>,
    /// Only these states, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(baton_common::state::WORDS))]
    pub(crate) state: Vec<String>,
    /// At most so many; 0 is all
    #[arg(short = 'n', long, default_value_t = 50)]
    pub(crate) limit: u32,
}

#[derive(Args, Debug)]
pub(crate) struct Pids {
    /// Process ids; `-` reads them from standard input
    #[arg(required = true)]
    pub(crate) pids: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct WatchArguments {
    #[command(flatten)]
    pub(crate) pids: Pids,
    /// How long to wait at most
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct LogsArguments {
    /// The process's id
    pub(crate) pid: String,
    /// Go on printing until the process has ended
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PauseArguments {
    #[command(flatten)]
    pub(crate) control: ControlArguments,
    /// Do not wait for the end of the advance: end its local program and repeat it after `play`
    #[arg(long)]
    pub(crate) now: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ControlArguments {
    #[command(flatten)]
    pub(crate) pids: Pids,
    /// Why; kept in the process's history
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Wait until it is applied
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION", default_value = "1m")]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct WorkersArguments {
    /// Also those that have stopped or died
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum DeadCommand {
    /// List dead letters, the newest first
    #[command(after_help = "Examples:
  baton dead list
  baton dead list -n 0 -o json           all of them, for a program")]
    List(DeadListArguments),
    /// Show everything about dead letters: properties, headers, body
    #[command(after_help = "Examples:
  baton dead show 01940000-0000-7000-8000-000000000000
  baton dead list -n 1 -o ids | baton dead show -")]
    Show(LetterIds),
    /// Send dead letters to the queue that they came from
    #[command(after_help = "Examples:
  baton dead replay ID
  baton dead replay --all

Mend the cause first, or they come back with a new id. A process that has run already does not run again.")]
    Replay(WhichLetters),
    /// Throw dead letters away for good
    #[command(after_help = "Examples:
  baton dead drop ID
  baton dead drop --all                  asks before it does so
  baton dead drop --all --yes")]
    Drop(DropArguments),
}

#[derive(Args, Debug)]
pub(crate) struct DeadListArguments {
    /// At most so many; 0 is all
    #[arg(short = 'n', long, default_value_t = 50)]
    pub(crate) limit: usize,
}

#[derive(Args, Debug)]
pub(crate) struct LetterIds {
    /// Ids of dead letters; `-` reads them from standard input
    #[arg(required = true)]
    pub(crate) ids: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct WhichLetters {
    /// Ids of dead letters; `-` reads them from standard input
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) ids: Vec<String>,
    /// All that are there now
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DropArguments {
    #[command(flatten)]
    pub(crate) which: WhichLetters,
    /// Do not ask before dropping all
    #[arg(long)]
    pub(crate) yes: bool,
}
