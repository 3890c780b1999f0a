//! The command line: the commands and their help. Options that several commands share, and those of a family of
//! commands, have a file each.

pub(crate) mod bench;
pub(crate) mod control;
pub(crate) mod dead;
pub(crate) mod selection;
pub(crate) mod site;

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use baton_common::id::Pid;
use baton_worker::cli::Connection;
use clap::{Args, Parser, Subcommand, ValueEnum};

use self::bench::BenchCommand;
use self::control::{KillArguments, PauseArguments, PlayArguments};
use self::dead::DeadCommand;
use self::selection::{Facts, SELECTION, Selection};
use self::site::SiteCommand;

/// Runs, submits, watches and controls durable processes.
#[derive(Parser, Debug)]
#[command(
    name = "baton",
    version,
    after_help = "Exit codes:
  0 ok   1 failed   2 usage   3 not found   4 refused   5 conflict   6 wait timed out
  7 broker or database unreachable, nothing recorded   8 the process itself failed   9 some of several failed

Examples:
  baton run examples/hello.yaml          run a process on this machine; no server is needed
  baton submit job.yaml --count 200      submit 200 processes to the fleet
  baton list --state running             list the processes that are running
  baton submit job.yaml -o ids | baton watch -"
)]
pub(crate) struct Cli {
    /// Log level on standard error: error, warn, info or debug
    #[arg(
        long,
        global = true,
        env = "BATON_LOG",
        default_value = "error",
        value_name = "FILTER",
        help_heading = GLOBAL
    )]
    pub(crate) log: String,
    // The heading of a flattened struct also applies to the options after it. Therefore flattened structs are last.
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Heading of the options of every command, except those of the connection.
const GLOBAL: &str = "Global options";

/// Options of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = GLOBAL)]
pub(crate) struct Global {
    /// Output format
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// Directory for the state of `baton run`; other commands use its database if no database is configured
    #[arg(long, global = true, env = "BATON_HOME", default_value = ".baton", value_name = "DIR")]
    pub(crate) home: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Tables and text for people.
    Table,
    /// JSON for programs; fields are added, never removed.
    Json,
    /// Ids, one per line, as input for `-` of another command.
    Ids,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a process on this machine until it ends; after an interruption, the same command resumes it
    #[command(after_help = "Examples:
  baton run examples/hello.yaml
  baton run job.yaml --new               start another process even if an unfinished one exists

The exit code is that of the process. State is kept in .baton/ in the current directory, or in the directory set by
--home.")]
    Run(RunArguments),
    /// Submit processes to the fleet
    #[command(after_help = "Examples:
  baton submit job.yaml
  baton submit job.yaml --count 200 --wait
  baton submit job.yaml --dry-run        check the spec and show what would be submitted
  generate-spec | baton submit -         read YAML from standard input")]
    Submit(SubmitArguments),
    /// List processes, newest first
    #[command(after_help = "Examples:
  baton list
  baton list --state running,waiting -n 100
  baton list --label campaign=si --after PID   the page after this process
  baton list -n 0 -o json                all processes as JSON
  baton list --state paused -o ids | baton play -

Processes are sorted by id, which begins with the time at which it was generated. With --older-than, they are sorted by
the time of acceptance. The totals below the table stop counting at 10000.")]
    List(ListArguments),
    /// Show everything about a process: timeline, attempts, workers and results
    #[command(after_help = "Examples:
  baton show PID
  baton show PID -o json
  baton list --state excepted -o ids | baton show -")]
    Show(Pids),
    /// Ask the worker that holds a process for its current status
    #[command(after_help = "Examples:
  baton status PID
  baton list --state running -o ids | baton status -")]
    Status(Pids),
    /// Explain why a process does not advance: print the first unmet condition, with details
    #[command(after_help = "Examples:
  baton explain PID
  baton list --state waiting -o ids | baton explain -
  baton explain PID -o json              `condition` is a stable identifier; `facts` has the details

Conditions: ended, kill_pending, pause_pending, paused, on_hold, holder_gone, holder_silent, blocks_its_thread,
advancing, needs_other_worker, waits_for_retry, waits_for_timer, waits_for_job, waits_for_session, waits_for_room,
waits_for_file, refused_by_site, site_down, fleet_paused, no_worker, queue_not_served, workers_lack, workers_drain,
workers_silent, slots_taken, queued")]
    Explain(Pids),
    /// Follow processes until they end
    #[command(after_help = "Examples:
  baton watch 01940000-0000-7000-8000-000000000000
  baton submit job.yaml -o ids | baton watch - --timeout 10m")]
    Watch(WatchArguments),
    /// Print the standard output and standard error of a process
    #[command(after_help = "Examples:
  baton logs PID
  baton logs PID --follow                print new output until the process ends")]
    Logs(LogsArguments),
    /// List the result files of a process in the object store, or fetch them
    #[command(after_help = "Examples:
  baton results PID                      paths, sizes, SHA-256 digests and URLs
  baton results PID --get results/       fetch all files; skip those that are already there and unchanged
  baton results PID -o json

`out` in the spec names the result files. Every fetched file is verified by its SHA-256 digest.")]
    Results(ResultsArguments),
    /// Pause processes before their next advance
    #[command(after_help = "Examples:
  baton pause PID
  baton pause PID --now                  end the local program; `play` repeats the advance
  baton pause --all --reason maintenance
  baton pause --label campaign=si --state running,waiting --dry-run
  baton pause --fleet                    workers claim no more processes; held processes continue")]
    Pause(PauseArguments),
    /// Resume paused processes at their last checkpoint
    #[command(after_help = "Examples:
  baton play PID
  baton play --session night --wait
  baton play --fleet                     workers claim processes again")]
    Play(PlayArguments),
    /// Kill processes
    #[command(after_help = "Examples:
  baton kill PID --wait
  baton kill --label campaign=si --yes
  baton kill PID --force                 end it now, even if its worker does not answer")]
    Kill(KillArguments),
    /// List workers
    #[command(after_help = "Examples:
  baton workers
  baton workers w1                       also list the processes that the worker holds
  baton workers --all                    include workers that have stopped or died
  baton workers --watch                  refresh every second until Ctrl-C
  baton workers --watch -o json          print one line of JSON per refresh

States: live; draining (claims no more processes); silent (has missed a heartbeat); gone (stopped, or declared dead).
LEASE is the time since the last heartbeat. If a worker is silent for 10 s, as measured by another worker, the
other workers take over its processes.")]
    Workers(WorkersArguments),
    /// List sites with their sessions, jobs, waiting processes and last error
    #[command(after_help = "Examples:
  baton sites
  baton sites cluster -o json

A site is `down` after a failure to reach it. Its processes wait, without using a slot, until Baton reconnects.
SESSIONS counts the sessions of the whole fleet. WAIT-SESSION counts processes that wait for a session. WAIT-ROOM counts
processes that wait until the site accepts another job.")]
    Sites(SitesArguments),
    /// Open a shell in the directory of a process, at its site
    #[command(after_help = "Examples:
  baton open PID
  baton open PID --print                 only print the command")]
    Open(OpenArguments),
    /// Drain workers: they give back their processes and stop
    #[command(after_help = "Examples:
  baton drain w1 --reason 'new kernel'
  baton drain w1 w2 --wait               wait until they have stopped; show the processes that they still hold
  baton drain 01940000-0000-7000-8000-000000000000   one incarnation, if several have the same name

The request is written to the database first, so it also works while the broker is down: workers read it at their next
heartbeat. A process returns to its queue before its next advance, or when the grace period of the worker ends. If a
service manager restarts a drained worker, the worker claims processes as usual.")]
    Drain(DrainArguments),
    /// Remove processes that ended long ago, with their attempts, outputs and history; workers may keep running
    #[command(after_help = "Examples:
  baton prune --older-than 30d --dry-run
  baton prune --older-than 30d --yes     for cron: `0 3 * * * baton prune --older-than 30d --yes`
  baton prune --older-than 7d --state finished --label campaign=si

Only processes that have ended are removed. Removal is permanent. It proceeds in pages; after an interruption, run the
command again.

An external program may publish a launch a second time after its process was pruned. That launch must not run the
process again. Therefore the database stores the latest time up to which processes were pruned. A launch is
dead-lettered if its pid (a UUIDv7) was generated before that time and its process does not exist. Set --older-than to
more than the longest time that a launch may wait in a queue.")]
    Prune(PruneArguments),
    /// Remove unneeded objects from the object store
    #[command(after_help = "Examples:
  baton gc --dry-run
  baton gc                               for cron, after `baton prune`

A process needs its input files and its results until it is pruned. Objects that are younger than --older-than are kept,
because a process that is being submitted or is about to end may need them. Set --older-than to less than a day only
while no process is being submitted or about to end.")]
    Gc(GcArguments),
    /// Inspect, replay or drop dead letters: messages that no program could process
    #[command(
        subcommand,
        after_help = "Examples:
  baton dead list
  baton dead show ID
  baton dead replay --all
  baton dead list -o ids | baton dead drop -"
    )]
    Dead(DeadCommand),
    /// Measure the limits of this installation, and the performance and cost of Baton
    #[command(
        subcommand,
        after_help = "Examples:
  baton bench limits --combined          the maximum rates of broker and database
  baton bench throughput --workers 1     processes per second, and their ratio to the limits
  baton bench latency --workers 1 -o json
  baton bench throughput --workers 3 -n 50000 --no-limits

A benchmark needs PostgreSQL and RabbitMQ. Both must otherwise be idle, because their counters cover the whole server.
With --workers, the benchmark starts its own workers on its own queue. Without --workers, the workers that serve --queue
run the processes. At the end, the benchmark removes its processes, queues and schema (`baton_bench_*`). If a benchmark
is killed, it removes nothing."
    )]
    Bench(BenchCommand),
    /// Test a site, run commands there, and transfer files
    #[command(
        subcommand,
        after_help = "Examples:
  baton site test cluster
  baton site exec cluster -- squeue --me
  baton site put cluster data.tar inputs/data.tar
  baton site get cluster job/slurm.out ./slurm.out

Sites are configured as [sites.NAME]. Neither broker nor database is needed."
    )]
    Site(SiteCommand),
    /// Check database, broker, object store, workers and sites, and print remedies
    #[command(after_help = "Examples:
  baton doctor
  baton doctor -o json

The exit code is 0 if no check fails.")]
    Doctor,
    /// Print a completion script
    #[command(after_help = "Example:
  baton completion bash > /etc/bash_completion.d/baton")]
    Completion {
        /// Shell for which to print the script
        shell: clap_complete::Shell,
    },
}

#[derive(Args, Debug)]
pub(crate) struct RunArguments {
    /// Spec file; the extension selects YAML, JSON or TOML; `-` reads YAML from standard input
    pub(crate) file: PathBuf,
    /// Start another process even if an unfinished one with the same spec exists
    #[arg(long)]
    pub(crate) new: bool,
}

#[derive(Args, Debug)]
pub(crate) struct SubmitArguments {
    /// Spec file; the extension selects YAML, JSON or TOML; `-` reads YAML from standard input
    pub(crate) file: PathBuf,
    /// Number of processes to submit
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) count: u32,
    /// Wait until all processes have ended
    #[arg(long)]
    pub(crate) wait: bool,
    /// Maximum time to wait, such as 30s or 1h30m [default: no limit]
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
    /// Only check the spec and show what would be submitted
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ListArguments {
    /// Processes to list; `-` reads ids from standard input [default: all]
    pub(crate) pids: Vec<String>,
    /// Maximum number of processes to list; 0 means no limit
    #[arg(short = 'n', long, default_value_t = 50)]
    pub(crate) limit: u32,
    /// List the page that follows this process
    #[arg(long, value_name = "PID")]
    pub(crate) after: Option<Pid>,
    #[command(flatten)]
    pub(crate) selection: Selection,
}

#[derive(Args, Debug)]
pub(crate) struct PruneArguments {
    /// Remove only processes that ended at least this long ago, such as 12h or 30d
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) older_than: Duration,
    /// Only print the number of matches
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask for confirmation
    #[arg(long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) facts: Facts,
    /// Only processes that ended in one of these states, separated by commas
    #[arg(long, help_heading = SELECTION, value_delimiter = ',', value_parser = ["finished", "excepted", "killed"])]
    pub(crate) state: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct ResultsArguments {
    /// Process id
    pub(crate) pid: String,
    /// Fetch all result files into this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) get: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct GcArguments {
    /// Remove only objects that were stored at least this long ago, such as 12h or 30d
    #[arg(long, value_name = "DURATION", default_value = "1d", value_parser = duration::parse)]
    pub(crate) older_than: Duration,
    /// Only print the number and total size of the matches
    #[arg(long)]
    pub(crate) dry_run: bool,
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
    /// Maximum time to wait, such as 30s or 1h30m [default: no limit]
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct LogsArguments {
    /// Process id
    pub(crate) pid: String,
    /// Print new output until the process ends
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Args, Debug)]
pub(crate) struct WorkersArguments {
    /// Workers to list, by name or incarnation, with the processes that they hold [default: all, without processes]
    pub(crate) names: Vec<String>,
    /// Refresh every second until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
    /// Include workers that have stopped or died
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DrainArguments {
    /// Workers to drain, by name or incarnation
    #[arg(required = true, value_name = "WORKER")]
    pub(crate) names: Vec<String>,
    /// Reason to record in the history of the fleet
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Wait until the workers have stopped
    #[arg(long)]
    pub(crate) wait: bool,
    /// Maximum time to wait, such as 30s or 1h30m
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION", default_value = "2m")]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct SitesArguments {
    /// Site to list [default: all]
    pub(crate) name: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct OpenArguments {
    /// Process id
    pub(crate) pid: String,
    /// Print the command instead of running it
    #[arg(long)]
    pub(crate) print: bool,
}
