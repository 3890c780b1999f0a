//! The states of a process, and the only function that changes them.
//!
//! ```text
//! created ─► running ◄─► waiting          pause: created, running, waiting ─► paused (remembers the previous state)
//!               │           │             play:  paused ─► the previous state
//!               └──► finished · excepted · killed      (final; kill is legal in every other state)
//! ```
//!
//! The store's statements decide in the database, where the row is locked. A test compares each of them with
//! [`State::next`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// The state of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Accepted; no worker has claimed it yet.
    Created,
    /// A worker advances it, or it is ready to be advanced.
    Running,
    /// It waits for a timer, a child or a job.
    Waiting,
    /// Stopped by a request; `play` returns it to its previous state.
    Paused(Live),
    /// It ended by itself, with any exit code.
    Finished,
    /// It failed: an error of Baton, of a site or of the process's own code.
    Excepted,
    /// Ended by a request.
    Killed,
}

/// The states that a pause interrupts, and that `play` returns to.
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

/// An input of the state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// A worker has claimed it.
    Claim,
    /// Its advance ended with a wait.
    Wait,
    /// Its wait is over.
    Wake,
    /// Its worker has died or has given it back.
    Free,
    /// An operator requests a pause.
    Pause,
    /// An operator requests that it resumes.
    Play,
    /// Its last advance has ended.
    Finish,
    /// It has failed permanently.
    Except,
    /// An operator requests its end.
    Kill,
}

/// The input is not legal in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a process in state {state} cannot {input:?}")]
pub struct IllegalTransition {
    /// The unchanged state of the process.
    pub state: State,
    /// The rejected input.
    pub input: Input,
}

impl State {
    /// The state after `input`. Total and pure.
    ///
    /// # Errors
    /// [`IllegalTransition`] if the input is not legal in this state; the state does not change.
    pub fn next(&self, input: Input) -> Result<State, IllegalTransition> {
        let illegal = Err(IllegalTransition { state: *self, input });
        match self {
            State::Created => match input {
                Input::Claim => Ok(State::Running),
                Input::Free => Ok(State::Created),
                Input::Pause => Ok(State::Paused(Live::Created)),
                Input::Play => Ok(State::Created),
                Input::Except => Ok(State::Excepted),
                Input::Kill => Ok(State::Killed),
                Input::Wait | Input::Wake | Input::Finish => illegal,
            },
            State::Running => match input {
                Input::Claim | Input::Wake | Input::Free | Input::Play => Ok(State::Running),
                Input::Wait => Ok(State::Waiting),
                Input::Pause => Ok(State::Paused(Live::Running)),
                Input::Finish => Ok(State::Finished),
                Input::Except => Ok(State::Excepted),
                Input::Kill => Ok(State::Killed),
            },
            State::Waiting => match input {
                Input::Wake => Ok(State::Running),
                Input::Play => Ok(State::Waiting),
                Input::Pause => Ok(State::Paused(Live::Waiting)),
                Input::Except => Ok(State::Excepted),
                Input::Kill => Ok(State::Killed),
                Input::Claim | Input::Wait | Input::Free | Input::Finish => illegal,
            },
            State::Paused(before) => match input {
                Input::Play => Ok(State::from(*before)),
                Input::Pause | Input::Wake => Ok(*self),
                Input::Except => Ok(State::Excepted),
                Input::Kill => Ok(State::Killed),
                Input::Claim | Input::Wait | Input::Free | Input::Finish => illegal,
            },
            State::Finished | State::Excepted | State::Killed => match input {
                Input::Claim
                | Input::Wait
                | Input::Wake
                | Input::Free
                | Input::Pause
                | Input::Play
                | Input::Finish
                | Input::Except
                | Input::Kill => illegal,
            },
        }
    }

    /// Whether the process has ended. A final state never changes.
    pub fn is_final(&self) -> bool {
        match self {
            State::Finished | State::Excepted | State::Killed => true,
            State::Created | State::Running | State::Waiting | State::Paused(_) => false,
        }
    }

    /// The word for tables, messages and selections.
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

    /// The state for the columns `state` and `before`; `None` for unknown numbers.
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

/// The words of all states, for selections and help texts.
pub const WORDS: [&str; 7] = ["created", "running", "waiting", "paused", "finished", "excepted", "killed"];

const CREATED: i16 = 0;
const RUNNING: i16 = 1;
const WAITING: i16 = 2;
const PAUSED: i16 = 3;
const FINISHED: i16 = 4;
const EXCEPTED: i16 = 5;
const KILLED: i16 = 6;

/// The place of a process. A process is in exactly one place, and every recovery rule depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A task message represents it.
    Queued,
    /// One worker has its lease and advances it.
    Held,
    /// It waits or is paused, and uses no resources except its row.
    Parked,
    /// It has ended.
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

    /// The place for a number; `None` for an unknown number.
    pub fn from_code(code: i16) -> Option<Place> {
        [Place::Queued, Place::Held, Place::Parked, Place::Ended].into_iter().find(|place| place.code() == code)
    }
}

/// The state that operators desire of a process: a level, not an edge. A process never leaves `Kill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Run.
    Run,
    /// Pause before the next advance.
    Pause,
    /// End.
    Kill,
}

impl Desired {
    /// The verb of the request.
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

    /// The level for a number; `None` for an unknown number.
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
    const INPUTS: [Input; 9] = [
        Input::Claim,
        Input::Wait,
        Input::Wake,
        Input::Free,
        Input::Pause,
        Input::Play,
        Input::Finish,
        Input::Except,
        Input::Kill,
    ];

    #[test]
    fn nothing_changes_a_final_state() {
        for state in STATES.iter().filter(|state| state.is_final()) {
            for input in INPUTS {
                assert_eq!(state.next(input), Err(IllegalTransition { state: *state, input }));
            }
        }
    }

    #[test]
    fn kill_is_legal_from_every_state_that_is_not_final() {
        for state in STATES.iter().filter(|state| !state.is_final()) {
            assert_eq!(state.next(Input::Kill), Ok(State::Killed));
        }
    }

    #[test]
    fn play_returns_to_the_state_before_the_pause() {
        for state in [State::Created, State::Running, State::Waiting] {
            assert_eq!(state.next(Input::Pause).and_then(|paused| paused.next(Input::Play)), Ok(state));
        }
    }

    #[test]
    fn states_round_trip_through_their_codes() {
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
