//! The command line of `baton bench`.

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Measure broker and database with plain loops: confirmed publishes, acknowledged deliveries and fenced updates
    #[command(after_help = "Examples:
  baton bench limits
  baton bench limits --combined -n 50000")]
    Limits(LimitsArguments),
    /// Run many processes of one advance at once
    #[command(after_help = "Examples:
  baton bench throughput --workers 1
  baton bench throughput --workers 3 -n 50000 --no-limits")]
    Throughput(ThroughputArguments),
    /// Run processes of many durable advances
    #[command(after_help = "Examples:
  baton bench advances --workers 1
  baton bench advances --workers 1 -n 1000 --steps 100")]
    Advances(AdvancesArguments),
    /// Run processes of one advance, one after another
    #[command(after_help = "Examples:
  baton bench latency --workers 1
  baton bench latency --workers 1 -o json")]
    Latency(LatencyArguments),
    /// Pause and play held processes, first one by one, then all with one broadcast
    #[command(after_help = "Examples:
  baton bench control
  baton bench control -n 5000 --requests 500 --workers 2")]
    Control(ControlBenchArguments),
    /// Kill a worker and wait until other workers hold its processes
    #[command(after_help = "Examples:
  baton bench recover
  baton bench recover -n 1000 --workers 3")]
    Recover(RecoverArguments),
}

impl BenchCommand {
    /// The options of the workers, for benchmarks that have them.
    pub(crate) fn fleet(&self) -> Option<&FleetArguments> {
        match self {
            BenchCommand::Limits(_) | BenchCommand::Control(_) | BenchCommand::Recover(_) => None,
            BenchCommand::Throughput(arguments) => Some(&arguments.fleet),
            BenchCommand::Advances(arguments) => Some(&arguments.fleet),
            BenchCommand::Latency(arguments) => Some(&arguments.fleet),
        }
    }
}

/// The workers of a benchmark.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct FleetArguments {
    /// Number of workers to start; 0 uses the workers that serve --queue
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) workers: u32,
    /// Number of slots of each started worker [default: as baton-worker]
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Number of threads that advance processes in each started worker [default: as baton-worker]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u16>,
    /// Program to start as a worker [default: baton-worker in the directory of this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) worker_program: Option<PathBuf>,
    /// Queue that the existing workers serve
    #[arg(long, default_value = "default", value_name = "QUEUE")]
    pub(crate) queue: String,
    /// Do not measure the limits first
    #[arg(long)]
    pub(crate) no_limits: bool,
}

/// The workers that hold the processes of a benchmark. The benchmark always starts them, with slots for all processes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct HoldingArguments {
    /// Number of workers to start [default: the fewest that the benchmark needs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) workers: Option<u32>,
    /// Number of threads that advance processes in each started worker [default: as baton-worker]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u16>,
    /// Program to start as a worker [default: baton-worker in the directory of this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) worker_program: Option<PathBuf>,
}

impl HoldingArguments {
    /// Options of at least `workers_min` workers, each with `count` slots.
    pub(crate) fn holding(&self, count: u32, workers_min: u32) -> Result<FleetArguments, String> {
        let workers = self.workers.unwrap_or(workers_min);
        if workers < workers_min {
            return Err(format!("this benchmark needs --workers {workers_min} or more"));
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
    /// Also measure messages and rows together, in the way Baton uses them
    #[arg(long)]
    pub(crate) combined: bool,
    /// Number of processes in each measurement of --combined
    #[arg(short = 'n', long, default_value_t = 20_000, value_name = "N")]
    pub(crate) count: u32,
    /// Number of advances of each process of --combined
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// Duration of each other measurement, such as 500ms or 2s
    #[arg(long, default_value = "2s", value_parser = duration::parse, value_name = "DURATION")]
    pub(crate) each: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct ThroughputArguments {
    /// Number of processes
    #[arg(short = 'n', long, default_value_t = 20_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct AdvancesArguments {
    /// Number of processes
    #[arg(short = 'n', long, default_value_t = 5_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    /// Number of advances of each process
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct LatencyArguments {
    /// Number of processes
    #[arg(short = 'n', long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: FleetArguments,
}

#[derive(Args, Debug)]
pub(crate) struct ControlBenchArguments {
    /// Number of held processes
    #[arg(short = 'n', long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,
    /// Number of processes to pause and play one by one
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub(crate) requests: u32,
    #[command(flatten)]
    pub(crate) fleet: HoldingArguments,
}

#[derive(Args, Debug)]
pub(crate) struct RecoverArguments {
    /// Number of held processes
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) fleet: HoldingArguments,
}
