//! The command line of `baton site`.

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum SiteCommand {
    /// Test everything that Baton needs at a site
    #[command(after_help = "Example:
  baton site test cluster

The exit code is 0 if all tests pass, and 1 otherwise.")]
    Test {
        /// Name of the site
        site: String,
    },
    /// Run a command at a site, in the home directory of the user
    #[command(after_help = "Examples:
  baton site exec cluster -- squeue --me
  baton site exec cluster -- 'du -sh jobs/* | tail -n 3'
  baton site exec cluster --timeout 1h -- make -C src

A single argument is a command line for the shell at the site. Several arguments are a program and its arguments, which
are passed unchanged. Standard input is empty. The output (at most 16 MiB) is printed after the command has ended. The
exit code is that of the command.")]
    Exec(SiteExecArguments),
    /// Send a file to a site
    #[command(after_help = "Examples:
  baton site put cluster data.tar inputs/data.tar
  baton site put cluster data.tar /scratch/me/

Missing directories are created. An interrupted transfer resumes. The sent file is verified by its SHA-256 digest.")]
    Put(SitePutArguments),
    /// Fetch a file from a site
    #[command(after_help = "Examples:
  baton site get cluster job/slurm.out ./slurm.out
  baton site get cluster /scratch/me/data.tar .

An interrupted transfer resumes. The fetched file is verified by its SHA-256 digest.")]
    Get(SiteGetArguments),
}

#[derive(Args, Debug)]
pub(crate) struct SiteExecArguments {
    /// Name of the site
    pub(crate) site: String,
    /// Command line for the shell at the site, or a program and its arguments
    #[arg(required = true, last = true)]
    pub(crate) command: Vec<String>,
    /// Time limit of the command, such as 30s or 1h30m
    #[arg(long, value_parser = duration::parse, value_name = "DURATION", default_value = "10m")]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct SitePutArguments {
    /// Name of the site
    pub(crate) site: String,
    /// Local file
    pub(crate) from: PathBuf,
    /// File at the site, or a directory if it ends with `/`; a relative path is relative to the root of the site
    pub(crate) to: String,
}

#[derive(Args, Debug)]
pub(crate) struct SiteGetArguments {
    /// Name of the site
    pub(crate) site: String,
    /// File at the site; a relative path is relative to the root of the site
    pub(crate) from: String,
    /// Local file or directory
    pub(crate) to: PathBuf,
}
