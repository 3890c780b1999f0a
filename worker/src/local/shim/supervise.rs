//! The supervisor: starts the program, watches it, and ends it with all its descendants.

use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{WaitOptions, WaitStatus, wait};

use super::policy::{Act, Input, Now, Policy};
use super::stage::{Image, NotExecuted, memory_file};
use super::wire::{Ended, EndedBy, Order, Report, Request, Script};
use super::{COMMAND, PROBE, STAGE, report, tree};
use crate::machine::SELF;
use crate::machine::clock::boottime_ms;

/// Queue length from the two reading threads to the main thread, which only waits for them; a longer queue would change
/// nothing.
const SEEN_MAX: usize = 16;

/// Bytes that a disk probe writes.
const PROBE_BYTES: usize = 4096;

/// Space reserved for `done.json`, whose reason has some hundred bytes at most.
const DONE_BYTES: usize = 4096;

/// Why a shim could not run its program.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("could not write {path}: {source}")]
    Write { path: String, source: io::Error },
    #[error("could not start a process in {cwd}: {source}")]
    Start { cwd: String, source: io::Error },
    #[error("could not start a thread: {0}")]
    Thread(io::Error),
    /// The machine kept the second stage from executing the program.
    #[error("{message}")]
    Stage { message: String, errno: Option<i32> },
}

impl Error {
    /// The errno of the operating system.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Write { source, .. } | Self::Start { source, .. } | Self::Thread(source) => source.raw_os_error(),
            Self::Stage { errno, .. } => *errno,
        }
    }
}

/// A message from a reading thread.
enum Seen {
    Asked(Request),
    WorkerGone,
    MainEnded(WaitStatus, i64),
    AllGone,
}

/// Runs the program to its end and writes `done.json`. No descendant is left when it returns, except those that
/// `left_behind` counts.
pub(super) fn run(order: &Order, input: impl BufRead + Send + 'static) -> Result<Ended, Error> {
    let (seen_tx, seen_rx) = sync_channel(SEEN_MAX);
    let started = now();
    let started_at = unix_micros();
    let requests_tx = seen_tx.clone();
    let (main_tx, main_rx) = sync_channel(1);
    // The threads come first: if the shim cannot have them, the program must not start.
    thread::Builder::new()
        .name("requests".into())
        .spawn(move || read_requests(input, &requests_tx))
        .and_then(|_| {
            // Without a program there is nothing to reap.
            let reaper = move || {
                if let Ok(main) = main_rx.recv() {
                    reap(main, &seen_tx)
                }
            };
            thread::Builder::new().name("reaper".into()).spawn(reaper)
        })
        .map_err(Error::Thread)?;
    // The program's parent-death signal is bound to this thread, which is the last of the shim to end.
    let (main, mut failure) = start(order)?;
    // The channel holds one message, and the reaper waits for it.
    let _ = main_tx.send(main);
    report(&Report::Started { pid: main });

    let mut policy = Policy::new(
        started,
        order.time_limit_ms.map(Duration::from_millis),
        Duration::from_millis(order.grace_ms),
        order.lease_ms,
        order.leased_at_ms,
    );
    let (result, left_behind) = watch(&mut policy, main, &seen_rx);

    let mut not_executed = Vec::new();
    if result.is_some() {
        // The other end was closed when the program was executed or ended.
        let _ = failure.read_to_end(&mut not_executed);
    }
    let not_executed: Option<NotExecuted> = serde_json::from_slice(&not_executed).ok();
    if let Some(NotExecuted { message, errno, .. }) = not_executed.clone().filter(|failure| failure.is_of_machine) {
        return Err(Error::Stage { message, errno });
    }
    let (user_ms, system_ms) = tree::children_times_ms();
    let ended = Ended {
        exit: result.and_then(|(status, _)| status.exit_status()),
        signal: result.and_then(|(status, _)| status.terminating_signal()),
        ended_by: policy.ended_by().unwrap_or(EndedBy::Own),
        not_started: not_executed.map(|failure| failure.message),
        started_at,
        ended_at: result.map_or_else(unix_micros, |(_, at)| at),
        user_ms,
        system_ms,
        left_behind,
    };
    // The report reaches the worker in any case. Writing can fail only if the program removed the folder, since the space
    // is reserved.
    let _ = write_done(&order.done, &ended);
    Ok(ended)
}

/// Probes the start of a program: starts two threads and a process, as a shim does, and writes a small file to the
/// folder.
pub(crate) fn try_start(folder: Option<&Path>) -> io::Result<()> {
    for name in ["requests", "reaper"] {
        // The thread does nothing and cannot panic.
        let _ = thread::Builder::new().name(name.into()).spawn(|| {})?.join();
    }
    let file = memory_file("image", b"{}")?;
    let (_failure, to_shim) = io::pipe()?;
    let mut command = Command::new(SELF);
    command.args([COMMAND, PROBE, PROBE]).env_clear().stdin(file).stdout(to_shim).spawn()?.wait()?;
    let Some(folder) = folder else { return Ok(()) };
    // Several machines may share the root, so the process id alone is not unique.
    write_probe(&folder.join(format!("{}-{}", std::process::id(), boottime_ms())))
}

/// Writes a small file to the disk and removes it.
pub(crate) fn write_probe(path: &Path) -> io::Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(&[0; PROBE_BYTES])?;
        file.sync_all()
    };
    let written = write();
    let removed = fs::remove_file(path);
    written.and(removed)
}

/// Starts the second stage. Returns its process id, which becomes the program's, and the pipe on which it reports why it
/// could not execute the program.
fn start(order: &Order) -> Result<(u32, io::PipeReader), Error> {
    let create =
        |path: &Path| File::create(path).map_err(|source| Error::Write { path: path.display().to_string(), source });
    create(&order.stdout)?;
    create(&order.stderr)?;
    if let Some(script) = &order.script {
        write_script(script).map_err(|source| Error::Write { path: script.path.display().to_string(), source })?;
    }
    // Without space to record its end, the program must not start.
    make_room(&order.done).map_err(|source| Error::Write { path: order.done.display().to_string(), source })?;
    let spawn = || {
        let image = Image {
            parent: std::process::id(),
            argv: order.argv.clone(),
            env: order.env.clone(),
            stdin: order.stdin.clone(),
            stdout: order.stdout.clone(),
            open_files: order.open_files,
        };
        let (failure, to_shim) = io::pipe()?;
        let child = Command::new(SELF)
            .arg0("baton")
            .args([COMMAND, STAGE])
            .env_clear()
            .current_dir(&order.cwd)
            .stdin(memory_file("image", &serde_json::to_vec(&image)?)?)
            .stdout(to_shim)
            .stderr(Stdio::from(File::options().append(true).open(&order.stderr)?))
            .spawn()?;
        Ok((child.id(), failure))
    };
    spawn().map_err(|source| Error::Start { cwd: order.cwd.display().to_string(), source })
}

/// Feeds the state machine until it finishes. Returns how and when the program ended, if it did, and how many processes
/// could not be ended.
fn watch(policy: &mut Policy, main: u32, seen: &Receiver<Seen>) -> (Option<(WaitStatus, i64)>, u32) {
    let shim = std::process::id();
    let mut result = None;
    let mut n_left = 0;
    loop {
        let input = match seen.recv_timeout(policy.pause(now())) {
            Ok(Seen::Asked(request)) => Input::Asked(request),
            Ok(Seen::WorkerGone) => Input::WorkerGone,
            Ok(Seen::MainEnded(status, at)) => {
                result = Some((status, at));
                Input::MainEnded
            }
            Ok(Seen::AllGone) => {
                n_left = 0;
                Input::AllGone
            }
            Err(RecvTimeoutError::Timeout) => Input::Tick,
            Err(RecvTimeoutError::Disconnected) => Input::WorkerGone,
        };
        match policy.on(input, now()) {
            Act::Nothing => {}
            Act::Term => tree::terminate(shim, main),
            Act::Kill => n_left = tree::kill(shim),
            Act::Finish => return (result, u32::try_from(n_left).unwrap_or(u32::MAX)),
        }
    }
}

fn read_requests(input: impl BufRead, seen: &SyncSender<Seen>) {
    for line in input.lines() {
        let Ok(line) = line else { break };
        if let Some(request) = Request::from_line(&line)
            && seen.send(Seen::Asked(request)).is_err()
        {
            return;
        }
    }
    // The receiver is gone if everything has ended already.
    let _ = seen.send(Seen::WorkerGone);
}

/// Waits for every child, including orphans that the shim inherited. Every descendant has a living chain of parents up to
/// the shim, so when no child is left, no descendant is.
fn reap(main: u32, seen: &SyncSender<Seen>) {
    loop {
        let said = match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if u32::try_from(pid.as_raw_pid()) == Ok(main) => {
                seen.send(Seen::MainEnded(status, unix_micros()))
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(_) => {
                let _ = seen.send(Seen::AllGone);
                return;
            }
        };
        if said.is_err() {
            return;
        }
    }
}

fn write_script(script: &Script) -> io::Result<()> {
    let mode = if script.is_executable { 0o700 } else { 0o600 };
    fs::write(&script.path, &script.text)?;
    fs::set_permissions(&script.path, fs::Permissions::from_mode(mode))
}

/// Reserves the space for `done.json`.
fn make_room(path: &Path) -> io::Result<()> {
    open_part(path)?.1.write_all(&[b' '; DONE_BYTES])
}

/// Opens the file that becomes `done.json` without releasing its space.
fn open_part(path: &Path) -> io::Result<(PathBuf, File)> {
    let part = path.with_extension("part");
    let file = File::options().write(true).create(true).truncate(false).open(&part)?;
    Ok((part, file))
}

/// Writes under another name, then renames, so `done.json` is complete as soon as it exists.
fn write_done(path: &Path, ended: &Ended) -> io::Result<()> {
    let (part, mut file) = open_part(path)?;
    let text = serde_json::to_vec(ended)?;
    file.write_all(&text)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()?;
    fs::rename(&part, path)
}

fn now() -> Now {
    Now { at: Instant::now(), boottime_ms: boottime_ms() }
}

fn unix_micros() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
