//! Sites: places to run programs other than the workers' own machines.
//!
//! Each worker has one loop for each site that its configuration names (`intake::sites`). It keeps the worker's part of the
//! sessions that the fleet may have there (`pool`), looks at the jobs if this worker has the watch (`watch`), and takes up the
//! processes that wait for either. A process uses a session within an advance and never beyond it; when there is none, it
//! parks, and costs nothing.

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
use pool::{Lease, Pool};

pub use at_site::AtSite;
pub(crate) use at_site::Folders;

/// The script of a job as it would be submitted, for people; `PID` and `TRY` stand for what is not known yet.
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

/// Processes that are woken at once when what they wait for is there.
const WOKEN_PAGE: u32 = 1_000;

/// What waits for a site looks again after this time, if nothing wakes it before.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// How long a small command may take at a site.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Most characters that are kept of why a scheduler has refused a job.
const REASON_CHARS_MAX: usize = 500;

/// The sites that a worker serves, by name.
#[derive(Default)]
pub(crate) struct Sites {
    by_name: BTreeMap<String, Arc<Site>>,
    /// Whether their object store is the fleet's.
    pub(crate) sharing: sharing::Sharing,
}

/// A site, as one incarnation of a worker sees it.
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
    /// The site's folder, as the far end writes it.
    root: OnceCell<String>,
    /// The object store knows that this database keeps something there.
    marked: OnceCell<()>,
    /// Files that this worker sends to the site's cache right now.
    sending: Mutex<HashSet<String>>,
    /// There may be something to do for the loop over the site.
    pub(crate) changed: Notify,
}

/// What all sites of a worker use.
pub(crate) struct Common {
    pub(crate) me: Incarnation,
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) queues: Arc<[String]>,
    pub(crate) blocking: Handle,
}

/// Why a process cannot use a site now.
#[derive(Debug)]
pub(crate) enum Closed {
    /// There is no session to be had; wait for one.
    Busy,
    /// The site cannot be reached; what it said is recorded.
    Down(String),
}

/// A session with a site, with one channel of it, until it is dropped.
pub(crate) struct Visit {
    pub(crate) session: Lease,
    /// The site's folder, absolute.
    pub(crate) root: String,
}

impl Sites {
    /// Those of a configuration.
    ///
    /// # Errors
    /// A site names an SSH section that is not there.
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
                        format!(
                            "the site `{name}` is reached by `ssh.{section}`, which the configuration does not have"
                        )
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

    /// Gives back every session.
    pub(crate) async fn close(&self) {
        for site in self.all() {
            site.pool.close().await;
        }
    }
}

impl Site {
    /// A session for an advance, if there is one now.
    ///
    /// # Errors
    /// [`Error::NotNow`], until there is one.
    pub(crate) async fn enter(&self, context: &Context) -> Result<Visit, Error> {
        self.open().await.map_err(|closed| {
            if let Closed::Down(text) = closed {
                context.log(format!("{}: {text}", self.name));
            }
            self.for_slot()
        })
    }

    /// A session, if there is one now.
    ///
    /// # Errors
    /// See [`Closed`].
    pub(crate) async fn open(&self) -> Result<Visit, Closed> {
        let session = self.pool.lease().await?;
        let root = self.root.get_or_try_init(|| self.find_root(&session)).await;
        match root {
            Ok(root) => Ok(Visit { session, root: root.clone() }),
            Err(error) => Err(self.failed(&error).await),
        }
    }

    /// What an advance ends with after this: if the way is at fault, it waits until the site can be reached again.
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

    /// The object store, for what is to be kept there: nobody else's `baton gc` removes it.
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

    /// Makes the site's folder, and says what it is called there.
    async fn find_root(&self, session: &Lease) -> Result<String, transport::Error> {
        let root = quote(self.config.root_from_home());
        let command = format!("umask 077; mkdir -p {root} && cd {root} && pwd -P");
        let stdout = session.exec(&command, b"", COMMAND_LIMIT).await?.ok()?;
        Ok(String::from_utf8_lossy(&stdout).lines().last().unwrap_or_default().to_owned())
    }

    /// Records that the site has failed, if it is the way to it that did.
    pub(crate) async fn failed(&self, error: &transport::Error) -> Closed {
        if matches!(error, transport::Error::NoChannel(_)) {
            // The server allows less than it is said to; the session is well.
            self.pool.narrow();
            return Closed::Busy;
        }
        if error.is_of_transport() {
            self.pool.discard_broken();
        }
        let text = error.to_string();
        debug!(site = self.name, error = text, "the site has failed");
        if let Err(error) = self.store.note_site(&self.name, Some(&text)).await {
            debug!(%error, "the site's failure is not recorded");
        }
        Closed::Down(text)
    }

    /// Begins to send a file, if nobody in the fleet does so.
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

    /// Where the processes stand that wait for a session with this site.
    pub(crate) fn slot(&self) -> String {
        format!("slot/{}", self.name)
    }

    /// Where the processes stand that wait until there is room for a job.
    pub(crate) fn room(&self) -> String {
        format!("room/{}", self.name)
    }

    /// Where a process stands whose job the scheduler does not accept now, with what it said.
    pub(crate) fn refused(&self, reason: &str) -> String {
        let reason: String =
            reason.chars().take(REASON_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{REFUSED}{}/{reason}", self.name)
    }

    pub(crate) fn watch(&self) -> String {
        format!("watch/{}", self.name)
    }
}

/// A file is being sent until this is dropped; then those that wait for it look again.
pub(crate) struct Sending {
    site: Arc<Site>,
    permit: String,
    /// Nobody waits for one who may not send.
    is_permitted: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        let (site, permit) = (Arc::clone(&self.site), std::mem::take(&mut self.permit));
        let is_permitted = self.is_permitted;
        self.site.blocking.spawn(async move {
            // If the database does not answer, this worker still has it, and is the one that sends it.
            let _ = site.store.give_permit(&permit, site.me).await;
            site.sending.lock().unwrap_or_else(PoisonError::into_inner).remove(&permit);
            while is_permitted
                && let Ok(woken) = site.store.wake_waiting(&permit, &site.queues, WOKEN_PAGE).await
                && !woken.is_empty()
            {
                site.outbox.tell_all(woken).await;
            }
        });
    }
}

impl Visit {
    /// The folder of a try: its sandbox.
    pub(crate) fn sandbox(&self, pid: Pid, try_number: i64) -> String {
        format!("{}/p/{pid}/{try_number}", self.root)
    }

    /// Runs a small command.
    ///
    /// # Errors
    /// It could not be run, or not to its end.
    pub(crate) async fn exec(&self, command: &str) -> Result<Output, transport::Error> {
        self.session.exec(command, b"", COMMAND_LIMIT).await
    }

    /// A whole small file; `None` if it is not there.
    ///
    /// # Errors
    /// The site did not answer.
    pub(crate) async fn read(&self, path: &str) -> Result<Option<Vec<u8>>, transport::Error> {
        let path = quote(path);
        let output = self.exec(&format!("[ -e {path} ] || exit 44; cat {path}")).await?;
        if output.exit == Some(44) { Ok(None) } else { output.ok().map(Some) }
    }
}
