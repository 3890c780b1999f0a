//! Programs of their own on a machine that has no scheduler.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::{Launcher, Listed};
use crate::transport::Output;

mod sessions;

/// A program in a session of its own, which nobody looks after.
pub(crate) struct Fork;

/// What says which process it is: its number and when it started, since numbers come again.
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
        // The answer must not wait for the program: nothing of this command's streams is left to it.
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
