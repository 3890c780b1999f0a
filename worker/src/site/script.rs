//! The script of a job, in two layers, and the files by which it says what happened.
//!
//! The outer layer, `.baton/run.sh`, is Baton's. It takes the try by making the folder `.baton/started`, which works once:
//! a second job of the same try ends without running the program. A worker that gives a try up puts a link there instead,
//! so no job of the try can run any more. At its end it renames `.baton/done.json` into place; only that file says how the
//! program ended. A job that its launcher has started again finds its own name in `.baton/started/job` and leaves
//! `.baton/again`.
//!
//! The inner layer, `.baton/program`, runs as a child process in the shell of the site: the lines of `pre`, then the
//! program with its variables. Nothing that it does to its shell or its environment reaches the outer layer, which gives
//! each of its own commands a clean environment. The inner layer makes the file `.baton/running` right before it starts
//! the program, by a redirection alone, so no function or alias can prevent that.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec, Work};
use serde::Deserialize;

use super::launcher::Launcher;
use crate::transport::quote;

/// Where a script and what it leaves are, below the folder of a try.
pub(crate) const FOLDER: &str = ".baton";

/// What the script of a job leaves that its launcher has started again.
pub(crate) const AGAIN: &str = "again";

/// The file that exists from right before the program starts. A folder of this name says that it has not started and
/// cannot start any more.
const RUNNING: &str = "running";

/// Room for `done.json`, in bytes: blanks behind its one line mean nothing.
const DONE_BYTES: usize = 127;

/// What stands in the room for `done.json` until the end. Scripts of earlier versions put blanks there when they started
/// the program.
const IN_PRE: &str = "pre";

/// The exit of `timeout` for a program that it has ended, and of one that needed a KILL.
const TIMED_OUT: i32 = 124;
const TIMED_OUT_KILLED: i32 = 137;

/// Runs a command of the outer layer: without the variables of the job, and with the system's own programs first.
const BATON: &str = r#"baton() (
  PATH=/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin${PATH:+:$PATH}
  export PATH
  unset LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT LD_DEBUG LD_DEBUG_OUTPUT
  exec env -i PATH="$PATH" "$@"
)
"#;

/// Prints how long the machine has been up, in hundredths of a second: a clock that nobody sets.
const CLOCK: &str = r"baton_clock() { baton sed 's/^\([0-9]*\)\.\([0-9]*\) .*/\1\2/' /proc/uptime; }
";

/// What `done.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Done {
    /// As the shell reports it: 128 + N for signal N.
    pub(crate) exit: i32,
    /// `pre` if the program was not started, else `program`.
    pub(crate) phase: String,
    /// In seconds since 1970, by the clock there.
    pub(crate) started_at: i64,
    /// In seconds since 1970, by the clock there.
    pub(crate) ended_at: i64,
    /// Whether the script ended the program because its time was over; absent from scripts of earlier versions.
    #[serde(default)]
    pub(crate) timed_out: Option<bool>,
    /// Whether the script itself was sent a signal: by the program to its whole group, or by the scheduler.
    #[serde(default)]
    pub(crate) signalled: bool,
}

/// What the script of a job is made of.
pub(crate) struct Script<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) on_site: &'a OnSite,
    pub(crate) site: &'a config::Site,
    pub(crate) launcher: &'a dyn Launcher,
    /// The folder of the try.
    pub(crate) dir: &'a str,
    /// The name under which the launcher knows the job.
    pub(crate) token: &'a str,
    /// The process and the try, as the program sees them.
    pub(crate) pid: &'a str,
    pub(crate) try_number: &'a str,
}

impl Script<'_> {
    /// Both layers and what they need: paths below the folder of the try, and contents.
    pub(crate) fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = vec![("run.sh", self.outer()), ("program", self.inner())];
        if let Work::Script { text } = &self.spec.what {
            files.push(("script", unix_lines(text)));
        }
        if let Some(stdin) = &self.spec.stdin {
            files.push(("stdin", stdin.clone()));
        }
        files.into_iter().map(|(name, text)| (format!("{FOLDER}/{name}"), text.into_bytes())).collect()
    }

    /// Both layers, for people.
    pub(crate) fn text(&self) -> String {
        format!("{}\n# {FOLDER}/program:\n\n{}", self.outer(), self.inner())
    }

    /// A path below `.baton`, as a word of the shell.
    fn own(&self, name: &str) -> String {
        quote(&format!("{}/{FOLDER}/{name}", self.dir))
    }

    fn outer(&self) -> String {
        let header = self.launcher.header(self.spec, self.on_site, self.site, self.dir, self.token);
        let job_id = self.launcher.job_id();
        let [started, job, job_part] = ["started", "started/job", "started/job.part"].map(|name| self.own(name));
        let [part, stdout, stderr] = ["done.json.part", "stdout", "stderr"].map(|name| self.own(name));
        let (dir, again) = (quote(self.dir), self.own(AGAIN));
        let mut text = format!("#!/bin/sh\n{header}{BATON}{CLOCK}");
        let _ = write!(
            text,
            r#"baton_signalled=false
trap : USR1 USR2
{trap}cd {dir} || exit 1
if ! baton_said=$(baton mkdir {started} 2>&1); then
  if [ ! -e {started} ] && [ ! -L {started} ]; then
    echo "baton: nothing is run: $baton_said" >&2
    exit 1
  fi
  [ "$(baton cat {job} 2>/dev/null)" != "{job_id}" ] || : > {again}
  echo 'baton: this try has been started or given up before; nothing is run' >&2
  exit 0
fi
set -- "{job_id}"
echo "$1" > {job_part} && baton mv {job_part} {job} || exit 1
printf '%-{DONE_BYTES}s\n' {IN_PRE} > {part} || exit 1
: > {stdout} && : > {stderr} || exit 1
set -- "$1" "$(baton date +%s)" "$(baton_clock)"
{run} {program} < /dev/null > {stdout} 2> {stderr}
set -- "$1" "$2" "$3" "$?"
{ending}"#,
            trap = self.launcher.trap(),
            run = self.run(),
            program = self.own("program"),
            ending = self.ending()
        );
        text
    }

    /// What runs the inner layer. Where the script keeps the time, `timeout` does, and gives the layer a process group of its
    /// own, so that a signal to its group does not reach the outer layer.
    fn run(&self) -> String {
        let shell = self.site.shell.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        match self.launcher.time_limit(self.spec) {
            Some(secs) => format!("\"$(baton sh -c 'command -v timeout')\" -k 10 {secs} {shell}"),
            None => shell,
        }
    }

    /// From the end of the inner layer, with `$1` the job, `$2` and `$3` when that began, and `$4` its exit.
    fn ending(&self) -> String {
        let [started, job, running, exits] = ["started", "started/job", RUNNING, "exit."].map(|name| self.own(name));
        let [part, done] = ["done.json.part", "done.json"].map(|name| self.own(name));
        let over = match self.launcher.time_limit(self.spec) {
            Some(secs @ 1..) => format!(
                // The clock counts in hundredths, so it may be one behind.
                "case $4 in {TIMED_OUT} | {TIMED_OUT_KILLED}) [ $(($(baton_clock) - $3)) -lt {} ] || baton_over=true ;; esac\n",
                secs.saturating_mul(100) - 1
            ),
            Some(0) | None => String::new(),
        };
        // Once the folder is made, the program cannot start any more. A program that has removed everything has run.
        format!(
            r#"baton_over=false baton_phase=pre
{over}baton mkdir {running} 2>/dev/null
if [ -f {running} ] || [ ! -d {started} ]; then baton_phase=program; fi
for baton_exit in {exits}*; do
  baton_exit=${{baton_exit##*.}}
  case $baton_exit in "" | *[!0-9]*) ;; *) set -- "$1" "$2" "$3" "$baton_exit" ;; esac
done
if $baton_over; then set -- "$1" "$2" "$3" {TIMED_OUT}; fi
if [ ! -d {started} ]; then baton mkdir -p {started} && echo "$1" > {job}; fi
for baton_try in 1 2 3 4 5 6 7 8 9 10 11 12; do
  printf '{{"exit":%d,"phase":"%s","started_at":%s,"ended_at":%s,"timed_out":%s,"signalled":%s}}' \
    "$4" "$baton_phase" "$2" "$(baton date +%s)" "$baton_over" "$baton_signalled" 1<> {part} &&
    baton mv {part} {done} && break
  baton sleep 5
done
exit "$4"
"#
        )
    }

    fn inner(&self) -> String {
        let mut text = String::new();
        for pre in self.site.pre.iter().chain(&self.on_site.pre) {
            // In this very shell, so what it sets is there for the program; `set -e` does not count on this side of `||`.
            let _ = writeln!(text, "eval {} || exit \"$?\"", quote(&unix_lines(pre)));
        }
        let stdin = if self.spec.stdin.is_some() { self.own("stdin") } else { "/dev/null".to_owned() };
        let program = self.program().iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        let (running, exits) = (self.own(RUNNING), self.own("exit."));
        let _ = write!(
            text,
            // A signal to the whole group ends the program, whose end this shell waits for: only then may its files be
            // collected. A trap is not passed on to the program. No word here can be a function that `pre` has made.
            r#"trap : TERM INT HUP
baton_exit=0
> {running} && {program} < {stdin} || baton_exit=$?
> {exits}"$baton_exit" || exit "$baton_exit"
exit "$baton_exit"
"#
        );
        text
    }

    /// The program with its variables. `env` takes any name that an environment can hold; shells drop or refuse those that
    /// are no identifiers.
    fn program(&self) -> Vec<String> {
        let own = [("BATON_PID", self.pid), ("BATON_TRY", self.try_number), ("BATON_SANDBOX", self.dir)];
        let vars = self.spec.vars.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let vars = vars.filter(|(name, _)| own.iter().all(|(own, _)| own != name)).chain(own);
        let mut words = vec!["/usr/bin/env".to_owned(), "--".to_owned()];
        words.extend(vars.map(|(name, value)| format!("{name}={value}")));
        let argv = match &self.spec.what {
            Work::Run { argv } => argv.clone(),
            Work::Script { text } => {
                let mut argv = interpreter(text).unwrap_or_else(|| self.shell_of_scripts());
                argv.push(format!("{}/{FOLDER}/script", self.dir));
                argv
            }
            Work::Call { .. } => vec!["false".to_owned()],
        };
        if argv.first().is_some_and(|program| program.contains('=')) {
            // `env` would take it for another variable.
            words.extend(["nice", "-n", "0"].map(str::to_owned));
        }
        words.extend(argv);
        words
    }

    /// The shell of the site without its options: as a login shell it would undo what `pre` and `vars` have set.
    fn shell_of_scripts(&self) -> Vec<String> {
        self.site.shell.iter().take_while(|word| !word.starts_with('-')).cloned().collect()
    }
}

/// What the system would run for a script that begins with `#!`: the interpreter, and the rest of the line as one
/// argument. It is named here, so the script needs no permission to be executed, and its file system none either.
fn interpreter(script: &str) -> Option<Vec<String>> {
    let blanks = [' ', '\t'];
    let line = script.strip_prefix("#!")?.lines().next()?.trim_matches(blanks);
    let (program, argument) = line.split_once(blanks).unwrap_or((line, ""));
    if program.is_empty() {
        return None;
    }
    // The system does not look for it in PATH.
    let program = if program.contains('/') { program.to_owned() } else { format!("./{program}") };
    let argument = Some(argument.trim_start_matches(blanks)).filter(|argument| !argument.is_empty());
    Some(std::iter::once(program).chain(argument.map(str::to_owned)).collect())
}

/// Shells take a carriage return before a line end for a part of the last word.
fn unix_lines(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    text.strip_suffix('\r').unwrap_or(&text).to_owned()
}

/// What gives a try up, unless its program was started: in one step, so that nobody can die in the middle of it. It prints
/// [`GIVEN_UP`] if the try is given up, by whomever.
pub(crate) fn give_up(dir: &str) -> String {
    let started = quote(&format!("{dir}/{FOLDER}/started"));
    format!("ln -sT given-up {started} 2>/dev/null; [ ! -L {started} ] || echo {GIVEN_UP}\n")
}

/// Prints [`UNMARKED`] if the script has ended before it could say what it is: then it has started nothing. Only what is
/// old and not listed can be told so.
pub(crate) fn look_for_mark(dir: &str) -> String {
    let started = quote(&format!("{dir}/{FOLDER}/started"));
    format!(
        "if [ -d {started} ] && [ ! -s {started}/job ]; then echo {UNMARKED}; fi; cat {started}/job 2>/dev/null; true"
    )
}

/// Prints what a job has left that has not said how its program ended: [`GIVEN_UP`], [`AGAIN`], [`BEGUN`] if its script
/// came to the lines of `pre`, and [`RAN`] if the program was started.
pub(crate) fn look_for_start(dir: &str) -> String {
    let [started, again, running, part] =
        ["started", AGAIN, RUNNING, "done.json.part"].map(|name| quote(&format!("{dir}/{FOLDER}/{name}")));
    // A script of an earlier version has put blanks there, and knows no other sign.
    format!(
        "[ ! -L {started} ] || echo {GIVEN_UP}
         [ ! -e {again} ] || echo {AGAIN}
         [ ! -s {part} ] || echo {BEGUN}
         if [ -f {running} ] || [ \"$(head -c {} {part} 2>/dev/null)\" = '{}' ]; then echo {RAN}; fi
         true\n",
        IN_PRE.len(),
        " ".repeat(IN_PRE.len())
    )
}

/// Prevents a program from starting that has not started, and prints [`RAN`] if it has.
pub(crate) fn prevent_start(dir: &str) -> String {
    let running = quote(&format!("{dir}/{FOLDER}/{RUNNING}"));
    format!("mkdir {running} 2>/dev/null; [ ! -f {running} ] || echo {RAN}\n")
}

/// See [`look_for_mark`].
pub(crate) const UNMARKED: &str = "unmarked";

/// See [`give_up`].
pub(crate) const GIVEN_UP: &str = "given-up";

/// See [`look_for_start`].
pub(crate) const BEGUN: &str = "begun";

/// See [`look_for_start`].
pub(crate) const RAN: &str = "ran";

impl Done {
    /// Whether the script itself has ended the program because its time was over.
    pub(crate) fn is_timed_out(&self, launcher: &dyn Launcher, spec: &Spec) -> bool {
        let keeps_time = || spec.time.is_some() && launcher.time_limit(spec).is_some();
        let guess = || keeps_time() && self.exit == TIMED_OUT;
        self.timed_out.unwrap_or_else(guess)
    }

    /// The signal that ended the program.
    pub(crate) fn signal(&self) -> Option<i32> {
        (self.exit > 128).then(|| self.exit - 128)
    }
}

#[cfg(test)]
mod tests;
