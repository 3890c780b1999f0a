//! The submission of a job, and what became of one that was not answered.

use std::time::Duration;

use baton_common::border;
use baton_common::failpoint::fail_point;
use baton_common::spec::Wait as Pauses;
use baton_common::store::site::{Intent, NEVER};
use serde::{Deserialize, Serialize};

use super::{At, Job, NO_FOLDER, SETTLE_PAUSE, Stage, Trouble, gives_up};
use crate::author::process::{Advance, Error, Wait};
use crate::machine::random::random;
use crate::site::LOOK_AGAIN;
use crate::site::script::{self, GIVEN_UP, UNMARKED};
use crate::transport::{self, quote};

/// Beyond the time that a submission may take: for the way there and back.
const SUBMIT_MARGIN: Duration = Duration::from_secs(15);

/// The longest pause between two submissions that a scheduler refuses for now; the first is that between two looks.
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(600);

/// What a refusal of the site's folder begins with.
const STAGING: &str = "stage: ";

/// The exit of a submission that was made before.
const ALREADY_TAKEN: i32 = 42;

/// What was not accepted, a submission or its files, for a reason that passes.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Refusal {
    /// Those in a row.
    count: u32,
    /// Nothing is submitted before, in microseconds by the clock of the database.
    until: i64,
    /// What was said.
    reason: String,
}

impl Refusal {
    /// It is the site's folder that took nothing, and not its scheduler.
    pub(super) fn is_of_staging(&self) -> bool {
        self.reason.starts_with(STAGING)
    }
}

impl Job {
    /// What the site has refused is tried again when its time has come.
    pub(super) async fn wait_for_refusal(&self, at: &At<'_>) -> Result<(), Trouble> {
        let Some(refusal) = &self.refusal else { return Ok(()) };
        let left = refusal.until - at.site.store.now().await?;
        if left <= 0 {
            return Ok(());
        }
        let at_most = Duration::from_micros(left.cast_unsigned());
        Err(Error::NotNow(Wait { waits_for: at.site.refused(&refusal.reason), at_most }).into())
    }

    /// The site has no room for the files of the job.
    pub(super) async fn wait_for_room(&mut self, at: &At<'_>, text: String) -> Result<Advance, Error> {
        at.context.log(format!("{}: {text}", at.site.name));
        self.refusal = Some(self.refused(at, format!("{STAGING}{text}")).await?);
        Ok(Advance::Again)
    }

    pub(super) async fn submit(&mut self, at: &At<'_>) -> Result<Advance, Trouble> {
        at.context.set_stage("submit");
        self.wait_for_refusal(at).await?;
        let visit = at.enter().await?;
        let fence = at.context.fence;
        match at.site.store.intend(fence, self.try_number, &at.site.name, at.site.config.limits).await? {
            Intent::Recorded => {}
            Intent::Known => {
                self.stage = Stage::Settle;
                return Ok(Advance::Again);
            }
            Intent::Full => return Err(Error::NotNow(Wait { waits_for: at.site.room(), at_most: LOOK_AGAIN }).into()),
            Intent::TooSoon(micros) => {
                let at_most = Duration::from_micros(micros.max(0).cast_unsigned()) + Duration::from_secs(1);
                return Err(Error::NotNow(Wait { waits_for: at.site.room(), at_most }).into());
            }
            Intent::Lost => return Err(Error::Interrupted("the lease was lost".into()).into()),
        }
        border!("job-intended");
        let limit = at.site.config.submit_timeout;
        let command = format!(
            "cd {} || exit {NO_FOLDER}
             mkdir .baton/submit 2>/dev/null || exit {ALREADY_TAKEN}
             timeout -k 5 {} /bin/sh -c {}",
            quote(&at.sandbox(&visit)),
            limit.as_secs().max(1),
            quote(at.site.launcher.submit())
        );
        let submitting = async {
            fail_point!("submission-refused", |_| Err(transport::Error::NoChannel("no more sessions".to_owned())));
            visit.session.exec(&command, b"", limit + SUBMIT_MARGIN).await
        };
        let answer = submitting.await;
        border!("job-submitted");
        if let Err(error @ transport::Error::NoChannel(_)) = answer {
            // Nothing has gone there, so the try is as it was before.
            at.site.store.withdraw(fence, self.try_number).await?;
            return Err(error.into());
        }
        let Some(row) = at.row().await? else { return Err(Error::failed("its intent is not there any more").into()) };
        self.stage = Stage::Settle;
        let output = match answer {
            Ok(output) => output,
            Err(error) => {
                // Whatever it was, a job may have come of it.
                at.context.log(format!("{}: {error}", at.site.name));
                at.site.failed(&error).await;
                return Ok(Advance::Again);
            }
        };
        let stdout = String::from_utf8_lossy(&output.stdout);
        if output.exit == Some(0)
            && let Some(id) = at.site.launcher.submitted(&stdout)
        {
            at.site.store.submitted(at.context.pid(), self.try_number, &id).await?;
            border!("job-known");
            at.context.log(format!("{}: job {id}", at.site.name));
            self.refusal = None;
            self.stage = Stage::Monitor;
            return Ok(Advance::Again);
        }
        if output.exit == Some(NO_FOLDER) {
            at.record_ended(&row, NEVER).await?;
            return Err(Error::failed("stage: its folder at the site is gone").into());
        }
        let complaint = output.complaints();
        if output.exit == Some(ALREADY_TAKEN) {
            return Ok(Advance::Again);
        }
        if at.site.launcher.is_unsure(&output) {
            at.context.log(format!("{}: the submission may have made a job: {complaint}", at.site.name));
            // If none has come of it, the next submission does not follow at once.
            self.refusal = Some(self.refused(at, complaint).await?);
            return Ok(Advance::Again);
        }
        if at.site.launcher.may_pass(&output) {
            at.context.log(format!("{}: the scheduler does not accept the job now: {complaint}", at.site.name));
            let refusal = self.refused(at, complaint).await?;
            // No command is left that could submit it, so the same try may be submitted again.
            let free = format!("rmdir {}", quote(&format!("{}/.baton/submit", at.sandbox(&visit))));
            visit.exec(&free).await?.ok()?;
            at.site.store.withdraw(fence, self.try_number).await?;
            self.refusal = Some(refusal);
            self.stage = Stage::Submit;
            return Ok(Advance::Again);
        }
        // Whatever was refused so, no job of it can run its program.
        if !gives_up(&visit.exec(&script::give_up(&at.sandbox(&visit))).await?.ok()?) {
            return Ok(Advance::Again);
        }
        at.record_ended(&row, NEVER).await?;
        Err(Error::Failed(format!("scheduler: {complaint}")).into())
    }

    /// One more refusal, and when the next submission may follow.
    async fn refused(&self, at: &At<'_>, reason: String) -> Result<Refusal, Error> {
        let count = self.refusal.as_ref().map_or(0, |refusal| refusal.count).saturating_add(1);
        let pauses =
            Pauses { first: at.site.config.poll.min(REFUSED_PAUSE_MAX), max: REFUSED_PAUSE_MAX, ..Pauses::default() };
        let pause = pauses.before(count, random());
        let now = at.site.store.now().await.map_err(|error| Error::Interrupted(error.to_string()))?;
        let until = now.saturating_add(i64::try_from(pause.as_micros()).unwrap_or(i64::MAX));
        Ok(Refusal { count, until, reason })
    }

    /// Finds out what became of a submission without an answer.
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
        // If nobody has taken the submission yet, nobody can any more.
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
        // When the time is over, the try is given up: then no job of it can run its program any more.
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
            at.context.log(format!("{}: job {id}, found after its submission was not answered", at.site.name));
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
            at.context.log(format!("{}: no job has come of the submission; it is done again", at.site.name));
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        Ok(Advance::After(SETTLE_PAUSE))
    }
}
