//! The launcher for Slurm, by its commands.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::{End, Launcher, Listed};
use crate::transport::{Output, quote};

mod header;
mod list;
mod state;
mod submission;

/// Slurm 20.11 or later.
pub(crate) struct Slurm;

impl Launcher for Slurm {
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
        header::header(spec, on_site, site, dir, token)
    }

    fn trap(&self) -> &'static str {
        // Both layers share a process group. The outer one must survive a signal that the program sends to its group
        // (`kill 0`). It records the signal, which may as well come from Slurm.
        "trap baton_signalled=true TERM INT HUP\n"
    }

    fn time_limit(&self, _spec: &Spec) -> Option<u64> {
        // Slurm enforces the limit itself, and may track the processes of a job by their group.
        None
    }

    fn job_id(&self) -> &'static str {
        "$SLURM_JOB_ID"
    }

    fn submit(&self) -> &'static str {
        "sbatch --parsable .baton/run.sh"
    }

    fn submitted(&self, stdout: &str) -> Option<String> {
        submission::submitted(stdout)
    }

    fn is_unsure(&self, output: &Output) -> bool {
        submission::is_unsure(output)
    }

    fn may_pass(&self, output: &Output) -> bool {
        submission::may_pass(output)
    }

    fn list(&self, _jobs: &[(&Job, String)], token: Option<&str>) -> String {
        list::script(token)
    }

    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String> {
        list::listed(output)
    }

    fn waiting(&self) -> Option<&'static str> {
        Some("timeout -k 10 10 squeue -h -t PENDING -o %Q")
    }

    fn is_first_wait(&self, status: &str) -> bool {
        status == state::PENDING
    }

    fn end(&self, status: &str) -> End {
        state::end(status)
    }

    fn confirm(&self, external_ids: &[&str]) -> Option<String> {
        Some(list::confirm(external_ids))
    }

    fn cancel(&self, external_id: &str) -> String {
        format!("scancel {}", quote(external_id))
    }

    fn is_cancelled(&self, output: &Output) -> bool {
        let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
        output.exit == Some(0) || stderr.contains("invalid job id") || stderr.contains("already complet")
    }
}

fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}
