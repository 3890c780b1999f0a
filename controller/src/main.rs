//! `baton`: runs, submits, watches and controls processes.

use std::process::ExitCode;

use baton_worker::registry::Registry;

fn main() -> ExitCode {
    baton_controller::main(Registry::new())
}
