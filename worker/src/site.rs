//! Sites: machines and clusters where programs run, other than the workers' own machines.
//!
//! A worker has one loop for each site in its configuration (`intake::sites`). The loop maintains the worker's share of
//! the fleet's sessions with the site (`pool`), looks at the jobs if this worker has the watch (`watch`), and claims the
//! processes that wait for a session or for room. A process uses a session only within an advance; if none is free, it
//! parks, which costs nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_common::config;
use baton_common::id::{Incarnation, Pid};
use baton_common::objects::Objects;
use baton_common::spec::Spec;
use baton_common::store::site::REFUSED;
use baton_common::store::{self, Store};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OnceCell};
use tracing::debug;

use crate::author::process::{Context, Error, Wait};
use crate::outbox::Outbox;
use crate::transport::{self, Output, quote};

mod at_site;
pub(crate) mod launcher;
pub(crate) mod pool;
pub(crate) mod script;
pub(crate) mod sharing;
pub(crate) mod staging;
pub(crate) mod watch;

use launcher::Launcher;
use pool::{Channel, Pool};

pub use at_site::AtSite;
pub(crate) use at_site::Folders;

/// The script of a job as it would be submitted, for people; `PID` and `TRY` are placeholders.
pub fn job_script(spec: &Spec, site: &config::Site) -> String {
    let on_site = spec.on_site.clone().unwrap_or_default();
    let dir = format!("{}/p/PID/TRY", site.root);
    let launcher = launcher::of(site.launcher);
    let script = script::Script {
        spec,
        on_site: &on_site,
        site,
        launcher,
        dir: &dir,
        token: "baton-PID-TRY",
        pid: "PID",
        try_number: "TRY",
    };
    script.text()
}

/// Processes that are woken in one page.
const WOKEN_PAGE: u32 = 1_000;

/// The longest wait of a process for a site, if nothing wakes it before.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// Time limit of a small command at a site.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Most characters of a scheduler's reason for a refusal that are kept.
const REASON_CHARS_MAX: usize = 500;

/// The sites that a worker serves, by name.
#[derive(Default)]
pub(crate) struct Sites {
    by_name: BTreeMap<String, Arc<Site>>,
    /// Whether the fleet's object store can be used.
    pub(crate) sharing: sharing::Sharing,
}

/// A site of one incarnation of a worker.
pub(crate) struct Site {
    pub(crate) name: String,
    pub(crate) config: config::Site,
    pub(crate) launcher: &'static dyn Launcher,
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) me: Incarnation,
    pub(crate) outbox: Arc<Outbox>,
    /// The queues that the worker serves.
    pub(crate) queues: Arc<[String]>,
    blocking: Handle,
    pub(crate) pool: Pool,
    /// The resolved path of the site's folder.
    root: OnceCell<String>,
    /// Set once the object store records this database as an owner.
    marked: OnceCell<()>,
    /// Files that this worker is sending to the site's cache.
    sending: Mutex<HashSet<String>>,
    /// Notified when the loop over the site may have work.
    pub(crate) changed: Notify,
}

/// The parts of a worker that all its sites share.
pub(crate) struct Common {
    pub(crate) me: Incarnation,
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) queues: Arc<[String]>,
    pub(crate) blocking: Handle,
}

/// Why there is no session with a site now.
#[derive(Debug)]
pub(crate) enum Closed {
    /// All sessions are in use.
    Busy,
    /// The site cannot be reached, for this recorded reason.
    Down(String),
}

/// One channel of a session with a site, until it is dropped.
pub(crate) struct Visit {
    pub(crate) session: Channel,
    /// The absolute path of the site's folder.
    pub(crate) root: String,
}

impl Sites {
    /// The sites of a configuration.
    ///
    /// # Errors
    /// A site names a missing SSH section.
    pub(crate) fn new(
        sites: &BTreeMap<String, config::Site>,
        ssh: &BTreeMap<String, config::Ssh>,
        common: &Common,
    ) -> Result<Self, String> {
        let mut by_name = BTreeMap::new();
        for (name, config) in sites {
            let way = match &config.transport {
                config::Transport::Local => None,
                config::Transport::Ssh(section) => {
                    let ssh = ssh.get(section).ok_or_else(|| {
                        format!("the site `{name}` uses `ssh.{section}`, which is missing in the configuration")
                    })?;
                    Some(ssh.clone())
                }
            };
            let site = Site {
                name: name.clone(),
                config: config.clone(),
                launcher: launcher::of(config.launcher),
                store: common.store.clone(),
                objects: common.objects.clone(),
                me: common.me,
                outbox: Arc::clone(&common.outbox),
                queues: Arc::clone(&common.queues),
                blocking: common.blocking.clone(),
                pool: Pool::new(name, way, &common.store, common.me),
                root: OnceCell::new(),
                marked: OnceCell::new(),
                sending: Mutex::default(),
                changed: Notify::new(),
            };
            by_name.insert(name.clone(), Arc::new(site));
        }
        Ok(Self { by_name, sharing: sharing::Sharing::default() })
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Site>> {
        self.by_name.get(name).cloned()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Site>> {
        self.by_name.values()
    }

    /// Closes all sessions.
    pub(crate) async fn close(&self) {
        for site in self.all() {
            site.pool.close().await;
        }
    }
}

impl Site {
    /// Takes a channel for an advance.
    ///
    /// # Errors
    /// [`Error::NotNow`] if none is free.
    pub(crate) async fn enter(&self, context: &Context) -> Result<Visit, Error> {
        self.open().await.map_err(|closed| {
            if let Closed::Down(text) = closed {
                context.log(format!("{}: {text}", self.name));
            }
            self.for_slot()
        })
    }

    /// Takes a channel of a session.
    ///
    /// # Errors
    /// See [`Closed`].
    pub(crate) async fn open(&self) -> Result<Visit, Closed> {
        let session = self.pool.channel().await?;
        let root = self.root.get_or_try_init(|| self.find_root(&session)).await;
        match root {
            Ok(root) => Ok(Visit { session, root: root.clone() }),
            Err(error) => Err(self.failed(&error).await),
        }
    }

    /// The error of an advance after an error of the site. If the transport failed, the process waits for a new session.
    pub(crate) async fn trouble(&self, context: &Context, error: &transport::Error) -> Error {
        let is_full = matches!(error, transport::Error::NoChannel(_));
        if !error.may_pass() {
            return Error::Failed(format!("{}: {error}", self.name));
        }
        if !is_full {
            context.log(format!("{}: {error}", self.name));
        }
        self.failed(error).await;
        self.for_slot()
    }

    /// The object store for objects to be kept: `baton gc` of another database does not remove them.
    ///
    /// # Errors
    /// The database or the store does not answer.
    pub(crate) async fn objects_to_keep(&self) -> Result<&Objects, staging::Error> {
        let mark = async || Ok::<_, staging::Error>(self.objects.add_owner(self.store.identity().await?).await?);
        self.marked.get_or_try_init(mark).await?;
        Ok(&self.objects)
    }

    fn for_slot(&self) -> Error {
        Error::NotNow(Wait { waits_for: self.slot(), at_most: LOOK_AGAIN })
    }

    /// Makes the site's folder and returns its resolved path.
    async fn find_root(&self, session: &Channel) -> Result<String, transport::Error> {
        let root = quote(self.config.root_from_home());
        let command = format!("umask 077; mkdir -p {root} && cd {root} && pwd -P");
        let stdout = session.exec(&command, b"", COMMAND_LIMIT).await?.ok()?;
        Ok(String::from_utf8_lossy(&stdout).lines().last().unwrap_or_default().to_owned())
    }

    /// Records a failure of the transport to the site.
    pub(crate) async fn failed(&self, error: &transport::Error) -> Closed {
        if matches!(error, transport::Error::NoChannel(_)) {
            // The server allows fewer channels than configured; the session still works.
            self.pool.narrow();
            return Closed::Busy;
        }
        if error.is_of_transport() {
            self.pool.discard_broken();
        }
        let text = error.to_string();
        debug!(site = self.name, error = text, "the site failed");
        if let Err(error) = self.store.note_site(&self.name, Some(&text)).await {
            debug!(%error, "the failure of the site could not be recorded");
        }
        Closed::Down(text)
    }

    /// Starts to send a file; `None` if another worker of the fleet is sending it.
    ///
    /// # Errors
    /// The database does not answer.
    pub(crate) async fn begin_sending(self: &Arc<Self>, permit: &str) -> Result<Option<Sending>, store::Error> {
        if !self.sending.lock().unwrap_or_else(PoisonError::into_inner).insert(permit.to_owned()) {
            return Ok(None);
        }
        let mut sending = Sending { site: Arc::clone(self), permit: permit.to_owned(), is_permitted: false };
        sending.is_permitted = self.store.take_permit(permit, self.me).await?;
        Ok(sending.is_permitted.then_some(sending))
    }

    /// The `waits_for` of processes that wait for a session with this site.
    pub(crate) fn slot(&self) -> String {
        format!("slot/{}", self.name)
    }

    /// The `waits_for` of processes that wait for room for a job.
    pub(crate) fn room(&self) -> String {
        format!("room/{}", self.name)
    }

    /// The `waits_for` of a process whose job the scheduler refused for now, with the reason.
    pub(crate) fn refused(&self, reason: &str) -> String {
        let reason: String =
            reason.chars().take(REASON_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{REFUSED}{}/{reason}", self.name)
    }

    /// The name of the permit for the watch.
    pub(crate) fn watch(&self) -> String {
        format!("watch/{}", self.name)
    }
}

/// A file that is being sent. Dropping it wakes the processes that wait for the file.
pub(crate) struct Sending {
    site: Arc<Site>,
    permit: String,
    /// Without the permit no process waits for this worker.
    is_permitted: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        let (site, permit) = (Arc::clone(&self.site), std::mem::take(&mut self.permit));
        let is_permitted = self.is_permitted;
        self.site.blocking.spawn(async move {
            // If the database does not answer, this worker keeps the permit and sends the file later.
            let _ = site.store.give_permit(&permit, site.me).await;
            site.sending.lock().unwrap_or_else(PoisonError::into_inner).remove(&permit);
            while is_permitted
                && let Ok(woken) = site.store.wake_waiting(&permit, &site.queues, WOKEN_PAGE).await
                && !woken.is_empty()
            {
                site.outbox.announce_all(woken).await;
            }
        });
    }
}

impl Visit {
    /// The sandbox of a try.
    pub(crate) fn sandbox(&self, pid: Pid, try_number: i64) -> String {
        format!("{}/p/{pid}/{try_number}", self.root)
    }

    /// Runs a small command.
    ///
    /// # Errors
    /// The command could not be run to its end.
    pub(crate) async fn exec(&self, command: &str) -> Result<Output, transport::Error> {
        self.session.exec(command, b"", COMMAND_LIMIT).await
    }

    /// Reads a small file; `None` if it is missing.
    ///
    /// # Errors
    /// The site did not answer.
    pub(crate) async fn read(&self, path: &str) -> Result<Option<Vec<u8>>, transport::Error> {
        let path = quote(path);
        let output = self.exec(&format!("[ -e {path} ] || exit 44; cat {path}")).await?;
        if output.exit == Some(44) { Ok(None) } else { output.ok().map(Some) }
    }
}
