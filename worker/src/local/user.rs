//! The user of local programs, if it is not the worker's own.

use std::ffi::{CString, OsStr};
use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::unistd::{self, Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::local;
use crate::local::shim::{self, supervise, tree};
use crate::machine::SELF;

/// The action of a child that runs as this user: enter a folder.
const ENTER: &str = "enter";

/// The action: probe the start of a program, in [`PROBES`].
const PROBE: &str = "probe";

/// The action: kill the remaining processes of a program.
const SWEEP: &str = "sweep";

/// The user's folder below the root for the files of probes.
const PROBES: &str = "probe";

/// A user of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its home folder.
    pub home: PathBuf,
    /// Its ids.
    pub ids: Ids,
}

/// The ids of a user and of its groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// The user id.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
}

/// Why programs cannot run as a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user does not exist. Correct the name.
    #[error("there is no user `{0}` on this machine")]
    Unknown(String),
    /// Only root can run programs as another user. Start the worker as root, or without a user.
    #[error("programs can run as `{name}` only if the worker runs as root, and it runs as uid {uid}")]
    NotRoot {
        /// The user.
        name: String,
        /// The worker's user.
        uid: u32,
    },
    /// The worker cannot become the user, or the user cannot enter the folder of the sandboxes.
    #[error("a program that runs as `{name}` could not enter {}", .folder.display())]
    Refused {
        /// The user.
        name: String,
        /// The folder.
        folder: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The user database could not be read.
    #[error("could not look up the user `{name}`")]
    Lookup {
        /// The user.
        name: String,
        /// The error of the system.
        source: io::Error,
    },
}

impl User {
    /// Looks up a user by name or id.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::Lookup`].
    pub fn find(name: &str) -> Result<Self, Error> {
        let failed = |error: nix::Error| Error::Lookup { name: name.to_owned(), source: error.into() };
        let by_name = unistd::User::from_name(name).map_err(failed)?;
        let found = match (by_name, name.parse()) {
            (None, Ok(uid)) => unistd::User::from_uid(Uid::from_raw(uid)).map_err(failed)?,
            (found, _) => found,
        };
        let found = found.ok_or_else(|| Error::Unknown(name.to_owned()))?;
        let login = CString::new(found.name.clone()).map_err(|_| Error::Unknown(name.to_owned()))?;
        let groups = unistd::getgrouplist(&login, found.gid).map_err(failed)?;
        let groups = groups.into_iter().map(Gid::as_raw).collect();
        let ids = Ids { uid: found.uid.as_raw(), gid: found.gid.as_raw(), groups };
        Ok(Self { name: found.name, home: found.dir, ids })
    }

    /// Checks that programs can run as this user below a folder, which is created if it is missing.
    ///
    /// # Errors
    /// [`Error::NotRoot`] or [`Error::Refused`].
    pub fn check(&self, root: &Path) -> Result<(), Error> {
        let uid = unistd::geteuid();
        if !uid.is_root() {
            return Err(Error::NotRoot { name: self.name.clone(), uid: uid.as_raw() });
        }
        let folder = root.join(local::sandbox::FOLDER);
        let refused = |source| Error::Refused { name: self.name.clone(), folder: folder.clone(), source };
        local::sandbox::make_enterable(root).map_err(refused)?;
        let status = self.ids.command(ENTER, folder.as_os_str()).status().map_err(refused)?;
        match status.code() {
            Some(0) => Ok(()),
            Some(code) => Err(refused(io::Error::from_raw_os_error(code))),
            None => Err(refused(io::Error::other(format!("the attempt ended by {status}")))),
        }
    }
}

impl Ids {
    /// The command that probes the start of a program as this user.
    pub(crate) fn probe(&self, root: &Path) -> Command {
        self.command(PROBE, root.as_os_str())
    }

    /// Sends KILL to the remaining processes of this user's program, as [`tree::kill_marked`] does. A child does it as
    /// the user: root in a container may not read the environment of another user's processes.
    ///
    /// # Errors
    /// The child could not be started.
    pub(crate) fn kill_marked(&self, mark: &str) -> io::Result<usize> {
        let output = self.command(SWEEP, OsStr::new(mark)).output()?;
        let count = std::str::from_utf8(&output.stdout).ok().and_then(|text| text.trim().parse().ok());
        count.ok_or_else(|| {
            io::Error::other(format!("a process that runs as uid {} ended by {}", self.uid, output.status))
        })
    }

    /// The command that runs this executable for an action as this user.
    fn command(&self, what: &str, argument: &OsStr) -> Command {
        let ids = serde_json::to_string(self).expect("ids are numbers");
        let mut command = Command::new(SELF);
        command.args([shim::COMMAND, shim::AS, &ids, what]).arg(argument).env_clear();
        command
    }

    /// Becomes this user irrevocably.
    pub(crate) fn take_on(&self) -> io::Result<()> {
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        unistd::setgroups(&groups)?;
        unistd::setgid(Gid::from_raw(self.gid))?;
        unistd::setuid(Uid::from_raw(self.uid))?;
        Ok(())
    }
}

/// Becomes a user, performs an action, and exits with the errno of a failure.
pub(crate) fn act(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut next = || arguments.next().unwrap_or_default();
    let (ids, what, argument) = (next(), next(), next());
    let act = || -> io::Result<()> {
        let ids: Ids = serde_json::from_str(&ids)?;
        let probes = Path::new(&argument).join(PROBES);
        if what == PROBE {
            DirBuilder::new().recursive(true).mode(0o700).create(&probes)?;
            // Only root could replace it by a link.
            chown(&probes, Some(ids.uid), Some(ids.gid))?;
        }
        ids.take_on()?;
        match what.as_str() {
            ENTER => std::env::set_current_dir(&argument),
            PROBE => supervise::try_start(Some(&probes)),
            SWEEP => writeln!(io::stdout(), "{}", tree::kill_marked(local::sandbox::MARK, &argument)),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    };
    shim::exit_code(&act())
}
