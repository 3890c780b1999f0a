//! What this worker's machine lacks: disk space, inodes, memory, processes, open files.
//!
//! A shortage costs no process a try. Whatever fails for want of a resource goes back to the queue at no charge, the worker
//! takes no more processes, says so in its row, and tries the resource itself until it is there again. The probes are cheap
//! and run also while the worker has nothing to do, so an unusable worker is known before it takes anything.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::lack::{Lack, Shortage};
use rustix::fs::{StatVfs, StatVfsMountFlags, statvfs};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};
use uuid::Uuid;

use crate::cli::chain;
use crate::incarnation::Shared;
use crate::local;
use crate::shim::{self, supervise::PROBE_BYTES};
use crate::user::Ids;

/// Pause between two probes of a worker that lacks nothing: a shortage is in the worker's row within a few seconds.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// A child process is started at every so many probes: it costs milliseconds, all other probes microseconds.
const CHILD_EVERY: u64 = 2;

/// Pause of a worker that lacks something before it probes again, which doubles up to the second value. It grows also over
/// shortages that follow each other, so a worker whose slots exceed its machine does not take and give back all the time.
const SHORT_PAUSE_MIN: Duration = Duration::from_secs(1);
const SHORT_PAUSE_MAX: Duration = Duration::from_secs(10);

/// The longest pause while its own programs have what it lacks.
const OWN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// After so long without a shortage the pause begins anew.
const FORGET_AFTER: Duration = Duration::from_secs(30);

/// A disk that takes longer for a small file is slow.
const SLOW_AFTER: Duration = Duration::from_secs(2);

/// A disk that takes longer for a small file does not work.
const BROKEN_AFTER: Duration = Duration::from_secs(20);

/// Files that the start of one program needs at once.
const FILES_NEEDED: usize = 8;

/// Free space and inodes below which nothing is taken, unless the file system is so small that a part of it is less.
const FREE_BYTES_MIN: u64 = 1 << 20;
const FREE_INODES_MIN: u64 = 64;
const FREE_PART: u64 = 16;

/// Memory that must be available on the machine.
const FREE_MEMORY_MIN: u64 = 16 << 20;

/// Address space that must be left below a limit of it. Threads and allocators reserve it in large pieces, and some parts of
/// a program end it where they get none.
const FREE_ADDRESS_SPACE_MIN: u64 = 96 << 20;

/// How long a child process may take to start and exit.
const CHILD_LIMIT: Duration = Duration::from_secs(10);

/// What this worker lacks at present.
#[derive(Default)]
pub(crate) struct Health {
    current: Mutex<Option<Shortage>>,
    /// What was last said in the log.
    said: Mutex<Option<Lack>>,
    noted: Notify,
}

impl Health {
    /// What it lacks.
    pub(crate) fn current(&self) -> Option<Shortage> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it takes no processes for that.
    pub(crate) fn stops_taking(&self) -> bool {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().is_some_and(|shortage| shortage.lack.stops_taking())
    }

    /// A process has met a shortage.
    pub(crate) fn note(&self, shortage: Shortage) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !current.as_ref().is_some_and(|current| current.lack.stops_taking()) {
            *current = Some(shortage);
        }
        drop(current);
        self.noted.notify_one();
    }

    /// What a probe has found. What a process has met while the probe was under way is newer, unless the worker took nothing
    /// then.
    fn found(&self, shortage: Option<Shortage>, was_short: bool) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let is_newer = !was_short && current.as_ref().is_some_and(|current| current.lack.stops_taking());
        if !is_newer {
            *current = shortage;
        }
    }

    /// What was said before this.
    fn say(&self, lack: Option<Lack>) -> Option<Lack> {
        std::mem::replace(&mut *self.said.lock().unwrap_or_else(PoisonError::into_inner), lack)
    }
}

/// The resource that an error of the operating system says is exhausted. An error that has another cause is `None`.
pub(crate) fn lack_of(error: &io::Error) -> Option<Lack> {
    match Errno::from_io_error(error)? {
        Errno::NOSPC | Errno::DQUOT => Some(Lack::Disk),
        Errno::ROFS => Some(Lack::ReadOnlyDisk),
        Errno::IO => Some(Lack::BrokenDisk),
        Errno::MFILE | Errno::NFILE => Some(Lack::OpenFiles),
        Errno::NOMEM => Some(Lack::Memory),
        // A thread for whose stack there is no memory is refused with the same number.
        Errno::AGAIN => Some(if has_little_address_space() { Lack::Memory } else { Lack::Processes }),
        _ => None,
    }
}

/// The shortage behind an error with a file below the root, where only Baton has written yet. Whatever the error is, the
/// process has no part in it.
pub(crate) fn below_root(path: &Path, error: &io::Error) -> Shortage {
    let lack = match lack_of(error) {
        Some(Lack::Disk) if has_no_inodes(path) => Lack::Inodes,
        Some(lack) => lack,
        None => Lack::Root,
    };
    Shortage { lack, text: format!("could not write {}: {error}", path.display()) }
}

/// The shortage behind an error with a thread or a child process.
pub(crate) fn of_children(what: &str, error: &io::Error) -> Shortage {
    Shortage { lack: lack_of(error).unwrap_or(Lack::Children), text: format!("{what}: {error}") }
}

/// The shortage that a shim has met before its program was executed.
pub(crate) fn of_shim(text: String, errno: Option<i32>, sandbox: &Path) -> Shortage {
    let lack = errno.map(io::Error::from_raw_os_error).map_or(Lack::Children, |error| match lack_of(&error) {
        Some(Lack::Disk) if has_no_inodes(sandbox) => Lack::Inodes,
        Some(lack) => lack,
        // The sandbox was made just before.
        None if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied, io::ErrorKind::NotADirectory]
            .contains(&error.kind()) =>
        {
            Lack::Root
        }
        None => Lack::Children,
    });
    Shortage { lack, text }
}

/// The shortage behind an error of the worker's own program, if it is one of process-wide resources that a process in
/// Rust shares with all others of its worker.
pub(crate) fn of_worker(error: &io::Error) -> Option<Shortage> {
    let lack = lack_of(error).filter(|lack| matches!(lack, Lack::OpenFiles | Lack::Memory))?;
    Some(Shortage { lack, text: error.to_string() })
}

/// Runs blocking work on the pool of a runtime.
///
/// # Errors
/// The operating system starts no thread for it, over which the runtime panics, or has too little memory for one, over which
/// the thread would end the program.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    runtime: &Handle,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Shortage> {
    if let Some(shortage) = address_space() {
        return Err(shortage);
    }
    catch_unwind(AssertUnwindSafe(|| runtime.spawn_blocking(work)))
        .map_err(|_| Shortage { lack: Lack::Processes, text: "could not start a thread".into() })
}

/// Probes until it is dropped. The first look is [`look_once`].
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut prober = Prober::default();
    let mut pause = SHORT_PAUSE_MIN;
    let mut well_since = Instant::now();
    for count in 1_u64.. {
        let wait = if shared.health.stops_taking() { pause } else { PROBE_INTERVAL };
        let is_noted = tokio::select! {
            () = tokio::time::sleep(wait) => false,
            () = shared.health.noted.notified() => true,
        };
        if is_noted && shared.health.stops_taking() {
            // Others may have what it takes. Nothing more comes here before the resource has been tried.
            say(&shared).await;
            tokio::time::sleep(pause).await;
        }
        let was_short = shared.health.stops_taking();
        let before = shared.health.current().map(|shortage| shortage.lack);
        let found = prober.probe(&shared, was_short || count.is_multiple_of(CHILD_EVERY)).await;
        shared.health.found(found, was_short);
        say(&shared).await;
        if was_short {
            // What its own programs have, it has again when they end.
            let is_own = before.is_some_and(Lack::is_shared_by_programs) && shared.programs.count() > 0;
            pause = (pause * 2).min(if is_own { OWN_PAUSE_MAX } else { SHORT_PAUSE_MAX });
            well_since = Instant::now();
        } else if well_since.elapsed() > FORGET_AFTER {
            pause = SHORT_PAUSE_MIN;
        }
    }
}

/// Looks before the worker takes its first process.
pub(crate) async fn look_once(shared: &Arc<Shared>) {
    let found = Prober::default().probe(shared, true).await;
    shared.health.found(found, true);
    say(shared).await;
}

/// Says in the log and in the worker's row what has changed, and takes processes or takes none.
async fn say(shared: &Arc<Shared>) {
    let now = shared.health.current();
    let lack = now.as_ref().map(|shortage| shortage.lack);
    let before = shared.health.say(lack);
    // A process may have met a shortage that a probe did not find, and have stopped the taking.
    shared.take_what_it_can().await;
    if before == lack {
        return;
    }
    match (before, &now) {
        (_, Some(Shortage { lack, text })) => {
            let effect = if lack.stops_taking() { "taking no processes until it is there" } else { "going on" };
            warn!(text, remedy = lack.remedy(), "this worker lacks {}; {effect}", lack.word());
        }
        (Some(before), None) => info!("this worker has {} again", before.word()),
        (None, None) => {}
    }
    // Others see it in the row.
    shared.beat_now.notify_one();
}

/// Tries what a local program needs.
#[derive(Default)]
struct Prober {
    /// A probe of the disk that has not come back, and since when.
    pending: Option<(JoinHandle<Option<Shortage>>, Instant)>,
}

impl Prober {
    async fn probe(&mut self, shared: &Shared, with_child: bool) -> Option<Shortage> {
        // Without memory a thread may end the program instead of being refused.
        if let Some(shortage) = open_files().or_else(memory).or_else(threads) {
            return Some(shortage);
        }
        match self.disk(&shared.root).await {
            Some(shortage) => Some(shortage),
            None if with_child => child(&shared.root, shared.user.as_deref().map(|user| &user.ids)).await,
            None => None,
        }
    }

    /// Writes a small file on a thread of its own: a disk may hang.
    async fn disk(&mut self, root: &Path) -> Option<Shortage> {
        let (mut task, began_at) = match self.pending.take() {
            Some(pending) => pending,
            None => {
                let root = root.to_owned();
                match spawn_blocking(&Handle::current(), move || disk(&root)) {
                    Ok(task) => (task, Instant::now()),
                    Err(shortage) => return Some(shortage),
                }
            }
        };
        let found = timeout(SLOW_AFTER, &mut task).await;
        let took = began_at.elapsed();
        let place = root.display();
        match found {
            Ok(found) => found.ok().flatten().or_else(|| {
                (took >= SLOW_AFTER).then(|| Shortage {
                    lack: Lack::SlowDisk,
                    text: format!("a write of 4 KiB below {place} took {} s", took.as_secs()),
                })
            }),
            Err(_) => {
                self.pending = Some((task, began_at));
                let lack = if took >= BROKEN_AFTER { Lack::BrokenDisk } else { Lack::SlowDisk };
                let text = format!("a write of 4 KiB below {place} has not come back for {} s", took.as_secs());
                Some(Shortage { lack, text })
            }
        }
    }
}

fn open_files() -> Option<Shortage> {
    let opened: Result<Vec<File>, io::Error> = (0..FILES_NEEDED).map(|_| File::open("/dev/null")).collect();
    let error = opened.err()?;
    let lack = lack_of(&error)?;
    let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    Some(Shortage { lack, text: format!("{error} (the limit is {limit})") })
}

fn threads() -> Option<Shortage> {
    match std::thread::Builder::new().name("probe".into()).spawn(|| {}) {
        Ok(thread) => {
            // It does nothing, and cannot panic.
            let _ = thread.join();
            None
        }
        Err(error) => Some(of_children("could not start a thread", &error)),
    }
}

fn memory() -> Option<Shortage> {
    address_space().or_else(|| {
        let available = kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
        let text = format!("{} KiB are available on the machine", available >> 10);
        (available < FREE_MEMORY_MIN).then_some(Shortage { lack: Lack::Memory, text })
    })
}

fn address_space() -> Option<Shortage> {
    let text = "its address space has reached its limit".to_owned();
    has_little_address_space().then_some(Shortage { lack: Lack::Memory, text })
}

fn has_little_address_space() -> bool {
    let Some(limit) = getrlimit(Resource::As).current else { return false };
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib(&status, "VmSize:").is_some_and(|size| size + FREE_ADDRESS_SPACE_MIN > limit)
}

/// A size of /proc in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Makes the root if it is absent, looks at what is free there, and writes a small file.
fn disk(root: &Path) -> Option<Shortage> {
    let folder = root.join("sandbox");
    if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(&folder) {
        return Some(below_root(&folder, &error));
    }
    if let Ok(status) = statvfs(root)
        && let Some(shortage) = too_little_free(root, &status)
    {
        return Some(shortage);
    }
    // Another probe may still wait for a slow disk, and another worker may have the same root.
    let path = root.join(format!(".probe-{}", Uuid::now_v7()));
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(&[0; PROBE_BYTES])?;
        file.sync_all()
    };
    let written = write();
    let removed = fs::remove_file(&path);
    written.and(removed).err().map(|error| below_root(&path, &error))
}

fn too_little_free(root: &Path, status: &StatVfs) -> Option<Shortage> {
    let place = root.display();
    if status.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Some(Shortage { lack: Lack::ReadOnlyDisk, text: format!("the file system of {place} is read-only") });
    }
    let (free, total) = (status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize);
    if total > 0 && free < FREE_BYTES_MIN.min(total / FREE_PART) {
        let text = format!("{} of {} KiB are free on the file system of {place}", free >> 10, total >> 10);
        return Some(Shortage { lack: Lack::Disk, text });
    }
    // Some file systems have no number of inodes.
    let (free, total) = (status.f_favail, status.f_files);
    if total > 0 && free < FREE_INODES_MIN.min(total / FREE_PART) {
        let text = format!("{free} of {total} inodes are free on the file system of {place}");
        return Some(Shortage { lack: Lack::Inodes, text });
    }
    None
}

fn has_no_inodes(path: &Path) -> bool {
    let existing = path.ancestors().find_map(|ancestor| statvfs(ancestor).ok());
    existing.is_some_and(|status| status.f_files > 0 && status.f_favail == 0)
}

/// Starts a child that does what a shim does at its start, as the user whom the shim takes on: quotas and limits are a
/// user's.
async fn child(root: &Path, ids: Option<&Ids>) -> Option<Shortage> {
    let started = tokio::process::Command::from(child_command(root, ids)).spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return Some(of_children("could not start a process", &error)),
    };
    match timeout(CHILD_LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => None,
        Ok(Ok(status)) => {
            let number = status.code().filter(|code| *code > 1);
            let error = number.map(io::Error::from_raw_os_error);
            Some(match error {
                Some(error) => of_children("a child could not do what the start of a program needs", &error),
                None => {
                    let lack = if has_little_address_space() { Lack::Memory } else { Lack::Children };
                    Shortage { lack, text: format!("a child process ended by {status}") }
                }
            })
        }
        Ok(Err(error)) => Some(of_children("could not wait for a process", &error)),
        Err(_) => {
            // It is reaped by the runtime.
            let _ = child.start_kill();
            let text = format!("a process that does nothing has not ended for {} s", CHILD_LIMIT.as_secs());
            Some(Shortage { lack: Lack::Children, text })
        }
    }
}

fn child_command(root: &Path, ids: Option<&Ids>) -> Command {
    let plain = || {
        let mut command = Command::new(local::SELF);
        command.args([shim::COMMAND, shim::PROBE]).env_clear();
        command
    };
    let mut command = ids.map_or_else(plain, |ids| ids.probe(root));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// The shortage that kept a local program from running, if it was one.
pub(crate) fn of_local(error: &local::Error) -> Option<Shortage> {
    match error {
        local::Error::Sandbox { path, source } => Some(below_root(path, source)),
        local::Error::Shim(source) => Some(of_children(&error.to_string(), source)),
        local::Error::NotStarted { shortage } => Some(shortage.clone()),
        local::Error::Vanished { has_started: false } => Some(Shortage { lack: Lack::Children, text: chain(error) }),
        local::Error::Vanished { has_started: true } | local::Error::Stopping => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_system_names_the_resource_that_is_exhausted() {
        for (errno, lack) in [
            (Errno::NOSPC, Some(Lack::Disk)),
            (Errno::DQUOT, Some(Lack::Disk)),
            (Errno::ROFS, Some(Lack::ReadOnlyDisk)),
            (Errno::MFILE, Some(Lack::OpenFiles)),
            (Errno::NFILE, Some(Lack::OpenFiles)),
            (Errno::NOMEM, Some(Lack::Memory)),
            (Errno::AGAIN, Some(Lack::Processes)),
            (Errno::NOENT, None),
            (Errno::TOOBIG, None),
        ] {
            assert_eq!(lack_of(&errno.into()), lack, "{errno}");
        }
        assert_eq!(below_root(Path::new("/nowhere"), &Errno::ACCESS.into()).lack, Lack::Root);
        assert_eq!(of_worker(&Errno::NOSPC.into()), None);
    }

    #[test]
    fn a_machine_that_has_everything_lacks_nothing() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(disk(&root.path().join("made/below")), None);
        assert_eq!(open_files().or_else(threads).or_else(memory), None);
        assert_eq!(fs::read_dir(root.path().join("made/below")).unwrap().count(), 1, "no probe is left");
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let shortage = disk(&root.path().join("file/root")).unwrap();
        assert!(shortage.lack == Lack::Root && shortage.text.contains("file/root"), "{shortage:?}");
    }
}
