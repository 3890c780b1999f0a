//! A process at its site: its row, its job in the launcher's list, and the end of that job.

use std::sync::Arc;
use std::time::Duration;

use baton_common::border;
use baton_common::spec::{OnSite, Spec};
use baton_common::store::site::{Job as Row, NEVER, Seen, token};

use super::CANCEL_PAUSE;
use super::trouble::{Trouble, not_yet};
use crate::author::process::{Context, Error};
use crate::site::launcher::{CANCELLED, Listed, Phase};
use crate::site::script::{self, GIVEN_UP, UNMARKED};
use crate::site::{Site, Sites, Visit};
use crate::transport::quote;

/// A process at its site.
pub(super) struct At<'a> {
    pub(super) context: &'a Context,
    pub(super) spec: &'a Spec,
    pub(super) on_site: &'a OnSite,
    pub(super) site: Arc<Site>,
}

/// The marks in the folder of a try.
struct Mark {
    /// This call took the submission: no job was or can be submitted.
    is_free: bool,
    is_given_up: bool,
    is_unmarked: bool,
    /// The job that the script recorded.
    external_id: Option<String>,
}

impl<'a> At<'a> {
    pub(super) fn new(context: &'a Context, sites: &Sites) -> Result<Self, Error> {
        let spec = context.spec();
        let on_site = spec.on_site.as_ref().ok_or_else(|| Error::Input("no site".into()))?;
        let site = sites.get(&on_site.at);
        let site = site.ok_or_else(|| Error::Interrupted(format!("this worker has no site `{}`", on_site.at)))?;
        Ok(Self { context, spec, on_site, site })
    }

    pub(super) async fn enter(&self) -> Result<Visit, Trouble> {
        Ok(self.site.enter(self.context).await?)
    }

    pub(super) fn try_number(&self) -> i64 {
        self.context.try_number()
    }

    pub(super) fn token(&self) -> String {
        token(self.context.pid(), self.try_number())
    }

    /// The sandbox of the try, which the outcome names from now on.
    pub(super) fn sandbox(&self, visit: &Visit) -> String {
        let path = visit.sandbox(self.context.pid(), self.try_number());
        self.context.draft.borrow_mut().outcome.sandbox = Some(format!("{}:{path}", self.site.name));
        path
    }

    pub(super) async fn row(&self) -> Result<Option<Row>, Trouble> {
        Ok(self.site.store.job(self.context.pid(), self.try_number()).await?)
    }

    /// Whether a submission that was still on its way at the intent must have arrived by now.
    pub(super) async fn is_settled(&self, row: &Row) -> Result<bool, Trouble> {
        self.has_passed(row.intent_at, self.site.config.submit_timeout + self.site.config.settle).await
    }

    /// Whether this much time has passed since then, in microseconds by the clock of the database.
    pub(super) async fn has_passed(&self, since: i64, time: Duration) -> Result<bool, Trouble> {
        let age = self.site.store.now().await? - since;
        Ok(age > i64::try_from(time.as_micros()).unwrap_or(i64::MAX))
    }

    /// Records that the job of this try is gone, or that there is none.
    pub(super) async fn record_ended(&self, row: &Row, status: &str) -> Result<(), Trouble> {
        let woken = self.site.store.record_seen(&[Seen::ended(row, status)]).await?;
        self.site.outbox.announce_all(woken).await;
        Ok(())
    }

    /// The job that the launcher lists under this try's token; one that has not ended comes first.
    pub(super) async fn find(&self, visit: &Visit, row: &Row) -> Result<Result<Option<Listed>, String>, Trouble> {
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

    /// Ends the job of this try, if there is one, and prevents a later one.
    pub(super) async fn end_job(&self) -> Result<(), Trouble> {
        let Some(row) = self.row().await? else { return Ok(()) };
        if row.ended_at.is_some() {
            return Ok(());
        }
        self.context.set_stage("ending the job");
        let visit = self.enter().await?;
        let mark = self.give_up(&visit).await?;
        if mark.is_free {
            return self.record_ended(&row, NEVER).await;
        }
        border!("job-given-up");
        let found = match self.find(&visit, &row).await? {
            Ok(found) => found,
            Err(complaint) => {
                self.context.log(format!("{}: {complaint}", self.site.name));
                return Err(not_yet(CANCEL_PAUSE * 3));
            }
        };
        let is_over = found.as_ref().is_some_and(|found| found.phase == Phase::Ended);
        let id = found.map(|found| found.external_id).or(row.external_id.clone()).or(mark.external_id);
        let Some(id) = id else {
            if mark.is_unmarked && self.is_settled(&row).await? {
                return self.record_ended(&row, NEVER).await;
            }
            // A job may still appear. If the try is given up, it runs nothing, and the watch ends it; else its script has
            // started and soon records its id.
            return if mark.is_given_up { Ok(()) } else { Err(not_yet(CANCEL_PAUSE)) };
        };
        if is_over {
            return self.record_ended(&row, CANCELLED).await;
        }
        self.cancel(&visit, &row, &id).await
    }

    /// Takes the submission and gives the try up, where that is still possible; reads what is there otherwise.
    async fn give_up(&self, visit: &Visit) -> Result<Mark, Trouble> {
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
        let has = |word: &str| text.lines().any(|line| line == word);
        let external_id = text.lines().rfind(|line| line.bytes().next().is_some_and(|byte| byte.is_ascii_digit()));
        Ok(Mark {
            is_free: has("free"),
            is_given_up: has(GIVEN_UP),
            is_unmarked: has(UNMARKED),
            external_id: external_id.map(str::to_owned),
        })
    }

    async fn cancel(&self, visit: &Visit, row: &Row, id: &str) -> Result<(), Trouble> {
        let cancelled = visit.exec(&self.site.launcher.cancel(id)).await?;
        border!("job-cancelled");
        let is_gone = match self.find(visit, row).await? {
            Ok(Some(found)) => found.phase == Phase::Ended,
            // A list without the job does not prove that it has ended.
            Ok(None) => self.site.launcher.is_cancelled(&cancelled),
            Err(_) => false,
        };
        if !is_gone {
            return Err(not_yet(CANCEL_PAUSE));
        }
        self.record_ended(row, CANCELLED).await
    }
}
