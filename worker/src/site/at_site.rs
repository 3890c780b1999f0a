//! What a process's author can do at a site.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_common::digest::Digest;

use super::{Site, Sites, Visit};
use crate::author::process::{Context, Error};
use crate::transport::{self, Output, quote};

/// How long a site that is well may take to answer anything.
const PING_LIMIT: Duration = Duration::from_secs(10);

impl Context {
    /// A session with a site of the worker's configuration, until it is dropped. Ask for it at the beginning of an advance:
    /// when there is none, `?` ends this one, and it is made when there is.
    ///
    /// # Errors
    /// [`Error::NotNow`], or [`Error::Failed`] when the worker has no such site.
    pub async fn site(&self, name: &str) -> Result<AtSite<'_>, Error> {
        AtSite::enter(self, name).await
    }
}

/// Commands and files at a site, in the middle of an advance. All paths begin at the folder of the process's try there,
/// which is made; nothing else of Baton uses it for such a process.
///
/// When the site fails, whatever is asked of it ends in [`Error::NotNow`]: hand it on, and the advance is made again when
/// the site is back. So what an advance does there must bear to be done twice.
pub struct AtSite<'a> {
    context: &'a Context,
    site: Arc<Site>,
    visit: Visit,
    folder: String,
}

impl<'a> AtSite<'a> {
    pub(crate) async fn enter(context: &'a Context, name: &str) -> Result<Self, Error> {
        let sites = context.facilities.sites.downcast_ref::<Sites>().expect("an incarnation puts its sites there");
        let site = sites.get(name).ok_or_else(|| {
            Error::Failed(format!("this worker has no site `{name}`; sites stand in its configuration as [sites.NAME]"))
        })?;
        let visit = site.enter(context).await?;
        let folder = visit.sandbox(context.pid(), context.try_number());
        let at = AtSite { context, site, visit, folder };
        at.exec("true", b"", super::COMMAND_LIMIT).await?;
        Ok(at)
    }

    /// The folder of the process's try there, absolute.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Runs a command of the POSIX shell, with these bytes as its standard input; it may write 16 MiB to each of its
    /// outputs. That it fails is no error here: see [`Output::ok`].
    ///
    /// # Errors
    /// [`Error::NotNow`]; [`Error::Failed`] when it outlives the limit or writes too much.
    ///
    /// # Cancel safety
    /// A command whose future is dropped is killed where the server can do that.
    pub async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<Output, Error> {
        let folder = quote(&self.folder);
        let command = format!("mkdir -p {folder} && cd {folder} || exit 1\n{command}");
        match self.visit.session.exec(&command, stdin, limit).await {
            // Only if the way is well was it the command that took too long.
            Err(error @ transport::Error::TimedOut { .. }) if self.visit.session.ping(PING_LIMIT).await.is_ok() => {
                Err(Error::failed(error))
            }
            output => self.way(output).await,
        }
    }

    /// Sends one file, in a folder that is there; it has its name only when it is whole, and its SHA-256 is compared.
    ///
    /// # Errors
    /// [`Error::NotNow`]; [`Error::Failed`] when one of the two files cannot be, or when it arrives with another content.
    pub async fn put(&self, from: &Path, to: &str) -> Result<(), Error> {
        let to = self.path(to);
        let path = from.to_owned();
        let (digest, _) = self.context.blocking(move || Digest::of_file(&path)).await??;
        let coming = transport::beside(Path::new(&to), &digest).display().to_string();
        if self.way(self.visit.session.put(from, &coming, &|_| ()).await).await? != digest {
            return Err(different(&coming));
        }
        let moved = self.visit.exec(&format!("mv -fT {} {}", quote(&coming), quote(&to))).await;
        self.way(moved.and_then(Output::ok)).await.map(drop)
    }

    /// Fetches one file, as [`Self::put`] sends one.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub async fn get(&self, from: &str, to: &Path) -> Result<(), Error> {
        let from = self.path(from);
        let digest = self.way(self.visit.session.digest(&from).await).await?;
        let coming = transport::beside(to, &digest);
        if self.way(self.visit.session.get(&from, &coming, &|_| ()).await).await? != digest {
            return Err(different(&from));
        }
        Ok(std::fs::rename(coming, to)?)
    }

    fn path(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.folder) }
    }

    async fn way<T>(&self, result: Result<T, transport::Error>) -> Result<T, Error> {
        match result {
            Ok(value) => Ok(value),
            Err(error) => Err(self.site.trouble(self.context, &error).await),
        }
    }
}

fn different(path: &str) -> Error {
    Error::Failed(format!("{path} has another content here than there"))
}

impl Drop for AtSite<'_> {
    fn drop(&mut self) {
        // Others may wait for its channel.
        self.site.changed.notify_one();
    }
}
