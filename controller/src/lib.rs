//! Baton's command line as a library, for programs with processes of their own.
//!
//! A program that calls [`main_with_worker`] with a [`Registry`] is `baton` and `baton-worker` in one: `own run FILE` runs a
//! process on this machine, `own worker` serves a fleet, `own submit FILE` and all other commands are those of `baton`.
//! The front page of [`baton_worker`] explains how to write a process.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use baton_worker::prelude::*;
//!
//! fn main() -> ExitCode {
//!     let mut registry = Registry::new();
//!     // registry.register::<MyProcess>("my.process");
//!     baton_controller::main_with_worker(registry)
//! }
//! ```

mod bench;
mod capture;
mod cli;
mod client;
mod commands;
mod condition;
mod dry_run;
mod failure;
mod follow;
mod output;
mod overview;
mod submission;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use baton_common::exit;
use baton_worker::registry::Registry;
use clap::{Arg, CommandFactory, FromArgMatches};
use cli::{Cli, Command};
use failure::Failure;

/// The sub-command that is a worker.
const WORKER: &str = "worker";

/// Runs `baton` as a whole program: command line, output, exit code. Call it first in `main`, before any thread starts.
///
/// `registry` has the kinds of processes that `run` knows besides Baton's own.
pub fn main(registry: Registry) -> ExitCode {
    match baton_worker::cli::begin() {
        Ok(arguments) => run(Cli::command(), arguments, registry),
        Err(code) => code,
    }
}

/// Runs `baton` and `baton-worker` as one program: with `worker` as its first argument it is the worker, otherwise it is as
/// [`main`]. Call it first in `main`, before any thread starts.
///
/// `registry` has the kinds of processes that `run` and the worker know besides Baton's own.
pub fn main_with_worker(registry: Registry) -> ExitCode {
    let is_worker = std::env::args_os().nth(1).is_some_and(|argument| argument == WORKER);
    let mut arguments = match baton_worker::cli::begin() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    if is_worker {
        let name = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        // URLs of the environment may stand before it.
        if let Some(idx) = arguments.iter().position(|argument| argument == WORKER) {
            arguments.remove(idx);
        }
        arguments[0] = format!("{name} {WORKER}").into();
        return baton_worker::cli::run(arguments, registry);
    }
    let worker = clap::Command::new(WORKER)
        .about("Run a worker of the fleet; `worker --help` lists its options")
        .disable_help_flag(true)
        .arg(Arg::new("options").hide(true).num_args(0..).trailing_var_arg(true).allow_hyphen_values(true));
    run(Cli::command().subcommand(worker), arguments, registry)
}

fn run(command: clap::Command, arguments: Vec<OsString>, registry: Registry) -> ExitCode {
    let matches = command.clone().get_matches_from(arguments);
    if matches.subcommand_name() == Some(WORKER) {
        let failure = Failure::new(exit::USAGE, "`worker` must be the first argument, before all options");
        return failure.report();
    }
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command.clone()).exit());
    let _failpoints = baton_common::failpoint::init();
    baton_common::telemetry::init(&cli.log, baton_common::telemetry::LogFormat::Text);
    let runtime = match baton_worker::cli::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::failed(format!("cannot start: {error}")).report(),
    };
    let code = match runtime.block_on(dispatch(cli, registry)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    };
    runtime.shutdown_background();
    code
}

async fn dispatch(cli: Cli, registry: Registry) -> Result<u8, Failure> {
    let Cli { command, global, .. } = cli;
    match command {
        Command::Run(arguments) => Box::pin(commands::run::run(&global, arguments, registry)).await,
        Command::Submit(arguments) => commands::submit::run(&global, arguments).await,
        Command::List(arguments) => commands::list::run(&global, arguments).await,
        Command::Show(arguments) => commands::show::run(&global, arguments).await,
        Command::Status(arguments) => commands::status::run(&global, arguments).await,
        Command::Explain(arguments) => commands::explain::run(&global, arguments).await,
        Command::Watch(arguments) => commands::watch::run(&global, arguments).await,
        Command::Logs(arguments) => commands::logs::run(&global, arguments).await,
        Command::Results(arguments) => Box::pin(commands::results::run(&global, arguments)).await,
        Command::Pause(arguments) => commands::control::pause(&global, arguments).await,
        Command::Play(arguments) => commands::control::play(&global, arguments).await,
        Command::Kill(arguments) => commands::control::kill(&global, arguments).await,
        Command::Workers(arguments) => commands::workers::run(&global, arguments).await,
        Command::Drain(arguments) => commands::drain::run(&global, arguments).await,
        Command::Prune(arguments) => commands::prune::run(&global, arguments).await,
        Command::Gc(arguments) => Box::pin(commands::gc::run(&global, arguments)).await,
        Command::Dead(command) => Box::pin(commands::dead::run(&global, command)).await,
        Command::Bench(command) => Box::pin(bench::run(&global, command)).await,
        Command::Sites(arguments) => commands::sites::run(&global, arguments).await,
        Command::Open(arguments) => commands::open::run(&global, arguments).await,
        Command::Site(command) => Box::pin(commands::site::run(&global, command)).await,
        Command::Doctor => commands::doctor::run(&global).await,
        Command::Completion { shell } => commands::completion::run(shell),
    }
}
