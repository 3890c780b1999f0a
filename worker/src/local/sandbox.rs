//! The directory in which one try of a local program runs.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_common::id::Pid;

use super::Error;
use crate::local::shim::wire::Script;
use crate::local::user::User;

/// The directory in a sandbox for Baton's own files.
const OWN: &str = ".baton";

/// The directory below the root for all sandboxes.
pub(crate) const FOLDER: &str = "sandbox";

/// The mode of the directories above another user's sandbox: others may enter but not list them.
const ENTERABLE: u32 = 0o711;

/// The directory in which one try of a process runs, under one epoch: a worker that has lost the lease and its successor
/// never share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    path: PathBuf,
    pid: Pid,
    try_number: i32,
    /// Shared, since each held process keeps its sandbox.
    user: Option<Arc<User>>,
}

impl Sandbox {
    /// Makes `<root>/sandbox/<pid>/<try>.<epoch>`, which only its user can enter. An existing one is used unchanged.
    ///
    /// # Errors
    /// [`Error::Sandbox`] with the directory that could not be made.
    pub fn create(root: &Path, pid: Pid, try_number: i32, epoch: i64) -> Result<Self, Error> {
        let failed = |path: &Path, source| Error::Sandbox { path: path.to_owned(), source };
        let root = std::path::absolute(root).map_err(|source| failed(root, source))?;
        let path = root.join(FOLDER).join(pid.to_string()).join(format!("{try_number}.{epoch}"));
        let own = path.join(OWN);
        DirBuilder::new().recursive(true).mode(0o700).create(&own).map_err(|source| failed(&own, source))?;
        Ok(Self { path, pid, try_number, user: None })
    }

    /// Makes a sandbox that belongs to another user, for a program that runs as that user.
    ///
    /// # Errors
    /// [`Error::Sandbox`] with the directory that could not be made.
    pub fn create_for(user: Arc<User>, root: &Path, pid: Pid, try_number: i32, epoch: i64) -> Result<Self, Error> {
        let failed = |path: &Path, source| Error::Sandbox { path: path.to_owned(), source };
        let root = std::path::absolute(root).map_err(|source| failed(root, source))?;
        let of_process = root.join(FOLDER).join(pid.to_string());
        let path = of_process.join(format!("{try_number}.{epoch}"));
        let own = path.join(OWN);
        let make = || -> io::Result<()> {
            make_enterable(&root)?;
            DirBuilder::new().recursive(true).mode(ENTERABLE).create(&of_process)?;
            match DirBuilder::new().mode(0o700).create(&path) {
                // It was made under this lease. Root does not touch what its user changed since.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
                made => made?,
            }
            DirBuilder::new().mode(0o700).create(&own)?;
            // The inner directory first: the user could replace it by a link once the outer one is theirs.
            chown(&own, Some(user.ids.uid), Some(user.ids.gid))?;
            chown(&path, Some(user.ids.uid), Some(user.ids.gid))
        };
        make().map_err(|source| failed(&own, source))?;
        Ok(Self { path, pid, try_number, user: Some(user) })
    }

    /// The user of its program, if it is not the worker's own.
    pub fn user(&self) -> Option<&User> {
        self.user.as_deref()
    }

    /// The program's working directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file for the program's standard output.
    pub fn stdout(&self) -> PathBuf {
        self.path.join(OWN).join("stdout")
    }

    /// The file for the program's standard error.
    pub fn stderr(&self) -> PathBuf {
        self.path.join(OWN).join("stderr")
    }

    /// The file for how the program ended, a [`shim::wire::Ended`](super::shim::wire::Ended) as JSON; missing until then.
    pub fn done(&self) -> PathBuf {
        self.path.join(OWN).join("done.json")
    }

    /// Baton's variables in the program's environment.
    pub(super) fn variables(&self) -> [(String, String); 3] {
        [
            ("BATON_PID".to_owned(), self.pid.to_string()),
            ("BATON_TRY".to_owned(), self.try_number.to_string()),
            (MARK.to_owned(), self.path.to_string_lossy().into_owned()),
        ]
    }

    /// The script file of the sandbox and the command that runs it.
    pub(super) fn script(&self, text: String) -> (Script, Vec<String>) {
        let path = self.path.join(OWN).join("script");
        let name = path.to_string_lossy().into_owned();
        let is_executable = text.starts_with("#!");
        let argv = if is_executable { vec![name] } else { vec!["/bin/sh".to_owned(), name] };
        (Script { path, text, is_executable }, argv)
    }
}

/// Makes the directory of all sandboxes so that other users may enter it.
pub(crate) fn make_enterable(root: &Path) -> io::Result<()> {
    let folder = root.join(FOLDER);
    DirBuilder::new().recursive(true).mode(ENTERABLE).create(&folder)?;
    let mut permissions = fs::metadata(&folder)?.permissions();
    if permissions.mode() & 0o777 != ENTERABLE {
        permissions.set_mode(ENTERABLE);
        fs::set_permissions(&folder, permissions)?;
    }
    Ok(())
}

/// The variable that is unique for each sandbox. It identifies the processes of a program whose shim was killed.
pub(crate) const MARK: &str = "BATON_SANDBOX";
