//! The script that a job is: what it does before and after the program, and how it says so.
//!
//! Its first act is to make the folder `.baton/started`, which can be done once in a try: a second job of the same try ends
//! without running the program, and whoever gives a try up puts a link there instead, so that no job of it can run any more
//! and everybody sees why. Its last act is to write
//! `.baton/done.json` under its final name by a rename; nothing but that file says how the program ended. A launcher that
//! starts the same job again, since it has lost what it had started, finds its own name in `.baton/started/job` and leaves
//! `.baton/again`.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec, Work};
use serde::Deserialize;

use crate::transport::quote;

/// Where a script and what it leaves are, below the folder of a try.
pub(crate) const FOLDER: &str = ".baton";

/// What the script of a job leaves that its launcher has started again.
pub(crate) const AGAIN: &str = "again";

/// Room for `done.json`, in bytes: blanks behind its one line mean nothing.
const DONE_BYTES: usize = 127;

/// What stands there while the lines before the program run, any of which may end the script.
pub(crate) const IN_PRE: &str = "pre";

/// The exit of `timeout` for a program that it has ended.
const TIMED_OUT: i32 = 124;

/// What `done.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Done {
    /// As the shell reports it: 128 + N for signal N.
    pub(crate) exit: i32,
    /// `pre` when a line before the program failed, else `program`.
    pub(crate) phase: String,
    /// In seconds since 1970, by the clock there.
    pub(crate) started_at: i64,
    /// In seconds since 1970, by the clock there.
    pub(crate) ended_at: i64,
}

/// The whole script. `header` is what the launcher reads, `job_id` the shell expression for what it calls the job.
pub(crate) fn render(
    spec: &Spec,
    on_site: &OnSite,
    site: &config::Site,
    dir: &str,
    header: &str,
    job_id: &str,
) -> String {
    let mut text = String::from("#!/bin/sh\n");
    text.push_str(header);
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line(&format!("cd {} || exit 1", quote(dir)));
    // A line of `pre` may go elsewhere, and the program with it.
    line(&format!("baton_dir={}", quote(&format!("{dir}/{FOLDER}"))));
    line("if ! mkdir \"$baton_dir/started\" 2>/dev/null; then");
    line(&format!(
        "  [ \"$(cat \"$baton_dir/started/job\" 2>/dev/null)\" != \"{job_id}\" ] || : > \"$baton_dir/{AGAIN}\""
    ));
    line("  echo 'baton: this try has been started or given up before; nothing is run' >&2");
    line("  exit 0");
    line("fi");
    line(&format!(
        "echo \"{job_id}\" > \"$baton_dir/started/job.part\" && mv \"$baton_dir/started/job.part\" \"$baton_dir/started/job\" || exit 1"
    ));
    // It has its room from the beginning: whatever the program fills, it can say how it ended.
    line(&format!("printf '%-{DONE_BYTES}s\\n' {IN_PRE} > \"$baton_dir/done.json.part\" || exit 1"));
    line("baton_started=$(date +%s)");
    line("baton_done() {");
    line("  for baton_try in 1 2 3 4 5 6 7 8 9 10 11 12; do");
    line("    printf '{\"exit\":%d,\"phase\":\"%s\",\"started_at\":%s,\"ended_at\":%s}' \"$1\" \"$2\" \\");
    line("      \"$baton_started\" \"$(date +%s)\" 1<> \"$baton_dir/done.json.part\" &&");
    line("      mv \"$baton_dir/done.json.part\" \"$baton_dir/done.json\" && break");
    line("    sleep 5");
    line("  done");
    line("  exit \"$1\"");
    line("}");
    line("exec > \"$baton_dir/stdout\" 2> \"$baton_dir/stderr\"");
    for pre in site.pre.iter().chain(&on_site.pre) {
        // In this very shell, so that what it sets is there for the program; `set -e` does not count on this side of `||`.
        line(&format!("{{\n{pre}\n}} || baton_done $? pre"));
    }
    line("set +eu");
    line(&format!("printf '%-{}s' '' 1<> \"$baton_dir/done.json.part\"", IN_PRE.len()));
    for (name, value) in &spec.vars {
        line(&format!("export {name}={}", quote(value)));
    }
    let program = match &spec.what {
        Work::Run { argv } => argv.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
        Work::Script { .. } => "/bin/sh \"$baton_dir/script\"".to_owned(),
        Work::Call { .. } => "false".to_owned(),
    };
    let stdin = if spec.stdin.is_some() { "\"$baton_dir/stdin\"" } else { "/dev/null" };
    // Slurm keeps the time itself; a plain machine does not.
    let timeout = match (site.launcher, spec.time) {
        (config::Launcher::Fork, Some(time)) => format!("timeout -k 10 {} ", time.as_secs().max(1)),
        (config::Launcher::Fork | config::Launcher::Slurm, _) => String::new(),
    };
    line(&format!("{timeout}{program} < {stdin}"));
    line("baton_done $? program");
    text
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

/// See [`look_for_mark`].
pub(crate) const UNMARKED: &str = "unmarked";

/// See [`give_up`].
pub(crate) const GIVEN_UP: &str = "given-up";

/// What the program's files beside the script are: their paths below the folder of the try, and their content.
pub(crate) fn companions(spec: &Spec) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    if let Work::Script { text } = &spec.what {
        files.push((format!("{FOLDER}/script"), text.clone().into_bytes()));
    }
    if let Some(stdin) = &spec.stdin {
        files.push((format!("{FOLDER}/stdin"), stdin.clone().into_bytes()));
    }
    files
}

impl Done {
    /// Whether the script itself has ended the program because its time was over.
    pub(crate) fn is_timed_out(&self, site: &config::Site, spec: &Spec) -> bool {
        site.launcher == config::Launcher::Fork && spec.time.is_some() && self.exit == TIMED_OUT
    }

    /// The signal that ended the program.
    pub(crate) fn signal(&self) -> Option<i32> {
        (self.exit > 128).then(|| self.exit - 128)
    }
}

/// A value in a line that `sbatch` reads: it takes blanks and quotes for its own, but for those in double quotes.
fn header_word(value: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,=@%+".contains(&byte);
    if !value.is_empty() && value.bytes().all(is_plain) {
        return value.to_owned();
    }
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The lines that Slurm reads.
pub(crate) fn slurm_header(spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
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

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    fn site(launcher: &str) -> config::Site {
        toml::from_str(&format!("transport = 'local'\nlauncher = '{launcher}'\nroot = '/r'\npre = ['GREETING=hello']"))
            .unwrap()
    }

    fn run(spec: &Spec, dir: &std::path::Path) -> std::process::Output {
        let folder = dir.join(FOLDER);
        std::fs::create_dir_all(&folder).unwrap();
        for (path, content) in companions(spec) {
            std::fs::write(dir.join(path), content).unwrap();
        }
        let on_site = spec.on_site.clone().unwrap_or_default();
        let text = render(spec, &on_site, &site("fork"), &dir.display().to_string(), "", "$$");
        std::fs::write(folder.join("run.sh"), text).unwrap();
        Command::new("/bin/sh").arg(folder.join("run.sh")).output().unwrap()
    }

    fn done(dir: &std::path::Path) -> Option<Done> {
        let text = std::fs::read(dir.join(FOLDER).join("done.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap())
    }

    fn spec(what: Work) -> Spec {
        Spec { on_site: Some(OnSite { at: "x".into(), ..OnSite::default() }), ..Spec::new(what) }
    }

    #[test]
    fn a_script_runs_its_program_once_and_says_how_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("with 'quotes' and $signs");
        let argv = ["sh", "-c", "cat; echo \"$0 $GREETING $MORE\"; echo x >> ran; exit 3", "it's"].map(str::to_owned);
        let spec = Spec {
            vars: [("MORE".to_owned(), "a $HOME 'b'".to_owned())].into(),
            stdin: Some("in\n".into()),
            ..spec(Work::Run { argv: argv.to_vec() })
        };
        assert_eq!(run(&spec, &dir).status.code(), Some(3));
        let first = done(&dir).unwrap();
        assert_eq!((first.exit, first.phase.as_str(), first.signal()), (3, "program", None));
        assert_eq!(std::fs::read_to_string(dir.join(".baton/stdout")).unwrap(), "in\nit's  a $HOME 'b'\n");
        let second = run(&spec, &dir);
        assert!(second.status.success() && String::from_utf8_lossy(&second.stderr).contains("nothing is run"));
        assert_eq!(std::fs::read_to_string(dir.join("ran")).unwrap(), "x\n");
    }

    #[test]
    fn a_failing_line_before_the_program_is_told_apart_and_a_time_limit_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(Work::Script { text: "touch ran\nsleep 60\n".into() });
        spec.on_site.as_mut().unwrap().pre = vec!["false".into()];
        run(&spec, dir.path());
        assert_eq!(done(dir.path()).unwrap().phase, "pre");
        assert!(!dir.path().join("ran").exists());
        let dir = tempfile::tempdir().unwrap();
        spec.on_site.as_mut().unwrap().pre.clear();
        spec.time = Some(Duration::from_secs(1));
        run(&spec, dir.path());
        assert!(done(dir.path()).unwrap().is_timed_out(&site("fork"), &spec));
    }

    #[test]
    fn a_line_before_the_program_may_go_elsewhere_and_be_strict() {
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(Work::Script { text: "cat > here; false; exit 7".into() });
        spec.stdin = Some("in".into());
        let pre = vec!["set -eu".to_owned(), format!("cd '{}'", elsewhere.path().display())];
        spec.on_site.as_mut().unwrap().pre = pre;
        run(&spec, dir.path());
        let said = done(dir.path()).unwrap();
        assert_eq!((said.exit, said.phase.as_str()), (7, "program"));
        assert_eq!(std::fs::read_to_string(elsewhere.path().join("here")).unwrap(), "in");
        for (line, exit) in [("set -e\nfalse\ntrue", None), ("set -e; false", Some(1)), ("exit 5", None)] {
            let dir = tempfile::tempdir().unwrap();
            spec.on_site.as_mut().unwrap().pre = vec![line.to_owned(), "true # a word".to_owned()];
            run(&spec, dir.path());
            let part = std::fs::read_to_string(dir.path().join(".baton/done.json.part")).unwrap_or_default();
            let said = done(dir.path()).map(|done| (done.exit, done.phase));
            match exit {
                Some(exit) => assert_eq!(said, Some((exit, "pre".to_owned())), "{line}"),
                None if line.starts_with("exit") => {
                    assert!(said.is_none() && part.starts_with(IN_PRE), "{line}: {part}")
                }
                None => assert_eq!(said.unwrap().1, "program", "{line}"),
            }
        }
    }

    #[test]
    fn a_job_that_its_launcher_starts_again_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(Work::Run { argv: vec!["true".into()] });
        run(&spec, dir.path());
        run(&spec, dir.path());
        assert!(!dir.path().join(".baton/again").exists(), "another job");
        let text =
            render(&spec, spec.on_site.as_ref().unwrap(), &site("slurm"), &dir.path().display().to_string(), "", "7");
        std::fs::write(dir.path().join(".baton/started/job"), "7\n").unwrap();
        assert!(Command::new("/bin/sh").arg("-c").arg(text).status().unwrap().success());
        assert!(dir.path().join(".baton/again").exists());
    }

    #[test]
    fn a_value_with_blanks_is_one_word_for_slurm() {
        assert_eq!(header_word("a/b:c"), "a/b:c");
        assert_eq!(header_word("two words"), r#""two words""#);
        assert_eq!(header_word(r#"a"b\c"#), r#""a\"b\\c""#);
    }

    #[test]
    fn slurm_is_asked_for_what_the_spec_needs() {
        let mut spec = spec(Work::Run { argv: vec!["true".into()] });
        spec.time = Some(Duration::from_secs(61));
        let on_site = spec.on_site.as_mut().unwrap();
        on_site.needs.cpus = Some(4);
        on_site.needs.mem = Some((1 << 30) + 1);
        on_site.native = [("exclusive".to_owned(), String::new()), ("account".to_owned(), "a1".to_owned())].into();
        let on_site = on_site.clone();
        let header = slurm_header(&spec, &on_site, &site("slurm"), "/d", "baton-1-1");
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
