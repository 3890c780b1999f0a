//! What ends processes that advance for ever.

use baton_common::store::blob::Checkpoint;

/// What ends endless loops.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Advances that a process may make in all.
    pub advances_max: u64,
    /// Advances in a row that change neither its state nor its values nor its progress.
    pub idle_advances_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { advances_max: 1_000_000, idle_advances_max: 1_000 }
    }
}

impl Limits {
    /// Why a process with this checkpoint must not go on.
    pub(crate) fn broken_by(&self, checkpoint: &Checkpoint) -> Option<String> {
        if checkpoint.advances >= self.advances_max {
            return Some(format!("it has made {} advances, and more are not allowed", checkpoint.advances));
        }
        (checkpoint.idle_advances >= self.idle_advances_max)
            .then(|| format!("it has made {} advances in a row without any progress", checkpoint.idle_advances))
    }
}
