//! Injects random faults into a fleet under mixed load, and checks the result. `tests/chaos` runs it.

#![expect(clippy::print_stdout, reason = "prints a report")]

mod faults;
mod fleet;
mod load;
mod report;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_tests::dice::Dice;
use clap::Parser;
use tokio_util::sync::CancellationToken;

use crate::faults::Fault;
use crate::fleet::Fleet;
use crate::load::Load;
use crate::report::Report;

/// Injects random faults into a fleet under mixed load, and checks the result
#[derive(Parser)]
struct Arguments {
    /// How long to inject faults; then the run waits for the remaining work
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// The same seed injects the same faults
    #[arg(long)]
    seed: Option<u64>,
    /// Number of workers
    #[arg(long, default_value_t = 3)]
    workers: usize,
    /// Faults to choose from, separated by commas; `none` only loads the fleet and measures resource usage
    #[arg(long, value_delimiter = ',')]
    faults: Vec<String>,
}

/// After this time a worker's resource usage is stable.
const WARM_UP: Duration = Duration::from_secs(60);

/// One fault in this many comes with a second.
const TWO_AT_ONCE: u64 = 4;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let faults = match chosen(&arguments.faults) {
        Ok(faults) => faults,
        Err(text) => {
            println!("{text}");
            return ExitCode::from(2);
        }
    };
    let seed = arguments.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed}, {} minutes, {} workers", arguments.minutes, arguments.workers);
    let report = run(&arguments, &faults, seed).await;
    println!("{report}");
    let mut again =
        format!("tests/chaos --minutes {} --seed {seed} --workers {}", arguments.minutes, arguments.workers);
    if !arguments.faults.is_empty() {
        again.push_str(&format!(" --faults {}", arguments.faults.join(",")));
    }
    println!("again: {again}");
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn chosen(names: &[String]) -> Result<Vec<Fault>, String> {
    if names.is_empty() {
        return Ok(Fault::ALL.to_vec());
    }
    if names == ["none"] {
        return Ok(vec![]);
    }
    let known = || Fault::ALL.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(", ");
    let find = |name: &String| Fault::ALL.iter().find(|fault| fault.name() == name).copied();
    names.iter().map(|name| find(name).ok_or_else(|| format!("no fault `{name}`; there are {}", known()))).collect()
}

async fn run(arguments: &Arguments, faults: &[Fault], seed: u64) -> Report {
    let fleet = Fleet::start(arguments.workers, faults.contains(&Fault::FullDisk)).await;
    let load = Load::new(Dice::seeded(seed).of(1));
    let mut report = Report::default();
    let stop = CancellationToken::new();
    let until = Instant::now() + Duration::from_secs_f64(arguments.minutes * 60.0);
    let throwing = async {
        throw(&fleet, faults, Dice::seeded(seed), until, &mut report).await;
        stop.cancel();
    };
    tokio::join!(throwing, load.give(&fleet, &stop), load.ask(&fleet, &stop));
    load.end(&fleet).await;
    report.judge(&fleet, &load).await;
    report
}

/// Injects one fault, or two at once, repeatedly. Each must be over, and the fleet must make progress, before the next.
async fn throw(fleet: &Fleet, faults: &[Fault], mut dice: Dice, until: Instant, report: &mut Report) {
    let begun = Instant::now();
    let quarter = until.saturating_duration_since(begun) / 4;
    report.warm_up(fleet, quarter.min(WARM_UP)).await;
    while Instant::now() < until {
        if faults.is_empty() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        tokio::time::sleep(dice.time(500, 4_000)).await;
        let first = *dice.pick(faults);
        let second = *dice.pick(faults);
        let (mut dice_1, mut dice_2) = (dice.of(1), dice.of(2));
        let is_double = dice.next(TWO_AT_ONCE) == 0 && first.goes_with(second);
        let name = if is_double { format!("{} + {}", first.name(), second.name()) } else { first.name().to_owned() };
        println!("{:7.1} s  {name}", begun.elapsed().as_secs_f64());
        if is_double {
            tokio::join!(first.strike(fleet, &mut dice_1), second.strike(fleet, &mut dice_2));
        } else {
            first.strike(fleet, &mut dice_1).await;
        }
        fleet.revive().await;
        report.goes_on(fleet, &name).await;
    }
    fleet.heal().await;
    report.cool_down(fleet, faults.is_empty()).await;
}
