//! `baton-worker`: a worker with Baton's own kinds of processes.

use std::process::ExitCode;

use baton_worker::registry::Registry;

fn main() -> ExitCode {
    baton_worker::main(Registry::new())
}
