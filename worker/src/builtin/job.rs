//! A leaf that runs at a site: it is staged in, submitted, watched and staged out, with a checkpoint after each stage.
//!
//! The site decides whether a try was submitted and whether its program was started: `.baton/submit` and `.baton/started`
//! in its folder can each be taken only once. A lost answer therefore costs time, but never a second run.

mod at;
mod ending;
mod submission;
mod trouble;

use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::at::At;
use self::ending::{Left, left, walltime, with_last_line};
use self::submission::Refusal;
use self::trouble::{Trouble, not_yet};
use crate::author::process::{Advance, Context, Error, Process};
use crate::site::launcher::{self, ENDED};
use crate::site::script::{Done, Script};
use crate::site::{LOOK_AGAIN, Sites, staging};

/// Pause between two looks for a job whose submission was not answered, or for files that a job should have left.
const SETTLE_PAUSE: Duration = Duration::from_secs(3);

/// Looks for files that are missing or incomplete: file systems may show them late.
const LOOKS_MAX: u32 = 5;

/// Pause between two attempts to end a job.
const CANCEL_PAUSE: Duration = Duration::from_secs(2);

/// The exit of Baton's commands at a site if the folder of the try is missing.
const NO_FOLDER: i32 = 41;

/// The state that a checkpoint keeps.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Job {
    #[serde(skip)]
    sites: Option<Arc<Sites>>,
    /// The try that `stage` belongs to.
    try_number: i64,
    stage: Stage,
    /// Jobs that the site has lost.
    #[serde(default)]
    lost: u32,
    /// Looks for files that were missing or incomplete.
    #[serde(default)]
    looks: u32,
    /// The last refusal for a reason that may pass.
    #[serde(default)]
    refusal: Option<Refusal>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    /// Its files are sent.
    #[default]
    In,
    /// The job is to be submitted.
    Submit,
    /// Whether there is a job is unknown.
    Settle,
    /// The job waits or runs, and its process is parked.
    Monitor,
    /// The results are fetched.
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
        // Other processes may wait for the channel that this advance has returned.
        at.site.changed.notify_one();
        match advanced {
            Ok(advance) => Ok(advance),
            Err(trouble) => self.after(&at, trouble).await,
        }
    }

    async fn end_outside(&mut self, context: &Context) -> Result<(), Error> {
        let at = At::new(context, self.sites())?;
        match at.end_job().await {
            Ok(()) => Ok(()),
            Err(trouble) => Err(trouble::after_ending(&at, trouble, CANCEL_PAUSE).await),
        }
    }
}

impl Job {
    /// Equips a job with the sites of its worker.
    pub(super) fn with(self, sites: Arc<Sites>) -> Self {
        Self { sites: Some(sites), ..self }
    }

    fn sites(&self) -> &Sites {
        self.sites.as_deref().expect("the registry equips every job with them")
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
            .map_err(|error| staging::Error::Content(format!("its done.json is malformed: {error}")))?;
        let is_timed_out = done.is_timed_out(at.site.launcher, at.spec);
        let is_ok = at.spec.ok_exit.contains(&done.exit) && !is_timed_out;
        let is_signalled = done.signalled || done.signal().is_some();
        if (is_signalled || !is_ok)
            && let Some(mut row) = at.row().await?
        {
            // Either the program signalled itself or its whole group, or the launcher ended the job; the launcher knows which.
            // Its signal may reach the script only after the script has reported the end of the program.
            let mut traces = at.look(&visit, &dir).await?;
            if is_signalled && row.look.status == ENDED && self.is_unsettled(at, &visit, &mut row, &mut traces).await? {
                return Ok(Advance::After(SETTLE_PAUSE));
            }
            if is_signalled && traces.is_again || launcher::end(at.site.launcher, &row.look.status).is_by_launcher() {
                return self.ended_by_launcher(at, &visit, &dir, &row, traces, outputs).await;
            }
        }
        if done.phase == "pre" && !is_timed_out {
            let failed = format!("env: `pre` ended with exit {} before the program", done.exit);
            let error = Error::Failed(with_last_line(failed, &outputs));
            at.context.draft.borrow_mut().outputs = outputs;
            return Err(error.into());
        }
        at.context.draft.borrow_mut().outputs = outputs;
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
}
