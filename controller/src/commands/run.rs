//! `baton run`: a fleet of one in this program, with its state in a folder.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_common::communicator::Broker;
use baton_common::exit;
use baton_common::id::Pid;
use baton_common::objects::Objects;
use baton_common::spec::Spec;
use baton_common::state::{Desired, State};
use baton_common::store::control::Request;
use baton_common::store::query::{Details, Filter, Summary, queue_name};
use baton_common::store::submit::NewProcess;
use baton_common::store::{Location, Store};
use baton_common::telemetry::new_traceparent;
use baton_worker::cli::host_name;
use baton_worker::process::by_worker;
use baton_worker::registry::Registry;
use baton_worker::worker::{self, Limits, Options, Stop};

use crate::capture;
use crate::cli::{Global, Output, RunArguments};
use crate::client::{DATABASE_FILE, Document, absent, check_site, objects_beside, read_spec, whoami};
use crate::failure::Failure;
use crate::output;

/// Pause between two looks at the process: what a person sees as at once.
const LOOK: Duration = Duration::from_millis(50);

/// Processes of the same home that are still unfinished go on beside the one that was asked for.
const SLOTS: u32 = 16;

/// How long a program has between TERM and KILL after Ctrl-C: a person waits for it.
const GRACE: Duration = Duration::from_secs(5);

/// The only worker of a home.
const WORKER: &str = "baton-run";

pub(crate) async fn run(global: &Global, arguments: RunArguments, registry: Registry) -> Result<u8, Failure> {
    let Document { spec, folder } = read_spec(&arguments.file)?;
    let config = global.connection.resolve()?.config;
    check_site(&spec, &config.sites)?;
    let plan = capture::plan(&spec, &folder)?;
    let home = std::path::absolute(&global.home)?;
    make_private(&home).map_err(|error| Failure::failed(format!("cannot create {}: {error}", home.display())))?;
    // Held until the program ends: the lock is what tells that every other incarnation is gone.
    let _lock = lock(&home)?;
    let store = Store::open(Location::Sqlite(home.join(DATABASE_FILE))).await?;
    let objects = Objects::open(&objects_beside(&home))?;
    objects.add_owner(store.identity().await?).await?;
    let spec = if plan.files.is_empty() { spec } else { Box::pin(capture::capture(&spec, plan, &objects)).await? };
    let pid = resume_or_submit(&store, &spec, arguments.new).await?;
    let options = Options {
        name: WORKER.into(),
        host: host_name(),
        // Whatever queue the spec names, there is only this worker.
        queues: queues(&store, &spec).await?,
        slots: SLOTS,
        threads: 2,
        root: home.clone(),
        grace: GRACE,
        limits: Limits::default(),
        registry,
        sites: config.sites,
        ssh: config.ssh,
        objects,
        store: store.clone(),
        broker: Broker::InProcess,
    };
    let stop = Stop::default();
    let working = worker::run(&options, &stop);
    let following = follow(&store, pid, &home, global.output);
    tokio::pin!(working, following);
    let ended = tokio::select! {
        ended = &mut following => Some(ended?),
        worked = &mut working => {
            worked.map_err(|error| Failure::failed(baton_worker::cli::chain(&error)))?;
            None
        }
        _ = tokio::signal::ctrl_c() => None,
    };
    stop.drain();
    let hurry = async {
        // A second Ctrl-C does not wait for the grace.
        let _ = tokio::signal::ctrl_c().await;
        stop.hurry();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = &mut working => {}
        () = hurry => {}
    }
    let Some(summary) = ended else {
        output::note(&format!("interrupted; to resume {pid}, run the same command again"));
        return Ok(exit::INTERRUPTED);
    };
    let details = store.show(pid).await?.ok_or_else(|| absent(pid))?;
    report(global, &details)?;
    if is_stuck(&summary) {
        output::note("  to resume it, remove the cause and run the same command again");
    }
    Ok(exit_code(&summary))
}

/// Returns the process that this command follows: an unfinished one of the same spec, which resumes, or a new one.
async fn resume_or_submit(store: &Store, spec: &Spec, is_new: bool) -> Result<Pid, Failure> {
    let (pid, is_resumed) = find_or_submit(store, spec, is_new).await?;
    if is_resumed {
        output::note(&format!("resuming {pid}; --new starts another process"));
        let row = store.list(&Filter::of(vec![pid])).await?.pop();
        if row.is_some_and(|row| is_stuck(&row)) {
            // A user who runs the command again has removed the cause of the pause.
            store.control(pid, &Request::new(Desired::Run, whoami())).await?;
        }
    }
    Ok(pid)
}

/// The exit code of the command: that of the process, if it has finished.
fn exit_code(summary: &Summary) -> u8 {
    match summary.state {
        State::Finished => {
            let code = summary.outcome.as_ref().and_then(|outcome| outcome.exit).unwrap_or(0);
            u8::try_from(code).unwrap_or(exit::PROCESS_FAILED)
        }
        State::Excepted | State::Killed | State::Created | State::Running | State::Waiting | State::Paused(_) => {
            exit::PROCESS_FAILED
        }
    }
}

/// Makes the home, where the values and variables of processes are, so that only its user can read it. A folder that is there
/// keeps its rights, unless it has the usual name, which nothing else has.
fn make_private(home: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(home)?;
    if home.file_name().is_some_and(|name| name == ".baton") {
        std::fs::set_permissions(home, Permissions::from_mode(0o700))?;
    }
    let database = home.join(DATABASE_FILE);
    // SQLite gives its other files the same rights.
    File::options().append(true).create(true).mode(0o600).open(&database)?;
    for end in ["", "-wal", "-shm"] {
        let path = home.join(format!("{DATABASE_FILE}{end}"));
        if path.exists() {
            std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// Takes the home for this program, or says who has it.
fn lock(home: &Path) -> Result<File, Failure> {
    let path = home.join("baton.lock");
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            return Err(Failure::new(exit::CONFLICT, format!("{} is in use by {}", home.display(), holder.trim()))
                .with_remedy("`baton list`, `watch`, `pause` and `kill` work meanwhile; or use another --home"));
        }
        Err(TryLockError::Error(error)) => {
            return Err(Failure::failed(format!("cannot lock {}: {error}", path.display())));
        }
    }
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "`baton run` of {} (process {})", whoami(), std::process::id())?;
    Ok(file)
}

/// The unfinished process of the same spec in the same folder, or a new one.
async fn find_or_submit(store: &Store, spec: &Spec, new: bool) -> Result<(Pid, bool), Failure> {
    let folder = std::env::current_dir()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&spec.digest());
    hasher.update(folder.as_os_str().as_encoded_bytes());
    let run_key = hasher.finalize().as_bytes().to_vec();
    if !new && let Some(pid) = store.unfinished_run(&run_key).await? {
        return Ok((pid, true));
    }
    let process = NewProcess {
        pid: Pid::generate(),
        spec: spec.clone(),
        created_by: whoami(),
        traceparent: Some(new_traceparent()),
        reply_to: None,
        run_key: Some(run_key),
    };
    let pid = process.pid;
    store.submit(&[process]).await?;
    if spec.hold {
        output::note(&format!("{pid} is on hold; `baton play {pid}` starts it"));
    }
    Ok((pid, false))
}

/// The queues of everything unfinished in this home.
async fn queues(store: &Store, spec: &Spec) -> Result<Vec<String>, Failure> {
    let mut queues = BTreeSet::from([spec.queue.clone()]);
    queues.extend(store.queues_in_use().await?.iter().map(|queue| queue_name(queue).to_owned()));
    Ok(queues.into_iter().collect())
}

/// Whether the worker has paused it, since it cannot go on by itself.
fn is_stuck(row: &Summary) -> bool {
    matches!(row.state, State::Paused(_)) && row.paused.as_ref().is_some_and(|paused| paused.by == by_worker(WORKER))
}

/// Prints what the program writes and how far it is, until the process has ended or cannot go on.
async fn follow(store: &Store, pid: Pid, home: &Path, how: Output) -> Result<Summary, Failure> {
    let mut shown = Shown::default();
    let mut progress: Option<(i64, State)> = None;
    let mut told_at = Instant::now();
    loop {
        let filter = Filter::of(vec![pid]);
        let row = store.list(&filter).await?.pop().ok_or_else(|| absent(pid))?;
        if how == Output::Table {
            shown.print(home, &row)?;
            let now = (row.advances, row.state);
            // Not more often than a person reads.
            let is_worth_it = row.advances > 0 && !row.state.is_final() && told_at.elapsed() > Duration::from_secs(1);
            if progress != Some(now) && is_worth_it {
                output::note(&format!(
                    "{}  advance {}  {}",
                    output::status_word(&row),
                    row.advances,
                    output::detail(&row)
                ));
                progress = Some(now);
                told_at = Instant::now();
            }
        }
        if row.state.is_final() || is_stuck(&row) {
            return Ok(row);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// How far the program's streams have been printed. They lie on this machine, so nobody needs to be asked for them.
#[derive(Default)]
struct Shown {
    sandbox: PathBuf,
    stdout: u64,
    stderr: u64,
}

impl Shown {
    fn print(&mut self, home: &Path, row: &Summary) -> Result<(), Failure> {
        let own = home.join("sandbox").join(row.pid.to_string()).join(format!("{}.{}", row.try_number, row.epoch));
        let own = own.join(".baton");
        if own != self.sandbox {
            *self = Self { sandbox: own, ..Self::default() };
        }
        copy(&self.sandbox.join("stdout"), &mut self.stdout, &mut std::io::stdout())?;
        copy(&self.sandbox.join("stderr"), &mut self.stderr, &mut std::io::stderr())
    }
}

fn copy(path: &Path, offset: &mut u64, to: &mut impl Write) -> Result<(), Failure> {
    let Ok(mut file) = File::open(path) else { return Ok(()) };
    file.seek(SeekFrom::Start(*offset))?;
    *offset += std::io::copy(&mut file, to)?;
    to.flush()?;
    Ok(())
}

fn report(global: &Global, details: &Details) -> Result<(), Failure> {
    let summary = &details.summary;
    match global.output {
        Output::Json => output::print_json(&output::summary_json(summary)),
        Output::Ids => output::print(&summary.pid.to_string()),
        Output::Table => {
            let took = summary.ended_at.unwrap_or(summary.now) - summary.created_at;
            let took = Duration::from_micros(u64::try_from(took).unwrap_or(0));
            let attempts = match details.attempts.len() {
                0 | 1 => String::new(),
                count => format!(", {count} attempts"),
            };
            output::note(&format!(
                "{} {} in {}{attempts}  {}",
                output::state_text(summary),
                summary.name,
                output::seconds(took),
                output::detail(summary)
            ));
            if let Some(outcome) = &summary.outcome {
                if !outcome.values.is_empty() {
                    output::note(&format!("  values  {}", serde_json::Value::Object(outcome.values.clone())));
                }
                if let Some(sandbox) = &outcome.sandbox {
                    output::note(&format!(
                        "  files   {}",
                        sandbox.split_once(':').map_or(sandbox.as_str(), |(_, path)| path)
                    ));
                }
            }
            if summary.outcome.as_ref().is_some_and(|outcome| outcome.results.is_some()) {
                output::note(&format!("  results baton results {}", summary.pid));
            }
            output::note(&format!("  more    baton show {}", summary.pid));
            Ok(())
        }
    }
}
