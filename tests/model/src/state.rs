//! The state of the model: rows, messages, workers and their memory, the site.

use std::hash::{DefaultHasher, Hash, Hasher};

use baton_common::state::{Desired, Place};

use crate::row::{Incarnation, Row, Stage};

/// The leaf, or the parent.
pub const FIRST: usize = 0;
/// The parent's child.
pub const CHILD: usize = 1;

/// A state of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The database: the first process, and its child if it exists.
    pub rows: [Option<Row>; 2],
    /// The incarnations that are declared gone, one bit each.
    pub gone: u8,
    /// The queue: whether it has a message for each process. A second copy has no other effect than a copy that comes
    /// after the first was taken.
    pub messages: [bool; 2],
    /// For each process, whether the broker lost its only message.
    pub lost: [bool; 2],
    /// The workers.
    pub workers: [Worker; 2],
    /// The site where the leaf's work runs.
    pub site: Site,
    /// The number of requests that the operator has made.
    pub n_asked: usize,
    /// What the operator desires now.
    pub asked: Desired,
    /// The number of faults so far.
    pub n_faults: u8,
    /// A violation that a single state does not show.
    pub harm: Harm,
}

/// A violation in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Harm {
    /// A write under an older epoch has changed a row.
    pub older_wrote: bool,
    /// A holder wrote a checkpoint that does not continue the last one.
    pub gap: bool,
    /// A row changed after its end.
    pub end_changed: bool,
}

/// Whether a worker acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alive {
    /// It runs.
    Up,
    /// It is frozen, with everything in its memory.
    Stopped,
    /// It is dead.
    Down,
}

/// A worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    /// Whether it acts.
    pub alive: Alive,
    /// The number of its earlier incarnations.
    pub generation: u8,
    /// What it does with the message of each process.
    pub deliveries: [Delivery; 2],
    /// What it holds, or believes to hold.
    pub hands: [Option<Hand>; 2],
    /// It has claimed although it is gone. It may do so once before its beat reports it; more would make the search
    /// infinite.
    pub claimed_late: bool,
    /// It has ended the child and still has to wake the parent; impossible while [`crate::rule::Rule::WakeWithTheEnd`]
    /// holds.
    pub owes_wake: bool,
}

/// What a worker does with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// It has none.
    None,
    /// It is about to claim.
    Taken,
    /// It is about to claim, and the broker no longer has the message.
    TakenAndAcknowledged,
    /// It has claimed, and is about to acknowledge.
    Claimed,
}

/// A process in a worker's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hand {
    /// The epoch of the lease.
    pub epoch: u8,
    /// The last checkpoint that it knows.
    pub checkpoint: Stage,
    /// The last try that it knows.
    pub try_number: u8,
    /// What was desired when it last read the row.
    pub desired: Desired,
    /// What it has done since the last write.
    pub step: Step,
}

/// What a worker has done since its last write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Nothing.
    Begin,
    /// It has itself decided the open submission.
    Decided,
    /// It has sent the submission.
    Sent,
    /// The open submission can no longer be made.
    Burnt,
    /// The open submission was made.
    Found,
    /// It has checked whether the event that the process waits for has occurred.
    Looked(bool),
    /// It has killed the child.
    AskedChild,
    /// The job is cancelled.
    Cancelled,
}

/// The site. Each set has a bit for each name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Site {
    /// Submissions in flight.
    pub flying: u16,
    /// Names that are taken.
    pub locked: u16,
    /// Names under which a job was created.
    pub made: u16,
    /// Names whose job has ended.
    pub ended: u16,
    /// Names whose end the watcher has reported.
    pub reported: u16,
    /// The number of jobs that were created, under any name.
    pub n_made: u8,
    /// Names that were recorded as intents.
    pub intended: u16,
}

/// The bit of a name.
pub fn bit(name: u8) -> u16 {
    1 << name
}

impl Worker {
    /// A worker that has just started.
    pub fn fresh(generation: u8) -> Self {
        Worker {
            alive: Alive::Up,
            generation,
            deliveries: [Delivery::None; 2],
            hands: [None; 2],
            claimed_late: false,
            owes_wake: false,
        }
    }
}

impl State {
    /// The first process is accepted and announced; nothing else has happened.
    pub fn first() -> Self {
        State {
            rows: [Some(Row::accepted()), None],
            gone: 0,
            messages: [true, false],
            lost: [false; 2],
            workers: [Worker::fresh(0); 2],
            site: Site::default(),
            n_asked: 0,
            asked: Desired::Run,
            n_faults: 0,
            harm: Harm::default(),
        }
    }

    /// Returns the current incarnation of a worker.
    pub fn incarnation(&self, worker: usize) -> Incarnation {
        Incarnation { worker, generation: self.workers[worker].generation }
    }

    /// Returns whether the incarnation is declared gone.
    pub fn is_gone(&self, incarnation: Incarnation) -> bool {
        self.gone & incarnation_bit(incarnation) != 0
    }

    /// Declares the incarnation gone.
    pub fn declare(&mut self, incarnation: Incarnation) {
        self.gone |= incarnation_bit(incarnation);
    }

    /// Returns whether the process has work outside its row, so that the database alone cannot end it.
    pub fn is_outside(&self, process: usize) -> bool {
        match self.rows[process].map(|row| row.checkpoint) {
            Some(Stage::Intended(_) | Stage::Submitted(_)) => true,
            Some(Stage::Spawned) => !self.has_ended(CHILD),
            Some(Stage::Fresh) | None => false,
        }
    }

    /// Returns whether the process has ended.
    pub fn has_ended(&self, process: usize) -> bool {
        self.rows[process].is_some_and(|row| row.place == Place::Ended)
    }

    /// Adds a message for the process.
    pub fn publish(&mut self, process: usize) {
        self.messages[process] = true;
    }

    /// Requeues a worker's messages, as the broker does when its connection ends.
    pub fn requeue(&mut self, worker: usize) {
        for process in [FIRST, CHILD] {
            let delivery = &mut self.workers[worker].deliveries[process];
            let unacknowledged = matches!(delivery, Delivery::Taken | Delivery::Claimed);
            *delivery = Delivery::None;
            if unacknowledged {
                self.publish(process);
            }
        }
    }

    /// Returns whether a message stands for the process, in the queue or with a worker.
    pub fn is_told(&self, process: usize) -> bool {
        let in_hand = |worker: &Worker| match worker.deliveries[process] {
            Delivery::Taken | Delivery::TakenAndAcknowledged => true,
            Delivery::None | Delivery::Claimed => false,
        };
        self.messages[process] || self.workers.iter().any(in_hand)
    }
}

/// Workers are interchangeable: a state and its mirror image count as one.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let (here, there) = (self.digest(), self.exchanged().digest());
        (here.min(there), here.max(there)).hash(hasher);
    }
}

impl State {
    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let State { rows, gone, messages, lost, workers, site, n_asked, asked, n_faults, harm } = self;
        (rows, gone, messages, lost, workers, site, n_asked, asked, n_faults, harm).hash(&mut hasher);
        hasher.finish()
    }

    fn exchanged(&self) -> State {
        let mut state = self.clone();
        state.workers.swap(0, 1);
        state.gone = (self.gone & EVEN_BITS) << 1 | (self.gone >> 1) & EVEN_BITS;
        for owner in state.rows.iter_mut().flatten().filter_map(|row| row.owner.as_mut()) {
            owner.worker = 1 - owner.worker;
        }
        state
    }

    /// Removes numbers on which nothing depends, so that states that differ only in them are one: earlier incarnations
    /// that hold nothing, and the number of leases before the oldest one that is still remembered.
    pub fn forget(&mut self) {
        for worker in 0..self.workers.len() {
            let me = self.incarnation(worker);
            let is_earlier = |owner: Incarnation| owner.worker == worker && owner.generation < me.generation;
            if me.generation > 0 && !self.rows.iter().flatten().filter_map(|row| row.owner).any(is_earlier) {
                let is_gone = self.is_gone(me);
                self.gone &= !(EVEN_BITS << worker);
                self.workers[worker].generation = 0;
                let first = self.incarnation(worker);
                if is_gone {
                    self.declare(first);
                }
                for row in self.rows.iter_mut().flatten().filter(|row| row.owner == Some(me)) {
                    row.owner = Some(first);
                }
            }
        }
        for process in [FIRST, CHILD] {
            let Some(row) = self.rows[process].as_mut() else { continue };
            let mut hands: Vec<&mut u8> =
                self.workers.iter_mut().filter_map(|worker| Some(&mut worker.hands[process].as_mut()?.epoch)).collect();
            hands.push(&mut row.epoch);
            let mut known: Vec<u8> = hands.iter().map(|epoch| **epoch).collect();
            known.sort_unstable();
            known.dedup();
            for epoch in hands {
                let rank = known.iter().position(|known| known == epoch).expect("it is one of them");
                *epoch = u8::try_from(rank).expect("there are three at most");
            }
        }
    }
}

/// The bits of the first worker's incarnations.
const EVEN_BITS: u8 = 0b0101_0101;

fn incarnation_bit(incarnation: Incarnation) -> u8 {
    1 << (incarnation.worker + 2 * usize::from(incarnation.generation))
}
