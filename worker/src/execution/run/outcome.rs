//! The end of a process, and its next step after an advance that failed or has to wait.

use baton_common::state::{Desired, State};
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::control::{Answer, Request};
use baton_common::store::writer::{Fence, How, Verb};
use tracing::{info, warn};

use super::{Hold, Run, STUCK_PAUSE};
use crate::author::process::{Error, Wait, by_worker};
use crate::execution::decide::{Ending, next_try};
use crate::machine::random::random;

impl Run {
    /// Ends a process whose last advance returned an exit code, or parks it for another try.
    pub(super) async fn finish(&mut self, exit: i32, checkpoint: Checkpoint) -> Hold {
        let ending = Ending::of(self.context.spec(), exit, &self.context.draft.borrow());
        if let Some(failure) = ending.failure()
            && let Some(hold) = self.retry(failure).await
        {
            return hold;
        }
        let Ending { ok, reason, is_incomplete, outcome } = ending;
        let outcome = Outcome {
            exit: Some(exit),
            ok,
            values: checkpoint.values.clone(),
            sandbox: self.location(&outcome),
            ..outcome
        };
        self.checkpoint = checkpoint;
        let how = if ok { How::Ok } else { How::Error };
        let attempt = Some((how, reason));
        let state = if is_incomplete { State::Excepted } else { State::Finished };
        self.outcome = Some(outcome.clone());
        self.write(Verb::End { state, outcome }, Some(self.checkpoint.clone()), attempt).await
    }

    /// Parks the process until its wait is over.
    pub(super) async fn wait(&mut self, Wait { waits_for, at_most }: Wait, killing: bool) -> Hold {
        let hold = self.write(Verb::Wait { waits_for, wake_in: at_most, killing }, None, None).await;
        if hold == Hold::Gone {
            self.execution.timer.due_in(at_most);
        }
        hold
    }

    /// Handles an advance that returned an error.
    pub(super) async fn fail(&mut self, error: Error) -> Hold {
        match error {
            Error::NotNow(wait) => self.wait(wait, false).await,
            Error::Interrupted(reason) => {
                info!(pid = %self.context.pid(), reason, "interrupted; giving the process back at no charge");
                self.write(Verb::GiveBack, None, Some((How::Drained, Some(reason)))).await
            }
            Error::Lacking(shortage) => {
                let reason = Some(shortage.to_string());
                // Noted first, so that this worker does not claim the process again at once.
                self.execution.health.note(shortage);
                self.execution.gate.take_what_it_can().await;
                self.write(Verb::GiveBack, None, Some((How::Drained, reason))).await
            }
            Error::Failed(reason) => {
                if let Some(hold) = self.retry(reason.clone()).await {
                    return hold;
                }
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
            Error::Input(reason) => {
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
            Error::Stuck(reason) => self.pause(reason).await,
        }
    }

    /// Pauses the process as an operator would. A person has to remove the cause, which the reason names.
    pub(super) async fn pause(&mut self, reason: String) -> Hold {
        let Fence { pid, .. } = self.context.fence;
        warn!(%pid, reason, "the process is stuck; pausing it");
        let by = by_worker(&self.execution.facilities.identity.name);
        let request = Request { reason: Some(reason.clone()), ..Request::new(Desired::Pause, by) };
        let asked = tokio::select! {
            biased;
            asked = self.execution.store.control_held(self.context.fence, &request) => asked,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        match asked {
            // If a kill was requested, it is obeyed; if the lease is lost, the write notices.
            Ok(Answer::Recorded(_) | Answer::Dying | Answer::Ended(_) | Answer::Absent) => {
                self.write(Verb::Pause, None, Some((How::Error, Some(reason)))).await
            }
            Err(error) => {
                warn!(%pid, %error, "the pause could not be recorded; trying again");
                self.wait(Wait::pause(STUCK_PAUSE), false).await
            }
        }
    }

    /// Parks the process until its next try; `None` if none is left.
    pub(super) async fn retry(&mut self, reason: String) -> Option<Hold> {
        let (checkpoint, pause) = next_try(&self.context.spec().retry, &self.checkpoint, &reason, random())?;
        info!(pid = %self.context.pid(), reason, wait_ms = pause.as_millis(), "failed; trying again later");
        let attempt = Some((How::Error, Some(reason)));
        let hold = self.write_as(Verb::Park { wake_in: pause }, Some(checkpoint), attempt, 1).await;
        self.execution.timer.due_in(pause);
        Some(hold)
    }

    pub(super) async fn killed(&self) -> Outcome {
        let reason = self.execution.store.killed_because(self.context.pid()).await.ok().flatten();
        let outcome = self.context.draft.borrow().outcome.clone();
        Outcome {
            reason: Some(reason.unwrap_or_else(|| "killed".into())),
            values: self.checkpoint.values.clone(),
            sandbox: self.location(&outcome),
            ..Outcome::default()
        }
    }

    fn location(&self, outcome: &Outcome) -> Option<String> {
        // A sandbox at a site names the site already.
        let is_elsewhere = self.context.spec().on_site.is_some();
        outcome.sandbox.as_ref().map(|path| {
            if is_elsewhere { path.clone() } else { format!("{}:{path}", self.execution.facilities.identity.host) }
        })
    }

    pub(super) async fn end(&mut self, state: State, outcome: Outcome, how: How) {
        let attempt = Some((how, outcome.reason.clone()));
        self.outcome = Some(outcome.clone());
        self.write(Verb::End { state, outcome }, None, attempt).await;
    }
}
