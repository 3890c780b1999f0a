//! `baton completion`: prints a completion script.

use baton_common::exit;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Failure;

pub(crate) fn run(shell: Shell) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "baton", &mut script);
    crate::output::print(&String::from_utf8_lossy(&script))?;
    Ok(exit::OK)
}
