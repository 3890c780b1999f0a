//! Real workers, and what tests do to them.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;
use crate::scene::Scene;

/// A running `baton-worker` with its own root, home and temporary folder.
pub struct Worker {
    child: Child,
    log: PathBuf,
    /// Its name.
    pub name: String,
}

/// Removes everything from a command's environment except what programs need to run.
pub fn clean_environment(command: &mut tokio::process::Command) {
    clean(command.as_std_mut());
}

fn clean(command: &mut Command) {
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LANG", "C.UTF-8");
}

impl Worker {
    pub(crate) fn start(
        scene: &Scene,
        program: &Path,
        variables: &[(&str, &str)],
        name: &str,
        arguments: &[&str],
    ) -> Self {
        let folder = scene.path(&format!("worker-{name}"));
        for part in ["root", "home", "tmp"] {
            std::fs::create_dir_all(folder.join(part)).expect("own folder");
        }
        let log = folder.join("log");
        let mut command = Command::new(program);
        clean(&mut command);
        if program.ends_with("own-process") {
            // The worker of this program is a sub-command.
            command.arg("worker");
        }
        let file = File::options().create(true).append(true).open(&log).expect("own folder");
        command
            .args(["--name", name])
            .args(arguments)
            .current_dir(&folder)
            .env("BATON_BROKER_URL", scene.broker_url())
            .env("BATON_DATABASE_URL", scene.database_url())
            .env("BATON_WORKER_ROOT", folder.join("root"))
            .env("HOME", folder.join("home"))
            .env("TMPDIR", folder.join("tmp"))
            .env("RUST_BACKTRACE", "1")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .process_group(0);
        let child = command.spawn().expect("the worker is built");
        Self { child, log, name: name.to_owned() }
    }

    /// Waits until it has started. It may declare its queues at the broker a moment later.
    pub async fn ready(&self) {
        self.says("worker ready").await;
    }

    /// Waits until its log contains this text.
    pub async fn says(&self, text: &str) {
        eventually(&format!("{} says {text:?}", self.name), Duration::from_secs(30), async || {
            let log = self.log();
            if log.contains(text) { Ok(()) } else { Err(log) }
        })
        .await;
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Sends SIGSTOP.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Sends SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends SIGTERM.
    pub fn ask_to_end(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends SIGTERM, and waits for the exit.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.ask_to_end();
        self.ended(Duration::from_secs(60)).await
    }

    /// Waits for the exit.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let child = &mut self.child;
        eventually("the worker ends", limit, async || child.try_wait().expect("own child").ok_or("it runs")).await
    }

    /// Whether it has exited.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("own child").is_some()
    }

    /// Its process id.
    pub fn os_pid(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory.
    pub fn memory_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.os_pid())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line VmRSS");
        line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).expect("a number")
    }

    /// The number of its open files.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.os_pid())).expect("it runs").count()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.os_pid()).ok().and_then(Pid::from_raw).expect("a pid");
        // It may have exited by itself.
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln(&format!("--- log of {} ---\n{}", self.name, tail(&self.log())));
        }
        self.signal(Signal::CONT);
        self.kill();
    }
}

#[expect(clippy::print_stderr, reason = "prints the log of a failed test")]
fn eprintln(text: &str) {
    eprintln!("{text}");
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Returns the processes whose command line contains this text.
pub fn processes_with(text: &str) -> Vec<u32> {
    processes_where("cmdline", text)
}

/// Returns the processes with this text in their environment: all that a program with this variable has started.
pub fn processes_in_environment(text: &str) -> Vec<u32> {
    processes_where("environ", text)
}

fn processes_where(file: &str, text: &str) -> Vec<u32> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join(file)).unwrap_or_default();
        // The arguments are separated by NUL.
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(text) && pid != std::process::id() {
            pids.push(pid);
        }
    }
    pids
}
