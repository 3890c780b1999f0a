//! Launchers start programs at a site. A launcher only writes commands for the site's shell and reads their output; the
//! commands run over a session, so every transport can use every launcher.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use crate::transport::Output;

mod fork;
mod slurm;

/// The status that Baton records for a job whose script reported how its program ended.
pub(crate) const ENDED: &str = "ENDED";

/// The status that Baton records for a job that is missing from the launcher's list and is not found otherwise.
pub(crate) const LOST: &str = "LOST";

/// The status that Baton records for a job that it cancelled.
pub(crate) const CANCELLED: &str = "CANCELLED";

/// A launcher.
pub(crate) trait Launcher: Send + Sync {
    /// The options for the launcher in the first lines of the script.
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String;

    /// The line by which the outer layer of the script handles signals, or nothing.
    fn trap(&self) -> &'static str;

    /// The time limit that the script enforces itself, in seconds, 0 for none; `None` if the launcher enforces it.
    fn time_limit(&self, spec: &Spec) -> Option<u64>;

    /// The shell expression for the id of the script's own job. It may call the function `baton` of the script.
    fn job_id(&self) -> &'static str;

    /// The command that submits the script `.baton/run.sh` of the current folder and prints the id of the job.
    fn submit(&self) -> &'static str;

    /// The id of the job in the output of a submission.
    fn submitted(&self, stdout: &str) -> Option<String>;

    /// Whether a failed submission may have created a job nevertheless.
    fn is_unsure(&self, output: &Output) -> bool;

    /// Whether a submission was refused for a reason that passes by itself, such as a full queue.
    fn may_pass(&self, output: &Output) -> bool;

    /// A script that lists all jobs of this user, or only that of one token. `jobs` are the jobs of interest with their
    /// folders.
    fn list(&self, jobs: &[(&Job, String)], token: Option<&str>) -> String;

    /// Reads the output of such a script. Jobs that are not Baton's are left out.
    ///
    /// # Errors
    /// The output is not a list; it says nothing about any job.
    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String>;

    /// A script that lists the priorities of all waiting jobs, one number a line, if the launcher has priorities.
    fn waiting(&self) -> Option<&'static str>;

    /// Whether a listed job with this status waits for the first time, so its program cannot have run.
    fn is_first_wait(&self, status: &str) -> bool;

    /// How a job ended whose status is one of the launcher's own.
    fn end(&self, status: &str) -> End;

    /// A script that queries jobs that no list has, each by itself, and prints `ID|STATUS` for each that the launcher
    /// confirms as gone; `None` if a list is confirmation enough.
    fn confirm(&self, external_ids: &[&str]) -> Option<String>;

    /// A command that ends a job in whatever phase.
    fn cancel(&self, external_id: &str) -> String;

    /// Whether such a command ended its job, or found that there is none.
    fn is_cancelled(&self, output: &Output) -> bool;
}

/// A job in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The name that Baton gave it.
    pub(crate) token: String,
    /// Its id at the launcher.
    pub(crate) external_id: String,
    /// Its phase.
    pub(crate) phase: Phase,
    /// The launcher's own word for its state.
    pub(crate) status: String,
    /// The launcher's reason for that state.
    pub(crate) reason: String,
    /// Its priority among waiting jobs; a larger one starts sooner.
    pub(crate) priority: Option<i64>,
    /// When it started or is expected to start, in microseconds since 1970.
    pub(crate) starts_at: Option<i64>,
}

/// The phase of a listed job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It waits to start, for the first time or again.
    Waiting,
    /// It runs.
    Running,
    /// It has ended.
    Ended,
    /// It is listed with a state that this version does not know.
    Unknown,
}

/// How a job ended, as far as its launcher knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its script exited.
    Exited,
    /// It exceeded its time limit.
    TimeLimit,
    /// It exceeded its memory limit.
    OutOfMemory,
    /// A user, an administrator or Baton cancelled it.
    Cancelled,
    /// The launcher took its node away: the node failed or did not boot, or another job preempted it.
    Interrupted,
    /// The launcher does not have the job any more.
    Lost,
    /// The status says nothing that this version knows.
    Unknown,
}

impl End {
    /// Whether the launcher or a person ended the job, not its script.
    pub(crate) fn is_by_launcher(self) -> bool {
        match self {
            End::TimeLimit | End::OutOfMemory | End::Cancelled | End::Interrupted => true,
            End::Exited | End::Lost | End::Unknown => false,
        }
    }
}

/// How a job with this status ended. The statuses that Baton records itself are the same for every launcher.
pub(crate) fn end(launcher: &dyn Launcher, status: &str) -> End {
    match status {
        ENDED | "" => End::Exited,
        LOST => End::Lost,
        CANCELLED => End::Cancelled,
        status => launcher.end(status),
    }
}

/// The launcher that a configuration names.
pub(crate) fn of(launcher: config::Launcher) -> &'static dyn Launcher {
    match launcher {
        config::Launcher::Fork => &fork::Fork,
        config::Launcher::Slurm => &slurm::Slurm,
    }
}

/// Its name, for messages.
pub(crate) fn word(launcher: config::Launcher) -> &'static str {
    match launcher {
        config::Launcher::Fork => "fork",
        config::Launcher::Slurm => "slurm",
    }
}
