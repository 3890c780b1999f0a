//! The output of `sbatch`: the job, or why there is none.

use super::is_id;
use crate::transport::Output;

/// Texts in the output of `sbatch` if the controller's answer was lost or not understood; there may be a job.
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

/// Texts in the output of `sbatch` if the submission was refused for a reason that passes by itself.
const PASSING: [&str; 26] = [
    "backup controller",
    "cannot allocate memory",
    "cannot fork",
    "configuration source",
    "disk quota exceeded",
    "failed to fetch config",
    "i/o error writing script",
    "inactive or drain",
    "munge",
    "name resolution",
    "network is unreachable",
    "no route to host",
    "no space left",
    "not available now",
    "not responding",
    "not usable now",
    "presently disabled",
    "protocol authentication error",
    "required node not available",
    "slurm is busy",
    "standby mode",
    "submissions disabled",
    "submit limit exceeded",
    "temporarily",
    "too many open files",
    "try again",
];

/// The text of `sbatch` for every limit; the line before it names the limit.
const ANY_LIMIT: &str = "violates accounting/qos policy";

/// The exit of `timeout` after the time limit, and those of a command that a signal ended. `sbatch` exits with 255 for a
/// wrong option.
const TIMED_OUT: i32 = 124;
const SIGNALLED: std::ops::RangeInclusive<i32> = 128..=254;

/// Returns the id of the job in the output of a submission.
pub(super) fn submitted(stdout: &str) -> Option<String> {
    // JOB or JOB;CLUSTER, after the output of the site's filters.
    let line = stdout.lines().rev().find(|line| !line.trim().is_empty())?;
    let id = line.trim().split(';').next()?;
    is_id(id).then(|| id.to_owned())
}

/// Whether a failed submission may have created a job nevertheless.
pub(super) fn is_unsure(output: &Output) -> bool {
    let Some(exit) = output.exit else { return true };
    let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
    let is_cut = exit == 0 || exit == TIMED_OUT || SIGNALLED.contains(&exit);
    let has_printed_job = submitted(&String::from_utf8_lossy(&output.stdout)).is_some();
    is_cut || has_printed_job || UNSURE.iter().any(|text| stderr.contains(text))
}

/// Whether a submission was refused for a reason that passes by itself.
pub(super) fn may_pass(output: &Output) -> bool {
    let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
    let limits = limits(&stderr);
    // A limit on the number of jobs passes; one on the size or the time of a job does not.
    let is_full = limits.iter().any(|limit| is_of_count(limit)) || (limits.is_empty() && stderr.contains(ANY_LIMIT));
    is_full || PASSING.iter().any(|text| stderr.contains(text))
}

/// The names of limits in the output of `sbatch`, in lower case.
fn limits(stderr: &str) -> Vec<&str> {
    let words = stderr.split(|c: char| !c.is_ascii_alphanumeric());
    // Some names have another end: QOSMinGRES, QOSMaxMemoryPerJob.
    let is_name = |word: &str| {
        let begins = |start: &str| word.starts_with(start) && word.len() > start.len();
        (word.ends_with("limit") && word != "limit") || begins("qos") || begins("assoc")
    };
    words.filter(|word| is_name(word)).collect()
}

/// Whether a limit is one on the number of jobs.
fn is_of_count(limit: &str) -> bool {
    let is_of_jobs = limit.contains("jobs") || (limit.ends_with("joblimit") && !limit.ends_with("perjoblimit"));
    limit.contains("submit") || is_of_jobs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(exit: i32, stdout: &str, stderr: &str) -> Output {
        Output { exit: Some(exit), signal: None, stdout: stdout.into(), stderr: stderr.into() }
    }

    #[test]
    fn refusals_that_pass_are_recognized() {
        const POLICY: &str = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy \
                              (job submit limit, user's size and/or time limits)";
        let of_limit = |limit: &str| format!("sbatch: error: {limit}\n{POLICY}");
        let passing = [
            of_limit("QOSMaxSubmitJobPerUserLimit"),
            of_limit("AssocMaxSubmitJobLimit"),
            of_limit("AssocGrpSubmitJobsLimit"),
            of_limit("QOSMaxJobsPerUserLimit"),
            POLICY.to_owned(),
            "sbatch: error: Batch job submission failed: Resource temporarily unavailable".to_owned(),
            "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying".to_owned(),
            "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode".to_owned(),
            "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration \
             source"
                .to_owned(),
            "sbatch: error: Batch job submission failed: I/O error writing script/environment to file".to_owned(),
            "sbatch: error: Batch job submission failed: No space left on device".to_owned(),
            "sbatch: error: Batch job submission failed: Requested operation is presently disabled".to_owned(),
            "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)"
                .to_owned(),
        ];
        for stderr in &passing {
            assert!(may_pass(&output(1, "", stderr)) && !is_unsure(&output(1, "", stderr)), "{stderr}");
        }
        for stderr in [
            of_limit("QOSMaxWallDurationPerJobLimit"),
            of_limit("AssocMaxNodePerJobLimit"),
            of_limit("QOSMaxCpuPerUserLimit"),
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)"
                .to_owned(),
            of_limit("QOSMinGRES"),
            of_limit("QOSMaxMemoryPerJob"),
            "sbatch: error: invalid partition specified: standby".to_owned(),
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
                .to_owned(),
            "sbatch: error: Batch job submission failed: Requested node configuration is not available".to_owned(),
        ] {
            assert!(!may_pass(&output(1, "", &stderr)), "{stderr}");
        }
    }

    #[test]
    fn a_submission_failed_for_certain_only_if_slurm_refused_it() {
        assert_eq!(submitted("sbatch: a filter speaks\n12;cluster\n"), Some("12".into()));
        assert_eq!(submitted("Submitted"), None);
        assert!(!is_unsure(&output(1, "", "sbatch: error: Invalid partition name specified")));
        assert!(!is_unsure(&output(255, "", "sbatch: unrecognized option '--acount=x'")));
        assert!(is_unsure(&output(1, "12\n", "sbatch: a site's own words")));
        for (exit, stderr) in [
            (1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
            (124, ""),
            (0, ""),
            (137, ""),
            (1, "sbatch: error: Batch job submission failed: Message receive failure"),
        ] {
            assert!(is_unsure(&output(exit, "", stderr)), "{exit} {stderr}");
        }
    }
}
