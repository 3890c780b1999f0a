//! The directory in which one try of a local program runs.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use baton_common::id::Pid;

use super::Error;

/// The directory inside a sandbox that holds Baton's own files.
const OWN: &str = ".baton";

/// The directory in which one try of a process runs, under one epoch: a worker that has lost its lease and one that has
/// taken it over never share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    path: PathBuf,
    pid: Pid,
    try_number: i32,
}

impl Sandbox {
    /// Makes `<root>/sandbox/<pid>/<try>.<epoch>`, which only its user can enter. If it exists, it is taken as it is.
    ///
    /// # Errors
    /// [`Error::Sandbox`] with the directory that could not be made.
    pub fn create(root: &Path, pid: Pid, try_number: i32, epoch: i64) -> Result<Self, Error> {
        let failed = |path: &Path, source| Error::Sandbox { path: path.to_owned(), source };
        let root = std::path::absolute(root).map_err(|source| failed(root, source))?;
        let path = root.join("sandbox").join(pid.to_string()).join(format!("{try_number}.{epoch}"));
        let own = path.join(OWN);
        DirBuilder::new().recursive(true).mode(0o700).create(&own).map_err(|source| failed(&own, source))?;
        Ok(Self { path, pid, try_number })
    }

    /// The program's working directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that the program's standard output goes to.
    pub fn stdout(&self) -> PathBuf {
        self.path.join(OWN).join("stdout")
    }

    /// The file that the program's standard error goes to.
    pub fn stderr(&self) -> PathBuf {
        self.path.join(OWN).join("stderr")
    }

    /// The file that says how the program ended, a [`crate::shim::wire::Ended`] as JSON; absent before.
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

    /// Writes a script into the sandbox and gives back the command that runs it.
    pub(super) fn write_script(&self, text: &str) -> Result<Vec<String>, Error> {
        let path = self.path.join(OWN).join("script");
        let has_interpreter = text.starts_with("#!");
        let mode = if has_interpreter { 0o700 } else { 0o600 };
        let write = || -> io::Result<()> {
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        write().map_err(|source| Error::Sandbox { path: path.clone(), source })?;
        let script = path.to_string_lossy().into_owned();
        Ok(if has_interpreter { vec![script] } else { vec!["/bin/sh".to_owned(), script] })
    }
}

/// The variable that is different for each sandbox, and by which a program is found when its shim was killed.
pub(super) const MARK: &str = "BATON_SANDBOX";
