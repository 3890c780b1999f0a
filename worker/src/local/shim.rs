//! The shim: the small process between a worker and one local program, which leaves nothing of the program behind.
//!
//! A worker starts its own executable as `<exe> shim`. The shim is the subreaper of everything that the program starts,
//! so also what forked, called setsid and closed its pipes stays below it. It ends all of it when the program ends, when
//! it is told to, when its standard input closes (the worker died), or when nobody renews the worker's lease (the worker
//! is frozen or cut off). If the shim itself is killed, the program goes with it by its parent-death signal, and the
//! worker ends the rest.
//!
//! Here is only plain blocking code, and no runtime: there is one shim for each program.

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

/// The hidden sub-command of every Baton binary under which [`main`] has to be called.
pub(crate) const COMMAND: &str = "shim";

/// The argument after [`COMMAND`] that names the second stage, which becomes the program.
const STAGE: &str = "exec";

/// The argument after [`COMMAND`] with which a worker tries whether children can be started.
pub(crate) const PROBE: &str = "probe";

/// The argument after [`COMMAND`] with which a worker does something as the user of its programs.
pub(crate) const AS: &str = "as";

/// Runs the shim. Call this first in `main`, before any runtime or other thread starts, when the first argument is
/// [`COMMAND`].
pub(crate) fn main() -> ExitCode {
    // No program has what its worker was started with.
    handover::keep_inherited();
    let mut arguments = std::env::args().skip(2);
    match arguments.next().as_deref() {
        Some(STAGE) => return stage::main(),
        // A probe starts a process, too, which does nothing.
        Some(PROBE) if arguments.next().is_some() => return ExitCode::SUCCESS,
        Some(PROBE) => return exit_code(&supervise::try_start(None)),
        Some(AS) => return user::act(arguments),
        Some(_) | None => {}
    }
    let mut input = io::BufReader::new(io::stdin());
    let mut line = String::new();
    match input.read_line(&mut line) {
        // The worker died before it had said what to run.
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
    // This fails only for a process that leads its group already, and then the terminal's signals are its own business.
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

/// An exit code that tells the operating system's number of a failure.
pub(crate) fn exit_code(done: &io::Result<()>) -> ExitCode {
    let code = done.as_ref().err().map_or(0, |error| error.raw_os_error().unwrap_or(1));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn failed(message: String, errno: Option<i32>) -> ExitCode {
    report(&Report::Failed { message, errno });
    ExitCode::FAILURE
}

/// Tells the worker. Nobody may be there to hear it any more, and that is no error of the shim.
fn report(report: &Report) {
    let mut line = serde_json::to_string(report).expect("a report is made of numbers and text");
    line.push('\n');
    let _ = io::stdout().lock().write_all(line.as_bytes());
}
