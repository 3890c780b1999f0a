//! Everything that there is at one moment: rows, messages, workers and what they have in memory, the far end.

use std::hash::{DefaultHasher, Hash, Hasher};

use baton_common::state::{Desired, Place};

use crate::row::{Incarnation, Row, Stage};

/// The leaf, or the parent.
pub const FIRST: usize = 0;
/// The parent's child.
pub const CHILD: usize = 1;

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The database: the first process, and its child once there is one.
    pub rows: [Option<Row>; 2],
    /// Incarnations that are declared gone, a bit each.
    pub gone: u8,
    /// The queue: whether a message for each process is in it. A second copy there would do nothing that it does not
    /// do as well when it comes after the first was taken.
    pub messages: [bool; 2],
    /// For each process, that its only message was lost by the broker.
    pub lost: [bool; 2],
    /// The workers.
    pub workers: [Worker; 2],
    /// Where the leaf's work runs.
    pub site: Site,
    /// How many of the operator's requests are made.
    pub n_asked: usize,
    /// What the operator wants now.
    pub asked: Desired,
    /// How many faults have happened.
    pub n_faults: u8,
    /// What must never happen and cannot be seen in a single moment.
    pub harm: Harm,
}

/// What has gone wrong in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Harm {
    /// A write under an older epoch has changed a row.
    pub older_wrote: bool,
    /// A holder wrote a checkpoint that did not go on from the last one.
    pub gap: bool,
    /// A row changed after its end.
    pub end_changed: bool,
}

/// Whether a worker does anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alive {
    /// It runs.
    Up,
    /// It is frozen, with all that it has in memory.
    Stopped,
    /// It is dead.
    Down,
}

/// A worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    /// Whether it does anything.
    pub alive: Alive,
    /// How many incarnations it had before this one.
    pub generation: u8,
    /// What it does with a message of each process.
    pub deliveries: [Delivery; 2],
    /// What it holds, or thinks that it holds.
    pub hands: [Option<Hand>; 2],
    /// It has claimed although it is gone. It may once, before its beat tells it; for ever would be without end.
    pub claimed_late: bool,
    /// It has ended the child and still has to wake the parent; never so while [`crate::rule::Rule::WakeWithTheEnd`] holds.
    pub owes_wake: bool,
}

/// What a worker does with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// It has none.
    None,
    /// It is about to claim.
    Taken,
    /// It is about to claim, and the broker has forgotten the message.
    TakenAndAcknowledged,
    /// It has claimed, and is about to acknowledge.
    Claimed,
}

/// A process in a worker's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hand {
    /// The lease.
    pub epoch: u8,
    /// The last checkpoint that it knows of.
    pub checkpoint: Stage,
    /// The last try that it knows of.
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
    /// It has itself decided the submission that is open.
    Decided,
    /// It has sent the submission.
    Sent,
    /// Nobody can make the open submission any more.
    Burnt,
    /// The open submission was made.
    Found,
    /// It has looked whether what the process waits for has come.
    Looked(bool),
    /// It has asked the child to end.
    AskedChild,
    /// The job is cancelled.
    Cancelled,
}

/// The far end. Each set has a bit for a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Site {
    /// Submissions on their way.
    pub flying: u16,
    /// Names that are taken.
    pub locked: u16,
    /// Names under which a job was made.
    pub made: u16,
    /// Those whose job has ended.
    pub ended: u16,
    /// Those whose end the watcher has reported.
    pub reported: u16,
    /// Jobs that were made, of whatever name.
    pub n_made: u8,
    /// Names that were recorded as intents before.
    pub intended: u16,
}

/// The bit of a name.
pub fn bit(name: u8) -> u16 {
    1 << name
}

impl Worker {
    /// One that has just started.
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
    /// The first process is accepted and told; nothing else has happened.
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

    /// The present incarnation of a worker.
    pub fn incarnation(&self, worker: usize) -> Incarnation {
        Incarnation { worker, generation: self.workers[worker].generation }
    }

    /// Whether it is declared gone.
    pub fn is_gone(&self, incarnation: Incarnation) -> bool {
        self.gone & incarnation_bit(incarnation) != 0
    }

    /// Declares it gone.
    pub fn declare(&mut self, incarnation: Incarnation) {
        self.gone |= incarnation_bit(incarnation);
    }

    /// Whether something of the process lives outside its row, so that it cannot be ended in the database alone.
    pub fn is_outside(&self, process: usize) -> bool {
        match self.rows[process].map(|row| row.checkpoint) {
            Some(Stage::Intended(_) | Stage::Submitted(_)) => true,
            Some(Stage::Spawned) => !self.has_ended(CHILD),
            Some(Stage::Fresh) | None => false,
        }
    }

    /// Whether the process has ended.
    pub fn has_ended(&self, process: usize) -> bool {
        self.rows[process].is_some_and(|row| row.place == Place::Ended)
    }

    /// A message for the process.
    pub fn publish(&mut self, process: usize) {
        self.messages[process] = true;
    }

    /// Gives a worker's messages back to the queue, as the broker does when its connection ends.
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

    /// Whether a message stands for the process, in the queue or with a worker.
    pub fn is_told(&self, process: usize) -> bool {
        let in_hand = |worker: &Worker| match worker.deliveries[process] {
            Delivery::Taken | Delivery::TakenAndAcknowledged => true,
            Delivery::None | Delivery::Claimed => false,
        };
        self.messages[process] || self.workers.iter().any(in_hand)
    }
}

/// The workers are alike: a moment and the same with their names exchanged count as one.
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

    /// Forgets numbers that nothing depends on, so that moments that differ in them only are one: earlier incarnations
    /// that hold nothing, and how many leases there were before those that anybody remembers.
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
