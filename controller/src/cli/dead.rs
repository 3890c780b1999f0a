//! The command line of `baton dead`.

use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum DeadCommand {
    /// List dead letters, newest first
    #[command(after_help = "Examples:
  baton dead list
  baton dead list -n 0 -o json           all dead letters as JSON")]
    List(DeadListArguments),
    /// Show everything about dead letters: properties, headers and body
    #[command(after_help = "Examples:
  baton dead show 01940000-0000-7000-8000-000000000000
  baton dead list -n 1 -o ids | baton dead show -")]
    Show(LetterIds),
    /// Return dead letters to their original queues
    #[command(after_help = "Examples:
  baton dead replay ID
  baton dead replay --all

Remove the cause first; otherwise the messages are dead-lettered again, with new ids. A process that has already run
does not run again.")]
    Replay(WhichLetters),
    /// Drop dead letters permanently
    #[command(after_help = "Examples:
  baton dead drop ID
  baton dead drop --all                  drop all after confirmation
  baton dead drop --all --yes")]
    Drop(DropArguments),
}

#[derive(Args, Debug)]
pub(crate) struct DeadListArguments {
    /// Maximum number of dead letters to list; 0 means no limit
    #[arg(short = 'n', long, default_value_t = 50)]
    pub(crate) limit: usize,
}

#[derive(Args, Debug)]
pub(crate) struct LetterIds {
    /// Ids of dead letters; `-` reads them from standard input
    #[arg(required = true)]
    pub(crate) ids: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct WhichLetters {
    /// Ids of dead letters; `-` reads them from standard input
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) ids: Vec<String>,
    /// All dead letters that are in the queue now
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DropArguments {
    #[command(flatten)]
    pub(crate) which: WhichLetters,
    /// Do not ask for confirmation before dropping all dead letters
    #[arg(long)]
    pub(crate) yes: bool,
}
