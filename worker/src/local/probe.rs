//! Probes of the machine: whether it has the resources to start a local program. They are cheap and also run on an idle
//! worker, so a shortage is known before the worker takes a process.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use baton_common::lack::{Lack, Shortage};
use rustix::fs::{StatVfs, StatVfsMountFlags, statvfs};
use rustix::process::{Resource, getrlimit};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::local::shim::{self, supervise::write_probe};
use crate::local::user::{Ids, User};
use crate::machine::SELF;
use crate::machine::shortage::{
    FREE_MEMORY_MIN, address_space, below_root, has_little_address_space, kib, lack_of, of_children, spawn_blocking,
};

/// A disk that takes longer for a small file counts as slow.
const SLOW_AFTER: Duration = Duration::from_secs(2);

/// A disk that takes longer for a small file counts as broken.
const BROKEN_AFTER: Duration = Duration::from_secs(20);

/// Open files that the start of one program needs at once.
const FILES_NEEDED: usize = 8;

/// Free space and inodes below which the worker takes nothing. On a small file system the limit is its size divided by
/// [`FREE_PART`], if that is less.
const FREE_BYTES_MIN: u64 = 1 << 20;
const FREE_INODES_MIN: u64 = 64;
const FREE_PART: u64 = 16;

/// How long a child process may take to start and exit.
const CHILD_LIMIT: Duration = Duration::from_secs(10);

/// Probes the resources that a local program needs.
#[derive(Default)]
pub(crate) struct Prober {
    /// A disk probe that has not returned, and its start.
    pending: Option<(JoinHandle<Option<Shortage>>, Instant)>,
}

impl Prober {
    /// Returns the shortage of the machine for a program below this root that runs as this user. Starts a child process
    /// only with `with_child`.
    pub(crate) async fn probe(&mut self, root: &Path, user: Option<&User>, with_child: bool) -> Option<Shortage> {
        // Memory comes before threads: without it a new thread may abort the program instead of failing.
        if let Some(shortage) = open_files().or_else(memory).or_else(threads) {
            return Some(shortage);
        }
        match self.disk(root).await {
            Some(shortage) => Some(shortage),
            None if with_child => child(root, user.map(|user| &user.ids)).await,
            None => None,
        }
    }

    /// Writes a small file on another thread, since a disk may hang.
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
        let folder = root.display();
        match found {
            Ok(found) => found.ok().flatten().or_else(|| {
                (took >= SLOW_AFTER).then(|| Shortage {
                    lack: Lack::SlowDisk,
                    text: format!("a write of 4 KiB below {folder} took {} s", took.as_secs()),
                })
            }),
            Err(_) => {
                self.pending = Some((task, began_at));
                let lack = if took >= BROKEN_AFTER { Lack::BrokenDisk } else { Lack::SlowDisk };
                let text = format!("a write of 4 KiB below {folder} has not returned for {} s", took.as_secs());
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
            // The thread does nothing and cannot panic.
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

/// Makes the root if it is missing, checks its free space, and writes a small file.
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
    write_probe(&path).err().map(|error| below_root(&path, &error))
}

fn too_little_free(root: &Path, status: &StatVfs) -> Option<Shortage> {
    let folder = root.display();
    if status.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Some(Shortage { lack: Lack::ReadOnlyDisk, text: format!("the file system of {folder} is read-only") });
    }
    let (free, total) = (status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize);
    if total > 0 && free < FREE_BYTES_MIN.min(total / FREE_PART) {
        let text = format!("{} of {} KiB are free on the file system of {folder}", free >> 10, total >> 10);
        return Some(Shortage { lack: Lack::Disk, text });
    }
    // Some file systems report no inodes.
    let (free, total) = (status.f_favail, status.f_files);
    if total > 0 && free < FREE_INODES_MIN.min(total / FREE_PART) {
        let text = format!("{free} of {total} inodes are free on the file system of {folder}");
        return Some(Shortage { lack: Lack::Inodes, text });
    }
    None
}

/// Starts a child that does what a shim does at its start, as the user of the programs: quotas and limits apply to users.
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
            // The runtime reaps it.
            let _ = child.start_kill();
            let text = format!("a process that does nothing has not ended for {} s", CHILD_LIMIT.as_secs());
            Some(Shortage { lack: Lack::Children, text })
        }
    }
}

fn child_command(root: &Path, ids: Option<&Ids>) -> Command {
    let plain = || {
        let mut command = Command::new(SELF);
        command.args([shim::COMMAND, shim::PROBE]).env_clear();
        command
    };
    let mut command = ids.map_or_else(plain, |ids| ids.probe(root));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healthy_machine_has_no_shortage() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(disk(&root.path().join("made/below")), None);
        assert_eq!(open_files().or_else(threads).or_else(memory), None);
        assert_eq!(fs::read_dir(root.path().join("made/below")).unwrap().count(), 1, "no probe is left");
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named_in_the_shortage() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let shortage = disk(&root.path().join("file/root")).unwrap();
        assert!(shortage.lack == Lack::Root && shortage.text.contains("file/root"), "{shortage:?}");
    }
}
