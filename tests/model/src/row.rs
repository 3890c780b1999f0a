//! A process's row, and the statements that change it, as `common/src/store` has them.

use baton_common::state::{Desired, Live, Place, State};

use crate::rule::{Rule, Rules};

/// One start of a worker: the worker and how often it has started anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation {
    /// Which worker, 0 or 1.
    pub worker: usize,
    /// How many incarnations it had before.
    pub generation: u8,
}

/// How far a process has come, which is its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nothing is done yet.
    Fresh,
    /// A submission under this name is decided, and nothing is known of it.
    Intended(u8),
    /// The job of this name is known.
    Submitted(u8),
    /// The child is inserted.
    Spawned,
}

/// A row of `process`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// Where it is.
    pub place: Place,
    /// Its state, with what it was before a pause.
    pub state: State,
    /// Its last lease.
    pub epoch: u8,
    /// Who holds it.
    pub owner: Option<Incarnation>,
    /// What operators want.
    pub desired: Desired,
    /// Something that it waits for has come since the last write.
    pub woken: bool,
    /// Its last checkpoint.
    pub checkpoint: Stage,
    /// The last try that was decided.
    pub try_number: u8,
}

/// What a holder's write does besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// It goes on.
    Keep,
    /// It waits for a fact; `killing` when it knows that a kill is desired, and waits for what is outside to end.
    Park {
        /// See above.
        killing: bool,
    },
    /// It was asked to pause.
    Pause,
    /// It lets go of it.
    GiveBack,
    /// It has come to an end.
    End(State),
}

/// A holder's write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Under which lease.
    pub epoch: u8,
    /// A new checkpoint.
    pub checkpoint: Option<Stage>,
    /// And then.
    pub verb: Verb,
}

impl Row {
    /// Accepted, and queued.
    pub fn accepted() -> Self {
        Row {
            place: Place::Queued,
            state: State::Created,
            epoch: 0,
            owner: None,
            desired: Desired::Run,
            woken: false,
            checkpoint: Stage::Fresh,
            try_number: 0,
        }
    }

    /// Takes the lease; says whether it got it.
    pub fn claim(&mut self, me: Incarnation, rules: Rules) -> bool {
        let free = self.place == Place::Queued || !rules.keep(Rule::ClaimOnlyQueued);
        if !free || self.place == Place::Ended {
            return false;
        }
        self.place = Place::Held;
        self.state = State::Running;
        self.owner = Some(me);
        self.epoch += 1;
        if !rules.keep(Rule::TokenByTry) {
            self.try_number += 1;
        }
        self.woken = false;
        true
    }

    /// Applies a holder's write; says whether its lease was good for it.
    pub fn write(&mut self, write: Write, rules: Rules) -> bool {
        let epoch_fits = self.epoch == write.epoch || !rules.keep(Rule::FenceByEpoch);
        let place_fits = self.place == Place::Held || !rules.keep(Rule::FenceByPlace);
        if !epoch_fits || !place_fits {
            return false;
        }
        let woken = self.woken && rules.keep(Rule::ParkSeesWoken);
        let stays = match write.verb {
            Verb::Keep => true,
            Verb::Park { killing } => woken || (self.desired == Desired::Kill && !killing),
            Verb::Pause => self.desired != Desired::Pause && rules.keep(Rule::PauseAsksTheRow),
            Verb::GiveBack | Verb::End(_) => false,
        };
        if let Some(checkpoint) = write.checkpoint {
            self.checkpoint = checkpoint;
            if let Stage::Intended(_) = checkpoint {
                self.try_number += 1;
            }
        }
        self.woken = false;
        if stays {
            return true;
        }
        self.owner = None;
        let (place, state) = match write.verb {
            Verb::Keep | Verb::GiveBack => (Place::Queued, State::Running),
            Verb::Park { .. } => (Place::Parked, State::Waiting),
            Verb::Pause => (Place::Parked, State::Paused(Live::Running)),
            Verb::End(state) => (Place::Ended, state),
        };
        (self.place, self.state) = (place, state);
        self.obey_pause(rules);
        true
    }

    /// Something that it waits for has come.
    pub fn wake(&mut self, rules: Rules) {
        if self.place == Place::Ended {
            return;
        }
        self.woken = true;
        let sleeps = match self.state {
            State::Waiting => true,
            State::Paused(_) => !rules.keep(Rule::WakeRespectsPause),
            State::Created | State::Running | State::Finished | State::Excepted | State::Killed => false,
        };
        if self.place == Place::Parked && sleeps {
            (self.place, self.state) = (Place::Queued, State::Running);
        }
    }

    /// An operator, or the holder of its parent, asks for something. What is held only learns what is desired. `outside`
    /// says whether something of it lives outside the database, so that a worker has to end it.
    pub fn control(&mut self, verb: Desired, outside: bool, rules: Rules) {
        if self.place == Place::Ended || (self.desired == Desired::Kill && verb != Desired::Kill) {
            return;
        }
        self.desired = verb;
        if self.place == Place::Held {
            return;
        }
        match (verb, self.state) {
            (Desired::Kill, _) => self.end_or_queue(outside),
            (Desired::Pause, _) => self.obey_pause(Rules::default()),
            (Desired::Run, State::Paused(before)) => {
                self.state = before.into();
                let sleeps = before == Live::Waiting && !(self.woken && rules.keep(Rule::PlayLooksAtWoken));
                self.place = if sleeps { Place::Parked } else { Place::Queued };
            }
            (Desired::Run, _) => {}
        }
    }

    /// Its holder is gone.
    pub fn free(&mut self, outside: bool, rules: Rules) {
        self.owner = None;
        (self.place, self.state) = (Place::Queued, State::Running);
        if self.desired == Desired::Kill && rules.keep(Rule::LeavingHeldObeys) {
            self.end_or_queue(outside);
        }
        self.obey_pause(rules);
    }

    fn end_or_queue(&mut self, outside: bool) {
        (self.place, self.state) =
            if outside { (Place::Queued, State::Running) } else { (Place::Ended, State::Killed) };
    }

    fn obey_pause(&mut self, rules: Rules) {
        let before = match self.state {
            State::Created => Live::Created,
            State::Running => Live::Running,
            State::Waiting => Live::Waiting,
            State::Paused(_) | State::Finished | State::Excepted | State::Killed => return,
        };
        if self.desired == Desired::Pause && rules.keep(Rule::LeavingHeldObeys) {
            (self.place, self.state) = (Place::Parked, State::Paused(before));
        }
    }
}
