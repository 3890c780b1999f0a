//! The ways to database and broker that commands share.

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

/// How long a command waits for the broker before it goes on without: what it asks for is recorded already.
const BROKER_LIMIT: Duration = Duration::from_secs(3);

/// How long a command waits for a connection to a database that has none left.
const FULL_LIMIT: Duration = Duration::from_secs(30);

/// Pause between two attempts to get one.
const FULL_PAUSE: Duration = Duration::from_secs(1);

/// The SQLite file in the home of `baton run`.
pub(crate) const DATABASE_FILE: &str = "baton.db";

/// The folder of objects beside that file.
const OBJECTS_FOLDER: &str = "objects";

/// The database, and the broker if there is one.
pub(crate) struct Client {
    pub(crate) store: Store,
    /// Where the files of its processes are.
    pub(crate) objects: config::Objects,
    broker_urls: Vec<String>,
    communicator: OnceLock<Communicator>,
}

impl Client {
    /// Opens the database that is named, or else the one of `baton run` in the home.
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let resolved = global.connection.resolve()?;
        let objects = objects_of(global, &resolved)?;
        let location = match resolved.database_url {
            Some(url) => Location::parse(&url)?,
            None => {
                let file = global.home.join(DATABASE_FILE);
                if !file.exists() {
                    return Err(Failure::usage(format!(
                        "no database is named, and {} does not exist",
                        file.display()
                    ))
                    .with_remedy(
                        "set BATON_DATABASE_URL, `database.url` in baton.toml or --database-url; or use `baton run`",
                    ));
                }
                Location::Sqlite(file)
            }
        };
        let store = open(location).await?;
        // The fleet's broker carries nothing of an embedded database.
        let broker_urls = if store.is_embedded() { Vec::new() } else { resolved.broker_urls };
        Ok(Self { store, objects, broker_urls, communicator: OnceLock::new() })
    }

    /// The broker, once it is connected; `None` when there is none, or the reason why it cannot be reached.
    pub(crate) async fn broker(&self) -> Result<Option<&Communicator>, String> {
        if self.broker_urls.is_empty() {
            return Ok(None);
        }
        let database = self.store.identity().await.map_err(|error| error.to_string())?;
        // Only a command that has something to say opens connections.
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
        // The first attempt at every address decides: whoever waits for an operator's command does not wait for a broker.
        let decided = health.wait_for(|health| health.connected || health.unreachable);
        let decided = tokio::time::timeout(BROKER_LIMIT, decided).await;
        match decided.ok().and_then(Result::ok).map(|health| health.clone()) {
            Some(health) if health.connected => Ok(Some(communicator)),
            Some(health) => Err(health.last_error.unwrap_or_else(|| "the broker cannot be reached".to_owned())),
            None => Err(format!("the broker does not answer within {} s", BROKER_LIMIT.as_secs())),
        }
    }

    /// The broker, if there is one and it answers; a command whose work is recorded in the database goes on without, and
    /// says so.
    pub(crate) async fn broker_or_warning(&self) -> Option<&Communicator> {
        match self.broker().await {
            Ok(broker) => broker,
            Err(reason) => {
                output::warn(&format!(
                    "nobody can be told ({reason}); what is asked is recorded, and workers obey at their next beat"
                ));
                None
            }
        }
    }

    /// Frees what workers hold that are gone, so that a request finds it in its place even when no worker is left.
    pub(crate) async fn free_orphans(&self) -> Result<(), Failure> {
        loop {
            let freed = self.store.free().await?;
            if freed.count() == 0 {
                return Ok(());
            }
            if let Err(reason) = self.publish(&freed.queued, false).await {
                output::warn(&format!("freed processes were not told ({reason}); workers find them"));
            }
        }
    }

    /// Waits for something that dead workers may hold up: when no worker is left to notice their death, this does.
    pub(crate) async fn while_watching<T>(&self, waiting: impl Future<Output = T>) -> T {
        let watching = worker::watch(&self.store, async || {
            // A database that does not answer shows up in what is waited for.
            let _ = self.free_orphans().await;
        });
        tokio::select! {
            done = waiting => done,
            never = watching => match never {},
        }
    }

    /// Does what follows requests that were applied in the database: tells what is queued now, announces, answers.
    pub(crate) async fn follow(&self, rows: &[Controlled]) {
        let mut queued = ByQueue::new();
        for (queue, told) in rows.iter().filter_map(|row| row.announced.clone()) {
            queued.entry(queue).or_default().push(told);
        }
        // Without a broker this was said before, and workers find what is queued.
        let _ = self.publish(&queued, false).await;
        let Ok(Some(communicator)) = self.broker().await else { return };
        let at = chrono::Utc::now().timestamp_micros();
        for row in rows.iter().filter(|row| row.place != Place::Held) {
            let state = row.state.word().to_owned();
            communicator.announce(Event { pid: row.pid, state: state.clone(), at, by: whoami(), exit: None });
            if let Some(to) = row.reply_to.as_deref().and_then(ReplyTo::from_bytes) {
                let reply = Reply { pid: Some(row.pid), state: Some(state), ..Reply::default() };
                // It is only an answer; the row is what counts.
                let _ = communicator.reply(&to, &reply).await;
            }
        }
    }

    /// Publishes the messages of rows that were queued. What it cannot publish, workers find in the database.
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

/// Where the files of processes are: beside an embedded database, and else in the place that is configured.
pub(crate) fn objects_of(global: &Global, resolved: &Resolved) -> Result<config::Objects, Failure> {
    match resolved.database_url.as_deref().map(Location::parse).transpose()? {
        None => Ok(objects_beside(&global.home)),
        Some(Location::Sqlite(file)) => Ok(objects_beside(file.parent().unwrap_or(Path::new("")))),
        Some(Location::Postgres(_)) => Ok(resolved.objects.clone()),
    }
}

/// Where the files of an embedded database in this folder are. The place that is configured is a fleet's, whose database
/// knows nothing of them.
pub(crate) fn objects_beside(folder: &Path) -> config::Objects {
    config::Objects { url: Some(folder.join(OBJECTS_FOLDER).display().to_string()), ..config::Objects::default() }
}

/// A spec, and the folder that its `client://` stands for.
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

/// That the spec's site is one of those that the configuration has, if it has any.
pub(crate) fn check_site(spec: &Spec, sites: &BTreeMap<String, config::Site>) -> Result<(), Failure> {
    let Some(on_site) = spec.on_site.as_ref().filter(|on_site| !sites.is_empty() && !sites.contains_key(&on_site.at))
    else {
        return Ok(());
    };
    let known = || sites.keys().map(String::as_str);
    let remedy = match nearest(&on_site.at, known()) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("the configuration has {}", known().collect::<Vec<_>>().join(", ")),
    };
    Err(Failure::usage(format!("`at`: the site `{}` is not known", on_site.at)).with_remedy(remedy))
}

/// What a command uses of the database: with more it would try to open a second connection while the first is on its way
/// back to the pool, and fail where the server has none left.
pub(crate) fn one_connection() -> Access {
    Access { name: "baton".to_owned(), pool: 1 }
}

/// Opens the database, and waits for a while if it has no connection left.
async fn open(location: Location) -> Result<Store, Failure> {
    let since = Instant::now();
    let mut has_said = false;
    loop {
        match Store::open_as(location.clone(), one_connection()).await {
            Err(error @ store::Error::Full(_)) if since.elapsed() < FULL_LIMIT => {
                if !std::mem::replace(&mut has_said, true) {
                    output::note(&format!("{error}; waiting up to {} s for one", FULL_LIMIT.as_secs()));
                }
                tokio::time::sleep(FULL_PAUSE).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// The ids of a command line; `-` stands for those on standard input, separated by white space.
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

/// Who asks, for a process's history.
pub(crate) fn whoami() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "unknown".into());
    format!("{user}@{}", host_name())
}

/// No such process.
pub(crate) fn absent(pid: Pid) -> Failure {
    Failure::new(exit::NOT_FOUND, format!("there is no process {pid}")).with_remedy("`baton list` shows those that are")
}
