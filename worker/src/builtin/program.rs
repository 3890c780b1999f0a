//! A leaf that runs a program on the worker's own machine, under the shim.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::spec::Work;
use baton_common::store::writer::{Output, Stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use crate::author::live::Streams;
use crate::author::process::{Advance, Context, Error, Interrupt, Process};
use crate::local::output::Capture;
use crate::local::sandbox::Sandbox;
use crate::local::shim::wire::{Ended, EndedBy};
use crate::local::user::User;
use crate::local::{self, Command, Programs, Running};
use crate::machine::shortage::{self, Health};

/// Pause between two looks at a running program. Each look stores its output so far, so that little is lost with the worker,
/// and measures its memory.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How long a program waits for resources that other programs of this worker occupy.
const TURN_LIMIT: Duration = Duration::from_secs(10);

/// Pause before the next launch if no program has ended.
const LAUNCH_PAUSE: Duration = Duration::from_secs(1);

/// Pause before the output of a program is read again, when there was no open file or thread for that.
const READ_PAUSE: Duration = Duration::from_secs(1);

/// How often the output is read again when the disk reports errors. After that the process ends without it.
const READS_MAX: u32 = 10;

/// How long a worker may take to learn that it is to stop. A service manager may stop the shims at the same time.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// What programs use of their worker.
pub(crate) struct Local {
    pub(crate) programs: Programs,
    pub(crate) health: Arc<Health>,
    /// The user that runs them, if it is not the worker's.
    pub(crate) user: Option<Arc<User>>,
}

/// One try is one advance: if the worker dies, the shim ends the program, and the next holder runs it again.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Program {
    #[serde(skip)]
    local: Option<Arc<Local>>,
    #[serde(skip)]
    running: Option<(Running, Sandbox)>,
}

impl Process for Program {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Program::default())
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        self.run(context).await
    }

    async fn interrupted(&mut self, context: &Context, _why: Interrupt) {
        if let Some((mut running, sandbox)) = self.running.take() {
            context.set_stage("ending");
            // Whatever this returns, nothing of the program is left running.
            let _ = running.terminate().await;
            if let Ok(Ok((outputs, _))) = context.blocking(move || capture(&sandbox)).await {
                context.draft.borrow_mut().outputs = outputs;
            }
        }
    }
}

impl Program {
    /// Adds what the program uses of its worker.
    pub(super) fn with(self, local: Arc<Local>) -> Self {
        Self { local: Some(local), ..self }
    }

    async fn run(&mut self, context: &Context) -> Result<Advance, Error> {
        context.set_stage("prepare");
        let local = Arc::clone(self.local.as_ref().expect("its registry gives it what it needs"));
        let (root, pid, epoch) = (context.root().to_owned(), context.pid(), context.epoch());
        let try_number = i32::try_from(context.try_number()).unwrap_or(i32::MAX);
        let user = local.user.clone();
        let create = move || match user {
            Some(user) => Sandbox::create_for(user, &root, pid, try_number, epoch),
            None => Sandbox::create(&root, pid, try_number, epoch),
        };
        let sandbox = context.blocking(create).await?.map_err(refused)?;
        context.live.set_streams(Streams { stdout: sandbox.stdout(), stderr: sandbox.stderr() });
        context.draft.borrow_mut().outcome.sandbox = Some(sandbox.path().display().to_string());

        context.set_stage("submit");
        let spec = context.spec();
        let program = local::Program {
            command: match &spec.what {
                Work::Run { argv } => Command::Run(argv.clone()),
                Work::Script { text } => Command::Script(text.clone()),
                Work::Call { .. } => return Err(Error::Input("no program".into())),
            },
            vars: spec.vars.clone(),
            stdin: spec.stdin.clone(),
            time_limit: spec.time,
            grace: context.facilities.grace,
            sandbox: sandbox.clone(),
        };
        let running = launch(&local, program).await?;
        let (running, _) = self.running.insert((running, sandbox.clone()));
        border!("program-started");

        context.set_stage("monitor");
        context.live.set_child(Some(running.pid()), None);
        let ended = watch(running, context, &sandbox).await;
        self.running = None;
        context.live.set_child(None, None);

        context.set_stage("stage-out");
        let ended = ended?;
        border!("program-ended");
        let (outputs, last_line) = written(context, &local.health, &sandbox).await;
        if let Some(line) = last_line {
            context.live.set_last_line(&line);
        }
        let mut draft = context.draft.borrow_mut();
        draft.outputs = outputs;
        conclude(&ended, spec.time, &mut draft.outcome)
    }
}

/// Starts a program. If other programs of this worker occupy what it needs, it waits for the end of one for a short time;
/// after that another worker may start it.
async fn launch(local: &Local, program: local::Program) -> Result<Running, Error> {
    let programs = &local.programs;
    let lacking = match programs.launch(program.clone()).await.map_err(refused) {
        Err(Error::Lacking(shortage)) if shortage.lack.is_shared_by_programs() && programs.count() > 0 => shortage,
        launched => return launched,
    };
    local.health.note(lacking.clone());
    let in_turn = async {
        // One waits at a time. Otherwise all would try after each end, and only one would succeed.
        let _turn = programs.turn().await;
        loop {
            programs.ended(LAUNCH_PAUSE).await;
            match programs.launch(program.clone()).await.map_err(refused) {
                Err(Error::Lacking(shortage)) if shortage.lack.is_shared_by_programs() && programs.count() > 0 => {}
                launched => return launched,
            }
        }
    };
    tokio::time::timeout(TURN_LIMIT, in_turn).await.unwrap_or(Err(Error::Lacking(lacking)))
}

/// Waits for the program's end. Meanwhile it stores the output and measures the memory.
async fn watch(running: &mut Running, context: &Context, sandbox: &Sandbox) -> Result<Ended, Error> {
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_INTERVAL, LOOK_INTERVAL);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut kept = Vec::new();
    loop {
        tokio::select! {
            ended = running.wait() => return match ended {
                Err(error @ local::Error::Vanished { .. }) => {
                    // A worker that stops returns the process to the queue in this time. Otherwise the failure is charged: a
                    // program that kills its shim would run again and again.
                    context.sleep(STOP_PATIENCE).await;
                    Err(Error::Failed(format!("{error} while it ran, and the program was ended with it")))
                }
                ended => ended.map_err(refused),
            },
            _ = look.tick() => {}
        }
        context.live.set_child(Some(running.pid()), Some(running.memory_bytes()));
        let sandbox = sandbox.clone();
        // The next look reads what this one cannot.
        let Ok(Ok((outputs, last_line))) = context.blocking(move || capture(&sandbox)).await else { continue };
        if let Some(line) = last_line {
            context.live.set_last_line(&line);
        }
        if outputs != kept {
            context.keep_outputs(outputs.clone()).await?;
            kept = outputs;
        }
    }
}

/// Turns the end of the program into the end of the process.
fn conclude(
    ended: &Ended,
    limit: Option<Duration>,
    outcome: &mut baton_common::store::blob::Outcome,
) -> Result<Advance, Error> {
    match ended.ended_by {
        EndedBy::Own | EndedBy::TimeLimit => {}
        EndedBy::Term | EndedBy::Kill | EndedBy::Lease | EndedBy::WorkerGone => {
            return Err(Error::Interrupted(format!("its program was ended ({:?})", ended.ended_by)));
        }
    }
    outcome.exit = ended.exit;
    outcome.signal = ended.signal;
    outcome.reason = ended.not_started.clone().or_else(|| {
        let limit = limit.filter(|_| ended.timed_out())?;
        Some(format!("its time limit of {} has passed", baton_common::duration::format(limit)))
    });
    // As shells report death by a signal.
    let exit = ended.exit.or_else(|| ended.signal.map(|signal| 128 + signal)).unwrap_or(1);
    Ok(Advance::Finished { exit })
}

/// Reads the kept part of both streams of a program that has ended. If the worker lacks an open file or a thread, it waits:
/// the outcome of the program must not be lost for its output.
async fn written(context: &Context, health: &Health, sandbox: &Sandbox) -> Written {
    let mut n_failures = 0;
    loop {
        let to_read = sandbox.clone();
        let error = match context.blocking(move || capture(&to_read)).await {
            Ok(Ok(written)) => return written,
            Ok(Err(error)) => {
                n_failures += u32::from(shortage::of_worker(&error).is_none());
                if let Some(shortage) = shortage::of_worker(&error) {
                    health.note(shortage);
                }
                error.to_string()
            }
            Err(Error::Lacking(shortage)) => {
                health.note(shortage);
                // Without a thread, two small files are read here.
                match capture(sandbox) {
                    Ok(written) => return written,
                    Err(error) => error.to_string(),
                }
            }
            // Reading has panicked and would panic again.
            Err(_) => return Written::default(),
        };
        if n_failures >= READS_MAX {
            warn!(error, "the output of the program cannot be read and is left out of its result");
            return Written::default();
        }
        context.sleep(READ_PAUSE).await;
    }
}

/// The kept part of both streams, and the last line of either.
type Written = (Vec<Output>, Option<String>);

fn capture(sandbox: &Sandbox) -> io::Result<Written> {
    let mut outputs = Vec::new();
    let mut last_line = None;
    for (stream, path) in [(Stream::Stderr, sandbox.stderr()), (Stream::Stdout, sandbox.stdout())] {
        let captured = read(&path)?;
        last_line = captured.last_line().or(last_line);
        if captured.total_bytes > 0 {
            let Capture { head, tail, total_bytes } = captured;
            outputs.push(Output { stream, head, tail, total_bytes });
        }
    }
    Ok((outputs, last_line))
}

/// Reads one stream. A program may remove or replace the file; then nothing is kept of it.
fn read(path: &Path) -> io::Result<Capture> {
    match Capture::read(path) {
        Err(error) if shortage::lack_of(&error).is_none() => Ok(Capture::default()),
        read => read,
    }
}

fn refused(error: local::Error) -> Error {
    match error.shortage() {
        Some(shortage) => Error::Lacking(shortage),
        None => Error::Interrupted(error.to_string()),
    }
}
