//! A leaf that runs at a site: staged in, submitted, watched, and staged out, with a checkpoint after each.
//!
//! The far end decides whether a try was submitted and whether its program was started: `.baton/submit` and
//! `.baton/started` in its folder can each be taken once. So an answer that was lost costs time, and never a second run.

mod submission;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::duration;
use baton_common::lack::Shortage;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::{Job as Row, NEVER, Seen, token};
use baton_common::store::writer::{Output, Stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::submission::Refusal;
use crate::author::process::{Advance, Context, Error, Process, Wait};
use crate::machine::shortage;
use crate::site::launcher::{Listed, Phase};
use crate::site::script::{self, AGAIN, BEGUN, Done, GIVEN_UP, RAN, Script, UNMARKED};
use crate::site::watch::{ENDED, LOST};
use crate::site::{LOOK_AGAIN, Site, Sites, Visit, staging};
use crate::transport::{self, quote};

/// Pause between two looks for a job whose submission was not answered, and for what a job should have left.
const SETTLE_PAUSE: Duration = Duration::from_secs(3);

/// Looks for files that are not what they should be: file systems may show them late.
const LOOKS_MAX: u32 = 5;

/// For how long the end of a job is waited for that something else than its script has ended; where the script should have
/// said it, that is the site's time of settling.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Jobs of a process that the site may lose before it is the process's failure.
const LOST_MAX: u32 = 10;

/// Pause between two attempts to end a job that ends slowly.
const CANCEL_PAUSE: Duration = Duration::from_secs(2);

/// Bytes of a stream that are kept of its beginning, and as many of its end.
const STREAM_PART_BYTES: usize = 32 * 1024;

/// The words of Slurm for a job that something else than its program has ended.
const SCHEDULER_ENDS: [&str; 7] =
    ["TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"];

/// Exits of Baton's own commands there.
const NO_FOLDER: i32 = 41;
const EMPTIED: i32 = 43;

/// What is kept between two advances.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Job {
    #[serde(skip)]
    sites: Option<Arc<Sites>>,
    /// The try that the stage is of.
    try_number: i64,
    stage: Stage,
    /// Jobs that the site has lost.
    #[serde(default)]
    lost: u32,
    /// Looks for files that are not what they should be.
    #[serde(default)]
    looks: u32,
    /// What came of the last submission, if that was not accepted for now.
    #[serde(default)]
    refusal: Option<Refusal>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    /// Its files go there.
    #[default]
    In,
    /// It is to be submitted.
    Submit,
    /// Whether there is a job is not known.
    Settle,
    /// It waits or runs, and its process is parked.
    Monitor,
    /// Its files come back.
    Out,
}

impl Process for Job {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Job::default())
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        let at = At::new(context, self.sites())?;
        if self.try_number != context.try_number() {
            let (sites, lost, refusal) = (self.sites.take(), self.lost, self.refusal.take());
            *self = Job { sites, try_number: context.try_number(), lost, refusal, ..Job::default() };
        }
        let advanced = match self.stage {
            Stage::In => self.stage_in(&at).await,
            Stage::Submit => self.submit(&at).await,
            Stage::Settle => self.settle(&at).await,
            Stage::Monitor => self.monitor(&at).await,
            Stage::Out => self.stage_out(&at).await,
        };
        // It has given its channel back, and others may wait for one.
        at.site.changed.notify_one();
        match advanced {
            Err(Trouble::Site(error)) => Err(match at.site.trouble(context, &error).await {
                // A job may be there: whatever the site says, the try is not given up by it.
                Error::Failed(text) if self.stage == Stage::Settle => {
                    context.log(text);
                    Error::NotNow(Wait::pause(SETTLE_PAUSE))
                }
                Error::Failed(text) if self.stage == Stage::Out => stuck(&text),
                error @ (Error::Input(_)
                | Error::Failed(_)
                | Error::Interrupted(_)
                | Error::Stuck(_)
                | Error::Lacking(_)
                | Error::NotNow(_)) => error,
            }),
            Err(Trouble::Lacks(text)) if self.stage == Stage::In => self.wait_for_room(&at, text).await,
            Err(Trouble::Here { path, error, text }) => match shortage_here(context, &path, &error) {
                Some(shortage) => Err(Error::Lacking(shortage)),
                None if self.stage == Stage::Out => Err(stuck(&text)),
                // The folder of a site on this machine has no room.
                None if shortage::lack_of(&error).is_some() => self.wait_for_room(&at, text).await,
                None => Err(Error::Failed(format!("stage: {text}"))),
            },
            Err(Trouble::Content(text) | Trouble::Emptied(text)) if self.looks < LOOKS_MAX => {
                context.log(text);
                self.looks += 1;
                Ok(Advance::After(SETTLE_PAUSE))
            }
            Err(Trouble::Content(text) | Trouble::Files(text) | Trouble::Lacks(text)) => Err(match self.stage {
                Stage::Out => stuck(&text),
                Stage::In | Stage::Submit | Stage::Settle | Stage::Monitor => Error::Failed(format!("stage: {text}")),
            }),
            Err(Trouble::Emptied(text)) => Err(Error::Failed(format!("output: {text}"))),
            Err(Trouble::Process(error)) => Err(error),
            Ok(advance) => Ok(advance),
        }
    }

    async fn end_outside(&mut self, context: &Context) -> Result<(), Error> {
        let at = At::new(context, self.sites())?;
        match at.end_job().await {
            Err(Trouble::Site(error)) => Err(at.site.trouble(context, &error).await),
            // The database does not answer; its next answer decides.
            Err(Trouble::Process(Error::Interrupted(_))) => Err(Error::NotNow(Wait::pause(CANCEL_PAUSE))),
            Err(
                Trouble::Content(text)
                | Trouble::Files(text)
                | Trouble::Lacks(text)
                | Trouble::Emptied(text)
                | Trouble::Here { text, .. },
            ) => Err(Error::Failed(text)),
            Err(Trouble::Process(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    }
}

/// Why a stage did not come to its end.
enum Trouble {
    /// Something there is not what it should be; that may pass, and the site is well.
    Content(String),
    /// The program has removed what Baton would know its end by. File systems may show the like for a while.
    Emptied(String),
    /// A system does not take or give files.
    Files(String),
    /// The site has no room for files.
    Lacks(String),
    /// This machine does not take or give a file.
    Here {
        path: PathBuf,
        error: io::Error,
        text: String,
    },
    Site(transport::Error),
    Process(Error),
}

impl From<transport::Error> for Trouble {
    fn from(error: transport::Error) -> Self {
        Trouble::Site(error)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Process(error)
    }
}

impl From<baton_common::store::Error> for Trouble {
    fn from(error: baton_common::store::Error) -> Self {
        Trouble::Process(Error::Interrupted(error.to_string()))
    }
}

impl From<staging::Error> for Trouble {
    fn from(error: staging::Error) -> Self {
        match error {
            staging::Error::Site(error) => Trouble::Site(error),
            staging::Error::Content(text) => Trouble::Content(text),
            staging::Error::Files(text) => Trouble::Files(text),
            staging::Error::Lacks(text) => Trouble::Lacks(text),
            staging::Error::Here { path, error, text } => Trouble::Here { path, error, text },
            staging::Error::Wait(wait) => Trouble::Process(Error::NotNow(wait)),
            staging::Error::Stage(text) => Trouble::Process(Error::Failed(format!("stage: {text}"))),
        }
    }
}

/// What this worker lacks, if that is why it does not take or give a file: where files come to it, only Baton writes.
fn shortage_here(context: &Context, path: &Path, error: &io::Error) -> Option<Shortage> {
    let is_own = path.starts_with(context.root().join(staging::FOLDER));
    if is_own { Some(shortage::below_root(path, error)) } else { shortage::of_worker(error) }
}

/// The job has done its work, and that is not thrown away.
fn stuck(text: &str) -> Error {
    Error::Stuck(format!("stage: {text}; its files stay at the site: play it once that is mended"))
}

/// It is looked at again after this time, if nothing wakes it before.
fn not_yet(at_most: Duration) -> Trouble {
    Error::NotNow(Wait::pause(at_most)).into()
}

/// A process at its site.
struct At<'a> {
    context: &'a Context,
    spec: &'a Spec,
    on_site: &'a OnSite,
    site: Arc<Site>,
}

impl<'a> At<'a> {
    fn new(context: &'a Context, sites: &Sites) -> Result<Self, Error> {
        let spec = context.spec();
        let on_site = spec.on_site.as_ref().ok_or_else(|| Error::Input("no site".into()))?;
        let site = sites.get(&on_site.at);
        let site = site.ok_or_else(|| Error::Interrupted(format!("this worker has no site `{}`", on_site.at)))?;
        Ok(Self { context, spec, on_site, site })
    }

    async fn enter(&self) -> Result<Visit, Trouble> {
        Ok(self.site.enter(self.context).await?)
    }

    fn try_number(&self) -> i64 {
        self.context.try_number()
    }

    fn token(&self) -> String {
        token(self.context.pid(), self.try_number())
    }

    fn sandbox(&self, visit: &Visit) -> String {
        let path = visit.sandbox(self.context.pid(), self.try_number());
        self.context.draft.borrow_mut().outcome.sandbox = Some(format!("{}:{path}", self.site.name));
        path
    }

    async fn row(&self) -> Result<Option<Row>, Trouble> {
        Ok(self.site.store.job(self.context.pid(), self.try_number()).await?)
    }

    /// Whether whatever was on its way when it was submitted has come by now.
    async fn is_settled(&self, row: &Row) -> Result<bool, Trouble> {
        self.has_passed(row.intent_at, self.site.config.submit_timeout + self.site.config.settle).await
    }

    /// Whether so much time has passed since then, in microseconds.
    async fn has_passed(&self, since: i64, time: Duration) -> Result<bool, Trouble> {
        let age = self.site.store.now().await? - since;
        Ok(age > i64::try_from(time.as_micros()).unwrap_or(i64::MAX))
    }

    /// Records that the job of this try is gone, or that there is none.
    async fn record_ended(&self, row: &Row, status: &str) -> Result<(), Trouble> {
        let woken = self.site.store.record_seen(&[Seen::ended(row, status)]).await?;
        self.site.outbox.tell_all(woken).await;
        Ok(())
    }

    /// What the launcher lists under this try's token.
    async fn find(&self, visit: &Visit, row: &Row) -> Result<Result<Option<Listed>, String>, Trouble> {
        let dir = visit.sandbox(self.context.pid(), self.try_number());
        let token = self.token();
        let script = self.site.launcher.list(&[(row, dir)], Some(&token));
        let output = visit.exec(&script).await?;
        Ok(self.site.launcher.listed(&output).map(|listed| {
            let mut ours: Vec<Listed> = listed.into_iter().filter(|listed| listed.token == token).collect();
            ours.sort_by_key(|listed| listed.phase == Phase::Ended);
            ours.into_iter().next()
        }))
    }

    /// Ends the job of this try, if there is one, and makes sure that none comes.
    async fn end_job(&self) -> Result<(), Trouble> {
        let Some(row) = self.row().await? else { return Ok(()) };
        if row.ended_at.is_some() {
            return Ok(());
        }
        self.context.set_stage("ending the job");
        let visit = self.enter().await?;
        let dir = visit.sandbox(self.context.pid(), self.try_number());
        let (give_up, look, dir) = (script::give_up(&dir), script::look_for_mark(&dir), quote(&dir));
        let script = format!(
            "mkdir -p {dir}/.baton || exit 1
             if mkdir {dir}/.baton/submit 2>/dev/null; then echo free; fi
             {give_up}
             {look}"
        );
        let stdout = visit.exec(&script).await?.ok()?;
        let text = String::from_utf8_lossy(&stdout);
        if text.lines().any(|line| line == "free") {
            // Nobody has submitted it, and now nobody can.
            self.record_ended(&row, NEVER).await?;
            return Ok(());
        }
        border!("job-given-up");
        let is_given_up = text.lines().any(|line| line == GIVEN_UP);
        let marked = text.lines().rfind(|line| line.bytes().next().is_some_and(|byte| byte.is_ascii_digit()));
        let found = match self.find(&visit, &row).await? {
            Ok(found) => found,
            Err(complaint) => {
                self.context.log(format!("{}: {complaint}", self.site.name));
                return Err(not_yet(CANCEL_PAUSE * 3));
            }
        };
        let is_over = found.as_ref().is_some_and(|found| found.phase == Phase::Ended);
        let id = found.map(|found| found.external_id).or(row.external_id.clone()).or(marked.map(str::to_owned));
        let Some(id) = id else {
            if text.lines().any(|line| line == UNMARKED) && self.is_settled(&row).await? {
                self.record_ended(&row, NEVER).await?;
                return Ok(());
            }
            // It may yet appear, and would run nothing; the watch looks for it. If it has started, it is known soon.
            return if is_given_up { Ok(()) } else { Err(not_yet(CANCEL_PAUSE)) };
        };
        if is_over {
            self.record_ended(&row, "CANCELLED").await?;
            return Ok(());
        }
        let cancelled = visit.exec(&self.site.launcher.cancel(&id)).await?;
        border!("job-cancelled");
        let is_gone = match self.find(&visit, &row).await? {
            Ok(Some(found)) => found.phase == Phase::Ended,
            // A list without it is no proof that it has ended.
            Ok(None) => self.site.launcher.is_cancelled(&cancelled),
            Err(_) => false,
        };
        if !is_gone {
            return Err(not_yet(CANCEL_PAUSE));
        }
        self.record_ended(&row, "CANCELLED").await
    }
}

impl Job {
    /// The same, with the sites of its worker.
    pub(super) fn with(self, sites: Arc<Sites>) -> Self {
        Self { sites: Some(sites), ..self }
    }

    fn sites(&self) -> &Sites {
        self.sites.as_deref().expect("its registry gives them to it")
    }

    async fn stage_in(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("stage-in");
        self.wait_for_refusal(at).await?;
        let visit = at.enter().await?;
        let dir = at.sandbox(&visit);
        let script = Script {
            spec: at.spec,
            on_site: at.on_site,
            site: &at.site.config,
            launcher: at.site.launcher,
            dir: &dir,
            token: &at.token(),
            pid: &at.context.pid().to_string(),
            try_number: &self.try_number.to_string(),
        };
        staging::stage_in(&at.site, &visit, at.context, at.on_site, &dir, script.files()).await?;
        border!("job-staged");
        self.refusal = self.refusal.take().filter(|refusal| !refusal.is_of_staging());
        self.stage = Stage::Submit;
        Ok(Advance::Again)
    }

    async fn monitor(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("monitor");
        match at.row().await? {
            Some(row) if row.ended_at.is_some() => {
                self.stage = Stage::Out;
                Ok(Advance::Again)
            }
            Some(row) if row.external_id.is_some() => Err(not_yet(LOOK_AGAIN)),
            Some(_) | None => {
                self.stage = Stage::Settle;
                Ok(Advance::Again)
            }
        }
    }

    async fn stage_out(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("stage-out");
        let visit = at.enter().await?;
        let dir = at.sandbox(&visit);
        let Left { done, outputs } = left(&visit, &dir).await?;
        let Some(done) = done else {
            return self.without_mark(at, &visit, &dir, outputs).await;
        };
        let done: Done = serde_json::from_slice(&done)
            .map_err(|error| Trouble::Content(format!("its done.json is not what a script writes: {error}")))?;
        let is_timed_out = done.is_timed_out(at.site.launcher, at.spec);
        if done.signalled
            && let Some(row) = at.row().await?
        {
            // The program has sent the signal to all of its group, or the scheduler has ended the job: that knows it.
            let left = at.look(&visit, &dir).await?;
            if left.is_again || SCHEDULER_ENDS.contains(&row.look.status.as_str()) {
                return self.ended_by_scheduler(at, &visit, &dir, &row, left, outputs).await;
            }
        }
        if done.phase == "pre" && !is_timed_out {
            let failed = format!("env: `pre` ended with exit {} before the program", done.exit);
            let error = Error::Failed(with_last_line(failed, &outputs));
            at.context.draft.borrow_mut().outputs = outputs;
            return Err(error.into());
        }
        at.context.draft.borrow_mut().outputs = outputs;
        let is_ok = at.spec.ok_exit.contains(&done.exit) && !is_timed_out;
        let missing = staging::stage_out(&at.site, &visit, at.context, at.on_site, &dir, is_ok).await?.reason();
        border!("job-collected");
        let mut draft = at.context.draft.borrow_mut();
        draft.outcome.signal = done.signal();
        let ended = is_timed_out.then(|| walltime(at.spec));
        draft.outcome.reason = match missing {
            None => ended,
            Some(missing) if is_ok => {
                draft.is_incomplete = true;
                Some(missing)
            }
            Some(missing) => Some(format!("{}; {missing}", ended.unwrap_or_else(|| format!("exit {}", done.exit)))),
        };
        Ok(Advance::Finished { exit: done.exit })
    }

    /// The job is gone, and its script has not said how the program ended.
    async fn without_mark(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        outputs: Vec<Output>,
    ) -> Result<Advance, Trouble> {
        let Some(row) = at.row().await? else { return Err(Error::failed("its job is not recorded any more").into()) };
        let left = at.look(visit, dir).await?;
        if left.is_given_up {
            at.context.log(format!("{}: the try was given up before its job came; it is done again", at.site.name));
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        let patience = match row.look.status.as_str() {
            "TIMEOUT" | "DEADLINE" | "OUT_OF_MEMORY" | "CANCELLED" | LOST if !left.is_again => END_PATIENCE,
            _ => at.site.config.settle.max(END_PATIENCE),
        };
        if !at.has_passed(row.ended_at.unwrap_or(row.intent_at), patience).await? {
            return Ok(Advance::After(SETTLE_PAUSE));
        }
        self.ended_by_scheduler(at, visit, dir, &row, left, outputs).await
    }

    /// The end of a job that its script has not said, or that something else than its program has caused.
    async fn ended_by_scheduler(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        row: &Row,
        left: Traces,
        outputs: Vec<Output>,
    ) -> Result<Advance, Trouble> {
        let status = if left.is_again { "REQUEUED" } else { row.look.status.as_str() };
        let ended_before = with_last_line("env: `pre` ended the job before the program".to_owned(), &outputs);
        at.context.draft.borrow_mut().outputs = outputs;
        match status {
            "TIMEOUT" | "DEADLINE" | "OUT_OF_MEMORY" => {
                let missing = match left.has_run {
                    true => staging::stage_out(&at.site, visit, at.context, at.on_site, dir, false).await?.reason(),
                    false => None,
                };
                let (reason, exit) = match status {
                    "OUT_OF_MEMORY" => ("oom: it took more memory than it may".to_owned(), 137),
                    _ => (walltime(at.spec), 124),
                };
                let reason = [Some(reason), missing].into_iter().flatten().collect::<Vec<_>>().join("; ");
                at.context.draft.borrow_mut().outcome.reason = Some(reason);
                Ok(Advance::Finished { exit })
            }
            "CANCELLED" => Err(Error::Failed("scheduler: the job was cancelled at the site".into()).into()),
            "COMPLETED" | "FAILED" | ENDED | "" if left.has_begun && !left.has_run => {
                Err(Error::Failed(ended_before).into())
            }
            "COMPLETED" | "FAILED" | ENDED | "" => {
                let said = visit.read(&format!("{dir}/.baton/launcher.out")).await?.unwrap_or_default();
                let said = String::from_utf8_lossy(&said);
                let last = said.lines().last().unwrap_or("nothing");
                if left.has_run {
                    let text = format!("scheduler: the job ended without its mark; its script said: {last}");
                    return Err(Error::Failed(text).into());
                }
                let why = format!("its script ran nothing, and said: {last}");
                self.begin_again(at, visit, dir, row, &left, &why).await
            }
            status => self.begin_again(at, visit, dir, row, &left, status).await,
        }
    }

    /// The site has lost the job: it is submitted again at no charge, unless its program had started.
    async fn begin_again(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        row: &Row,
        left: &Traces,
        why: &str,
    ) -> Result<Advance, Trouble> {
        // No job of this try may run any more, and none may still do so.
        let cancel = row.external_id.as_ref().map(|id| at.site.launcher.cancel(id)).unwrap_or_default();
        let end = format!("{}{}{cancel}\ntrue", script::give_up(dir), script::prevent_start(dir));
        let stdout = visit.exec(&end).await?.ok()?;
        // Scripts of earlier versions leave another sign that the program has started.
        if left.has_run || has_line(&stdout, RAN) {
            let text = format!("lost: the site lost the job after its program had started ({why})");
            return Err(Error::Failed(text).into());
        }
        self.lost += 1;
        if self.lost > LOST_MAX {
            return Err(Error::Failed(format!("lost: the site has lost {LOST_MAX} jobs of it ({why})")).into());
        }
        at.context.log(format!("{}: the job was lost ({why}); it is submitted again", at.site.name));
        at.context.begin_next_try();
        Ok(Advance::Again)
    }
}

/// What a job has left that says how far it came.
struct Traces {
    /// The try was given up before its job came.
    is_given_up: bool,
    /// The launcher has started the job again.
    is_again: bool,
    /// Its script came to the lines of `pre`.
    has_begun: bool,
    /// Its program was started.
    has_run: bool,
}

impl At<'_> {
    async fn look(&self, visit: &Visit, dir: &str) -> Result<Traces, Trouble> {
        let stdout = visit.exec(&script::look_for_start(dir)).await?.ok()?;
        Ok(Traces {
            is_given_up: gives_up(&stdout),
            is_again: has_line(&stdout, AGAIN),
            has_begun: has_line(&stdout, BEGUN),
            has_run: has_line(&stdout, RAN),
        })
    }
}

/// A failure with the last line that the job wrote to its standard error.
fn with_last_line(text: String, outputs: &[Output]) -> String {
    let stderr = outputs.iter().find(|output| output.stream == Stream::Stderr);
    let written = stderr.map(|output| [&output.head[..], &output.tail[..]].concat()).unwrap_or_default();
    let written = String::from_utf8_lossy(&written);
    match written.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("{text}: {}", transport::shortened(&line.replace(char::is_control, " "))),
        None => text,
    }
}

/// Whether what was printed says that the try is given up.
fn gives_up(stdout: &[u8]) -> bool {
    has_line(stdout, GIVEN_UP)
}

fn has_line(stdout: &[u8], word: &str) -> bool {
    stdout.split(|byte| *byte == b'\n').any(|line| line == word.as_bytes())
}

fn walltime(spec: &Spec) -> String {
    match spec.time {
        Some(limit) => format!("walltime: its time limit of {} has passed", duration::format(limit)),
        None => "walltime: the site's time limit has passed".to_owned(),
    }
}

/// What a job has left beside the files of its program.
struct Left {
    /// Its `done.json`.
    done: Option<Vec<u8>>,
    /// What is kept of both streams.
    outputs: Vec<Output>,
}

/// All of it by one command: a login node starts a shell for each.
async fn left(visit: &Visit, dir: &str) -> Result<Left, Trouble> {
    let part = STREAM_PART_BYTES;
    let script = format!(
        "if [ ! -d {0} ]; then
           [ \"$(stat -c %h {second} 2>/dev/null)\" != 1 ] || exit {EMPTIED}
           echo 'its folder at the site is not there' >&2; exit {NO_FOLDER}
         fi
         for file in {0}/done.json {0}/stderr {0}/stdout; do
           [ -f \"$file\" ] || {{ echo -; continue; }}
           size=$(wc -c < \"$file\") || exit 1
           echo $size
           [ $size -gt {1} ] || {{ head -c $size \"$file\" || exit 1; continue; }}
           head -c {part} \"$file\" && tail -c {part} \"$file\" || exit 1
         done",
        quote(&format!("{dir}/.baton")),
        2 * part,
        second = quote(&staging::second_name(dir)),
    );
    let output = visit.exec(&script).await?;
    match output.exit {
        Some(NO_FOLDER) => return Err(Trouble::Content(output.complaint())),
        Some(EMPTIED) => {
            return Err(Trouble::Emptied(format!(
                "the program has removed {dir}/.baton, and with it how it has ended"
            )));
        }
        Some(_) | None => {}
    }
    let bytes = output.ok()?;
    let mut rest = &bytes[..];
    let done = next_left(&mut rest)?.map(|(content, _)| content);
    let mut outputs = Vec::new();
    for stream in [Stream::Stderr, Stream::Stdout] {
        if let Some((mut head, total_bytes)) = next_left(&mut rest)?
            && total_bytes > 0
        {
            let tail = head.split_off(head.len().min(part));
            outputs.push(Output { stream, head, tail, total_bytes });
        }
    }
    Ok(Left { done, outputs })
}

/// What was printed of the next file, and its length.
fn next_left(rest: &mut &[u8]) -> Result<Option<(Vec<u8>, u64)>, Trouble> {
    let changed = || Trouble::Content("what the job has left changes while it is read".to_owned());
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(changed)?;
    let (line, content) = (&rest[..end], &rest[end + 1..]);
    *rest = content;
    if line == b"-" {
        return Ok(None);
    }
    let total_bytes: u64 =
        std::str::from_utf8(line).ok().and_then(|line| line.trim().parse().ok()).ok_or_else(changed)?;
    let count = usize::try_from(total_bytes).unwrap_or(usize::MAX).min(2 * STREAM_PART_BYTES);
    let (content, rest_of_all) = content.split_at_checked(count).ok_or_else(changed)?;
    *rest = rest_of_all;
    Ok(Some((content.to_vec(), total_bytes)))
}
