//! The submission of a job, and the search for a job whose submission was not answered.

use std::time::Duration;

use baton_common::border;
use baton_common::failpoint::fail_point;
use baton_common::spec::Wait as Pauses;
use baton_common::store::site::{Intent, Job as Row, NEVER};
use serde::{Deserialize, Serialize};

use super::at::At;
use super::ending::gives_up;
use super::trouble::Trouble;
use super::{Job, NO_FOLDER, SETTLE_PAUSE, Stage};
use crate::author::process::{Advance, Error, Wait};
use crate::machine::random::random;
use crate::site::launcher::Launcher;
use crate::site::script::{self, GIVEN_UP, UNMARKED};
use crate::site::{LOOK_AGAIN, Visit};
use crate::transport::{self, Output, quote};

/// Added to the time limit of a submission, for the network.
const SUBMIT_MARGIN: Duration = Duration::from_secs(15);

/// The longest pause between two submissions that the scheduler refuses for now. The first pause is the site's `poll`.
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(600);

/// The prefix of a refusal that concerns files, not the scheduler.
const STAGING: &str = "stage: ";

/// The exit of a submission whose try was submitted before.
const ALREADY_TAKEN: i32 = 42;

/// The last of several refusals in a row, of a submission or of its files, for a reason that may pass.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Refusal {
    /// The number of refusals in a row.
    count: u32,
    /// The earliest time of the next submission, in microseconds by the clock of the database.
    until: i64,
    /// The message of the site.
    reason: String,
}

impl Refusal {
    /// Whether the site refused files, not a submission.
    pub(super) fn is_of_staging(&self) -> bool {
        self.reason.starts_with(STAGING)
    }
}

impl Job {
    /// Parks the process until the next submission may follow the last refusal.
    pub(super) async fn wait_for_refusal(&self, at: &At<'_>) -> Result<(), Trouble> {
        let Some(refusal) = &self.refusal else { return Ok(()) };
        let left = refusal.until - at.site.store.now().await?;
        if left <= 0 {
            return Ok(());
        }
        let at_most = Duration::from_micros(left.cast_unsigned());
        Err(Error::NotNow(Wait { waits_for: at.site.refused(&refusal.reason), at_most }).into())
    }

    /// Handles a site without space for the files of the job.
    pub(super) async fn wait_for_room(&mut self, at: &At<'_>, text: String) -> Result<Advance, Error> {
        at.context.log(format!("{}: {text}", at.site.name));
        self.refusal = Some(self.refused(at, format!("{STAGING}{text}")).await?);
        Ok(Advance::Again)
    }

    pub(super) async fn submit(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("submit");
        self.wait_for_refusal(at).await?;
        let visit = at.enter().await?;
        if !self.intend(at).await? {
            self.stage = Stage::Settle;
            return Ok(Advance::Again);
        }
        border!("job-intended");
        let answer = send(at, &visit).await;
        border!("job-submitted");
        if let Err(error @ transport::Error::NoChannel(_)) = answer {
            // Nothing was sent, so the intent is withdrawn.
            at.site.store.withdraw(at.context.fence, self.try_number).await?;
            return Err(error.into());
        }
        let Some(row) = at.row().await? else { return Err(Error::failed("the row of its job is gone").into()) };
        self.stage = Stage::Settle;
        match answer {
            Ok(output) => self.answered(at, &visit, &row, &output).await,
            Err(error) => {
                // The command may have run, so there may be a job.
                at.context.log(format!("{}: {error}", at.site.name));
                at.site.failed(&error).await;
                Ok(Advance::Again)
            }
        }
    }

    /// Records the intent to submit this try; `false` if it was recorded before.
    async fn intend(&self, at: &At<'_>) -> Result<bool, Trouble> {
        let no_room = |at_most| Err(Error::NotNow(Wait { waits_for: at.site.room(), at_most }).into());
        let limits = at.site.config.limits;
        match at.site.store.intend(at.context.fence, self.try_number, &at.site.name, limits).await? {
            Intent::Recorded => Ok(true),
            Intent::Known => Ok(false),
            Intent::Full => no_room(LOOK_AGAIN),
            Intent::TooSoon(micros) => {
                no_room(Duration::from_micros(micros.max(0).cast_unsigned()) + Duration::from_secs(1))
            }
            Intent::Lost => Err(Error::Interrupted("the lease was lost".into()).into()),
        }
    }

    /// Records what the answer to a submission says; the stage is [`Stage::Settle`] already.
    async fn answered(&mut self, at: &At<'_>, visit: &Visit, row: &Row, output: &Output) -> Result<Advance, Trouble> {
        let complaint = output.complaints();
        match read(at.site.launcher, output) {
            Answer::Submitted(id) => {
                at.site.store.submitted(at.context.pid(), self.try_number, &id).await?;
                border!("job-known");
                at.context.log(format!("{}: job {id}", at.site.name));
                self.refusal = None;
                self.stage = Stage::Monitor;
            }
            Answer::NoFolder => {
                at.record_ended(row, NEVER).await?;
                return Err(Error::failed("stage: its folder at the site is missing").into());
            }
            Answer::AlreadyTaken => {}
            Answer::Unsure => {
                at.context.log(format!("{}: the submission may have created a job: {complaint}", at.site.name));
                // If it did not, the next submission has to wait.
                self.refusal = Some(self.refused(at, complaint).await?);
            }
            Answer::RefusedForNow => {
                at.context.log(format!("{}: the scheduler does not accept the job now: {complaint}", at.site.name));
                let refusal = self.refused(at, complaint).await?;
                // No command is left that could submit it, so the same try can be submitted again.
                let free = format!("rmdir {}", quote(&format!("{}/.baton/submit", at.sandbox(visit))));
                visit.exec(&free).await?.ok()?;
                at.site.store.withdraw(at.context.fence, self.try_number).await?;
                self.refusal = Some(refusal);
                self.stage = Stage::Submit;
            }
            Answer::Refused => {
                // If there is a job nevertheless, it cannot run its program.
                if gives_up(&visit.exec(&script::give_up(&at.sandbox(visit))).await?.ok()?) {
                    at.record_ended(row, NEVER).await?;
                    return Err(Error::Failed(format!("scheduler: {complaint}")).into());
                }
            }
        }
        Ok(Advance::Again)
    }

    /// Returns one more refusal, with the time of the next submission.
    async fn refused(&self, at: &At<'_>, reason: String) -> Result<Refusal, Error> {
        let count = self.refusal.as_ref().map_or(0, |refusal| refusal.count).saturating_add(1);
        let pauses =
            Pauses { first: at.site.config.poll.min(REFUSED_PAUSE_MAX), max: REFUSED_PAUSE_MAX, ..Pauses::default() };
        let pause = pauses.before(count, random());
        let now = at.site.store.now().await.map_err(|error| Error::Interrupted(error.to_string()))?;
        let until = now.saturating_add(i64::try_from(pause.as_micros()).unwrap_or(i64::MAX));
        Ok(Refusal { count, until, reason })
    }

    /// Finds the job of a submission that was not answered, or makes sure that there is none.
    pub(super) async fn settle(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("settle");
        let Some(row) = at.row().await? else {
            self.stage = Stage::Submit;
            return Ok(Advance::Again);
        };
        if row.ended_at.is_some() && row.look.status == NEVER {
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        if row.external_id.is_some() || row.ended_at.is_some() {
            self.stage = Stage::Monitor;
            return Ok(Advance::Again);
        }
        let visit = at.enter().await?;
        let sandbox = at.sandbox(&visit);
        let dir = quote(&sandbox);
        let is_settled = at.is_settled(&row).await?;
        // If no submission has been made yet, this prevents a later one.
        let give_up = script::give_up(&sandbox);
        let take = format!(
            "mkdir -p {dir}/.baton || exit 1
             if mkdir {dir}/.baton/submit 2>/dev/null; then
               {give_up}
             fi"
        );
        if gives_up(&visit.exec(&take).await?.ok()?) {
            at.record_ended(&row, NEVER).await?;
            border!("job-never");
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        let found = at.find(&visit, &row).await?;
        // After that time the try is given up, so no job of it can run its program any more.
        let is_missing = is_settled && matches!(found, Ok(None));
        let give_up = if is_missing { give_up } else { String::new() };
        let look = script::look_for_mark(&sandbox);
        let stdout = visit.exec(&format!("{give_up}{look}")).await?.ok()?;
        let text = String::from_utf8_lossy(&stdout);
        let marked = text.lines().find(|line| line.bytes().next().is_some_and(|byte| byte.is_ascii_digit()));
        let found = match found {
            Ok(found) => found.map(|found| found.external_id),
            Err(complaint) => {
                at.context.log(format!("{}: {complaint}", at.site.name));
                None
            }
        };
        if let Some(id) = found.or(marked.map(str::to_owned)) {
            at.context.log(format!("{}: found job {id}, whose submission was not answered", at.site.name));
            at.site.store.submitted(at.context.pid(), self.try_number, &id).await?;
            self.stage = Stage::Monitor;
            return Ok(Advance::Again);
        }
        if is_missing && text.lines().any(|line| line == UNMARKED) {
            at.record_ended(&row, NEVER).await?;
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        if text.lines().any(|line| line == GIVEN_UP) {
            border!("job-given-up");
            at.context.log(format!("{}: the submission created no job; submitting again", at.site.name));
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        Ok(Advance::After(SETTLE_PAUSE))
    }
}

/// The meaning of the answer to a submission.
enum Answer {
    /// The launcher has the job under this id.
    Submitted(String),
    /// The folder of the try is missing; nothing was submitted.
    NoFolder,
    /// Another submission of this try was made before.
    AlreadyTaken,
    /// There may be a job.
    Unsure,
    /// There is no job, for a reason that passes by itself.
    RefusedForNow,
    /// There is no job.
    Refused,
}

fn read(launcher: &dyn Launcher, output: &Output) -> Answer {
    if output.exit == Some(0)
        && let Some(id) = launcher.submitted(&String::from_utf8_lossy(&output.stdout))
    {
        return Answer::Submitted(id);
    }
    match output.exit {
        Some(NO_FOLDER) => Answer::NoFolder,
        Some(ALREADY_TAKEN) => Answer::AlreadyTaken,
        Some(_) | None if launcher.is_unsure(output) => Answer::Unsure,
        Some(_) | None if launcher.may_pass(output) => Answer::RefusedForNow,
        Some(_) | None => Answer::Refused,
    }
}

/// Submits the job, unless this try was submitted before.
async fn send(at: &At<'_>, visit: &Visit) -> Result<Output, transport::Error> {
    let limit = at.site.config.submit_timeout;
    let command = format!(
        "cd {} || exit {NO_FOLDER}
         mkdir .baton/submit 2>/dev/null || exit {ALREADY_TAKEN}
         timeout -k 5 {} /bin/sh -c {}",
        quote(&at.sandbox(visit)),
        limit.as_secs().max(1),
        quote(at.site.launcher.submit())
    );
    fail_point!("submission-refused", |_| Err(transport::Error::NoChannel("no more sessions".to_owned())));
    visit.session.exec(&command, b"", limit + SUBMIT_MARGIN).await
}
