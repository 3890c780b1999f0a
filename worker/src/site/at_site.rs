//! What a process can do at a site: commands and files, in the middle of an advance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::digest::Digest;

use super::{COMMAND_LIMIT, LOOK_AGAIN, Site, Sites, Visit};
use crate::author::process::{Context, Error, Wait};
use crate::transport::{self, Output, Session, quote};

/// How long a site that is well may take to answer anything.
const PING_LIMIT: Duration = Duration::from_secs(10);

impl Context {
    /// Opens a session with a site of the worker's configuration. Dropping the [`AtSite`] returns the session. Call this at
    /// the beginning of an advance: when there is no session, `?` ends the advance, and the worker repeats it when there is.
    ///
    /// In a test with [`testing`](crate::testing), a site is a local folder.
    ///
    /// # Errors
    /// [`Error::NotNow`] when there is no session at the moment, [`Error::Failed`] when the worker has no such site.
    pub async fn site(&self, name: &str) -> Result<AtSite<'_>, Error> {
        AtSite::enter(self, name).await
    }
}

/// A session with a site, for commands and files. Relative paths begin at the folder of the process's try at the site.
/// Baton makes this folder and uses it for nothing else.
///
/// When the site cannot be reached, every method returns [`Error::NotNow`]. Pass it on with `?`: the process is parked, and
/// the whole advance is repeated when the site is back. Everything that an advance does at a site must therefore be
/// repeatable.
pub struct AtSite<'a> {
    context: &'a Context,
    way: Way,
    folder: String,
}

/// How the site is reached.
enum Way {
    /// Through the sessions of the worker.
    Worker { site: Arc<Site>, visit: Visit },
    /// A folder of this machine that is the site in a test.
    Folder { name: String, session: Session },
}

/// The sites of a process in the test kit.
#[derive(Default)]
pub(crate) struct Folders {
    by_name: Mutex<BTreeMap<String, Folder>>,
}

#[derive(Clone)]
struct Folder {
    path: PathBuf,
    is_up: bool,
}

impl Folders {
    /// Makes a folder a site.
    pub(crate) fn add(&self, name: String, path: PathBuf) {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        by_name.insert(name, Folder { path, is_up: true });
    }

    /// Says whether a site can be reached; returns `false` when there is no such site.
    pub(crate) fn set_up(&self, name: &str, is_up: bool) -> bool {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        by_name.get_mut(name).map(|folder| folder.is_up = is_up).is_some()
    }

    fn get(&self, name: &str) -> Option<Folder> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

impl<'a> AtSite<'a> {
    pub(crate) async fn enter(context: &'a Context, name: &str) -> Result<Self, Error> {
        let sites = &context.facilities.sites;
        let at = match sites.downcast_ref::<Folders>() {
            Some(folders) => Self::enter_folder(context, folders, name)?,
            None => {
                let sites = sites.downcast_ref::<Sites>().expect("an incarnation puts its sites there");
                Self::enter_site(context, sites, name).await?
            }
        };
        at.exec("true", b"", COMMAND_LIMIT).await?;
        Ok(at)
    }

    async fn enter_site(context: &'a Context, sites: &Sites, name: &str) -> Result<Self, Error> {
        let site = sites.get(name).ok_or_else(|| {
            Error::Failed(format!("this worker has no site `{name}`; sites stand in its configuration as [sites.NAME]"))
        })?;
        let visit = site.enter(context).await?;
        let folder = visit.sandbox(context.pid(), context.try_number());
        Ok(AtSite { context, way: Way::Worker { site, visit }, folder })
    }

    fn enter_folder(context: &'a Context, folders: &Folders, name: &str) -> Result<Self, Error> {
        let Some(Folder { path, is_up }) = folders.get(name) else {
            return Err(Error::Failed(format!("this test has no site `{name}`; add it with `Harness::add_site`")));
        };
        if !is_up {
            return Err(Error::NotNow(Wait::pause(LOOK_AGAIN)));
        }
        let folder = format!("{}/p/{}/{}", path.display(), context.pid(), context.try_number());
        let way = Way::Folder { name: name.to_owned(), session: Session::local() };
        Ok(AtSite { context, way, folder })
    }

    /// The absolute path of the folder of the process's try at the site.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Runs a command of the POSIX shell with these bytes as its standard input. It may write 16 MiB to each of its outputs.
    /// A command that exits with another code than 0 is no error; see [`Output::ok`].
    ///
    /// # Errors
    /// [`Error::NotNow`] when the site cannot be reached, [`Error::Failed`] when the command exceeds the limit or writes
    /// too much.
    ///
    /// # Cancel safety
    /// Dropping the future kills the command if the server supports that.
    pub async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output, Error> {
        let _busy = self.context.facilities.clock.hold();
        let folder = quote(&self.folder);
        let command = format!("mkdir -p {folder} && cd {folder} || exit 1\n{command}");
        let session = self.session();
        match session.exec(&command, stdin, limit).await {
            // If the site still answers, the command itself took too long.
            Err(error @ transport::Error::TimedOut { .. }) if session.ping(PING_LIMIT).await.is_ok() => {
                Err(Error::failed(error))
            }
            output => self.checked(output).await,
        }
    }

    /// Sends one file into an existing folder. The file appears under its name only when it is complete and its SHA-256
    /// matches.
    ///
    /// # Errors
    /// [`Error::NotNow`] when the site cannot be reached, [`Error::Failed`] when a file cannot be read or written or when
    /// its content has changed on the way.
    ///
    /// # Cancel safety
    /// Dropping the future leaves a part of the file under a temporary name; the next call resumes from it.
    pub async fn put(&self, from: &Path, to: &str) -> Result<(), Error> {
        let _busy = self.context.facilities.clock.hold();
        let to = self.path(to);
        let path = from.to_owned();
        let (digest, _) = self.context.blocking(move || Digest::of_file(&path)).await??;
        let coming = transport::beside(Path::new(&to), &digest).display().to_string();
        if self.checked(self.session().put(from, &coming, &|_| ()).await).await? != digest {
            return Err(different(&coming));
        }
        let command = format!("mv -fT {} {}", quote(&coming), quote(&to));
        let moved = self.session().exec(&command, b"", COMMAND_LIMIT).await;
        self.checked(moved.and_then(Output::ok)).await.map(drop)
    }

    /// Fetches one file into an existing folder, with the same guarantees as [`Self::put`].
    ///
    /// # Errors
    /// As [`Self::put`].
    ///
    /// # Cancel safety
    /// As [`Self::put`].
    pub async fn get(&self, from: &str, to: &Path) -> Result<(), Error> {
        let _busy = self.context.facilities.clock.hold();
        let from = self.path(from);
        let digest = self.checked(self.session().digest(&from).await).await?;
        let coming = transport::beside(to, &digest);
        if self.checked(self.session().get(&from, &coming, &|_| ()).await).await? != digest {
            return Err(different(&from));
        }
        Ok(std::fs::rename(coming, to)?)
    }

    fn path(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.folder) }
    }

    fn session(&self) -> &Session {
        match &self.way {
            Way::Worker { visit, .. } => &visit.session,
            Way::Folder { session, .. } => session,
        }
    }

    /// Turns an error of the transport into what the advance ends with.
    async fn checked<T>(&self, result: Result<T, transport::Error>) -> Result<T, Error> {
        match (result, &self.way) {
            (Ok(value), _) => Ok(value),
            (Err(error), Way::Worker { site, .. }) => Err(site.trouble(self.context, &error).await),
            (Err(error), Way::Folder { name, .. }) => Err(Error::Failed(format!("{name}: {error}"))),
        }
    }
}

fn different(path: &str) -> Error {
    Error::Failed(format!("{path} has another content here than at the site"))
}

impl Drop for AtSite<'_> {
    fn drop(&mut self) {
        if let Way::Worker { site, .. } = &self.way {
            // Another process may wait for the channel of this session.
            site.changed.notify_one();
        }
    }
}
