//! Lists of jobs, from `squeue` and `sacct`.

use std::fmt::Write as _;

use super::{is_id, state};
use crate::site::launcher::Listed;
use crate::transport::{Output, quote, shortened};

/// The fields of a line in the list: job, state, name, priority, start, reason.
const FIELDS: [&str; 6] = ["%i", "%T", "%j", "%Q", "%S", "%r"];

/// Most characters of a state and of a reason that are kept.
const STATE_CHARS_MAX: usize = 40;
const REASON_CHARS_MAX: usize = 400;

/// Prints times as seconds since 1970, whatever format and zone the site uses. The time limit makes a hanging `squeue`
/// the scheduler's failure, not the transport's.
const LIST: &str = "SLURM_TIME_FORMAT=%s timeout -k 10 45 squeue -h -t all";

/// `confirm ID` prints `ID|STATE` if the controller says that it has no such job, or that the id belongs to another user now.
/// The state is the accounting's if that is an end, else `LOST`. If the controller does not answer, the whole script ends.
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

/// A script that lists all jobs of this user, or that of one token.
pub(super) fn script(token: Option<&str>) -> String {
    let only = token.map_or_else(|| "-u \"$(id -un)\"".to_owned(), |token| format!("-n {}", quote(token)));
    // The name of a foreign job may contain anything, even line ends, but not a mark that is generated for this list.
    let mark = uuid::Uuid::new_v4().simple().to_string();
    let format = format!("{mark}{}{mark}", FIELDS.join(&mark));
    format!("echo {mark}; {LIST} {only} -o {}", quote(&format))
}

/// Reads the output of such a script.
pub(super) fn listed(output: &Output) -> Result<Vec<Listed>, String> {
    if output.exit != Some(0) {
        return Err(format!("squeue: {}", output.complaint()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let (mark, text) = text.split_once('\n').ok_or_else(|| "the shell printed nothing".to_owned())?;
    let (lines, others): (Vec<&str>, Vec<&str>) =
        text.lines().filter(|line| !line.trim().is_empty()).partition(|line| line.starts_with(mark));
    match others.first() {
        Some(line) if lines.is_empty() => Err(format!("squeue printed {:?}", shortened(line))),
        // Other lines are the rest of a name with line ends.
        Some(_) | None => Ok(lines.into_iter().filter_map(|line| read(line, mark)).collect()),
    }
}

/// A script that queries each of these jobs by itself.
pub(super) fn confirm(external_ids: &[&str]) -> String {
    // Slurm reports an unknown job only if it is asked for a single id; of several it lists those that it knows.
    let mut script = format!(
        "{CONFIRM}past=$(timeout -k 10 10 sacct -nXPj {} -o JobIDRaw,State 2>/dev/null)\n",
        external_ids.join(",")
    );
    for id in external_ids {
        let _ = writeln!(script, "confirm {}", quote(id));
    }
    script
}

/// Reads a line in which `mark` stands around each field; `None` if the job is not Baton's.
fn read(line: &str, mark: &str) -> Option<Listed> {
    let fields: Vec<&str> = line.strip_prefix(mark)?.strip_suffix(mark)?.split(mark).collect();
    let [id, word, name, priority, start, reason] = fields.as_slice() else { return None };
    if !name.starts_with("baton-") || !is_id(id) {
        return None;
    }
    let starts_at = start.parse::<i64>().ok().map(|seconds| seconds.saturating_mul(1_000_000));
    Some(Listed {
        token: (*name).to_owned(),
        external_id: (*id).to_owned(),
        phase: state::phase(word),
        status: printable(word, STATE_CHARS_MAX),
        reason: if *reason == "None" { String::new() } else { printable(reason, REASON_CHARS_MAX) },
        priority: priority.parse().ok(),
        starts_at,
    })
}

fn printable(text: &str, chars_max: usize) -> String {
    text.chars().take(chars_max).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::launcher::Phase;

    fn output(exit: i32, stdout: &str, stderr: &str) -> Output {
        Output { exit: Some(exit), signal: None, stdout: stdout.into(), stderr: stderr.into() }
    }

    /// Lists rows, each with its fields between marks.
    fn listed_of(rows: &[&[&str]], more: &[u8]) -> Result<Vec<Listed>, String> {
        let mut text = b"MARK\n".to_vec();
        for row in rows {
            text.extend(format!("MARK{}MARK\n", row.join("MARK")).bytes());
        }
        text.extend(more);
        listed(&Output { exit: Some(0), signal: None, stdout: text, stderr: vec![] })
    }

    const OURS: [&str; 6] = ["7", "PENDING", "baton-a-1", "4294901748", "1795296000", "Resources"];

    #[test]
    fn names_of_foreign_jobs_cannot_change_the_list() {
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
            let listed = listed_of(&[&foreign(name), &OURS, &foreign(name)], b"").unwrap();
            assert_eq!(listed.len(), 1, "{name:?}: {listed:?}");
            assert_eq!((listed[0].phase, listed[0].reason.as_str()), (Phase::Waiting, "Resources"));
            assert_eq!(listed[0].starts_at, Some(1_795_296_000_000_000));
        }
        assert_eq!(listed_of(&[&OURS], b"\xff\xfe\n").unwrap().len(), 1, "the list need not be UTF-8");
        assert_eq!(listed_of(&[], b"").unwrap(), []);
        let asked = [script(None), script(None)];
        assert_ne!(asked[0], asked[1], "the mark cannot be guessed");
    }

    #[test]
    fn an_unknown_state_is_neither_an_end_nor_an_error() {
        let listed = listed_of(&[&["7", "AS\tLEEP", "baton-a-1", "1", "N/A", "None"]], b"").unwrap();
        assert_eq!((listed[0].phase, listed[0].status.as_str()), (Phase::Unknown, "AS LEEP"));
    }

    #[test]
    fn output_without_the_mark_is_an_error() {
        listed_of(&[], b"hello\n").unwrap_err();
        listed(&output(0, "", "")).unwrap_err();
        let said = "slurm_load_jobs error: Unable to contact slurm controller";
        let error = listed(&output(1, "MARK\n", said)).unwrap_err();
        assert!(error.contains("Unable to contact"), "{error}");
    }
}
