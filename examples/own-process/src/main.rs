//! A program with processes of its own: `own.pi` estimates pi from random points, and `own.words` counts the words of a text
//! at a site. It is a worker, and it has all commands of `baton`:
//!
//!     cargo test                                                # the processes, with the test kit
//!     cargo run -- run own-pi.yaml                              # one process on this machine, without services
//!     cargo run -- worker --name own --queue own                # BATON_BROKER_URL and BATON_DATABASE_URL are set
//!     cargo run -- submit own-pi.yaml --wait                    # in another terminal

use std::process::ExitCode;

use baton_worker::prelude::*;

use crate::pi::Pi;
use crate::words::Words;

mod pi;
mod words;

fn main() -> ExitCode {
    let mut registry = Registry::new();
    registry.register::<Pi>("own.pi");
    registry.register::<Words>("own.words");
    baton_controller::main_with_worker(registry)
}
