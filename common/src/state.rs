//! The states of a process and the only function that moves between them.
//!
//! ```text
//! created ─► running ◄─► waiting          pause: from created, running, waiting ─► paused (remembers where it was)
//!               │           │             play:  paused ─► where it was
//!               └──► finished · excepted · killed      (final; kill is legal from every state that is not)
//! ```
//!
//! The store's statements decide inside the database, where the row is locked; a test compares each of them with
//! [`State::next`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Accepted; no worker has claimed it yet.
    Created,
    /// A worker advances it, or it is ready for one.
    Running,
    /// It waits for a fact: a timer, a child, a job.
    Waiting,
    /// Stopped by request; `play` returns it to where it was.
    Paused(Live),
    /// It came to its end by itself, with whatever exit.
    Finished,
    /// Baton, a site or the process's own code broke.
    Excepted,
    /// Ended by request.
    Killed,
}

/// The states that a pause interrupts and `play` returns to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Live {
    /// See [`State::Created`].
    Created,
    /// See [`State::Running`].
    Running,
    /// See [`State::Waiting`].
    Waiting,
}

/// What can happen to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A worker took its lease.
    Claim,
    /// Its advance ended with a wait.
    Wait,
    /// What it waited for has come.
    Wake,
    /// Its worker died or gave it back.
    Free,
    /// Somebody asked for a pause.
    Pause,
    /// Somebody asked to go on.
    Play,
    /// Its last advance came to the end.
    Finish,
    /// Something broke for good.
    Except,
    /// Somebody asked for its end.
    Kill,
}

/// The event does not apply in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a process that is {state} cannot {event:?}")]
pub struct IllegalTransition {
    /// The state the process is in, unchanged.
    pub state: State,
    /// What was tried.
    pub event: Event,
}

impl State {
    /// The state after `event`. Total and pure.
    ///
    /// # Errors
    /// [`IllegalTransition`] when the event has no meaning in this state; the state stays as it is.
    pub fn next(&self, event: Event) -> Result<State, IllegalTransition> {
        let illegal = Err(IllegalTransition { state: *self, event });
        match self {
            State::Created => match event {
                Event::Claim => Ok(State::Running),
                Event::Free => Ok(State::Created),
                Event::Pause => Ok(State::Paused(Live::Created)),
                Event::Play => Ok(State::Created),
                Event::Except => Ok(State::Excepted),
                Event::Kill => Ok(State::Killed),
                Event::Wait | Event::Wake | Event::Finish => illegal,
            },
            State::Running => match event {
                Event::Claim | Event::Wake | Event::Free | Event::Play => Ok(State::Running),
                Event::Wait => Ok(State::Waiting),
                Event::Pause => Ok(State::Paused(Live::Running)),
                Event::Finish => Ok(State::Finished),
                Event::Except => Ok(State::Excepted),
                Event::Kill => Ok(State::Killed),
            },
            State::Waiting => match event {
                Event::Wake => Ok(State::Running),
                Event::Play => Ok(State::Waiting),
                Event::Pause => Ok(State::Paused(Live::Waiting)),
                Event::Except => Ok(State::Excepted),
                Event::Kill => Ok(State::Killed),
                Event::Claim | Event::Wait | Event::Free | Event::Finish => illegal,
            },
            State::Paused(before) => match event {
                Event::Play => Ok(State::from(*before)),
                Event::Pause | Event::Wake => Ok(*self),
                Event::Except => Ok(State::Excepted),
                Event::Kill => Ok(State::Killed),
                Event::Claim | Event::Wait | Event::Free | Event::Finish => illegal,
            },
            State::Finished | State::Excepted | State::Killed => match event {
                Event::Claim
                | Event::Wait
                | Event::Wake
                | Event::Free
                | Event::Pause
                | Event::Play
                | Event::Finish
                | Event::Except
                | Event::Kill => illegal,
            },
        }
    }

    /// Whether the process has come to its end; nothing changes it any more.
    pub fn is_final(&self) -> bool {
        match self {
            State::Finished | State::Excepted | State::Killed => true,
            State::Created | State::Running | State::Waiting | State::Paused(_) => false,
        }
    }

    /// The word for tables, messages and selectors.
    pub fn word(&self) -> &'static str {
        match self {
            State::Created => "created",
            State::Running => "running",
            State::Waiting => "waiting",
            State::Paused(_) => "paused",
            State::Finished => "finished",
            State::Excepted => "excepted",
            State::Killed => "killed",
        }
    }

    /// The number in the database's `state` column.
    pub const fn code(&self) -> i16 {
        match self {
            State::Created => CREATED,
            State::Running => RUNNING,
            State::Waiting => WAITING,
            State::Paused(_) => PAUSED,
            State::Finished => FINISHED,
            State::Excepted => EXCEPTED,
            State::Killed => KILLED,
        }
    }

    /// The state that the columns `state` and `before` stand for; `None` for numbers that no version wrote.
    pub fn from_codes(state: i16, before: Option<i16>) -> Option<State> {
        match state {
            CREATED => Some(State::Created),
            RUNNING => Some(State::Running),
            WAITING => Some(State::Waiting),
            PAUSED => match before? {
                CREATED => Some(State::Paused(Live::Created)),
                RUNNING => Some(State::Paused(Live::Running)),
                WAITING => Some(State::Paused(Live::Waiting)),
                _ => None,
            },
            FINISHED => Some(State::Finished),
            EXCEPTED => Some(State::Excepted),
            KILLED => Some(State::Killed),
            _ => None,
        }
    }
}

impl From<Live> for State {
    fn from(live: Live) -> State {
        match live {
            Live::Created => State::Created,
            Live::Running => State::Running,
            Live::Waiting => State::Waiting,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Every word of a state, in the order of a life; for selectors and help texts.
pub const WORDS: [&str; 7] = ["created", "running", "waiting", "paused", "finished", "excepted", "killed"];

const CREATED: i16 = 0;
const RUNNING: i16 = 1;
const WAITING: i16 = 2;
const PAUSED: i16 = 3;
const FINISHED: i16 = 4;
const EXCEPTED: i16 = 5;
const KILLED: i16 = 6;

/// The one place where a process is; every rule of recovery follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A task message stands for it.
    Queued,
    /// One worker has its lease and advances it.
    Held,
    /// It waits, or is paused; it costs a row and nothing else.
    Parked,
    /// Final.
    Ended,
}

impl Place {
    /// The word for tables and messages.
    pub fn word(self) -> &'static str {
        match self {
            Place::Queued => "queued",
            Place::Held => "held",
            Place::Parked => "parked",
            Place::Ended => "ended",
        }
    }

    /// The number in the database's `place` column.
    pub const fn code(self) -> i16 {
        match self {
            Place::Queued => 0,
            Place::Held => 1,
            Place::Parked => 2,
            Place::Ended => 3,
        }
    }

    /// The place that the number stands for.
    pub fn from_code(code: i16) -> Option<Place> {
        [Place::Queued, Place::Held, Place::Parked, Place::Ended].into_iter().find(|place| place.code() == code)
    }
}

/// What the operators want of a process: a level, not an edge; `Kill` absorbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Go on.
    Run,
    /// Stop before the next advance.
    Pause,
    /// End.
    Kill,
}

impl Desired {
    /// The verb that asks for it.
    pub fn verb(self) -> &'static str {
        match self {
            Desired::Run => "play",
            Desired::Pause => "pause",
            Desired::Kill => "kill",
        }
    }

    /// The number in the database's `desired` column.
    pub const fn code(self) -> i16 {
        match self {
            Desired::Run => 0,
            Desired::Pause => 1,
            Desired::Kill => 2,
        }
    }

    /// The level that the number stands for.
    pub fn from_code(code: i16) -> Option<Desired> {
        [Desired::Run, Desired::Pause, Desired::Kill].into_iter().find(|desired| desired.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 9] = [
        State::Created,
        State::Running,
        State::Waiting,
        State::Paused(Live::Created),
        State::Paused(Live::Running),
        State::Paused(Live::Waiting),
        State::Finished,
        State::Excepted,
        State::Killed,
    ];
    const EVENTS: [Event; 9] = [
        Event::Claim,
        Event::Wait,
        Event::Wake,
        Event::Free,
        Event::Pause,
        Event::Play,
        Event::Finish,
        Event::Except,
        Event::Kill,
    ];

    #[test]
    fn nothing_changes_a_final_state() {
        for state in STATES.iter().filter(|state| state.is_final()) {
            for event in EVENTS {
                assert_eq!(state.next(event), Err(IllegalTransition { state: *state, event }));
            }
        }
    }

    #[test]
    fn kill_is_legal_from_every_state_that_is_not_final() {
        for state in STATES.iter().filter(|state| !state.is_final()) {
            assert_eq!(state.next(Event::Kill), Ok(State::Killed));
        }
    }

    #[test]
    fn play_returns_to_where_pause_found_it() {
        for state in [State::Created, State::Running, State::Waiting] {
            assert_eq!(state.next(Event::Pause).and_then(|paused| paused.next(Event::Play)), Ok(state));
        }
    }

    #[test]
    fn codes_and_states_stand_for_each_other() {
        for state in STATES {
            let before = match state {
                State::Paused(before) => Some(State::from(before).code()),
                State::Created
                | State::Running
                | State::Waiting
                | State::Finished
                | State::Excepted
                | State::Killed => None,
            };
            assert_eq!(State::from_codes(state.code(), before), Some(state));
            assert!(WORDS.contains(&state.word()));
        }
        assert_eq!(State::from_codes(7, None), None);
        assert_eq!(State::from_codes(PAUSED, None), None);
    }
}
