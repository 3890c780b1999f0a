//! Writes under the fence: checkpoints, ends and everything else that takes a row out of `held`.

use baton_common::communicator::ReplyTo;
use baton_common::state::{Place, State};
use baton_common::store::Error as StoreError;
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::writer::{Attempt, Fence, Fenced, How, Verb, Written};
use tracing::{debug, warn};

use super::{Hold, Run};
use crate::author::live::WRITING;

impl Run {
    /// Writes a checkpoint; the process stays held.
    pub(super) async fn keep(&mut self, checkpoint: Checkpoint) -> Hold {
        let (has_outputs, begins_try) = {
            let draft = self.context.draft.borrow();
            (draft.has_outputs(), draft.begins_try)
        };
        if has_outputs || begins_try {
            return Box::pin(self.write_as(Verb::Keep, Some(checkpoint), None, i64::from(begins_try))).await;
        }
        self.context.live.set_stage(WRITING);
        let fence = self.context.fence;
        let write = self.execution.writer.checkpoint(fence, &checkpoint);
        let written = tokio::select! {
            biased;
            written = write => written,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        if written.is_err() && Box::pin(self.end_if_rejected(&written)).await {
            return Hold::Gone;
        }
        self.adopt(written, Some(checkpoint))
    }

    pub(super) async fn write(
        &mut self,
        verb: Verb,
        checkpoint: Option<Checkpoint>,
        ended: Option<(How, Option<String>)>,
    ) -> Hold {
        self.write_as(verb, checkpoint, ended, 0).await
    }

    /// Writes under the fence and adopts the row.
    pub(super) async fn write_as(
        &mut self,
        verb: Verb,
        checkpoint: Option<Checkpoint>,
        ended: Option<(How, Option<String>)>,
        more_tries: i64,
    ) -> Hold {
        let fence = self.context.fence;
        let fenced = Fenced {
            fence,
            verb,
            checkpoint: checkpoint.as_ref().map(Into::into),
            try_number: self.context.try_number() + more_tries,
            ended: ended.map(|(how, reason)| Attempt { started_at: self.claimed_at, how, reason }),
            outputs: self.context.draft.borrow_mut().take_outputs(),
        };
        self.context.live.set_stage(WRITING);
        let written = tokio::select! {
            biased;
            written = self.execution.writer.write(fenced) => written,
            () = self.context.live.until(|orders| orders.abandon) => return Hold::Gone,
        };
        if written.is_err() && Box::pin(self.end_if_rejected(&written)).await {
            return Hold::Gone;
        }
        if matches!(written, Ok(Some(_))) {
            self.context.try_number.set(self.context.try_number() + more_tries);
        }
        self.adopt(written, checkpoint)
    }

    /// Adopts the row after a write.
    pub(super) fn adopt(
        &mut self,
        written: Result<Option<Written>, StoreError>,
        checkpoint: Option<Checkpoint>,
    ) -> Hold {
        let fence = self.context.fence;
        match written {
            Ok(Some(written)) => {
                if let Some(checkpoint) = checkpoint {
                    self.context.live.set_advances(checkpoint.advances);
                    self.checkpoint = checkpoint;
                    if std::mem::take(&mut self.is_quarantined) {
                        self.execution.quarantine_free.notify_one();
                    }
                }
                if written.place == Place::Held {
                    self.context.live.wish(written.desired, written.urgent);
                    return Hold::Held;
                }
                self.context.live.set_left_as(written.state);
                self.left = Some(written);
                Hold::Gone
            }
            Ok(None) => {
                warn!(pid = %fence.pid, epoch = fence.epoch, "the lease is lost; dropping the process");
                self.outcome = None;
                Hold::Gone
            }
            Err(error) => {
                warn!(pid = %fence.pid, %error, "not written; the reconciling beat gives the process back");
                self.outcome = None;
                Hold::Gone
            }
        }
    }

    /// Ends the process if the database rejected its last write for good; otherwise every later holder would repeat the
    /// same advance and the same write. If the end is rejected too, the reconciling beat gives the process back.
    pub(super) async fn end_if_rejected(&mut self, written: &Result<Option<Written>, StoreError>) -> bool {
        let Err(StoreError::Rejected(cause)) = written else { return false };
        if std::mem::replace(&mut self.is_rejected, true) {
            return false;
        }
        let reason = format!("the database can never store what it has written: {cause}");
        Box::pin(self.end(State::Excepted, Outcome::because(reason), How::Error)).await;
        true
    }

    /// Publishes the messages that are due when the process is no longer held.
    pub(super) async fn leave(&mut self, reply_to: Option<Vec<u8>>) {
        // Everything that it still owns, such as the handle of a program, is dropped before the messages.
        self.process = None;
        let Some(written) = self.left.take() else { return };
        let Fence { pid, .. } = self.context.fence;
        debug!(%pid, place = written.place.word(), state = written.state.word(), "left this worker");
        match written.place {
            Place::Queued => self.execution.outbox.announce(pid, written.queue, written.announced_at).await,
            Place::Ended | Place::Parked | Place::Held => {
                let exit = self.outcome.as_ref().and_then(|outcome| outcome.exit);
                self.execution.outbox.publish_event(pid, written.state, exit);
            }
        }
        if written.place == Place::Ended
            && let Some(reply_to) = reply_to.as_deref().and_then(ReplyTo::from_bytes)
        {
            self.execution.outbox.answer_end(pid, written.state, self.outcome.as_ref(), reply_to).await;
        }
    }
}
