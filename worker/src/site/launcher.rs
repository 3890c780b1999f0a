//! What starts programs at a site: commands for its shell, and what their answers mean. Nothing here does anything; the
//! commands are run over a session, and so the same for all transports.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use crate::transport::Output;

mod fork;
mod slurm;

/// A launcher: only texts, so that every transport is the same to it.
pub(crate) trait Launcher: Send + Sync {
    /// What the script's first lines tell it.
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String;

    /// What the outer layer of the script does about signals: a line, or nothing.
    fn trap(&self) -> &'static str;

    /// The time that the script keeps itself, in seconds, and 0 for no limit; `None` where the launcher keeps it.
    fn time_limit(&self, spec: &Spec) -> Option<u64>;

    /// The shell expression by which a script knows its job. `baton` runs a command in it.
    fn job_id(&self) -> &'static str;

    /// The command that submits the script `.baton/run.sh` of the current folder and prints the job.
    fn submit(&self) -> &'static str;

    /// The job that a submission has printed.
    fn submitted(&self, stdout: &str) -> Option<String>;

    /// Whether a submission that failed may have made a job nevertheless.
    fn is_unsure(&self, output: &Output) -> bool;

    /// Whether a submission was refused for a reason that passes by itself, such as a full queue.
    fn may_pass(&self, output: &Output) -> bool;

    /// A script that lists jobs: all of this user's there, or that of one token. `jobs` are those of interest with their
    /// folders.
    fn list(&self, jobs: &[(&Job, String)], token: Option<&str>) -> String;

    /// What such a script has printed. Whatever it says of jobs that are not Baton's is left out.
    ///
    /// # Errors
    /// It is no list; nothing follows from it about any job.
    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String>;

    /// A script that lists the priorities of all that wait, if there is such a thing: a number in each line.
    fn waiting(&self) -> Option<&'static str>;

    /// A script that asks for jobs that are in no list, each by itself, and prints `ID|WORD` for each of which the launcher
    /// says that it is gone; `None` where a list says so.
    fn confirm(&self, external_ids: &[&str]) -> Option<String>;

    /// A command that ends a job, whatever it does.
    fn cancel(&self, external_id: &str) -> String;

    /// Whether such a command has reached its job, or found that there is none.
    fn is_cancelled(&self, output: &Output) -> bool;
}

/// A job in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The name that it was given.
    pub(crate) token: String,
    /// What the launcher calls it.
    pub(crate) external_id: String,
    /// Where it is.
    pub(crate) phase: Phase,
    /// The launcher's word for it.
    pub(crate) status: String,
    /// Why, in the launcher's words.
    pub(crate) reason: String,
    /// Its priority among those that wait; larger is sooner.
    pub(crate) priority: Option<i64>,
    /// When it is expected to start, or has, in microseconds since 1970.
    pub(crate) starts_at: Option<i64>,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It has not started, or not again.
    Waiting,
    /// It runs.
    Running,
    /// It has ended, however.
    Ended,
    /// It is there, and its launcher's word for where says nothing to this version.
    Unknown,
}

/// The launcher that a configuration names.
pub(crate) fn of(launcher: config::Launcher) -> &'static dyn Launcher {
    match launcher {
        config::Launcher::Fork => &fork::Fork,
        config::Launcher::Slurm => &slurm::Slurm,
    }
}

/// Its word, for people.
pub(crate) fn word(launcher: config::Launcher) -> &'static str {
    match launcher {
        config::Launcher::Fork => "fork",
        config::Launcher::Slurm => "slurm",
    }
}
