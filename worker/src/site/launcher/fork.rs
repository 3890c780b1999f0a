//! The launcher for machines without a scheduler: each job is a session of the operating system.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::{End, Launcher, Listed};
use crate::transport::Output;

mod sessions;

/// Starts each job in a new session.
pub(crate) struct Fork;

/// Identifies the script's shell by its process id and its start time, since process ids are reused.
const JOB_ID: &str = "$$.$(baton cut -d ' ' -f 22 /proc/$$/stat)";

impl Launcher for Fork {
    fn header(&self, _: &Spec, _: &OnSite, _: &config::Site, _: &str, _: &str) -> String {
        String::new()
    }

    fn trap(&self) -> &'static str {
        ""
    }

    fn time_limit(&self, spec: &Spec) -> Option<u64> {
        Some(spec.time.map_or(0, |time| time.as_secs().max(1)))
    }

    fn job_id(&self) -> &'static str {
        JOB_ID
    }

    fn submit(&self) -> &'static str {
        // The program must inherit no stream of this command, or the answer would wait for its end.
        "{ setsid /bin/sh .baton/run.sh < /dev/null > .baton/launcher.out 2>&1 & \
         echo \"$!.$(cut -d ' ' -f 22 /proc/$!/stat)\"; }"
    }

    fn submitted(&self, stdout: &str) -> Option<String> {
        let line = stdout.lines().rev().find(|line| !line.trim().is_empty())?.trim();
        sessions::is_id(line).then(|| line.to_owned())
    }

    fn is_unsure(&self, _output: &Output) -> bool {
        true
    }

    fn may_pass(&self, _output: &Output) -> bool {
        false
    }

    fn list(&self, jobs: &[(&Job, String)], _token: Option<&str>) -> String {
        sessions::look(jobs)
    }

    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String> {
        sessions::seen(output)
    }

    fn waiting(&self) -> Option<&'static str> {
        None
    }

    fn is_first_wait(&self, _status: &str) -> bool {
        false
    }

    fn end(&self, _status: &str) -> End {
        End::Unknown
    }

    fn confirm(&self, _external_ids: &[&str]) -> Option<String> {
        None
    }

    fn cancel(&self, external_id: &str) -> String {
        sessions::end(external_id)
    }

    fn is_cancelled(&self, output: &Output) -> bool {
        output.exit == Some(0)
    }
}
