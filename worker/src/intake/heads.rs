//! The head of each queue: a process that was announced long before it has lost its message.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The largest `announced_at` delivered from each queue.
#[derive(Default)]
pub(crate) struct Heads {
    by_queue: Mutex<HashMap<String, i64>>,
}

impl Heads {
    /// Notes the delivery of a task that was announced at this time.
    pub(crate) fn note(&self, queue: &str, announced_at: Option<i64>) {
        let Some(announced_at) = announced_at else { return };
        let mut heads = self.by_queue.lock().unwrap_or_else(PoisonError::into_inner);
        let head = heads.entry(queue.to_owned()).or_insert(announced_at);
        *head = (*head).max(announced_at);
    }

    /// Returns the head of this queue.
    pub(crate) fn of(&self, queue: &str) -> Option<i64> {
        self.by_queue.lock().unwrap_or_else(PoisonError::into_inner).get(queue).copied()
    }
}
