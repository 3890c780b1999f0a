//! The shim: a small process between a worker and one local program that makes sure the program ends completely.
//!
//! A worker starts its own executable as `<exe> shim`. The shim is the subreaper of the program's descendants, so even a
//! process that forked, called setsid and closed its pipes stays below it. The shim ends all of them when the program
//! ends, when the worker asks for it, when its standard input closes (the worker died), or when the worker's lease is not
//! renewed (the worker is frozen or cut off). If the shim itself is killed, its parent-death signal kills the program,
//! and the worker ends the rest.
//!
//! The code is plain and blocking, without a runtime: there is one shim for each program.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use rustix::process::{getpid, set_child_subreaper, setsid};

use crate::local::user;
use crate::machine::handover;

pub(crate) mod policy;
mod stage;
pub(crate) mod supervise;
pub(crate) mod tree;
pub(crate) mod wire;

use wire::{Order, Report};

/// The hidden subcommand of every Baton binary that must call [`main`].
pub(crate) const COMMAND: &str = "shim";

/// The argument after [`COMMAND`] for the second stage, which becomes the program.
const STAGE: &str = "exec";

/// The argument after [`COMMAND`] for a probe: whether children can be started.
pub(crate) const PROBE: &str = "probe";

/// The argument after [`COMMAND`] for an action as the user of the programs.
pub(crate) const AS: &str = "as";

/// Runs the shim. Call this first in `main`, before any runtime or other thread starts, when the first argument is
/// [`COMMAND`].
pub(crate) fn main() -> ExitCode {
    // The program must not inherit the worker's open files.
    handover::keep_inherited();
    let mut arguments = std::env::args().skip(2);
    match arguments.next().as_deref() {
        Some(STAGE) => return stage::main(),
        // The child of a probe does nothing.
        Some(PROBE) if arguments.next().is_some() => return ExitCode::SUCCESS,
        Some(PROBE) => return exit_code(&supervise::try_start(None)),
        Some(AS) => return user::act(arguments),
        Some(_) | None => {}
    }
    let mut input = io::BufReader::new(io::stdin());
    let mut line = String::new();
    match input.read_line(&mut line) {
        // The worker died before it sent an order.
        Ok(0) => return ExitCode::SUCCESS,
        Ok(_) => {}
        Err(error) => return failed(format!("could not read the order: {error}"), error.raw_os_error()),
    }
    let order: Order = match serde_json::from_str(&line) {
        Ok(order) => order,
        Err(error) => return failed(format!("could not read the order: {error}"), None),
    };
    if let Some(ids) = &order.user
        && let Err(error) = ids.take_on()
    {
        return failed(format!("could not become the user {}: {error}", ids.uid), error.raw_os_error());
    }
    // This fails only if the process leads its group already; then it also handles the terminal's signals itself.
    let _ = setsid();
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        return failed(format!("could not become a subreaper: {error}"), Some(error.raw_os_error()));
    }
    match supervise::run(&order, input) {
        Ok(ended) => {
            report(&Report::Ended(ended));
            ExitCode::SUCCESS
        }
        Err(error) => failed(error.to_string(), error.errno()),
    }
}

/// The exit code that carries the errno of a failure.
pub(crate) fn exit_code(done: &io::Result<()>) -> ExitCode {
    let code = done.as_ref().err().map_or(0, |error| error.raw_os_error().unwrap_or(1));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn failed(message: String, errno: Option<i32>) -> ExitCode {
    report(&Report::Failed { message, errno });
    ExitCode::FAILURE
}

/// Sends a report to the worker. The worker may be gone, which is no error of the shim.
fn report(report: &Report) {
    let mut line = serde_json::to_string(report).expect("a report is made of numbers and text");
    line.push('\n');
    let _ = io::stdout().lock().write_all(line.as_bytes());
}
