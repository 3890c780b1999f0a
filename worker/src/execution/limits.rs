//! Limits that end processes that advance for ever.

use baton_common::store::blob::Checkpoint;

/// Limits on the advances of a process. A process that exceeds one is excepted.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of advances in total.
    pub advances_max: u64,
    /// Maximum number of advances in a row that change neither the state nor the values nor the progress.
    pub idle_advances_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { advances_max: 1_000_000, idle_advances_max: 1_000 }
    }
}

impl Limits {
    /// Why a process with this checkpoint is excepted; `None` if it may continue.
    pub(crate) fn broken_by(&self, checkpoint: &Checkpoint) -> Option<String> {
        if checkpoint.advances >= self.advances_max {
            return Some(format!("it has made {} advances, and more are not allowed", checkpoint.advances));
        }
        (checkpoint.idle_advances >= self.idle_advances_max)
            .then(|| format!("it has made {} advances in a row without any progress", checkpoint.idle_advances))
    }
}
