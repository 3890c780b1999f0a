//! The health of the three connections: written by the tasks that keep them, read by all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::meter::Meter;
use super::{Down, Health};

/// One of the three connections. Acknowledgements have a separate one, since a broker with an alarm stops reading from
/// every connection that publishes. Control messages have a separate one, since many publishes must not delay them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Publish,
    Control,
    Consume,
}

impl Link {
    /// The word in the connection's name.
    pub(super) fn word(self) -> &'static str {
        match self {
            Link::Publish => "publish",
            Link::Control => "control",
            Link::Consume => "consume",
        }
    }
}

/// The shared health.
#[derive(Debug)]
pub(super) struct HealthState {
    pub(super) meter: Meter,
    state: Mutex<State>,
    health_tx: watch::Sender<Health>,
}

#[derive(Debug, Default)]
struct State {
    links: [LinkState; 3],
    /// The problems with items that cannot be declared or consumed, by name.
    problems: BTreeMap<String, String>,
    /// The queues that are consumed now.
    consumed: BTreeSet<String>,
    /// The task queues whose last publish was not confirmed in time.
    mute: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct LinkState {
    is_needed: bool,
    up_since: Option<Instant>,
    blocked: Option<String>,
    error: Option<String>,
}

impl HealthState {
    pub(super) fn new() -> Self {
        HealthState {
            meter: Meter::default(),
            state: Mutex::default(),
            health_tx: watch::Sender::new(Health::default()),
        }
    }

    /// Records that this program needs the connection.
    pub(super) fn need(&self, link: Link) {
        self.change(|state| state.links[link as usize].is_needed = true);
    }

    /// Records that the connection is open.
    pub(super) fn up(&self, link: Link) {
        self.change(|state| {
            let link = &mut state.links[link as usize];
            *link = LinkState { is_needed: link.is_needed, up_since: Some(Instant::now()), blocked: None, error: None };
        });
    }

    /// Records that the connection is lost or could not be opened; without an error it was closed on purpose. The same
    /// error is logged only once, however long the broker is away.
    pub(super) fn down(&self, link: Link, error: Option<String>) {
        self.change(|state| {
            let word = link.word();
            let link = &mut state.links[link as usize];
            if let Some(error) = error.as_ref().filter(|&error| link.error.as_ref() != Some(error)) {
                tracing::warn!(connection = word, "broker: {error}");
            }
            *link = LinkState { is_needed: link.is_needed, up_since: None, blocked: None, error };
        });
    }

    /// Records whether the broker blocks publishers on this connection.
    pub(super) fn block(&self, link: Link, reason: Option<String>) {
        self.change(|state| state.links[link as usize].blocked = reason);
    }

    /// Records a problem with a named item, or that it is usable again.
    pub(super) fn problem(&self, name: &str, problem: Option<String>) {
        self.change(|state| match problem {
            Some(problem) => {
                if state.problems.insert(name.to_owned(), problem.clone()).as_ref() != Some(&problem) {
                    tracing::error!(name, "{problem}");
                }
            }
            None => {
                state.problems.remove(name);
            }
        });
    }

    /// Records the queues that are consumed now.
    pub(super) fn consumed(&self, queues: BTreeSet<String>) {
        self.lock().consumed = queues;
    }

    /// Records whether the last publish to a queue was not confirmed in time.
    pub(super) fn mute(&self, queue: &str, is_mute: bool) {
        let mut state = self.lock();
        if is_mute {
            state.mute.insert(queue.to_owned());
        } else {
            state.mute.remove(queue);
        }
    }

    /// Forgets the unconfirmed publishes, which say nothing about a new connection.
    pub(super) fn unmute(&self) {
        self.lock().mute.clear();
    }

    /// Whether messages that are published to this queue arrive here.
    pub(super) fn delivers(&self, queue: &str) -> bool {
        let state = self.lock();
        state.consumed.contains(queue) && !state.mute.contains(queue)
    }

    /// How long the connection has been open.
    pub(super) fn up_for(&self, link: Link) -> Option<Duration> {
        self.lock().links[link as usize].up_since.map(|since| since.elapsed())
    }

    /// The reason why nothing can be published over this connection now.
    pub(super) fn refusal(&self, link: Link) -> Option<Down> {
        let state = self.lock();
        let link = &state.links[link as usize];
        match (&link.blocked, link.up_since) {
            (Some(reason), _) => Some(Down(format!("the broker blocks publishers: memory or disk alarm ({reason})"))),
            (None, None) => Some(Down(link.error.clone().unwrap_or_else(|| "not connected".to_owned()))),
            (None, Some(_)) => None,
        }
    }

    pub(super) fn watch(&self) -> watch::Receiver<Health> {
        self.health_tx.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let health = {
            let mut state = self.lock();
            change(&mut state);
            state.health()
        };
        self.health_tx.send_if_modified(|old| {
            let is_new = *old != health;
            *old = health;
            is_new
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn health(&self) -> Health {
        let error = self.links.iter().find_map(|link| link.error.clone());
        Health {
            connected: self.links.iter().all(|link| !link.is_needed || link.up_since.is_some()),
            unreachable: self.links.iter().any(|link| link.is_needed && link.error.is_some()),
            blocked: self.links.iter().any(|link| link.blocked.is_some()),
            last_error: error.or_else(|| self.problems.values().next().cloned()),
        }
    }
}
