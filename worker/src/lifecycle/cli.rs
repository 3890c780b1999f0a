//! The command line of a worker, and the options that all programs of Baton share.

use std::ffi::OsString;
use std::hint::black_box;
use std::io;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use baton_common::communicator::{Broker, CheckError};
use baton_common::config::{self, Config};
use baton_common::exit;
use baton_common::failpoint;
use baton_common::objects::Objects;
use baton_common::store::{self, Access, Location, Store};
use baton_common::telemetry::{self, LogFormat};
use baton_common::{duration, store::Error as StoreError};
use clap::{Args, Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::author::registry::Registry;
use crate::lifecycle::worker::{self, Limits, Options, Stop};
use crate::local::shim;
use crate::local::user::{self, User};
pub use crate::machine::causes::chain;
use crate::machine::{handover, open_files};

/// Default number of slots. A held process costs memory and, if it runs a program, a share of the machine. If the
/// processes are short, one or two hundred are always between delivery and acknowledgement, and each occupies a slot.
const SLOTS: u32 = 400;

/// Default grace. Service managers send KILL after 30 s or more.
const GRACE: Duration = Duration::from_secs(25);

/// Pause between two attempts to reach the database at the start.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);

/// Time limit for asking the broker, at the start, which database the virtual host belongs to.
const CHECK_LIMIT: Duration = Duration::from_secs(3);

/// Maximum number of database connections of one worker. A larger number is a typing error.
const CONNECTIONS_MAX: u32 = 100;

/// How long an idle thread of the blocking pool is kept. A probe of the worker's machine uses one every few seconds.
const BLOCKING_KEPT: Duration = Duration::from_secs(60);

/// Memory that a worker keeps in reserve: 16 MiB. The allocator would return larger chunks to the system.
const HEADROOM_CHUNKS: usize = 160;
const HEADROOM_CHUNK_BYTES: usize = 100 << 10;

/// The minimum number of open files that a program of Baton needs.
const FILES_MIN: usize = 16;

/// Options of every program.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub struct Connection {
    /// Configuration file [default: baton.toml, ~/.config/baton/baton.toml, /etc/baton/baton.toml]
    #[arg(long, global = true, env = "BATON_CONFIG", value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// URLs of RabbitMQ's nodes, separated by commas: amqp://USER:PASSWORD@HOST:PORT/VHOST
    #[arg(long, global = true, env = "BATON_BROKER_URL", value_name = "URL", hide_env_values = true)]
    pub broker_url: Option<String>,
    /// File that contains the broker's URLs
    #[arg(long, global = true, env = "BATON_BROKER_URL_FILE", value_name = "PATH")]
    pub broker_url_file: Option<PathBuf>,
    /// URL of the database: postgres://USER:PASSWORD@HOST:PORT/NAME, or sqlite:PATH
    #[arg(long, global = true, env = "BATON_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// File that contains the database's URL
    #[arg(long, global = true, env = "BATON_DATABASE_URL_FILE", value_name = "PATH")]
    pub database_url_file: Option<PathBuf>,
    /// Object store for the files of processes: a directory, or s3://BUCKET/PREFIX
    /// [default: ~/.local/share/baton/objects]
    #[arg(long, global = true, env = "BATON_OBJECTS_URL", value_name = "URL")]
    pub objects_url: Option<String>,
}

/// The locations of the broker, the database and the object store, merged from options, environment and file.
#[derive(Clone)]
pub struct Resolved {
    /// The content of the configuration file.
    pub config: Config,
    /// The broker's URLs; empty when none is configured.
    pub broker_urls: Vec<String>,
    /// The database's URL; `None` when none is configured.
    pub database_url: Option<String>,
    /// The object store; `url` is `None` when none is configured.
    pub objects: config::Objects,
}

impl Connection {
    /// Merges the options and the environment with the configuration file.
    ///
    /// # Errors
    /// A file cannot be read, or the configuration is invalid.
    pub fn resolve(&self) -> Result<Resolved, config::Error> {
        let config = Config::load(self.config.as_deref())?;
        let broker_urls = match (&self.broker_url, &self.broker_url_file) {
            (Some(urls), _) => config::split_urls(urls),
            (None, Some(path)) => config::split_urls(&config::read_secret(path)?),
            (None, None) => config.broker_urls()?,
        };
        let database_url = match (&self.database_url, &self.database_url_file) {
            (Some(url), _) => Some(url.clone()),
            (None, Some(path)) => Some(config::read_secret(path)?),
            (None, None) => config.database_url()?,
        };
        let mut objects = config.objects.clone();
        objects.url = self.objects_url.clone().or(objects.url);
        Ok(Resolved { config, broker_urls, database_url, objects })
    }
}

/// Runs a worker of a Baton fleet. A worker receives processes from RabbitMQ, advances them, and checkpoints them in the
/// database.
#[derive(Parser, Debug)]
#[command(
    name = "baton-worker",
    version,
    after_help = "Examples:
  baton-worker --broker-url amqp://guest:guest@localhost --database-url postgres://postgres@localhost/baton
  baton-worker --name gpu-1 --queue gpu --slots 4

Signals:
  TERM, INT  drain: claim no more processes, let running advances finish within --grace, give back all processes, and
             exit with 0; an advance that exceeds the grace period is interrupted and repeated by another worker
  repeated   skip the grace period

Exit codes:
  0 drained   1 failed   2 wrong command line or configuration   4 wrong credentials, or the schema is newer
  5 the virtual host belongs to another database
If the database or the broker does not answer, the worker waits; it does not exit."
)]
struct Command {
    #[command(flatten)]
    connection: Connection,
    /// Name of the worker in lists and logs; need not be unique [default: the host's name]
    #[arg(long, env = "BATON_WORKER_NAME")]
    name: Option<String>,
    /// Queue to serve; may be repeated or separated by commas [default: default]
    #[arg(long = "queue", env = "BATON_WORKER_QUEUES", value_delimiter = ',')]
    queues: Vec<String>,
    /// Maximum number of processes held at once [default: 400]
    #[arg(long, env = "BATON_WORKER_SLOTS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    slots: Option<u32>,
    /// Number of threads that advance processes [default: the number of processor cores]
    #[arg(long, env = "BATON_WORKER_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Maximum number of database connections, at least 4 [default: 4]
    #[arg(long, env = "BATON_WORKER_DATABASE_CONNECTIONS", value_name = "N")]
    database_connections: Option<u32>,
    /// Directory for the sandboxes of local programs [default: ./.baton/worker]
    #[arg(long, env = "BATON_WORKER_ROOT", value_name = "DIR")]
    root: Option<PathBuf>,
    /// User that runs the local programs; requires a worker that runs as root [default: the worker's user]
    #[arg(long, env = "BATON_WORKER_USER", value_name = "NAME")]
    user: Option<String>,
    /// Grace period: the time that advances have to finish when the worker stops, and that a local program has between
    /// TERM and KILL [default: 25s]
    #[arg(long, env = "BATON_WORKER_GRACE", value_parser = duration::parse, value_name = "DURATION")]
    grace: Option<Duration>,
    /// Log filter: error, warn, info, debug, or a list such as baton_worker=debug
    #[arg(long, env = "BATON_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// Log format
    #[arg(long, env = "BATON_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Runs a worker as a whole program: command line, signals, exit code. Call it first in `main`, before any thread starts.
///
/// `registry` has the kinds of processes that the worker knows besides Baton's own. `baton-worker --help` describes the
/// command line.
pub fn main(registry: Registry) -> ExitCode {
    match begin() {
        Ok(arguments) => run(arguments, registry),
        Err(code) => code,
    }
}

/// The first steps of every program of Baton, in `main` before any thread starts.
///
/// Acts as the shim of a local program if the program was started as a shim. Removes passwords from the environment and
/// the command line, where other users of the machine could read them; for this, it may execute the program again.
/// Returns the original arguments with the URLs of the environment added.
///
/// # Errors
/// The exit code of the shim. Return it from `main`.
pub fn begin() -> Result<Vec<OsString>, ExitCode> {
    if std::env::args().nth(1).as_deref() == Some(shim::COMMAND) {
        return Err(shim::main());
    }
    Ok(handover::begin())
}

/// The original arguments of this program, without the URLs that [`begin`] adds.
pub fn arguments() -> Vec<String> {
    handover::arguments()
}

/// Runs a worker with the arguments of [`begin`]. The first argument is the name of the program in the help.
pub fn run(arguments: Vec<OsString>, registry: Registry) -> ExitCode {
    keep_headroom();
    let command = Command::parse_from(arguments);
    let _failpoints = failpoint::init();
    let format = match command.log_format {
        Format::Text => LogFormat::Text,
        Format::Json => LogFormat::Json,
    };
    telemetry::init(&command.log, format);
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(failure) => {
            error!("cannot start: {failure}");
            return ExitCode::from(exit::FAILED);
        }
    };
    let code = runtime.block_on(serve(command, registry));
    // A process that blocks its thread, or a closure on the blocking pool, must not prevent the program from exiting.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

/// Lets the allocator keep some memory in reserve, so that a worker can still report a shortage of memory. A failed
/// allocation ends a program. Memory that is never written to costs nothing.
fn keep_headroom() {
    let chunks: Vec<Vec<u8>> = (0..HEADROOM_CHUNKS).map(|_| Vec::with_capacity(HEADROOM_CHUNK_BYTES)).collect();
    // The allocator returns only memory above the last chunk in use.
    std::mem::forget(black_box(Box::new([0_u8; 64])));
    drop(black_box(chunks));
}

/// Starts the main runtime of a program.
///
/// # Errors
/// The limits of open files, processes or threads are too low.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    open_files::raise();
    open_files::check(FILES_MIN)?;
    let build = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            // If the system cannot start another thread, blocking work needs an existing one.
            .thread_keep_alive(BLOCKING_KEPT)
            .enable_all()
            .build()
    };
    // Without a thread, the runtime panics. The error has a clearer text.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let built = catch_unwind(build);
    std::panic::set_hook(hook);
    built.unwrap_or_else(|_| {
        Err(io::Error::other("the system cannot start a thread; raise the process limit (`ulimit -u`, `pids.max`)"))
    })
}

async fn serve(command: Command, registry: Registry) -> ExitCode {
    let stop = Stop::default();
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(failure) => {
            error!(%failure, "cannot listen for signals");
            return ExitCode::from(exit::FAILED);
        }
    };
    let working = async {
        let (options, user) = match options(command, registry, &stop).await {
            Ok(options) => options,
            Err(code) => return code,
        };
        if let Err(code) = refuse_other_database(&options, &stop).await {
            return code;
        }
        match worker::run_as(&options, user, &stop).await {
            Ok(()) => ExitCode::from(exit::OK),
            Err(failure) => {
                error!("{}", chain(&failure));
                ExitCode::from(exit::FAILED)
            }
        }
    };
    tokio::pin!(working);
    let mut received = 0;
    loop {
        tokio::select! {
            code = &mut working => return code,
            name = signals.next() => {
                received += 1;
                if received == 1 {
                    info!(signal = name, "stopping");
                    stop.drain();
                } else {
                    warn!(signal = name, "stopping at once");
                    stop.hurry();
                }
            }
        }
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "TERM",
            _ = self.interrupt.recv() => "INT",
        }
    }
}

async fn options(command: Command, registry: Registry, stop: &Stop) -> Result<(Options, Option<User>), ExitCode> {
    let refuse = |text: String| {
        error!("{text}");
        ExitCode::from(exit::USAGE)
    };
    let resolved = command.connection.resolve().map_err(|error| refuse(chain(&error)))?;
    let url = resolved.database_url.ok_or_else(|| {
        refuse(
            "no database is configured; set BATON_DATABASE_URL, `database.url` in baton.toml, or --database-url".into(),
        )
    })?;
    if resolved.broker_urls.is_empty() {
        return Err(refuse(
            "no broker is configured; set BATON_BROKER_URL, `broker.url` in baton.toml, or --broker-url".into(),
        ));
    }
    let location = Location::parse(&url).map_err(|error| refuse(error.to_string()))?;
    if matches!(location, Location::Sqlite(_)) {
        return Err(refuse("a worker needs PostgreSQL; SQLite is only for `baton run`".into()));
    }
    let objects = Objects::open(&resolved.objects).map_err(|error| refuse(chain(&error)))?;
    let (sites, ssh) = (resolved.config.sites, resolved.config.ssh);
    let file = resolved.config.worker;
    let host = host_name();
    let name = command.name.or(file.name).unwrap_or_else(|| host.clone());
    if !is_plain(&name) {
        return Err(refuse(format!(
            "the worker's name `{name}` must consist of 1 to 64 letters, digits, `-`, `_` and `.`"
        )));
    }
    let queues =
        if command.queues.is_empty() { file.queues.unwrap_or_else(|| vec!["default".into()]) } else { command.queues };
    if let Some(queue) = queues.iter().find(|queue| !is_plain(queue) || queue.contains('.')) {
        return Err(refuse(format!("the queue's name `{queue}` must consist of 1 to 64 letters, digits, `-` and `_`")));
    }
    let connections = command.database_connections.or(file.database_connections).unwrap_or(store::WORKER_CONNECTIONS);
    if !(store::WORKER_CONNECTIONS..=CONNECTIONS_MAX).contains(&connections) {
        let least = store::WORKER_CONNECTIONS;
        return Err(refuse(format!(
            "`database_connections` is {connections}; it must be from {least} to {CONNECTIONS_MAX}"
        )));
    }
    let access = Access::of_worker(&name, connections);
    let root = command.root.or(file.root).unwrap_or_else(|| PathBuf::from(".baton/worker"));
    let root = config::from_home(&root).map_err(|problem| refuse(format!("`worker.root` {problem}")))?;
    let user = match command.user.or(file.user) {
        Some(name) => Some(user(&name, &root).map_err(|error| refuse(chain(&error)))?),
        None => None,
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let defaults = Limits::default();
    let options = Options {
        name,
        host,
        queues,
        slots: command.slots.or(file.slots).unwrap_or(SLOTS),
        threads: command.threads.map(usize::from).or(file.threads).unwrap_or(cores).max(1),
        root,
        grace: command.grace.or(file.grace).unwrap_or(GRACE),
        limits: Limits {
            advances_max: file.advances_max.unwrap_or(defaults.advances_max),
            idle_advances_max: file.idle_advances_max.unwrap_or(defaults.idle_advances_max),
        },
        registry,
        sites,
        ssh,
        objects,
        store: open(location, access, stop).await?,
        broker: Broker::Amqp(resolved.broker_urls),
    };
    Ok((options, user))
}

/// The user that runs local programs.
fn user(name: &str, root: &std::path::Path) -> Result<User, user::Error> {
    let user = User::find(name)?;
    user.check(root)?;
    Ok(user)
}

/// Refuses to start on a virtual host of another database. If the broker does not answer, the communicator asks again later.
async fn refuse_other_database(options: &Options, stop: &Stop) -> Result<(), ExitCode> {
    let Broker::Amqp(urls) = &options.broker else { return Ok(()) };
    let asking = async {
        let database = options.store.identity().await.ok()?;
        let checks = Broker::check(urls, Some(database)).await;
        checks.into_iter().filter_map(Result::err).find(|error| matches!(error, CheckError::OtherDatabase { .. }))
    };
    match stop.unless_stopped(tokio::time::timeout(CHECK_LIMIT, asking)).await {
        Some(Ok(Some(error))) => {
            error!(
                "{error}: use a separate virtual host for each database; if the other database no longer exists, delete the \
                 queue `baton.database` of this virtual host"
            );
            Err(ExitCode::from(exit::CONFLICT))
        }
        Some(Ok(None) | Err(_)) | None => Ok(()),
    }
}

/// Opens the database. Waits while it does not answer, until the worker is told to stop; a refusal is final.
async fn open(location: Location, access: Access, stop: &Stop) -> Result<Store, ExitCode> {
    let mut said = None;
    loop {
        let opening = async {
            let store = Store::open_as(location.clone(), access.clone()).await?;
            match store.room_for_worker().await {
                Ok(()) => Ok(store),
                Err(failure) => {
                    // Other workers may need the connections meanwhile.
                    store.close().await;
                    Err(failure)
                }
            }
        };
        let opened = stop.unless_stopped(opening).await;
        match opened.ok_or(ExitCode::from(exit::OK))? {
            Ok(store) => return Ok(store),
            Err(failure) if failure.is_transient() => {
                // The numbers in the text change from one attempt to the next.
                let kind = std::mem::discriminant(&failure);
                if said.replace(kind) != Some(kind) {
                    warn!("{failure}; {}", remedy_of(&failure));
                }
                let pause = tokio::time::sleep(CONNECT_PAUSE);
                stop.unless_stopped(pause).await.ok_or(ExitCode::from(exit::OK))?;
            }
            Err(failure) => {
                error!("{}", chain(&failure));
                return Err(ExitCode::from(exit::of_store(&failure)));
            }
        }
    }
}

/// The remedy that is logged while a worker waits for the database.
pub(crate) fn remedy_of(error: &StoreError) -> &'static str {
    if matches!(error, store::Error::Full(_)) {
        "the worker starts when another program closes a connection; for more workers, raise the server's max_connections"
    } else {
        "the worker waits until the database answers"
    }
}

/// The name of this host.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn is_plain(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.'))
}
