//! A leaf that runs a program on the worker's own machine, under the shim.

use std::path::Path;
use std::time::Duration;

use baton_common::border;
use baton_common::spec::Work;
use baton_common::store::writer::{Output, Stream};
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use crate::cli::chain;
use crate::local::output::Capture;
use crate::local::sandbox::Sandbox;
use crate::local::{self, Command, Running};
use crate::process::{Advance, Context, Error, Interrupt, Process, Wait};
use crate::shim::wire::{Ended, EndedBy};

/// Pause between two looks at a running program: what it has written is stored, so that little of it is lost with the
/// worker, and its memory is measured.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// When a program is tried again that the worker's machine had no process or open file for.
const SHORT_PAUSE: Duration = Duration::from_secs(10);

/// One try is one advance: if the worker dies, the shim ends the program, and the next holder runs it again.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Program {
    #[serde(skip)]
    running: Option<Running>,
}

impl Process for Program {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Program::default())
    }

    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>> {
        Box::pin(self.run(context))
    }

    fn interrupted<'a>(&'a mut self, context: &'a Context, _why: Interrupt) -> LocalBoxFuture<'a, ()> {
        Box::pin(async {
            if let Some(mut running) = self.running.take() {
                context.set_stage("ending");
                // However it ends now, nothing of it is left.
                let _ = running.terminate().await;
                if let Some(sandbox) = context.live.sandbox()
                    && let Ok((outputs, _)) = context.blocking(move || capture(&sandbox)).await
                {
                    context.draft.borrow_mut().outputs = outputs;
                }
            }
        })
    }
}

impl Program {
    async fn run(&mut self, context: &Context) -> Result<Advance, Error> {
        context.set_stage("prepare");
        let (root, pid, epoch) = (context.root().to_owned(), context.pid(), context.epoch());
        let attempt = i32::try_from(context.attempt()).unwrap_or(i32::MAX);
        let sandbox =
            context.blocking(move || Sandbox::create(&root, pid, attempt, epoch)).await?.map_err(Error::failed)?;
        context.live.set_sandbox(sandbox.clone());
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
            grace: context.shared.grace,
            sandbox: sandbox.clone(),
        };
        let running = context.shared.programs.launch(program).await.map_err(refused)?;
        let running = self.running.insert(running);
        border!("program-started");

        context.set_stage("monitor");
        context.live.set_child(Some(running.pid()), None);
        let ended = watch(running, context, &sandbox).await;
        self.running = None;
        context.live.set_child(None, None);

        context.set_stage("stage-out");
        let ended = ended?;
        border!("program-ended");
        let (outputs, last_line) = context.blocking(move || capture(&sandbox)).await?;
        if let Some(line) = last_line {
            context.live.set_last_line(&line);
        }
        let mut draft = context.draft.borrow_mut();
        draft.outputs = outputs;
        conclude(&ended, spec.time, &mut draft.outcome)
    }
}

/// Waits for the program's end, and looks after it meanwhile.
async fn watch(running: &mut Running, context: &Context, sandbox: &Sandbox) -> Result<Ended, Error> {
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_INTERVAL, LOOK_INTERVAL);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut kept = Vec::new();
    loop {
        tokio::select! {
            ended = running.wait() => return ended.map_err(refused),
            _ = look.tick() => {}
        }
        context.live.set_child(Some(running.pid()), Some(running.memory_bytes()));
        let sandbox = sandbox.clone();
        let (outputs, last_line) = context.blocking(move || capture(&sandbox)).await?;
        if let Some(line) = last_line {
            context.live.set_last_line(&line);
        }
        if outputs != kept {
            context.keep_outputs(outputs.clone()).await?;
            kept = outputs;
        }
    }
}

/// What the end of the program means for the process.
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
    // As shells report the end by a signal.
    let exit = ended.exit.or_else(|| ended.signal.map(|signal| 128 + signal)).unwrap_or(1);
    Ok(Advance::Finished { exit })
}

/// What is kept of both streams, and the last line of either.
fn capture(sandbox: &Sandbox) -> (Vec<Output>, Option<String>) {
    let mut outputs = Vec::new();
    let mut last_line = None;
    for (stream, path) in [(Stream::Stderr, sandbox.stderr()), (Stream::Stdout, sandbox.stdout())] {
        let captured = read(&path);
        last_line = captured.last_line().or(last_line);
        if captured.total_bytes > 0 {
            let Capture { head, tail, total_bytes } = captured;
            outputs.push(Output { stream, head, tail, total_bytes });
        }
    }
    (outputs, last_line)
}

fn read(path: &Path) -> Capture {
    // A program may remove its own output; then nothing is kept of it.
    Capture::read(path).unwrap_or_default()
}

fn refused(error: local::Error) -> Error {
    match error {
        local::Error::Vanished | local::Error::Stopping => Error::Interrupted(error.to_string()),
        // The machine is short of processes or open files, which is no fault of the process.
        local::Error::Shim(_) => {
            warn!("{}; it is tried again in {} s", chain(&error), SHORT_PAUSE.as_secs());
            Error::NotNow(Wait::pause(SHORT_PAUSE))
        }
        local::Error::Sandbox { .. } | local::Error::NotStarted { .. } | local::Error::NotRecorded { .. } => {
            Error::failed(error)
        }
    }
}
