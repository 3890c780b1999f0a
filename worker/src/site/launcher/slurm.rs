//! Slurm by its commands.

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::{Launcher, Listed};
use crate::transport::{Output, quote};

mod header;
mod list;
mod submission;

/// Slurm, from 20.11 on.
pub(crate) struct Slurm;

impl Launcher for Slurm {
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
        header::header(spec, on_site, site, dir, token)
    }

    fn trap(&self) -> &'static str {
        // Both layers are of one process group, so the outer one outlives a signal that the program sends to its group
        // (`kill 0`), and says that there was one: it can as well be Slurm's.
        "trap baton_signalled=true TERM INT HUP\n"
    }

    fn time_limit(&self, _spec: &Spec) -> Option<u64> {
        // Slurm keeps the time itself, and may know the processes of a job by their group.
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
