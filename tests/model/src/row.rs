//! A process's row and the statements that change it, as in `common/src/store`.

use baton_common::state::{Desired, Live, Place, State};

use crate::rule::{Rule, Rules};

/// An incarnation: a worker and how often it has restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation {
    /// The worker, 0 or 1.
    pub worker: usize,
    /// The number of its earlier incarnations.
    pub generation: u8,
}

/// The progress of a process, which is its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nothing is done yet.
    Fresh,
    /// A submission under this name is decided; its outcome is unknown.
    Intended(u8),
    /// The job of this name is known.
    Submitted(u8),
    /// The child is inserted.
    Spawned,
}

/// A row of `process`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// Its place.
    pub place: Place,
    /// Its state, including the state before a pause.
    pub state: State,
    /// The epoch of its last lease.
    pub epoch: u8,
    /// Its holder.
    pub owner: Option<Incarnation>,
    /// What operators desire.
    pub desired: Desired,
    /// Something that it waits for has occurred since the last write.
    pub woken: bool,
    /// Its last checkpoint.
    pub checkpoint: Stage,
    /// The number of the last try that was decided.
    pub try_number: u8,
}

/// What a holder's write does in addition to the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Continues.
    Keep,
    /// Waits for an event. `killing` means that a kill is desired and the process waits for external work to end.
    Park {
        /// See above.
        killing: bool,
    },
    /// Pauses on request.
    Pause,
    /// Gives the process back.
    GiveBack,
    /// Ends the process.
    End(State),
}

/// A holder's write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// The lease under which it is written.
    pub epoch: u8,
    /// The new checkpoint, if any.
    pub checkpoint: Option<Stage>,
    /// What else the write does.
    pub verb: Verb,
}

impl Row {
    /// Creates the row of a process that is accepted and queued.
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

    /// Takes the lease; returns whether it succeeded.
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

    /// Applies a holder's write; returns whether its lease was valid.
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

    /// Records that something that the process waits for has occurred.
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

    /// Records a request of an operator or of the parent's holder. For a held process only the desired state changes.
    /// `outside` tells whether it has external work, which a worker has to end.
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

    /// Frees the process of a gone holder.
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
