//! Limits that end endless loops.

use baton_common::store::blob::Checkpoint;

/// Limits on the advances of a process.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Advances of a process in total.
    pub advances_max: u64,
    /// Advances in a row that change neither state nor values nor progress.
    pub idle_advances_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { advances_max: 1_000_000, idle_advances_max: 1_000 }
    }
}

impl Limits {
    /// Returns why a process with this checkpoint must end.
    pub(crate) fn broken_by(&self, checkpoint: &Checkpoint) -> Option<String> {
        if checkpoint.advances >= self.advances_max {
            return Some(format!("it reached the limit of {} advances", checkpoint.advances));
        }
        (checkpoint.idle_advances >= self.idle_advances_max)
            .then(|| format!("it made {} advances in a row without any progress", checkpoint.idle_advances))
    }
}
