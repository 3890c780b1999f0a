//! `baton`: runs, submits, watches and controls processes.

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

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use failure::Failure;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(baton_worker::shim::COMMAND) {
        return baton_worker::shim::main();
    }
    let cli = Cli::parse_from(baton_worker::handover::begin());
    let _failpoints = baton_common::failpoint::init();
    baton_common::telemetry::init(&cli.log, baton_common::telemetry::LogFormat::Text);
    let runtime = match baton_worker::cli::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::failed(format!("cannot start: {error}")).report(),
    };
    let code = match runtime.block_on(dispatch(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    };
    runtime.shutdown_background();
    code
}

async fn dispatch(cli: Cli) -> Result<u8, Failure> {
    let Cli { command, global, .. } = cli;
    match command {
        Command::Run(arguments) => Box::pin(commands::run::run(&global, arguments)).await,
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
