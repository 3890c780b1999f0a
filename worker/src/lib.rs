//! The program that advances Baton's processes, and the library for processes written in Rust.
//!
//! A program of one's own with its own kinds of processes is [`main`] with a [`registry::Registry`]:
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     let registry = baton_worker::registry::Registry::new();
//!     // registry.register::<MyProcess>("my.process");
//!     baton_worker::main(registry)
//! }
//! ```
//!
//! The modules are rooms, one above the other: each imports from itself and from those below it. From the ground up:
//! `machine`, `author`, `outbox`, [`transport`], [`local`], [`site`], `builtin`, `execution`, `intake`, `lifecycle`.
//!
//! Threads: the communicator's (AMQP, see `baton_common::communicator`), process threads ([`process`]), one that owns
//! local programs ([`local`]), and the runtime of the caller for everything else (the store's writer, the beat, the
//! sweeps). Shutdown goes in this order: stop taking, finish or checkpoint, settle deliveries, flush, close.

mod author;
mod builtin;
mod execution;
mod intake;
mod lifecycle;
mod local;
mod machine;
mod outbox;
pub mod site;
pub mod testing;
pub mod transport;

pub use author::{process, registry};
pub use lifecycle::cli::main;
pub use lifecycle::{cli, worker};

/// What the tests of local programs use. It is no part of the library.
#[doc(hidden)]
pub mod internals {
    pub use crate::local::output::Capture;
    pub use crate::local::sandbox::Sandbox;
    pub use crate::local::shim::wire::{Ended, EndedBy, Order, Report};
    pub use crate::local::{Command, Error, Program, Programs, Running};
}

/// What the author of a process imports: `use baton_worker::prelude::*;`.
pub mod prelude {
    pub use serde::{Deserialize, Serialize};
    pub use serde_json::{Value, json};

    pub use crate::author::process::{Advance, Context, Error, Interrupt, Process, read_input};
    pub use crate::author::registry::Registry;
}
