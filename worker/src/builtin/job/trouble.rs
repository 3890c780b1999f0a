//! Why a stage of a job did not complete, and what the advance returns then.

use std::io;
use std::path::Path;
use std::time::Duration;

use baton_common::lack::Shortage;
use baton_common::store;

use super::at::At;
use super::{Job, LOOKS_MAX, SETTLE_PAUSE, Stage};
use crate::author::process::{Advance, Context, Error, Wait};
use crate::machine::shortage;
use crate::site::staging::{self, Error as Staging};
use crate::transport;

/// Why a stage did not complete.
pub(super) enum Trouble {
    /// Files could not be staged, or the site could not be reached.
    Staging(Staging),
    /// The program removed the folder with its exit code. File systems may show it as missing for a while.
    Emptied(String),
    Process(Error),
}

impl From<Staging> for Trouble {
    fn from(error: Staging) -> Self {
        Trouble::Staging(error)
    }
}

impl From<transport::Error> for Trouble {
    fn from(error: transport::Error) -> Self {
        // Unlike in staging, a command that fails here says nothing about files.
        Trouble::Staging(Staging::Site(error))
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Process(error)
    }
}

impl From<store::Error> for Trouble {
    fn from(error: store::Error) -> Self {
        Trouble::Process(Error::Interrupted(error.to_string()))
    }
}

/// Repeats the advance after this time, unless something wakes the process before.
pub(super) fn not_yet(at_most: Duration) -> Trouble {
    Error::NotNow(Wait::pause(at_most)).into()
}

/// Pauses the process: its job has done its work, which must not be thrown away.
fn stuck(text: &str) -> Error {
    Error::Stuck(format!("stage: {text}; its files are kept at the site: fix the cause, then play the process"))
}

/// The shortage of this worker behind an error with a local file. Only Baton writes below the staging folder, so every
/// error there is one.
fn shortage_here(context: &Context, path: &Path, error: &io::Error) -> Option<Shortage> {
    let is_own = path.starts_with(context.root().join(staging::FOLDER));
    if is_own { Some(shortage::below_root(path, error)) } else { shortage::of_worker(error) }
}

impl Job {
    /// Returns the result of an advance whose stage did not complete.
    pub(super) async fn after(&mut self, at: &At<'_>, trouble: Trouble) -> Result<Advance, Error> {
        match trouble {
            Trouble::Staging(Staging::Site(error)) => Err(match at.site.trouble(at.context, &error).await {
                // There may be a job, so the try continues whatever the site says.
                Error::Failed(text) if self.stage == Stage::Settle => {
                    at.context.log(text);
                    Error::NotNow(Wait::pause(SETTLE_PAUSE))
                }
                Error::Failed(text) if self.stage == Stage::Out => stuck(&text),
                error @ (Error::Input(_)
                | Error::Failed(_)
                | Error::Interrupted(_)
                | Error::Stuck(_)
                | Error::Lacking(_)
                | Error::NotNow(_)) => error,
            }),
            Trouble::Staging(Staging::Lacks(text)) if self.stage == Stage::In => self.wait_for_room(at, text).await,
            Trouble::Staging(Staging::Here { path, error, text }) => match shortage_here(at.context, &path, &error) {
                Some(shortage) => Err(Error::Lacking(shortage)),
                None if self.stage == Stage::Out => Err(stuck(&text)),
                // The folder of a site on this machine has no space left.
                None if shortage::lack_of(&error).is_some() => self.wait_for_room(at, text).await,
                None => Err(Error::Failed(format!("stage: {text}"))),
            },
            Trouble::Staging(Staging::Content(text)) | Trouble::Emptied(text) if self.looks < LOOKS_MAX => {
                at.context.log(text);
                self.looks += 1;
                Ok(Advance::After(SETTLE_PAUSE))
            }
            Trouble::Staging(Staging::Content(text) | Staging::Files(text) | Staging::Lacks(text)) => {
                Err(match self.stage {
                    Stage::Out => stuck(&text),
                    Stage::In | Stage::Submit | Stage::Settle | Stage::Monitor => {
                        Error::Failed(format!("stage: {text}"))
                    }
                })
            }
            Trouble::Staging(Staging::Wait(wait)) => Err(Error::NotNow(wait)),
            Trouble::Staging(Staging::Stage(text)) => Err(Error::Failed(format!("stage: {text}"))),
            Trouble::Emptied(text) => Err(Error::Failed(format!("output: {text}"))),
            Trouble::Process(error) => Err(error),
        }
    }
}

/// Returns the error if the end of a job could not be confirmed. The process tries again after `pause`.
pub(super) async fn after_ending(at: &At<'_>, trouble: Trouble, pause: Duration) -> Error {
    match trouble {
        Trouble::Staging(Staging::Site(error)) => at.site.trouble(at.context, &error).await,
        // The database does not answer; its next answer decides.
        Trouble::Process(Error::Interrupted(_)) => Error::NotNow(Wait::pause(pause)),
        Trouble::Staging(Staging::Wait(wait)) => Error::NotNow(wait),
        Trouble::Staging(Staging::Stage(text)) => Error::Failed(format!("stage: {text}")),
        Trouble::Staging(
            Staging::Content(text) | Staging::Files(text) | Staging::Lacks(text) | Staging::Here { text, .. },
        )
        | Trouble::Emptied(text) => Error::Failed(text),
        Trouble::Process(error) => error,
    }
}
