//! The script of a job, in two layers, and the files by which it reports its progress.
//!
//! The outer layer, `.baton/run.sh`, is Baton's. It takes the try by making the folder `.baton/started`, which succeeds only
//! once: a second job of the same try exits without running the program. A worker that gives a try up puts a link there
//! instead, so no job of the try can run any more. At its end the script renames `.baton/done.json` into place; only that file
//! says how the program ended. A job that its launcher requeued finds its own id in `.baton/started/job` and leaves
//! `.baton/again`.
//!
//! The inner layer, `.baton/program`, runs as a child process in the shell of the site: the lines of `pre`, then the
//! program with its variables. It cannot affect the shell or the environment of the outer layer, which gives each of its
//! own commands a clean environment. The inner layer makes the file `.baton/running` right before it starts the program,
//! by a redirection alone, so that no function or alias can prevent it.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec, Work};
use serde::Deserialize;

use super::launcher::Launcher;
use crate::transport::quote;

/// The folder of a script and its files, below the folder of a try.
pub(crate) const FOLDER: &str = ".baton";

/// The file that the script of a requeued job leaves.
pub(crate) const AGAIN: &str = "again";

/// The file that is made right before the program starts. A folder of this name means that the program has not started
/// and cannot start any more.
const RUNNING: &str = "running";

/// Space reserved for `done.json`, in bytes; blanks after its line are ignored.
const DONE_BYTES: usize = 127;

/// The placeholder in that space until the end. Scripts of earlier versions wrote blanks there when they started the
/// program.
const IN_PRE: &str = "pre";

/// The exit of `timeout` for a program that it ended, and for one that it killed.
const TIMED_OUT: i32 = 124;
const TIMED_OUT_KILLED: i32 = 137;

/// Runs a command of the outer layer without the variables of the job and with the system's programs first.
const BATON: &str = r#"baton() (
  PATH=/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin${PATH:+:$PATH}
  export PATH
  unset LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT LD_DEBUG LD_DEBUG_OUTPUT
  exec env -i PATH="$PATH" "$@"
)
"#;

/// Prints the uptime of the machine in hundredths of a second: a clock that cannot be set.
const CLOCK: &str = r"baton_clock() { baton sed 's/^\([0-9]*\)\.\([0-9]*\) .*/\1\2/' /proc/uptime; }
";

/// The content of `done.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Done {
    /// The exit code of the shell: 128 + N for signal N.
    pub(crate) exit: i32,
    /// `pre` if the program was not started, else `program`.
    pub(crate) phase: String,
    /// In seconds since 1970, by the clock there.
    pub(crate) started_at: i64,
    /// In seconds since 1970, by the clock there.
    pub(crate) ended_at: i64,
    /// Whether the script ended the program at its time limit; missing in scripts of earlier versions.
    #[serde(default)]
    pub(crate) timed_out: Option<bool>,
    /// Whether the script itself received a signal: from the program to its whole group, or from the scheduler.
    #[serde(default)]
    pub(crate) signalled: bool,
}

/// The parts of a job's script.
pub(crate) struct Script<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) on_site: &'a OnSite,
    pub(crate) site: &'a config::Site,
    pub(crate) launcher: &'a dyn Launcher,
    /// The folder of the try.
    pub(crate) dir: &'a str,
    /// The name of the job at the launcher.
    pub(crate) token: &'a str,
    /// The process, as the program sees it.
    pub(crate) pid: &'a str,
    /// The try, as the program sees it.
    pub(crate) try_number: &'a str,
}

impl Script<'_> {
    /// Both layers and their inputs, as paths below the folder of the try and contents.
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

    /// A path below `.baton`, quoted for the shell.
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

    /// The command that runs the inner layer. If the script enforces the time limit, `timeout` does so, and it gives the
    /// layer its own process group, so that a signal to that group does not reach the outer layer.
    fn run(&self) -> String {
        let shell = self.site.shell.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        match self.launcher.time_limit(self.spec) {
            Some(secs) => format!("\"$(baton sh -c 'command -v timeout')\" -k 10 {secs} {shell}"),
            None => shell,
        }
    }

    /// The part after the inner layer, with the job in `$1`, the start of the layer in `$2` and `$3`, and its exit in
    /// `$4`.
    fn ending(&self) -> String {
        let [started, job, running, exits] = ["started", "started/job", RUNNING, "exit."].map(|name| self.own(name));
        let [part, done] = ["done.json.part", "done.json"].map(|name| self.own(name));
        let over = match self.launcher.time_limit(self.spec) {
            Some(secs @ 1..) => format!(
                // The clock counts hundredths of a second and may be one behind.
                "case $4 in {TIMED_OUT} | {TIMED_OUT_KILLED}) [ $(($(baton_clock) - $3)) -lt {} ] || baton_over=true ;; esac\n",
                secs.saturating_mul(100) - 1
            ),
            Some(0) | None => String::new(),
        };
        // Once the folder is made, the program cannot start any more. If everything was removed, the program has run.
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
            // `eval` runs it in this shell, so that it can prepare the program's environment. `set -e` has no effect before `||`.
            let _ = writeln!(text, "eval {} || exit \"$?\"", quote(&unix_lines(pre)));
        }
        let stdin = if self.spec.stdin.is_some() { self.own("stdin") } else { "/dev/null".to_owned() };
        let program = self.program().iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        let (running, exits) = (self.own(RUNNING), self.own("exit."));
        let _ = write!(
            text,
            // After a signal to the whole group this shell must wait for the program, since only then may its files be
            // collected. The program does not inherit the traps. No word here can be a function that `pre` defined.
            r#"trap : TERM INT HUP
baton_exit=0
> {running} && {program} < {stdin} || baton_exit=$?
> {exits}"$baton_exit" || exit "$baton_exit"
exit "$baton_exit"
"#
        );
        text
    }

    /// The program with its variables. `env` accepts any name of a variable; shells drop or reject names that are not
    /// identifiers.
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
            // `env` would take it for a variable.
            words.extend(["nice", "-n", "0"].map(str::to_owned));
        }
        words.extend(argv);
        words
    }

    /// The shell of the site without its options: a login shell could override `pre` and `vars`.
    fn shell_of_scripts(&self) -> Vec<String> {
        self.site.shell.iter().take_while(|word| !word.starts_with('-')).cloned().collect()
    }
}

/// Returns the command of the system for a script with `#!`: the interpreter, and the rest of the line as one argument.
/// With it, neither the script nor its file system needs the permission to be executed.
fn interpreter(script: &str) -> Option<Vec<String>> {
    let blanks = [' ', '\t'];
    let line = script.strip_prefix("#!")?.lines().next()?.trim_matches(blanks);
    let (program, argument) = line.split_once(blanks).unwrap_or((line, ""));
    if program.is_empty() {
        return None;
    }
    // The system does not search PATH for it.
    let program = if program.contains('/') { program.to_owned() } else { format!("./{program}") };
    let argument = Some(argument.trim_start_matches(blanks)).filter(|argument| !argument.is_empty());
    Some(std::iter::once(program).chain(argument.map(str::to_owned)).collect())
}

/// Removes carriage returns, which shells would treat as part of the last word.
fn unix_lines(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    text.strip_suffix('\r').unwrap_or(&text).to_owned()
}

/// A command that gives a try up unless its script has started, in one atomic step. It prints [`GIVEN_UP`] if the try is
/// given up, now or before.
pub(crate) fn give_up(dir: &str) -> String {
    let started = quote(&format!("{dir}/{FOLDER}/started"));
    format!("ln -sT given-up {started} 2>/dev/null; [ ! -L {started} ] || echo {GIVEN_UP}\n")
}

/// A command that prints the job in the mark of the script. It prints [`UNMARKED`] if there is no mark: the script has
/// not started the program. That is certain only for an old try whose job is not listed.
pub(crate) fn look_for_mark(dir: &str) -> String {
    let started = quote(&format!("{dir}/{FOLDER}/started"));
    format!(
        "if [ -d {started} ] && [ ! -s {started}/job ]; then echo {UNMARKED}; fi; cat {started}/job 2>/dev/null; true"
    )
}

/// A command that prints the traces of a job without `done.json`: [`GIVEN_UP`], [`AGAIN`], [`BEGUN`] if its script came
/// to the lines of `pre`, and [`RAN`] if the program was started.
pub(crate) fn look_for_start(dir: &str) -> String {
    let [started, again, running, part] =
        ["started", AGAIN, RUNNING, "done.json.part"].map(|name| quote(&format!("{dir}/{FOLDER}/{name}")));
    // A script of an earlier version writes only blanks there.
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

/// A command that prevents the program from starting, or prints [`RAN`] if it has started.
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
    /// Whether the script ended the program at its time limit.
    pub(crate) fn is_timed_out(&self, launcher: &dyn Launcher, spec: &Spec) -> bool {
        let keeps_time = || spec.time.is_some() && launcher.time_limit(spec).is_some();
        let guess = || keeps_time() && self.exit == TIMED_OUT;
        self.timed_out.unwrap_or_else(guess)
    }

    /// The signal that ended the program: a shell reports it as 128 + its number, and there are 64 signals.
    pub(crate) fn signal(&self) -> Option<i32> {
        (129..=192).contains(&self.exit).then(|| self.exit - 128)
    }
}

#[cfg(test)]
mod tests;
