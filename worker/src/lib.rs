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
//! Threads: the communicator's (AMQP, see `baton_common::communicator`), process threads ([`process`]), one that owns
//! local programs ([`local`]), and the runtime of the caller for everything else (the store's writer, the beat, the
//! sweeps). Shutdown goes in this order: stop taking, finish or checkpoint, settle deliveries, flush, close.

mod beat;
mod claims;
pub mod cli;
mod control;
mod direct;
mod facilities;
mod gate;
mod heads;
mod held;
mod incarnation;
mod intake;
mod kinds;
mod lease;
mod limits;
mod live;
pub mod local;
mod machine;
mod outbox;
pub mod peers;
mod probing;
pub mod process;
pub mod registry;
mod run;
mod setbacks;
pub mod shim;
pub mod site;
mod suspects;
mod sweeps;
mod thread;
mod timer;
pub mod transport;
pub mod user;
pub mod worker;

pub use cli::main;
pub use machine::handover;
