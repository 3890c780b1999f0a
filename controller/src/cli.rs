//! The command line.

pub(crate) mod bench;
pub(crate) mod site;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use baton_common::id::Pid;
use baton_common::select::Select;
use baton_worker::cli::Connection;
use clap::{Args, Parser, Subcommand, ValueEnum};

use self::bench::BenchCommand;
use self::site::SiteCommand;
use crate::failure::Failure;

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
  baton list --label campaign=si --after PID   the page that comes after this process
  baton list -n 0 -o json                all of them, for a program, however many there are
  baton list --state paused -o ids | baton play -

The order is that of the ids, which begin with the time of their making; with --older-than it is that of acceptance.
Below the table stands what there is in all; from 10000 on that is not counted any further.")]
    List(ListArguments),
    /// Show everything about a process: what happened when, attempts and workers, its results
    Show(Pids),
    /// Ask the worker that holds a process what it does right now
    Status(Pids),
    /// Say why a process does not move: the first condition that is not met, with numbers
    #[command(after_help = "Examples:
  baton explain PID
  baton list --state waiting -o ids | baton explain -
  baton explain PID -o json              `condition` is a word that stays, with its `facts`

Conditions: ended, kill_pending, pause_pending, paused, on_hold, holder_gone, holder_silent, blocks_its_thread,
advancing, needs_other_worker, waits_for_retry, waits_for_timer, waits_for_job, waits_for_session, waits_for_room,
waits_for_file, refused_by_site, site_down, fleet_paused, no_worker, queue_not_served, workers_drain, workers_silent,
slots_taken, queued")]
    Explain(Pids),
    /// Follow processes until they have ended
    #[command(after_help = "Examples:
  baton watch 01940000-0000-7000-8000-000000000000
  baton submit job.yaml -o ids | baton watch - --timeout 10m")]
    Watch(WatchArguments),
    /// Print what a process has written
    Logs(LogsArguments),
    /// List the files that a process has left in the object store, or fetch them
    #[command(after_help = "Examples:
  baton results PID                      paths, sizes, SHA-256 and where they are
  baton results PID --get results/       fetch all; what is there and equal is left as it is
  baton results PID -o json

They are what the spec names in `out`. Each is verified by its SHA-256.")]
    Results(ResultsArguments),
    /// Stop processes before their next advance
    #[command(after_help = "Examples:
  baton pause PID
  baton pause PID --now                  end its local program, and repeat that after `play`
  baton pause --all --reason maintenance
  baton pause --label campaign=si --state running,waiting --dry-run
  baton pause --fleet                    what is held goes on, nothing new is taken")]
    Pause(PauseArguments),
    /// Let paused processes go on where they were
    #[command(after_help = "Examples:
  baton play PID
  baton play --session night --wait
  baton play --fleet                     take work again")]
    Play(PlayArguments),
    /// End processes
    #[command(after_help = "Examples:
  baton kill PID --wait
  baton kill --label campaign=si --yes
  baton kill PID --force                 end it now, although its worker does not answer")]
    Kill(KillArguments),
    /// List the workers
    #[command(after_help = "Examples:
  baton workers
  baton workers w1                       also what it holds
  baton workers --all                    also those that have stopped or died
  baton workers --watch                  again every second, until Ctrl-C
  baton workers --watch -o json          a line for each look

States: live; draining (takes nothing more); silent (has missed a beat); gone (has stopped or was declared gone).
LEASE is how long ago it beat; after 10 s of silence, as another worker sees it, what it holds is taken over.")]
    Workers(WorkersArguments),
    /// List the sites that workers serve: sessions, jobs, who waits, and what went wrong last
    #[command(after_help = "Examples:
  baton sites
  baton sites cluster -o json

A site is `down` after it could not be reached; its processes wait, and cost nothing, until it is tried again. SESSIONS are
those of the whole fleet; WAIT-SESSION and WAIT-ROOM are processes that wait for one, or for room for another job.")]
    Sites(SitesArguments),
    /// Open a shell in the folder of a process, at its site
    #[command(after_help = "Examples:
  baton open PID
  baton open PID --print                 only the command")]
    Open(OpenArguments),
    /// Let workers give back what they hold, and stop
    #[command(after_help = "Examples:
  baton drain w1 --reason 'new kernel'
  baton drain w1 w2 --wait               until they have stopped, showing what they still hold
  baton drain 01940000-0000-7000-8000-000000000000   one incarnation of several of the same name

It is written into the database first, so it holds even while the broker is down: workers read it at their next beat.
What a worker holds goes back to the queue before its next advance, or when the worker's grace has passed. A service
manager that starts the worker again starts one that takes work.")]
    Drain(DrainArguments),
    /// Remove processes that ended long ago, with their attempts, outputs and history, while the fleet works
    #[command(after_help = "Examples:
  baton prune --older-than 30d --dry-run
  baton prune --older-than 30d --yes     the line for cron: `0 3 * * * baton prune --older-than 30d --yes`
  baton prune --older-than 7d --state finished --label campaign=si

What has not ended is never touched. Whatever is removed is removed for good, a page at a time; after an interruption,
run it again.

A launch that came from outside and is sent again after its process was pruned must not run it again. So the time is kept
up to which something was pruned: from then on a launch whose pid, a UUIDv7, was made before that, and whose process is
not there, goes to the dead letters. Choose a duration that is longer than any launch waits in a queue.")]
    Prune(PruneArguments),
    /// Remove from the object store what no process needs any more
    #[command(after_help = "Examples:
  baton gc --dry-run
  baton gc                               the line for cron, after `baton prune`

A process needs what was sent for it and what it left as results, until it is pruned. What is younger than --older-than
is never removed, since it may be on its way into a process: less than a day only while nobody submits and nothing ends.")]
    Gc(GcArguments),
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
    /// Measure what this installation can do, what Baton makes of it, and what that costs
    #[command(
        subcommand,
        after_help = "Examples:
  baton bench limits --combined          what broker and database can do at best
  baton bench throughput --workers 1     processes a second, and what was reached of the limits
  baton bench latency --workers 1 -o json
  baton bench throughput --workers 3 -n 50000 --no-limits

It needs PostgreSQL and RabbitMQ, and both otherwise idle, since their counters are of the whole server. With --workers
it starts workers of its own on a queue of its own; without, it uses those that serve --queue. In the end it removes its
processes, queues and schema (`baton_bench_*`); a run that was killed leaves them behind."
    )]
    Bench(BenchCommand),
    /// Look after a site: whether it can be reached, commands and files there
    #[command(
        subcommand,
        after_help = "Examples:
  baton site test cluster
  baton site exec cluster -- squeue --me
  baton site put cluster data.tar inputs/data.tar
  baton site get cluster job/slurm.out ./slurm.out

Sites stand in the configuration as [sites.NAME]. Neither broker nor database is needed."
    )]
    Site(SiteCommand),
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
    #[command(flatten)]
    pub(crate) selection: Selection,
    /// At most so many; 0 is all
    #[arg(short = 'n', long, default_value_t = 50)]
    pub(crate) limit: u32,
    /// Only those that come after this process in the list: the next page
    #[arg(long, value_name = "PID")]
    pub(crate) after: Option<Pid>,
}

#[derive(Args, Debug)]
pub(crate) struct PruneArguments {
    /// Only those that ended at least so long ago
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) older_than: Duration,
    #[command(flatten)]
    pub(crate) facts: Facts,
    /// Only those that ended so, separated by commas
    #[arg(long, help_heading = "Selection", value_delimiter = ',', value_parser = ["finished", "excepted", "killed"])]
    pub(crate) state: Vec<String>,
    /// Only say how many it would be about
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Ask no question before they are removed
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ResultsArguments {
    /// The process's id
    pub(crate) pid: String,
    /// Fetch all of them into this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) get: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct GcArguments {
    /// Only what was put at least so long ago
    #[arg(long, value_name = "DURATION", default_value = "1d", value_parser = duration::parse)]
    pub(crate) older_than: Duration,
    /// Only say how much it would be
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

/// What says something of single processes. A request to the fleet has none of it, and does not drop it either.
const NOT_OF_A_FLEET: [&str; 8] = ["label", "session", "queue", "kind", "state", "worker", "older_than", "dry_run"];

#[derive(Args, Debug)]
pub(crate) struct PauseArguments {
    #[command(flatten)]
    pub(crate) control: ControlArguments,
    /// Do not wait for the end of the advance: end its local program and repeat it after `play`
    #[arg(long)]
    pub(crate) now: bool,
    /// The fleet takes no more work; what is held goes on
    #[arg(long, group = "whom", conflicts_with_all = NOT_OF_A_FLEET, conflicts_with = "now")]
    pub(crate) fleet: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PlayArguments {
    #[command(flatten)]
    pub(crate) control: ControlArguments,
    /// The fleet takes work again
    #[arg(long, group = "whom", conflicts_with_all = NOT_OF_A_FLEET)]
    pub(crate) fleet: bool,
}

#[derive(Args, Debug)]
pub(crate) struct KillArguments {
    #[command(flatten)]
    pub(crate) control: ControlArguments,
    /// End it in the database now, without waiting for its worker; that ends what it runs when it hears of it, at the
    /// latest with its lease
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ControlArguments {
    /// Process ids; `-` reads them from standard input
    #[arg(group = "whom")]
    pub(crate) pids: Vec<String>,
    /// Every process
    #[arg(long, group = "whom")]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) selection: Selection,
    /// Why; kept in the process's history
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Only say how many it would be about
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Ask no question before many are killed
    #[arg(long)]
    pub(crate) yes: bool,
    /// Wait until it is applied
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION", default_value = "1m")]
    pub(crate) timeout: Duration,
}

/// Which processes, by what they have in common. Conditions are ANDed.
#[derive(Args, Debug)]
#[command(next_help_heading = "Selection")]
pub(crate) struct Selection {
    #[command(flatten)]
    pub(crate) facts: Facts,
    /// Only those in these states, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(baton_common::state::WORDS))]
    pub(crate) state: Vec<String>,
    /// Only those that this worker holds
    #[arg(long, value_name = "NAME")]
    pub(crate) worker: Option<String>,
    /// Only those that were accepted at least so long ago
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) older_than: Option<Duration>,
}

/// What was said of a process when it was accepted, and never changes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Selection")]
pub(crate) struct Facts {
    /// Only those that bear this label; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) label: Vec<(String, String)>,
    /// Only those of this session
    #[arg(long, value_name = "NAME")]
    pub(crate) session: Option<String>,
    /// Only those of this task queue, with its class: `default`, `default.high`
    #[arg(long, value_name = "QUEUE")]
    pub(crate) queue: Option<String>,
    /// Only those that run this: `program`, `baton.count`…
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
}

impl Facts {
    /// As the database reads it.
    ///
    /// # Errors
    /// A label is asked for twice. No process bears two values of one label.
    pub(crate) fn select(self) -> Result<Select, Failure> {
        let mut labels = BTreeMap::new();
        for (key, value) in self.label {
            if let Some(other) = labels.insert(key.clone(), value.clone())
                && other != value
            {
                let text = format!("`--label {key}={other}` and `--label {key}={value}` exclude each other");
                return Err(Failure::usage(text));
            }
        }
        Ok(Select {
            labels: (!labels.is_empty()).then_some(labels),
            session: self.session,
            queue: self.queue,
            kind: self.kind,
            ..Select::default()
        })
    }
}

impl Selection {
    /// As the database reads it.
    ///
    /// # Errors
    /// As [`Facts::select`].
    pub(crate) fn select(self) -> Result<Select, Failure> {
        let states = (!self.state.is_empty()).then_some(self.state);
        Ok(Select { states, worker: self.worker, older_than: self.older_than, ..self.facts.select()? })
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

#[derive(Args, Debug)]
pub(crate) struct WorkersArguments {
    /// Only these, by name or incarnation, with what they hold
    pub(crate) names: Vec<String>,
    /// Show them again every second, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
    /// Also those that have stopped or died
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DrainArguments {
    /// Workers, by name or incarnation
    #[arg(required = true, value_name = "WORKER")]
    pub(crate) names: Vec<String>,
    /// Why; kept in the fleet's history
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Wait until they have stopped
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most
    #[arg(long, requires = "wait", value_parser = duration::parse, value_name = "DURATION", default_value = "2m")]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct SitesArguments {
    /// Only this one
    pub(crate) name: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct OpenArguments {
    /// The process
    pub(crate) pid: String,
    /// Print the command instead of running it
    #[arg(long)]
    pub(crate) print: bool,
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
