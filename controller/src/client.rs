//! The connections to database and broker that the commands share.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use baton_common::communicator::{self, Broker, Communicator, ReplyTo, TaskMessage};
use baton_common::config;
use baton_common::exit;
use baton_common::id::{ParseError, Pid};
use baton_common::message::{Event, Reply, Task};
use baton_common::nearest::nearest;
use baton_common::spec::{self, Format, Spec};
use baton_common::state::Place;
use baton_common::store::control::Controlled;
use baton_common::store::submit::ByQueue;
use baton_common::store::{self, Access, Location, Store};
use baton_worker::cli::{Resolved, host_name};
use baton_worker::worker;

use crate::cli::Global;
use crate::failure::Failure;
use crate::output;

/// How long a command waits for the broker before it continues without it: requests are recorded in the database.
const BROKER_LIMIT: Duration = Duration::from_secs(3);

/// How long a command waits for a connection to a database that has no free one.
const FULL_LIMIT: Duration = Duration::from_secs(30);

/// Pause between two attempts to get a connection.
const FULL_PAUSE: Duration = Duration::from_secs(1);

/// The SQLite file in the home of `baton run`.
pub(crate) const DATABASE_FILE: &str = "baton.db";

/// The folder of objects, in the same folder as the database file.
const OBJECTS_FOLDER: &str = "objects";

/// The database, and the broker if there is one.
pub(crate) struct Client {
    pub(crate) store: Store,
    /// Location of the object store.
    pub(crate) objects: config::Objects,
    broker_urls: Vec<String>,
    communicator: OnceLock<Communicator>,
}

impl Client {
    /// Opens the configured database or, if none is configured, the database of `baton run` in the home.
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let resolved = global.connection.resolve()?;
        let objects = objects_of(global, &resolved)?;
        let location = match resolved.database_url {
            Some(url) => Location::parse(&url)?,
            None => {
                let file = global.home.join(DATABASE_FILE);
                if !file.exists() {
                    return Err(Failure::usage(format!(
                        "no database is configured, and {} does not exist",
                        file.display()
                    ))
                    .with_remedy(
                        "set BATON_DATABASE_URL, `database.url` in baton.toml or --database-url, or use `baton run`",
                    ));
                }
                Location::Sqlite(file)
            }
        };
        let store = open(location).await?;
        // The broker of the fleet carries no messages about processes of an embedded database.
        let broker_urls = if store.is_embedded() { Vec::new() } else { resolved.broker_urls };
        Ok(Self { store, objects, broker_urls, communicator: OnceLock::new() })
    }

    /// Returns the connected broker, or `None` if none is configured.
    ///
    /// # Errors
    /// The reason why the broker cannot be reached.
    pub(crate) async fn broker(&self) -> Result<Option<&Communicator>, String> {
        if self.broker_urls.is_empty() {
            return Ok(None);
        }
        let database = self.store.identity().await.map_err(|error| error.to_string())?;
        // A command that never uses the broker opens no connection.
        let communicator = self.communicator.get_or_init(|| {
            let (communicator, _) = Communicator::start(communicator::Options {
                broker: Broker::Amqp(self.broker_urls.clone()),
                name: "baton".into(),
                control_queue: None,
                heartbeat: None,
                database: Some(database),
            });
            communicator
        });
        let mut health = communicator.watch_health();
        // One failed attempt at each address is enough: an operator should not have to wait for the broker.
        let decided = health.wait_for(|health| health.connected || health.unreachable);
        let decided = tokio::time::timeout(BROKER_LIMIT, decided).await;
        match decided.ok().and_then(Result::ok).map(|health| health.clone()) {
            Some(health) if health.connected => Ok(Some(communicator)),
            Some(health) => Err(health.last_error.unwrap_or_else(|| "the broker is unreachable".to_owned())),
            None => Err(format!("the broker did not answer within {} s", BROKER_LIMIT.as_secs())),
        }
    }

    /// Returns the broker if it is configured and answers; otherwise prints a warning. For commands whose requests are
    /// recorded in the database.
    pub(crate) async fn broker_or_warning(&self) -> Option<&Communicator> {
        match self.broker().await {
            Ok(broker) => broker,
            Err(reason) => {
                output::warn(&format!(
                    "the request is recorded, but workers were not notified ({reason}); they apply it at their next heartbeat"
                ));
                None
            }
        }
    }

    /// Frees processes whose holders are gone, so that a request applies to them even when no worker is left.
    pub(crate) async fn free_orphans(&self) -> Result<(), Failure> {
        loop {
            let freed = self.store.free().await?;
            if freed.count() == 0 {
                return Ok(());
            }
            if let Err(reason) = self.publish(&freed.queued, false).await {
                output::warn(&format!(
                    "freed processes were not announced ({reason}); workers find them in the database"
                ));
            }
        }
    }

    /// Waits for `waiting`, and meanwhile frees processes of dead workers, in case no other worker is left to do so.
    pub(crate) async fn while_watching<T>(&self, waiting: impl Future<Output = T>) -> T {
        let watching = worker::watch(&self.store, async || {
            // If the database does not answer, `waiting` fails.
            let _ = self.free_orphans().await;
        });
        tokio::select! {
            done = waiting => done,
            never = watching => match never {},
        }
    }

    /// Completes requests that were applied in the database: announces queued processes, publishes events, and replies.
    pub(crate) async fn follow(&self, rows: &[Controlled]) {
        let mut queued = ByQueue::new();
        for (queue, told) in rows.iter().filter_map(|row| row.announced.clone()) {
            queued.entry(queue).or_default().push(told);
        }
        // A warning about the broker was printed before, and workers find queued processes in the database.
        let _ = self.publish(&queued, false).await;
        let Ok(Some(communicator)) = self.broker().await else { return };
        let at = chrono::Utc::now().timestamp_micros();
        for row in rows.iter().filter(|row| row.place != Place::Held) {
            let state = row.state.word().to_owned();
            communicator.announce(Event { pid: row.pid, state: state.clone(), at, by: whoami(), exit: None });
            if let Some(to) = row.reply_to.as_deref().and_then(ReplyTo::from_bytes) {
                let reply = Reply { pid: Some(row.pid), state: Some(state), ..Reply::default() };
                // The row decides; the reply only reports.
                let _ = communicator.reply(&to, &reply).await;
            }
        }
    }

    /// Publishes the messages of queued rows. Workers find rows without a message in the database.
    pub(crate) async fn publish(&self, queued: &ByQueue, is_launch: bool) -> Result<(), String> {
        if queued.is_empty() {
            return Ok(());
        }
        let Some(communicator) = self.broker().await? else { return Ok(()) };
        for (queue, rows) in queued {
            let tasks = rows
                .iter()
                .map(|row| {
                    let (pid, announced_at) = (row.pid, Some(row.announced_at));
                    let task = if is_launch {
                        Task::Launch { pid, spec: None, wait: false, announced_at }
                    } else {
                        Task::Continue { pid, announced_at }
                    };
                    TaskMessage { task, traceparent: row.traceparent.clone() }
                })
                .collect();
            communicator.publish(queue, tasks).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Closes the connections.
    pub(crate) async fn close(&self) {
        if let Some(communicator) = self.communicator.get() {
            communicator.shutdown().await;
        }
    }
}

/// Returns the location of the object store: next to an embedded database, or as configured.
pub(crate) fn objects_of(global: &Global, resolved: &Resolved) -> Result<config::Objects, Failure> {
    match resolved.database_url.as_deref().map(Location::parse).transpose()? {
        None => Ok(objects_beside(&global.home)),
        Some(Location::Sqlite(file)) => Ok(objects_beside(file.parent().unwrap_or(Path::new("")))),
        Some(Location::Postgres(_)) => Ok(resolved.objects.clone()),
    }
}

/// Returns the location of the object store of an embedded database in this folder. The configured store belongs to a
/// fleet, whose database does not know these processes.
pub(crate) fn objects_beside(folder: &Path) -> config::Objects {
    config::Objects { url: Some(folder.join(OBJECTS_FOLDER).display().to_string()), ..config::Objects::default() }
}

/// A spec, and the folder that `client://` refers to.
pub(crate) struct Document {
    pub(crate) spec: Spec,
    pub(crate) folder: PathBuf,
}

/// Reads a spec from a file, or from standard input.
pub(crate) fn read_spec(path: &Path) -> Result<Document, Failure> {
    let mut text = String::new();
    let (format, folder) = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)?;
        (Format::Yaml, Path::new(""))
    } else {
        text = std::fs::read_to_string(path).map_err(|error| {
            let code = if error.kind() == std::io::ErrorKind::NotFound { exit::NOT_FOUND } else { exit::USAGE };
            Failure::new(code, format!("cannot read {}: {error}", path.display()))
        })?;
        (Format::of_path(path), path.parent().unwrap_or(Path::new("")))
    };
    let spec = spec::parse(&text, format).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    Ok(Document { spec, folder: Path::new(".").join(folder) })
}

/// Checks that the configuration has the site of the spec. A configuration without sites is not checked.
pub(crate) fn check_site(spec: &Spec, sites: &BTreeMap<String, config::Site>) -> Result<(), Failure> {
    let Some(on_site) = spec.on_site.as_ref().filter(|on_site| !sites.is_empty() && !sites.contains_key(&on_site.at))
    else {
        return Ok(());
    };
    let known = || sites.keys().map(String::as_str);
    let remedy = match nearest(&on_site.at, known()) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("configured sites: {}", known().collect::<Vec<_>>().join(", ")),
    };
    Err(Failure::usage(format!("`at`: unknown site `{}`", on_site.at)).with_remedy(remedy))
}

/// Database access of a command. With more than one connection, the pool would try to open a second one while the first is
/// being returned, and fail on a server that has none left.
pub(crate) fn one_connection() -> Access {
    Access { name: "baton".to_owned(), pool: 1 }
}

/// Opens the database, and waits up to [`FULL_LIMIT`] for a free connection.
async fn open(location: Location) -> Result<Store, Failure> {
    let since = Instant::now();
    let mut has_said = false;
    loop {
        match Store::open_as(location.clone(), one_connection()).await {
            Err(error @ store::Error::Full(_)) if since.elapsed() < FULL_LIMIT => {
                if !std::mem::replace(&mut has_said, true) {
                    output::note(&format!("{error}; waiting up to {} s for a connection", FULL_LIMIT.as_secs()));
                }
                tokio::time::sleep(FULL_PAUSE).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// Parses the ids of a command line. `-` stands for the ids on standard input, separated by white space.
pub(crate) fn read_ids<Id: FromStr<Err = ParseError>>(arguments: &[String]) -> Result<Vec<Id>, Failure> {
    let mut ids = Vec::new();
    let mut add = |text: &str| -> Result<(), Failure> {
        ids.push(text.parse().map_err(|error: ParseError| Failure::usage(error.to_string()))?);
        Ok(())
    };
    for argument in arguments {
        if argument == "-" {
            for line in std::io::stdin().lock().lines() {
                line?.split_whitespace().try_for_each(&mut add)?;
            }
        } else {
            add(argument)?;
        }
    }
    Ok(ids)
}

/// Returns `USER@HOST`, for the history of a process.
pub(crate) fn whoami() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "unknown".into());
    format!("{user}@{}", host_name())
}

/// Returns the failure for a process that does not exist.
pub(crate) fn absent(pid: Pid) -> Failure {
    Failure::new(exit::NOT_FOUND, format!("there is no process {pid}"))
        .with_remedy("`baton list` shows the existing processes")
}
