//! What follows an advance: its checkpoint, the next try, or the end of the process.

use std::time::Duration;

use baton_common::store::blob::Checkpoint;
use serde_json::Map;

use super::{End, Harness, Held, How, Step};
use crate::author::process::{Advance, Error};
use crate::execution::decide::{Ending, PARK_FROM, next_checkpoint, next_try};

impl Harness {
    /// Makes an advance durable.
    pub(super) fn commit(&mut self, advance: &Advance) -> Step {
        let Held { context, process, checkpoint } = self.held.as_mut().expect("it has just advanced");
        let state = match process.save() {
            Ok(state) => state,
            Err(error) => return self.fail(error),
        };
        let next = next_checkpoint(checkpoint, advance, state, &mut context.draft.borrow_mut());
        if let Some(reason) = self.limits.broken_by(&next)
            && !matches!(advance, Advance::Finished { .. })
        {
            return Step::Ended(self.except(reason));
        }
        match *advance {
            Advance::Again => {
                self.keep(next);
                Step::Again
            }
            Advance::After(pause) | Advance::Linger(pause) => {
                self.keep(next);
                self.row.wait = pause;
                if !matches!(advance, Advance::After(_)) {
                    return Step::Linger(pause);
                }
                if pause >= PARK_FROM {
                    self.leave(pause);
                }
                Step::After(pause)
            }
            Advance::Finished { exit } => self.finish(exit, next),
        }
    }

    pub(super) fn finish(&mut self, exit: i32, checkpoint: Checkpoint) -> Step {
        let Held { context, .. } = self.held.as_ref().expect("it has just advanced");
        let ending = Ending::of(&self.spec, exit, &context.draft.borrow());
        if let Some(failure) = ending.failure()
            && let Some(step) = self.retry(&failure)
        {
            return step;
        }
        let values = checkpoint.values.clone();
        self.keep(checkpoint);
        let Ending { ok, reason, .. } = ending;
        Step::Ended(self.end(End { how: How::Finished, exit: Some(exit), ok, reason, values }))
    }

    /// An advance has ended with an error.
    pub(super) fn fail(&mut self, error: Error) -> Step {
        match error {
            Error::NotNow(wait) => {
                self.leave(wait.at_most);
                Step::Waits(wait.at_most)
            }
            Error::Interrupted(reason) => {
                self.leave(Duration::ZERO);
                Step::GivenBack { reason }
            }
            Error::Lacking(shortage) => {
                self.leave(Duration::ZERO);
                Step::GivenBack { reason: shortage.to_string() }
            }
            Error::Failed(reason) => self.retry(&reason).unwrap_or_else(|| Step::Ended(self.except(reason))),
            Error::Input(reason) => Step::Ended(self.except(reason)),
            Error::Stuck(reason) => {
                self.pause();
                Step::Paused { reason }
            }
        }
    }

    /// Parks the process until its next try; `None` when there is none left.
    pub(super) fn retry(&mut self, reason: &str) -> Option<Step> {
        let Held { checkpoint, .. } = self.held.as_ref().expect("it has just advanced");
        let (checkpoint, pause) = next_try(&self.spec.retry, checkpoint, reason, 0.0)?;
        self.keep(checkpoint);
        self.row.try_number += 1;
        self.leave(pause);
        Some(Step::Retried { reason: reason.to_owned(), pause })
    }

    /// Stores a checkpoint.
    pub(super) fn keep(&mut self, checkpoint: Checkpoint) {
        self.keep_log();
        self.row.checkpoint = Some(checkpoint.to_bytes());
        if let Some(held) = &mut self.held {
            held.context.live.set_advances(checkpoint.advances);
            held.checkpoint = checkpoint;
        }
    }

    pub(super) fn keep_log(&mut self) {
        let Some(held) = &self.held else { return };
        for output in held.context.draft.borrow_mut().take_outputs() {
            let text = [output.head, output.tail].concat();
            self.row.log = String::from_utf8_lossy(&text).into_owned();
        }
    }

    /// The process leaves its holder in order and waits for this time.
    pub(super) fn leave(&mut self, wait: Duration) {
        self.keep_log();
        self.let_go();
        self.row.wait = wait;
    }

    /// Drops what is in memory.
    pub(super) fn let_go(&mut self) {
        // A process may hold timers or sockets of the runtime.
        let _runtime = self.runtime.enter();
        self.held = None;
        let log = std::mem::take(&mut self.row.log);
        self.row.earlier_log.push_str(&log);
    }

    pub(super) fn except(&mut self, reason: String) -> End {
        self.end(End { how: How::Excepted, exit: None, ok: false, reason: Some(reason), values: Map::new() })
    }

    pub(super) fn end(&mut self, end: End) -> End {
        self.leave(Duration::ZERO);
        self.row.end = Some(end.clone());
        end
    }
}
