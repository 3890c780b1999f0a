//! Shortages of the worker's machine: disk space, inodes, memory, processes, open files.
//!
//! A shortage costs no process a try. A process that meets one goes back to the queue at no charge, and the worker takes
//! no more processes until the resource is available again.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use baton_common::lack::{Lack, Shortage};
use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Memory that must be available on the machine.
pub(crate) const FREE_MEMORY_MIN: u64 = 16 << 20;

/// Address space that must be left below its limit. Threads and allocators reserve it in large pieces, and some code
/// aborts the program if it gets none.
const FREE_ADDRESS_SPACE_MIN: u64 = 96 << 20;

/// The current shortage of this worker, if any.
#[derive(Default)]
pub(crate) struct Health {
    current: Mutex<Option<Shortage>>,
    /// The shortage in the last log line.
    said: Mutex<Option<Lack>>,
    noted: Notify,
}

impl Health {
    /// Returns the current shortage.
    pub(crate) fn current(&self) -> Option<Shortage> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the shortage keeps the worker from taking processes.
    pub(crate) fn stops_taking(&self) -> bool {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().is_some_and(|shortage| shortage.lack.stops_taking())
    }

    /// Notes a shortage that a process has met.
    pub(crate) fn note(&self, shortage: Shortage) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !current.as_ref().is_some_and(|current| current.lack.stops_taking()) {
            *current = Some(shortage);
        }
        drop(current);
        self.noted.notify_one();
    }

    /// Waits until a process has met a shortage.
    pub(crate) async fn noted(&self) {
        self.noted.notified().await;
    }

    /// Notes the result of a probe. A shortage that a process met during the probe is newer, unless the worker was taking
    /// nothing (`was_short`).
    pub(crate) fn found(&self, shortage: Option<Shortage>, was_short: bool) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let is_newer = !was_short && current.as_ref().is_some_and(|current| current.lack.stops_taking());
        if !is_newer {
            *current = shortage;
        }
    }

    /// Remembers what the log now says; returns what it said before.
    pub(crate) fn say(&self, lack: Option<Lack>) -> Option<Lack> {
        std::mem::replace(&mut *self.said.lock().unwrap_or_else(PoisonError::into_inner), lack)
    }
}

/// The exhausted resource behind an error of the operating system; `None` if the cause is another one.
pub(crate) fn lack_of(error: &io::Error) -> Option<Lack> {
    match Errno::from_io_error(error)? {
        Errno::NOSPC | Errno::DQUOT => Some(Lack::Disk),
        Errno::ROFS => Some(Lack::ReadOnlyDisk),
        Errno::IO => Some(Lack::BrokenDisk),
        Errno::MFILE | Errno::NFILE => Some(Lack::OpenFiles),
        Errno::NOMEM => Some(Lack::Memory),
        // The same errno means that there is no memory for the stack of a thread.
        Errno::AGAIN => Some(if has_little_address_space() { Lack::Memory } else { Lack::Processes }),
        _ => None,
    }
}

/// The shortage behind an error with a file below the root that only Baton has written. Such an error is never the fault
/// of the process.
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

/// The shortage that a shim met before it executed its program.
pub(crate) fn of_shim(text: String, errno: Option<i32>, sandbox: &Path) -> Shortage {
    let lack = errno.map(io::Error::from_raw_os_error).map_or(Lack::Children, |error| match lack_of(&error) {
        Some(Lack::Disk) if has_no_inodes(sandbox) => Lack::Inodes,
        Some(lack) => lack,
        // The sandbox was made just before, so the root is at fault.
        None if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied, io::ErrorKind::NotADirectory]
            .contains(&error.kind()) =>
        {
            Lack::Root
        }
        None => Lack::Children,
    });
    Shortage { lack, text }
}

/// The shortage behind an error of a process written in Rust, if it concerns a resource that all processes of a worker
/// share.
pub(crate) fn of_worker(error: &io::Error) -> Option<Shortage> {
    let lack = lack_of(error).filter(|lack| matches!(lack, Lack::OpenFiles | Lack::Memory))?;
    Some(Shortage { lack, text: error.to_string() })
}

/// Runs blocking work on the blocking pool of a runtime.
///
/// # Errors
/// The operating system refuses a thread, on which the runtime panics, or has too little memory for one, which would abort
/// the program.
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

/// Returns a shortage if the address space of this program is near its limit.
pub(crate) fn address_space() -> Option<Shortage> {
    let text = "its address space has reached its limit".to_owned();
    has_little_address_space().then_some(Shortage { lack: Lack::Memory, text })
}

/// Whether the limit of the address space is near.
pub(crate) fn has_little_address_space() -> bool {
    let Some(limit) = getrlimit(Resource::As).current else { return false };
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib(&status, "VmSize:").is_some_and(|size| size + FREE_ADDRESS_SPACE_MIN > limit)
}

/// Reads a size from a file in /proc, in bytes.
pub(crate) fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn has_no_inodes(path: &Path) -> bool {
    let existing = path.ancestors().find_map(|ancestor| statvfs(ancestor).ok());
    existing.is_some_and(|status| status.f_files > 0 && status.f_favail == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_names_the_exhausted_resource() {
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
}
