//! Slurm by its commands.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::launcher::{Launcher, Listed, Phase};
use super::script;
use crate::transport::{Output, quote};

/// Slurm, from 20.11 on.
pub(crate) struct Slurm;

/// Fields of a line of the list: job, state, name, priority, start, reason. The reason comes last, since it may hold
/// anything.
const FORMAT: &str = "%i|%T|%j|%Q|%S|%r";

/// Times as seconds since 1970, whatever the site's own format and zone are. One that hangs is the scheduler's failure, and
/// not the way's.
const LIST: &str = "SLURM_TIME_FORMAT=%s timeout -k 10 45 squeue -h -t all";

/// In what `sbatch` says when its controller has not answered, or has not been understood; there may be a job then.
const UNSURE: [&str; 10] = [
    "timed out",
    "timeout",
    "unable to contact",
    "connection",
    "communication",
    "zero bytes",
    "unexpected message",
    "insane message",
    "message receive failure",
    "header lengths",
];

/// The exit of `timeout` when the time is over, and those of a command that a signal ended. `sbatch` itself ends with 255
/// when an option is wrong.
const TIMED_OUT: i32 = 124;
const SIGNALLED: std::ops::RangeInclusive<i32> = 128..=254;

impl Launcher for Slurm {
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
        script::slurm_header(spec, on_site, site, dir, token)
    }

    fn job_id(&self) -> &'static str {
        "$SLURM_JOB_ID"
    }

    fn submit(&self) -> &'static str {
        "sbatch --parsable .baton/run.sh"
    }

    fn submitted(&self, stdout: &str) -> Option<String> {
        // JOB or JOB;CLUSTER, after whatever a site's filters print.
        let line = stdout.lines().rev().find(|line| !line.trim().is_empty())?;
        let id = line.trim().split(';').next()?;
        is_id(id).then(|| id.to_owned())
    }

    fn is_unsure(&self, output: &Output) -> bool {
        let Some(exit) = output.exit else { return true };
        let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
        let is_cut = exit == 0 || exit == TIMED_OUT || SIGNALLED.contains(&exit);
        let has_printed_job = self.submitted(&String::from_utf8_lossy(&output.stdout)).is_some();
        is_cut || has_printed_job || UNSURE.iter().any(|text| stderr.contains(text))
    }

    fn list(&self, _jobs: &[(&Job, String)], token: Option<&str>) -> String {
        let only = token.map_or_else(|| "-u \"$(id -un)\"".to_owned(), |token| format!("-n {}", quote(token)));
        format!("{LIST} {only} -o {}", quote(FORMAT))
    }

    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String> {
        if output.exit != Some(0) {
            return Err(format!("squeue: {}", output.complaint()));
        }
        let text = std::str::from_utf8(&output.stdout).map_err(|_| "squeue printed no text".to_owned())?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let listed = lines.map(|line| read(line).ok_or_else(|| format!("squeue printed {line:?}")));
        listed.filter(|listed| listed.as_ref().map_or(true, |listed| listed.token.starts_with("baton-"))).collect()
    }

    fn waiting(&self) -> Option<&'static str> {
        Some("timeout -k 10 10 squeue -h -t PENDING -o %Q")
    }

    fn confirm(&self, external_ids: &[&str]) -> Option<String> {
        // Only a job's own number makes Slurm say that there is no such job; of several it lists those that it knows.
        let mut script = format!(
            "{CONFIRM}past=$(timeout -k 10 10 sacct -nXPj {} -o JobIDRaw,State 2>/dev/null)\n",
            external_ids.join(",")
        );
        for id in external_ids {
            let _ = writeln!(script, "confirm {}", quote(id));
        }
        Some(script)
    }

    fn cancel(&self, external_id: &str) -> String {
        format!("scancel {}", quote(external_id))
    }

    fn is_cancelled(&self, output: &Output) -> bool {
        let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
        output.exit == Some(0) || stderr.contains("invalid job id") || stderr.contains("already complet")
    }
}

/// `confirm ID`: prints `ID|WORD` if the controller says that it has no such job, or that another user has that number now;
/// the word is that of the accounting, where there is one that is an end's. It ends all if the controller does not answer.
const CONFIRM: &str = r#"confirm() {
  said=$(timeout -k 10 5 squeue -h -t all -j "$1" -o %u 2>&1)
  [ $? -ne 124 ] || exit 0
  case $said in
    *[Ii]"nvalid job id"*) ;;
    "" | *" "* | "$(id -un)") return 0 ;;
  esac
  word=$(printf '%s\n' "$past" | sed -n "s/^$1|\([A-Z_]*\).*/\1/p" | tail -n 1)
  case $word in
    COMPLETED|FAILED|TIMEOUT|DEADLINE|OUT_OF_MEMORY|CANCELLED|NODE_FAIL|PREEMPTED|BOOT_FAIL) ;;
    *) word=LOST ;;
  esac
  echo "$1|$word"
}
"#;

fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn read(line: &str) -> Option<Listed> {
    let fields: Vec<&str> = line.splitn(6, '|').collect();
    let [id, state, name, priority, start, reason] = fields.as_slice() else { return None };
    // Tasks of arrays of others have other ids.
    let digits = id.bytes().take_while(u8::is_ascii_digit).count();
    if digits == 0 {
        return None;
    }
    let starts_at = start.parse::<i64>().ok().map(|seconds| seconds.saturating_mul(1_000_000));
    Some(Listed {
        token: (*name).to_owned(),
        external_id: (*id).to_owned(),
        phase: phase(state)?,
        status: (*state).to_owned(),
        reason: if *reason == "None" { String::new() } else { (*reason).to_owned() },
        priority: priority.parse().ok(),
        starts_at,
    })
}

/// What each of Slurm's words means. A job that runs may wait again: its node was lost, or it was requeued.
fn phase(state: &str) -> Option<Phase> {
    match state {
        // What one cluster of several has revoked, another has.
        "PENDING" | "CONFIGURING" | "REQUEUED" | "REQUEUE_HOLD" | "REQUEUE_FED" | "RESV_DEL_HOLD" | "SPECIAL_EXIT"
        | "REVOKED" => Some(Phase::Waiting),
        "RUNNING" | "COMPLETING" | "SUSPENDED" | "STOPPED" | "SIGNALING" | "STAGE_OUT" | "RESIZING" => {
            Some(Phase::Running)
        }
        "BOOT_FAIL" | "CANCELLED" | "COMPLETED" | "DEADLINE" | "FAILED" | "NODE_FAIL" | "OUT_OF_MEMORY"
        | "PREEMPTED" | "TIMEOUT" => Some(Phase::Ended),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(exit: i32, stdout: &str, stderr: &str) -> Output {
        Output { exit: Some(exit), signal: None, stdout: stdout.into(), stderr: stderr.into() }
    }

    #[test]
    fn lists_are_read_and_nonsense_is_no_list() {
        let text = "7|PENDING|baton-a-1|4294901748|1795296000|Resources\n8|RUNNING|other|1|N/A|None\n";
        let listed = Slurm.listed(&output(0, text, "")).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].phase, listed[0].reason.as_str()), (Phase::Waiting, "Resources"));
        assert_eq!(listed[0].starts_at, Some(1_795_296_000_000_000));
        assert_eq!(Slurm.listed(&output(0, "", "")).unwrap(), []);
        for nonsense in ["hello\n", "7|ASLEEP|baton-a-1|1|N/A|x\n", "x|PENDING|baton-a-1|1|N/A|x\n", "7|PENDING\n"] {
            Slurm.listed(&output(0, nonsense, "")).unwrap_err();
        }
        let error =
            Slurm.listed(&output(1, "", "slurm_load_jobs error: Unable to contact slurm controller")).unwrap_err();
        assert!(error.contains("Unable to contact"), "{error}");
    }

    #[test]
    fn a_submission_is_sure_only_if_slurm_has_said_no() {
        assert_eq!(Slurm.submitted("sbatch: a filter speaks\n12;cluster\n"), Some("12".into()));
        assert_eq!(Slurm.submitted("Submitted"), None);
        assert!(!Slurm.is_unsure(&output(1, "", "sbatch: error: Invalid partition name specified")));
        assert!(!Slurm.is_unsure(&output(255, "", "sbatch: unrecognized option '--acount=x'")));
        assert!(Slurm.is_unsure(&output(1, "12\n", "sbatch: a site's own words")));
        for (exit, stderr) in [
            (1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
            (124, ""),
            (0, ""),
            (137, ""),
            (1, "sbatch: error: Batch job submission failed: Message receive failure"),
        ] {
            assert!(Slurm.is_unsure(&output(exit, "", stderr)), "{exit} {stderr}");
        }
    }
}
