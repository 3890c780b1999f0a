//! The command line of `baton bench`.

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Plain loops: confirmed publishes with acknowledged deliveries, fenced updates in batches, single commits
    Limits(LimitsArguments),
    /// Processes of one advance, all at once
    Throughput(ThroughputArguments),
    /// Processes of many durable advances
    Advances(AdvancesArguments),
    /// Processes of one advance, one after the other
    Latency(LatencyArguments),
    /// Pause and play among live processes: one by one, and all by a broadcast
    Control(ControlBenchArguments),
    /// Kill a worker, and wait until others hold what it held
    Recover(RecoverArguments),
}

impl BenchCommand {
    /// Who works, where anybody does.
    pub(crate) fn fleet(&self) -> Option<&FleetArguments> {
        match self {
            BenchCommand::Limits(_) | BenchCommand::Control(_) | BenchCommand::Recover(_) => None,
            BenchCommand::Throughput(arguments) => Some(&arguments.fleet),
            BenchCommand::Advances(arguments) => Some(&arguments.fleet),
            BenchCommand::Latency(arguments) => Some(&arguments.fleet),
        }
    }
}

/// Who does the work of a benchmark.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct FleetArguments {
    /// Start so many workers for the run; 0 uses those that serve --queue
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) workers: u32,
    /// Slots of each of these workers
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Threads of each of these workers that advance processes
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u16>,
    /// The program of these workers [default: baton-worker, beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) worker_program: Option<PathBuf>,
    /// The queue of workers that are there
    #[arg(long, default_value = "default", value_name = "QUEUE")]
    pub(crate) queue: String,
    /// Do not measure the limits before
    #[arg(long)]
    pub(crate) no_limits: bool,
}

/// Who holds the processes of a benchmark: always workers of its own, with room for all of them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct HoldingArguments {
    /// Start so many workers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) workers: Option<u32>,
    /// Threads of each of these workers that advance processes
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u16>,
    /// The program of these workers [default: baton-worker, beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) worker_program: Option<PathBuf>,
}

impl HoldingArguments {
    /// Workers each of which could hold all, of which there are at least so many.
    pub(crate) fn holding(&self, count: u32, workers_min: u32) -> Result<FleetArguments, String> {
        let workers = self.workers.unwrap_or(workers_min);
        if workers < workers_min {
            return Err(format!("this needs --workers {workers_min} at least"));
        }
        Ok(FleetArguments {
            workers,
            slots: Some(count),
            threads: self.threads,
            worker_program: self.worker_program.clone(),
            queue: String::new(),
            no_limits: true,
        })
    }
}

#[derive(Args, Debug)]
pub(crate) struct LimitsArguments {
    /// Also messages and rows together, as Baton has them
    #[arg(long)]
    pub(crate) combined: bool,
    /// How many processes go through at each point of --combined
    #[arg(short = 'n', long, default_value_t = 20_000, value_name = "N")]
    pub(crate) count: u32,
    /// How many advances each of these makes
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// For how long each other point is measured
    #[arg(long, default_value = "2s", value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) each: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct ThroughputArguments {
    /// How many processes
    #[arg(short = 'n', long, default_value_t = 20_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct AdvancesArguments {
    /// How many processes
    #[arg(short = 'n', long, default_value_t = 5_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    /// How many advances each makes
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct LatencyArguments {
    /// How many processes
    #[arg(short = 'n', long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct ControlBenchArguments {
    /// How many live processes
    #[arg(short = 'n', long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    /// How many of them are paused and played one by one
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub(crate) requests: u32,
    #[command(flatten)]
    pub(crate) fleet: HoldingArguments,
}

#[derive(Args, Debug)]
pub(crate) struct RecoverArguments {
    /// How many live processes
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: HoldingArguments,
}
