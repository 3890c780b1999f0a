//! Counters of the traffic on the connections since the start.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::message::Traffic;

/// The counters. [`Traffic`] gives the meaning of each.
#[derive(Debug, Default)]
pub(super) struct Meter {
    published: AtomicU64,
    published_bytes: AtomicU64,
    delivered: AtomicU64,
    ack_frames: AtomicU64,
    event_messages: AtomicU64,
    replies: AtomicU64,
}

impl Meter {
    pub(super) fn published(&self, n_bytes: usize) {
        self.published.fetch_add(1, Relaxed);
        self.published_bytes.fetch_add(n_bytes as u64, Relaxed);
    }

    pub(super) fn delivered(&self) {
        self.delivered.fetch_add(1, Relaxed);
    }

    pub(super) fn ack_frames(&self, n_frames: u64) {
        self.ack_frames.fetch_add(n_frames, Relaxed);
    }

    pub(super) fn event_message(&self) {
        self.event_messages.fetch_add(1, Relaxed);
    }

    pub(super) fn reply(&self) {
        self.replies.fetch_add(1, Relaxed);
    }

    pub(super) fn read(&self) -> Traffic {
        Traffic {
            published: self.published.load(Relaxed),
            published_bytes: self.published_bytes.load(Relaxed),
            delivered: self.delivered.load(Relaxed),
            ack_frames: self.ack_frames.load(Relaxed),
            event_messages: self.event_messages.load(Relaxed),
            replies: self.replies.load(Relaxed),
        }
    }
}
