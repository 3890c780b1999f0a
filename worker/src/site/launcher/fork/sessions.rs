//! Jobs as sessions of a machine: how they are listed and ended.

use std::fmt::Write as _;

use baton_common::store::site::Job;

use crate::site::launcher::{Listed, Phase};
use crate::transport::{Output, quote};

/// A job is its session, since the script's shell may be gone or have given its program another group. `alive ID` is true
/// while a process of the session runs; until then the system does not reuse its id.
const ALIVE: &str = r#"
members() { sed -n "s/^\([0-9]*\) (.*) [^ZX] [0-9]* [0-9]* $1 .*/\1/p" /proc/[0-9]*/stat 2>/dev/null; }
alive() {
  if [ -e "/proc/${1%.*}" ]; then
    set -- "$1" $(cut -d ' ' -f 3,22 "/proc/${1%.*}/stat" 2>/dev/null)
    [ "${3:-${1#*.}}" = "${1#*.}" ] || return 1
    case $2 in [ZX] | "") ;; *) return 0 ;; esac
  fi
  [ -n "$(members "${1%.*}")" ]
}
"#;

/// Prints the state of a job as `TOKEN|ID|STATUS`, or nothing for an unknown job. The id in the file is checked, since
/// the program may have written to the file.
const LOOK: &str = r#"
look() {
  id=$(cat "$2/.baton/started/job" 2>/dev/null)
  case $id in *[!0-9.]* | *.*.* | .* | *.) id=$3 ;; *.*) ;; *) id=$3 ;; esac
  [ -n "$id" ] || return 0
  if [ -f "$2/.baton/done.json" ]; then echo "$1|$id|ENDED"
  elif alive "$id"; then echo "$1|$id|RUNNING"
  else echo "$1|$id|LOST"; fi
}
"#;

/// A script that lists these jobs.
pub(super) fn look(jobs: &[(&Job, String)]) -> String {
    let mut script = [ALIVE, LOOK].concat();
    for (job, dir) in jobs {
        let id = job.external_id.as_deref().unwrap_or_default();
        let _ = writeln!(script, "look {} {} {}", quote(&job.token()), quote(dir), quote(id));
    }
    script.push_str("true\n");
    script
}

/// Reads the output of such a script.
pub(super) fn seen(output: &Output) -> Result<Vec<Listed>, String> {
    if output.exit != Some(0) {
        return Err(output.complaint());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(read).collect())
}

/// A command that ends a job; it fails if the job has not ended.
pub(super) fn end(external_id: &str) -> String {
    let pid = external_id.split('.').next().unwrap_or_default();
    let id = quote(external_id);
    format!(
        "{ALIVE}
         signal() {{ all=$(members {pid}); [ -z \"$all\" ] || kill -s \"$1\" $all 2>/dev/null; }}
         if alive {id}; then
           signal TERM
           for i in 1 2 3 4 5 6 7 8 9 10; do alive {id} || break; sleep 0.2; done
           for i in 1 2 3 4 5 6 7 8 9 10; do alive {id} || break; signal KILL; sleep 0.1; done
         fi
         ! alive {id}"
    )
}

/// Whether a text is a process id and a start time.
pub(super) fn is_id(text: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    text.split_once('.').is_some_and(|(pid, ticks)| is_number(pid) && is_number(ticks))
}

fn read(line: &str) -> Option<Listed> {
    let mut fields = line.split('|');
    let (token, id, status) = (fields.next()?, fields.next()?, fields.next()?);
    let phase = match status {
        "RUNNING" => Phase::Running,
        "ENDED" | "LOST" => Phase::Ended,
        _ => return None,
    };
    is_id(id).then(|| Listed {
        token: token.to_owned(),
        external_id: id.to_owned(),
        phase,
        status: status.to_owned(),
        reason: String::new(),
        priority: None,
        starts_at: None,
    })
}
