//! `baton-worker`: a worker with Baton's own kinds of processes.

use std::process::ExitCode;

use baton_worker::registry::Registry;
use mimalloc::MiMalloc;

/// A checkpoint is some dozen small pieces of memory that several threads make and drop.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    baton_worker::main(Registry::new())
}
