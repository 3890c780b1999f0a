//! Slurm by its commands.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::Job;

use super::launcher::{Launcher, Listed, Phase};
use super::script::FOLDER;
use crate::transport::{Output, quote, shortened};

/// Slurm, from 20.11 on.
pub(crate) struct Slurm;

/// Fields of a line of the list: job, state, name, priority, start, reason.
const FIELDS: [&str; 6] = ["%i", "%T", "%j", "%Q", "%S", "%r"];

/// Most characters that are kept of a state and of a reason.
const STATE_CHARS_MAX: usize = 40;
const REASON_CHARS_MAX: usize = 400;

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

/// In what `sbatch` says when it is refused for a reason that passes by itself.
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
    "not responding",
    "presently disabled",
    "slurm is busy",
    "standby mode",
    "not available now",
    "not usable now",
    "protocol authentication error",
    "required node not available",
    "submissions disabled",
    "submit limit exceeded",
    "temporarily",
    "too many open files",
    "try again",
];

/// What `sbatch` says of every limit; the line before it names the limit.
const ANY_LIMIT: &str = "violates accounting/qos policy";

/// The exit of `timeout` when the time is over, and those of a command that a signal ended. `sbatch` itself ends with 255
/// when an option is wrong.
const TIMED_OUT: i32 = 124;
const SIGNALLED: std::ops::RangeInclusive<i32> = 128..=254;

impl Launcher for Slurm {
    fn header(&self, spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
        header(spec, on_site, site, dir, token)
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

    fn may_pass(&self, output: &Output) -> bool {
        let stderr = String::from_utf8_lossy(&output.stderr).to_lowercase();
        let limits = limits(&stderr);
        // Limits of the size or the time of a job stay; that of a list of jobs that is full does not.
        let is_full =
            limits.iter().any(|limit| is_of_count(limit)) || (limits.is_empty() && stderr.contains(ANY_LIMIT));
        is_full || PASSING.iter().any(|text| stderr.contains(text))
    }

    fn list(&self, _jobs: &[(&Job, String)], token: Option<&str>) -> String {
        let only = token.map_or_else(|| "-u \"$(id -un)\"".to_owned(), |token| format!("-n {}", quote(token)));
        // Names of jobs may hold anything, line ends included. What they cannot hold is a word that is made for this list.
        let mark = uuid::Uuid::new_v4().simple().to_string();
        let format = format!("{mark}{}{mark}", FIELDS.join(&mark));
        format!("echo {mark}; {LIST} {only} -o {}", quote(&format))
    }

    fn listed(&self, output: &Output) -> Result<Vec<Listed>, String> {
        if output.exit != Some(0) {
            return Err(format!("squeue: {}", output.complaint()));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let (mark, text) = text.split_once('\n').ok_or_else(|| "the shell printed nothing".to_owned())?;
        let (lines, others): (Vec<&str>, Vec<&str>) =
            text.lines().filter(|line| !line.trim().is_empty()).partition(|line| line.starts_with(mark));
        match others.first() {
            Some(line) if lines.is_empty() => Err(format!("squeue printed {:?}", shortened(line))),
            // The rest of a name with line ends.
            Some(_) | None => Ok(lines.into_iter().filter_map(|line| read(line, mark)).collect()),
        }
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

/// A value in a line that `sbatch` reads: it takes blanks and quotes for its own, but for those in double quotes.
fn header_word(value: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,=@%+".contains(&byte);
    if !value.is_empty() && value.bytes().all(is_plain) {
        return value.to_owned();
    }
    // Specs are checked for this; a line end would begin a line of the script.
    let value = value.replace(char::is_control, " ");
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The lines that Slurm reads.
fn header(spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
    let mut header = String::new();
    let mut option = |name: &str, value: Option<String>| {
        let value = value.map(|value| format!("={}", header_word(&value))).unwrap_or_default();
        let _ = writeln!(header, "#SBATCH --{name}{value}");
    };
    option("job-name", Some(token.to_owned()));
    option("chdir", Some(dir.to_owned()));
    // `%` begins a pattern there.
    option("output", Some(format!("{}/{FOLDER}/launcher.out", dir.replace('%', "%%"))));
    // A job that the scheduler starts again would find `started` taken.
    option("no-requeue", None);
    let needs = &on_site.needs;
    for (name, value) in [("nodes", needs.nodes), ("ntasks", needs.ranks), ("cpus-per-task", needs.cpus)] {
        if let Some(value) = value {
            option(name, Some(value.to_string()));
        }
    }
    if let Some(bytes) = needs.mem {
        option("mem", Some(format!("{}M", bytes.div_ceil(1 << 20).max(1))));
    }
    if let Some(gpus) = needs.gpus {
        option("gpus-per-node", Some(gpus.to_string()));
    }
    if let Some(time) = spec.time {
        option("time", Some(time.as_secs().div_ceil(60).max(1).to_string()));
    }
    let mut native = site.native.clone();
    native.extend(on_site.native.clone());
    for (name, value) in native {
        option(&name, (!value.is_empty()).then_some(value));
    }
    header
}

fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A job of Baton's, from a line in which `mark` stands around each field.
fn read(line: &str, mark: &str) -> Option<Listed> {
    let fields: Vec<&str> = line.strip_prefix(mark)?.strip_suffix(mark)?.split(mark).collect();
    let [id, state, name, priority, start, reason] = fields.as_slice() else { return None };
    if !name.starts_with("baton-") || !is_id(id) {
        return None;
    }
    let starts_at = start.parse::<i64>().ok().map(|seconds| seconds.saturating_mul(1_000_000));
    Some(Listed {
        token: (*name).to_owned(),
        external_id: (*id).to_owned(),
        phase: phase(state),
        status: printable(state, STATE_CHARS_MAX),
        reason: if *reason == "None" { String::new() } else { printable(reason, REASON_CHARS_MAX) },
        priority: priority.parse().ok(),
        starts_at,
    })
}

fn printable(text: &str, chars_max: usize) -> String {
    text.chars().take(chars_max).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The names of limits in what `sbatch` says, in lower case.
fn limits(stderr: &str) -> Vec<&str> {
    let words = stderr.split(|c: char| !c.is_ascii_alphanumeric());
    // Some have no such end: QOSMinGRES, QOSMaxMemoryPerJob.
    let is_name = |word: &str| {
        let begins = |start: &str| word.starts_with(start) && word.len() > start.len();
        (word.ends_with("limit") && word != "limit") || begins("qos") || begins("assoc")
    };
    words.filter(|word| is_name(word)).collect()
}

/// Whether it is a limit of how many jobs there may be.
fn is_of_count(limit: &str) -> bool {
    let is_of_jobs = limit.contains("jobs") || (limit.ends_with("joblimit") && !limit.ends_with("perjoblimit"));
    limit.contains("submit") || is_of_jobs
}

/// What each of Slurm's words means. A job that runs may wait again: its node was lost, or it was requeued.
fn phase(state: &str) -> Phase {
    match state {
        // What one cluster of several has revoked, another has.
        "PENDING" | "CONFIGURING" | "REQUEUED" | "REQUEUE_HOLD" | "REQUEUE_FED" | "RESV_DEL_HOLD" | "SPECIAL_EXIT"
        | "REVOKED" => Phase::Waiting,
        "RUNNING" | "COMPLETING" | "SUSPENDED" | "STOPPED" | "SIGNALING" | "STAGE_OUT" | "RESIZING" => Phase::Running,
        "BOOT_FAIL" | "CANCELLED" | "COMPLETED" | "DEADLINE" | "FAILED" | "NODE_FAIL" | "OUT_OF_MEMORY"
        | "PREEMPTED" | "TIMEOUT" => Phase::Ended,
        _ => Phase::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_common::spec::Work;

    use super::*;

    fn output(exit: i32, stdout: &str, stderr: &str) -> Output {
        Output { exit: Some(exit), signal: None, stdout: stdout.into(), stderr: stderr.into() }
    }

    /// What is listed of rows, each with its fields between marks.
    fn listed(rows: &[&[&str]], more: &[u8]) -> Result<Vec<Listed>, String> {
        let mut text = b"MARK\n".to_vec();
        for row in rows {
            text.extend(format!("MARK{}MARK\n", row.join("MARK")).bytes());
        }
        text.extend(more);
        Slurm.listed(&Output { exit: Some(0), signal: None, stdout: text, stderr: vec![] })
    }

    const OURS: [&str; 6] = ["7", "PENDING", "baton-a-1", "4294901748", "1795296000", "Resources"];

    #[test]
    fn a_list_is_of_our_jobs_whatever_others_are_called() {
        let foreign = |name: &'static str| ["8", "RUNNING", name, "1", "N/A", "None"];
        let names = [
            "other",
            "two\nlines",
            "x\n7|PENDING|baton-a-1|1|N/A|None",
            "x\nMARX7MARXFAILEDMARXbaton-a-1MARX1MARXN/AMARXNoneMARX",
            "baton-a-1\n",
            "baton-a-1\nx",
            "\nbaton-a-1",
            "x|baton-a-1",
            "\u{0}",
            "",
        ];
        for name in names {
            let listed = listed(&[&foreign(name), &OURS, &foreign(name)], b"").unwrap();
            assert_eq!(listed.len(), 1, "{name:?}: {listed:?}");
            assert_eq!((listed[0].phase, listed[0].reason.as_str()), (Phase::Waiting, "Resources"));
            assert_eq!(listed[0].starts_at, Some(1_795_296_000_000_000));
        }
        assert_eq!(listed(&[&OURS], b"\xff\xfe\n").unwrap().len(), 1, "a list is bytes");
        assert_eq!(listed(&[], b"").unwrap(), []);
        let asked = [Slurm.list(&[], None), Slurm.list(&[], None)];
        assert_ne!(asked[0], asked[1], "nobody can know the mark before");
    }

    #[test]
    fn a_state_that_is_not_known_is_no_end_and_no_error() {
        let listed = listed(&[&["7", "AS\tLEEP", "baton-a-1", "1", "N/A", "None"]], b"").unwrap();
        assert_eq!((listed[0].phase, listed[0].status.as_str()), (Phase::Unknown, "AS LEEP"));
    }

    #[test]
    fn an_answer_without_a_line_of_a_list_is_none() {
        listed(&[], b"hello\n").unwrap_err();
        Slurm.listed(&output(0, "", "")).unwrap_err();
        let said = "slurm_load_jobs error: Unable to contact slurm controller";
        let error = Slurm.listed(&output(1, "MARK\n", said)).unwrap_err();
        assert!(error.contains("Unable to contact"), "{error}");
    }

    #[test]
    fn a_refusal_that_passes_is_told_from_one_that_stays() {
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
            assert!(Slurm.may_pass(&output(1, "", stderr)) && !Slurm.is_unsure(&output(1, "", stderr)), "{stderr}");
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
            assert!(!Slurm.may_pass(&output(1, "", &stderr)), "{stderr}");
        }
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

    #[test]
    fn a_value_with_blanks_is_one_word_for_slurm() {
        assert_eq!(header_word("a/b:c"), "a/b:c");
        assert_eq!(header_word("two words"), r#""two words""#);
        assert_eq!(header_word(r#"a"b\c"#), r#""a\"b\\c""#);
        assert_eq!(header_word("a\ntouch x"), r#""a touch x""#);
    }

    #[test]
    fn slurm_is_asked_for_what_the_spec_needs() {
        let mut spec = Spec::new(Work::Run { argv: vec!["true".into()] });
        spec.on_site = Some(OnSite::default());
        spec.time = Some(Duration::from_secs(61));
        let on_site = spec.on_site.as_mut().unwrap();
        on_site.needs.cpus = Some(4);
        on_site.needs.mem = Some((1 << 30) + 1);
        on_site.native = [("exclusive".to_owned(), String::new()), ("account".to_owned(), "a1".to_owned())].into();
        let on_site = on_site.clone();
        let site = toml::from_str("transport = 'local'\nlauncher = 'slurm'\nroot = '/r'").unwrap();
        let header = header(&spec, &on_site, &site, "/d", "baton-1-1");
        for wanted in [
            "--job-name=baton-1-1",
            "--no-requeue\n",
            "--cpus-per-task=4",
            "--mem=1025M",
            "--time=2",
            "--exclusive\n",
            "--account=a1",
        ] {
            assert!(header.contains(wanted), "{wanted} in\n{header}");
        }
    }
}
