//! Processes in Rust for a Baton fleet: how to write, test and run them. The crate is also the program `baton-worker`.
//!
//! # A process
//!
//! A process is a type that implements [`Process`](process::Process). Its fields are its state. A worker calls
//! [`advance`](process::Process::advance) again and again, and after each call it stores the state in the database: the
//! *checkpoint*. When a worker dies, another one restores the process from its last checkpoint and continues.
//!
//! ```
//! use std::time::Duration;
//!
//! use baton_worker::prelude::*;
//!
//! /// Waits until a file is there, then reports its size.
//! #[derive(Serialize, Deserialize)]
//! pub struct Arrival {
//!     path: String,
//!     #[serde(default)]
//!     looks: u64,
//! }
//!
//! impl Process for Arrival {
//!     /// `input` is the `with` of the spec. To refuse unknown keys, read it into a type of its own with
//!     /// `#[serde(deny_unknown_fields)]`, and make the state from that.
//!     fn start(input: &Value) -> Result<Self, Error> {
//!         read_input(input)
//!     }
//!
//!     async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
//!         self.looks += 1;
//!         let path = self.path.clone();
//!         let size = context.blocking(move || std::fs::metadata(path).map(|file| file.len())).await?;
//!         match size {
//!             Ok(size) => {
//!                 context.set_value("size", size);
//!                 Ok(Advance::Finished { exit: 0 })
//!             }
//!             Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
//!                 context.log(format!("look {}: not there yet", self.looks));
//!                 Ok(Advance::After(Duration::from_secs(60)))
//!             }
//!             Err(error) => Err(error.into()),
//!         }
//!     }
//! }
//! ```
//!
//! The spec of such a process names its kind and its input. Kinds are registered by name, see [Running](#running).
//!
//! ```yaml
//! call: my.arrival
//! with: {path: /data/in.csv}
//! retry: {max: 3, wait: 30s}
//! ```
//!
//! # An advance is made at least once
//!
//! A worker can die after an advance has done its work and before the checkpoint is committed. The next worker then repeats
//! the advance from the last checkpoint. For each advance this means:
//!
//! - The state, the values, the progress and the lines of the log are committed together, exactly once.
//! - Side effects outside of them (files, messages, requests to a server) can happen more than once. Make them repeatable:
//!   write a file under a temporary name and rename it, or send an idempotency key.
//!   [`Context::pid`](process::Context::pid) and [`Context::advance_number`](process::Context::advance_number) are the same
//!   in each repetition.
//! - Keep an advance short, and put a checkpoint between two side effects: return [`Advance::Again`](process::Advance::Again)
//!   after each.
//!
//! After an error and after an interrupt the worker discards the changes to `self` and restores the last checkpoint.
//!
//! # Checkpoints and new versions
//!
//! A checkpoint is the serde form of the process with named fields (MessagePack). State outside of it is lost in a crash and
//! whenever the process is parked: `#[serde(skip)]` fields, `static`s, open connections. Open such things again when they are
//! missing. Keep the state small, since it is written after each advance; use `serde_bytes` for bytes.
//!
//! A new version of a program must read the checkpoints of the old one. Give new fields `#[serde(default)]`. Do not rename
//! fields or change their types; a removed field is ignored unless the type has `#[serde(deny_unknown_fields)]`. A worker
//! that cannot read a checkpoint leaves the process to a worker of another version. Keep one checkpoint of each released
//! version as a *golden file*, and a test shows that the present version reads it:
//! [`Harness::keep_golden`](testing::Harness::keep_golden) writes the file if it is missing and `BATON_WRITE_GOLDEN=1` is set, and
//! [`Harness::from_golden`](testing::Harness::from_golden) restores it. A good path is
//! `concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/v1")`.
//!
//! # Waiting
//!
//! | wait | where the process is meanwhile | use |
//! |---|---|---|
//! | [`Advance::After`](process::Advance::After) | parked in the database, from one second on | all long waits |
//! | [`Advance::Linger`](process::Advance::Linger) | in memory, in a slot of its worker | the next advance must begin on time, or `end_outside` must be called before a kill |
//! | [`Context::sleep`](process::Context::sleep) | in the middle of an advance | short waits: a pause between two requests |
//!
//! [`Context::timeout`](process::Context::timeout) limits the time of any future.
//!
//! # Work that blocks
//!
//! Many processes share one thread. A process that blocks it (long arithmetic, synchronous input and output) holds up the
//! others, and `baton status` names it. Give such work to [`Context::blocking`](process::Context::blocking). An asynchronous
//! library that uses tokio works in an advance as it is. A process need not be `Send`.
//!
//! # Errors and retries
//!
//! The [`Error`](process::Error) that an advance returns decides what happens next:
//!
//! | error | the process | a try is charged |
//! |---|---|---|
//! | [`Input`](process::Error::Input), or a panic in `advance` | is excepted | – |
//! | [`Failed`](process::Error::Failed), or a panic in a closure of `blocking` | repeats the advance as `retry` says; excepted when no try is left | yes |
//! | [`Interrupted`](process::Error::Interrupted) | returns to the queue | no |
//! | [`Stuck`](process::Error::Stuck) | is paused until an operator plays it | no |
//! | [`NotNow`](process::Error::NotNow) | is parked until the site can be used; only sites return it | no |
//! | [`Lacking`](process::Error::Lacking) | returns to the queue; the worker takes no processes for a while | no |
//!
//! Tries count over the whole life of a process, not per advance: `max: 3` allows two failures in all, and a good advance does
//! not reset them. Without `retry` the first failure excepts the process. An excepted process keeps its progress and its log,
//! not its values.
//!
//! ```
//! # use baton_worker::prelude::*;
//! # fn orders(count: u64) -> Result<(), Error> {
//! if count == 0 {
//!     return Err(Error::Input("`orders` is empty".into()));
//! }
//! std::fs::create_dir_all("orders")?;
//! let first = std::fs::read_to_string("orders/1")?;
//! let price: f64 = first.trim().parse().map_err(Error::failed)?;
//! # let _ = price;
//! # Ok(())
//! # }
//! ```
//!
//! `?` turns a [`std::io::Error`] into `Lacking` when the machine has run out of something, else into `Failed`;
//! [`Error::failed`](process::Error::failed) takes any other error. An exit code that is not in the spec's `ok.exit` is
//! retried like `Failed`.
//!
//! # Values, progress and the log
//!
//! [`Context::set_value`](process::Context::set_value) sets a value that the process returns (`baton show` prints it), [`Context::set_progress`](process::Context::set_progress) says how far it is, and
//! [`Context::log`](process::Context::log) writes a line for `baton logs`. A process that changes neither its state nor its
//! values nor its progress in 1000 advances in a row is excepted, and so is one after a million advances.
//!
//! # Sites
//!
//! [`Context::site`](process::Context::site) opens a session with a site of the worker's configuration, to run commands and
//! to send and fetch files: see [`AtSite`](site::AtSite).
//!
//! ```
//! # use std::{path::Path, time::Duration};
//! # use baton_worker::prelude::*;
//! # async fn advance(context: &Context) -> Result<Advance, Error> {
//! let site = context.site("cluster").await?;     // first in the advance: without a session it ends here
//! site.put(Path::new("/data/in.csv"), "in.csv").await?;
//! let output = site.exec("wc -l < in.csv", b"", Duration::from_secs(60)).await?;
//! let lines = output.ok().map_err(Error::failed)?;
//! context.set_value("lines", String::from_utf8_lossy(&lines).trim());
//! # Ok(Advance::Finished { exit: 0 })
//! # }
//! ```
//!
//! # Interrupts
//!
//! `baton pause` takes effect between two advances. `baton kill`, `baton pause --now`, and a drain that exceeds the grace
//! interrupt a running advance: the worker drops its future at an await and calls
//! [`interrupted`](process::Process::interrupted), which ends what the advance has left running. Before a kill is recorded,
//! the worker that holds the process calls [`end_outside`](process::Process::end_outside) for what earlier advances have left
//! running. A crash calls neither.
//!
//! # Testing
//!
//! The [`testing`] kit runs a process in memory, without services, with the code of the worker. Waits need no real time (closures
//! of `blocking` do), and the kit crashes the worker wherever a test asks for it. It needs no further dependency. Processes in
//! `src/lib.rs` can be tested from `tests/`.
//!
//! ```
//! # mod arrival {
//! #     use std::time::Duration;
//! #     use baton_worker::prelude::*;
//! #     #[derive(Serialize, Deserialize)]
//! #     pub struct Arrival { path: String, #[serde(default)] looks: u64 }
//! #     impl Process for Arrival {
//! #         fn start(input: &Value) -> Result<Self, Error> { read_input(input) }
//! #         async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
//! #             self.looks += 1;
//! #             let path = self.path.clone();
//! #             match context.blocking(move || std::fs::metadata(path).map(|file| file.len())).await? {
//! #                 Ok(size) => { context.set_value("size", size); Ok(Advance::Finished { exit: 0 }) }
//! #                 Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
//! #                     context.log(format!("look {}: not there yet", self.looks));
//! #                     Ok(Advance::After(Duration::from_secs(60)))
//! #                 }
//! #                 Err(error) => Err(error.into()),
//! #             }
//! #         }
//! #     }
//! # }
//! # use arrival::Arrival;
//! use std::time::Duration;
//!
//! use baton_worker::prelude::*;
//! use baton_worker::testing::{Harness, How, Step, run_with_crash_after_every_advance};
//!
//! let path = std::env::temp_dir().join(format!("arrival-{}", std::process::id()));
//! let mut arrival = Harness::new::<Arrival>(json!({"path": path}));
//! assert_eq!(arrival.advance(), Step::After(Duration::from_secs(60)));
//! assert!(arrival.crash_before_commit());              // the second look is lost, and made again
//! assert_eq!(arrival.advance(), Step::After(Duration::from_secs(60)));
//! assert_eq!(arrival.log(), ["look 1: not there yet", "look 2: not there yet"]);
//! assert_eq!(arrival.elapsed(), Duration::from_secs(60));
//!
//! std::fs::write(&path, "12345")?;
//! let end = arrival.run_to_end();
//! assert_eq!((end.how, end.exit, &end.values["size"]), (How::Finished, Some(0), &json!(5)));
//!
//! // The same, from the beginning, with a crash after every advance.
//! run_with_crash_after_every_advance(|| Harness::new::<Arrival>(json!({"path": path})));
//! # std::fs::remove_file(&path)?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Running
//!
//! One program has everything: the worker, and the commands of `baton` (`run`, `submit`, `list`, …).
//!
//! ```toml
//! # Cargo.toml
//! [dependencies]
//! baton-controller = { path = "../baton/controller" }
//! baton-worker = { path = "../baton/worker" }
//! serde = { version = "1", features = ["derive"] }
//! ```
//!
//! ```no_run
//! # mod baton_controller {
//! #     pub fn main_with_worker(_: baton_worker::registry::Registry) -> std::process::ExitCode { unimplemented!() }
//! # }
//! # use baton_worker::prelude::*;
//! # #[derive(Serialize, Deserialize)] struct Arrival;
//! # impl Process for Arrival {
//! #     fn start(_: &Value) -> Result<Self, Error> { Ok(Arrival) }
//! #     async fn advance(&mut self, _: &Context) -> Result<Advance, Error> { Ok(Advance::Again) }
//! # }
//! // src/main.rs
//! fn main() -> std::process::ExitCode {
//!     let mut registry = Registry::new();
//!     registry.register::<Arrival>("my.arrival");
//!     baton_controller::main_with_worker(registry)
//! }
//! ```
//!
//! ```text
//! my run arrival.yaml                     one process on this machine, without services
//! my worker --queue my                    a worker of the fleet; the environment has BATON_BROKER_URL and BATON_DATABASE_URL
//! my submit arrival.yaml --wait           a process for the fleet; its spec has `queue: my`
//! ```
//!
//! `run` keeps its state in `.baton/` of the current directory, or in `--home`; `my list`, `my show` and `my logs` read it. After
//! a crash the same command resumes the process; `--new` starts another one. The exit code is that of the process, or 8 if it
//! is excepted.
//!
//! Workers that do not know a kind leave its processes to other workers (`run` excepts them). A queue of its own (`queue: my` in the spec) saves
//! them the attempt. A program that is only a worker needs neither `baton-controller` nor its commands: its `main` calls
//! [`main`] of this crate.
//!
//! `serde` must be a dependency of the author's crate, since its derives name it; [`prelude`] has everything else,
//! with [`Value`](serde_json::Value) and [`json!`](serde_json::json) of serde_json.
//!
//! # Inside
//!
//! The modules are rooms, one above the other: each imports from itself and from those below it. From the ground up:
//! `machine`, `author`, `outbox`, [`transport`], `local`, [`site`], `builtin`, `execution`, `intake`, `lifecycle`, [`testing`].
//!
//! Threads: the communicator's (AMQP, see `baton_common::communicator`), the process threads (`execution`), one that owns
//! local programs (`local`), and the runtime of the caller for everything else (the store's writer, the heartbeat, the
//! sweeps). A worker shuts down in this order: stop taking processes, finish or checkpoint, settle deliveries, flush, close.

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

/// The names that the author of a process needs: `use baton_worker::prelude::*;`.
///
/// It has serde's `Serialize` and `Deserialize` with their derives, and `Value` and `json!` of serde_json. The derives need
/// `serde` as a dependency of the author's crate.
pub mod prelude {
    pub use serde::{Deserialize, Serialize};
    pub use serde_json::{Value, json};

    pub use crate::author::process::{Advance, Context, Error, Interrupt, Process, read_input};
    pub use crate::author::registry::Registry;
}
