//! The user as whom local programs run, where that is another one than the worker's.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::unistd::{self, Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::local;
use crate::shim;

/// A user of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its home folder.
    pub home: PathBuf,
    /// What the system knows it by.
    pub ids: Ids,
}

/// The numbers of a user and of its groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// The user.
    pub uid: u32,
    /// Its own group.
    pub gid: u32,
    /// All of its groups.
    pub groups: Vec<u32>,
}

/// Why programs cannot be run as a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system knows no such user. Correct the name.
    #[error("there is no user `{0}` on this machine")]
    Unknown(String),
    /// Only root may do that. Start the worker as root, or without a user.
    #[error("programs can run as `{name}` only if the worker runs as root, and it runs as uid {uid}")]
    NotRoot {
        /// The user.
        name: String,
        /// Who the worker is.
        uid: u32,
    },
    /// The user cannot be taken on, or cannot enter the folder of the sandboxes.
    #[error("a program that runs as `{name}` could not enter {}", .folder.display())]
    Refused {
        /// The user.
        name: String,
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The system does not answer.
    #[error("could not look up the user `{name}`")]
    Lookup {
        /// The user.
        name: String,
        /// What the system says.
        source: io::Error,
    },
}

impl User {
    /// Looks a user up by its name or its number.
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

    /// Whether programs can run as this user below a folder, which is made if it is absent.
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
        let ids = serde_json::to_string(&self.ids).map_err(|error| refused(error.into()))?;
        let status = Command::new(local::SELF)
            .args([shim::COMMAND, shim::USER, &ids])
            .arg(&folder)
            .env_clear()
            .status()
            .map_err(refused)?;
        match status.code() {
            Some(0) => Ok(()),
            Some(code) => Err(refused(io::Error::from_raw_os_error(code))),
            None => Err(refused(io::Error::other(format!("the attempt ended by {status}")))),
        }
    }
}

impl Ids {
    /// Becomes this user, for good.
    pub(crate) fn take_on(&self) -> io::Result<()> {
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        unistd::setgroups(&groups)?;
        unistd::setgid(Gid::from_raw(self.gid))?;
        unistd::setuid(Uid::from_raw(self.uid))?;
        Ok(())
    }
}

/// Takes a user on and enters a folder, and exits with the operating system's number of a failure.
pub(crate) fn try_out(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let (ids, folder) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
    let attempt = || -> io::Result<()> {
        let ids: Ids = serde_json::from_str(&ids)?;
        ids.take_on()?;
        std::env::set_current_dir(folder)
    };
    let code = attempt().err().map_or(0, |error| error.raw_os_error().unwrap_or(1));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
