//! The command line of `baton site`.

use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum SiteCommand {
    /// Try everything that Baton needs of a site
    #[command(after_help = "Example:
  baton site test cluster

The exit code is 0 if all of it works, and 1 if something does not.")]
    Test {
        /// The site's name
        site: String,
    },
    /// Run a command at a site, in the home folder there
    #[command(after_help = "Examples:
  baton site exec cluster -- squeue --me
  baton site exec cluster -- 'du -sh jobs/* | tail -n 3'
  baton site exec cluster --timeout 1h -- make -C src

One word is a line for the shell there; several words are a program and its arguments as they are. It gets no input, and
what it writes (16 MiB at most) is printed when it has ended. The exit code is its own.")]
    Exec(SiteExecArguments),
    /// Send a file to a site
    #[command(after_help = "Examples:
  baton site put cluster data.tar inputs/data.tar
  baton site put cluster data.tar /scratch/me/

The folders on the way are made. What was cut goes on where it was, and what has come is compared by its SHA-256.")]
    Put(SitePutArguments),
    /// Fetch a file from a site
    #[command(after_help = "Examples:
  baton site get cluster job/slurm.out ./slurm.out
  baton site get cluster /scratch/me/data.tar .

What was cut goes on where it was, and what has come is compared by its SHA-256.")]
    Get(SiteGetArguments),
}

#[derive(Args, Debug)]
pub(crate) struct SiteExecArguments {
    /// The site's name
    pub(crate) site: String,
    /// A line for the shell there, or a program and its arguments
    #[arg(required = true, last = true)]
    pub(crate) command: Vec<String>,
    /// How long it may take
    #[arg(long, value_parser = duration::parse, value_name = "DURATION", default_value = "10m")]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct SitePutArguments {
    /// The site's name
    pub(crate) site: String,
    /// The file here
    pub(crate) from: PathBuf,
    /// The file there, or with `/` at the end its folder; below the site's root unless it is absolute
    pub(crate) to: String,
}

#[derive(Args, Debug)]
pub(crate) struct SiteGetArguments {
    /// The site's name
    pub(crate) site: String,
    /// The file there; below the site's root unless it is absolute
    pub(crate) from: String,
    /// The file here, or its folder
    pub(crate) to: PathBuf,
}
