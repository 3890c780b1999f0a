//! Decisions about a process after an advance, without any effect. The loop of a held process and the test kit share them.

use std::time::Duration;

use baton_common::spec::{Retry, Spec};
use baton_common::store::blob::{Checkpoint, Outcome};

use crate::author::process::{Advance, Draft, Error};

/// Waits shorter than this are spent in memory, with the lease; longer ones are parked. A parked second costs two
/// commits and a message, a held one nothing but memory.
pub(crate) const PARK_FROM: Duration = Duration::from_secs(1);

/// The checkpoint after an advance that returned `advance` and left the process in `state`. Takes the values and the
/// progress out of the draft.
pub(crate) fn next_checkpoint(last: &Checkpoint, advance: &Advance, state: Vec<u8>, draft: &mut Draft) -> Checkpoint {
    let (values, progress) = (std::mem::take(&mut draft.values), draft.progress.take());
    let is_idle = state == last.state && values == last.values && progress == last.progress;
    // A process that waits between two looks at the world is no loop.
    let waits = matches!(*advance, Advance::After(pause) | Advance::Linger(pause) if pause >= PARK_FROM);
    Checkpoint {
        advances: last.advances + 1,
        idle_advances: if is_idle && !waits { last.idle_advances + 1 } else { 0 },
        failures: last.failures,
        last_error: last.last_error.clone(),
        values,
        progress,
        state,
    }
}

/// How a process has come to its end by itself.
pub(crate) struct Ending {
    /// Whether the spec calls this success.
    pub(crate) ok: bool,
    /// Why the outcome is as it is, where the exit code alone does not say it.
    pub(crate) reason: Option<String>,
    /// The program has succeeded, but some of its outputs are missing.
    pub(crate) is_incomplete: bool,
    /// What the advance has reported.
    pub(crate) outcome: Outcome,
}

impl Ending {
    /// The end of a process that returned this exit code.
    pub(crate) fn of(spec: &Spec, exit: i32, draft: &Draft) -> Self {
        let (outcome, is_incomplete) = (draft.outcome.clone(), draft.is_incomplete);
        let ok = spec.ok_exit.contains(&exit) && !is_incomplete;
        let reason = outcome.reason.clone().or_else(|| (!ok).then(|| format!("exit {exit}")));
        Self { ok, reason, is_incomplete, outcome }
    }

    /// Why the process is to be tried again. A program that has succeeded is not run again for its missing outputs.
    pub(crate) fn failure(&self) -> Option<String> {
        (!self.ok && !self.is_incomplete).then(|| self.reason.clone().unwrap_or_default())
    }
}

/// The checkpoint before a failed try, with one more failure, and the pause before the next try; `None` when none is left.
/// `random` is in 0..1.
pub(crate) fn next_try(retry: &Retry, last: &Checkpoint, reason: &str, random: f64) -> Option<(Checkpoint, Duration)> {
    let failures = last.failures + 1;
    if failures >= retry.max {
        return None;
    }
    let pause = retry.wait.before(failures, random);
    Some((Checkpoint { failures, last_error: Some(reason.to_owned()), ..last.clone() }, pause))
}

/// The process's own state in a checkpoint; `None` before the first advance.
pub(crate) fn state_of(checkpoint: &Checkpoint) -> Option<&[u8]> {
    Some(&*checkpoint.state).filter(|state| !state.is_empty())
}

/// The error of an advance that panicked. Its state may be half-changed, so only its checkpoint can be trusted.
pub(crate) fn panicked(text: &str) -> Error {
    Error::Input(format!("it panicked: {text}"))
}
