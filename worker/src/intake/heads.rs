//! How far each queue has been delivered: what was told long before that has no message any more.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The largest `announced_at` that was delivered from each queue.
#[derive(Default)]
pub(crate) struct Heads {
    by_queue: Mutex<HashMap<String, i64>>,
}

impl Heads {
    /// Notes that a task was delivered that was told at this time.
    pub(crate) fn note(&self, queue: &str, announced_at: Option<i64>) {
        let Some(announced_at) = announced_at else { return };
        let mut heads = self.by_queue.lock().unwrap_or_else(PoisonError::into_inner);
        let head = heads.entry(queue.to_owned()).or_insert(announced_at);
        *head = (*head).max(announced_at);
    }

    /// The largest `announced_at` delivered from this queue.
    pub(crate) fn of(&self, queue: &str) -> Option<i64> {
        self.by_queue.lock().unwrap_or_else(PoisonError::into_inner).get(queue).copied()
    }
}
