//! Decides what a worker does next with a process that it holds, from its memory alone.

use baton_common::state::{Desired, State as Life};

use crate::Work;
use crate::action::Kind;
use crate::row::{Stage, Verb};
use crate::rule::{Rule, Rules};
use crate::state::{CHILD, Hand, Step};

/// Returns the next action of the holder of a process.
pub(crate) fn next(work: Work, process: usize, hand: &Hand, rules: Rules) -> Kind {
    match hand.desired {
        Desired::Pause => Kind::Pause,
        Desired::Kill => next_of_killed(hand),
        Desired::Run if process == CHILD => Kind::End,
        Desired::Run => match work {
            Work::Leaf => next_of_leaf(hand, rules),
            Work::Parent => next_of_parent(hand),
        },
    }
}

fn next_of_leaf(hand: &Hand, rules: Rules) -> Kind {
    match (hand.checkpoint, hand.step) {
        (Stage::Fresh, Step::Begin) if !rules.keep(Rule::IntentFirst) => Kind::Submit,
        (Stage::Fresh | Stage::Intended(_), Step::Found) => Kind::Record,
        (Stage::Fresh | Stage::Intended(_), Step::Sent) => Kind::Adopt,
        (Stage::Fresh, _) | (Stage::Intended(_), Step::Burnt) => Kind::Intend,
        (Stage::Intended(_), Step::Decided) => Kind::Submit,
        (Stage::Intended(_), _) => Kind::Adopt,
        (Stage::Submitted(_) | Stage::Spawned, step) => next_of_waiting(step),
    }
}

fn next_of_parent(hand: &Hand) -> Kind {
    match hand.checkpoint {
        Stage::Fresh => Kind::Spawn,
        Stage::Intended(_) | Stage::Submitted(_) | Stage::Spawned => next_of_waiting(hand.step),
    }
}

fn next_of_waiting(step: Step) -> Kind {
    match step {
        Step::Looked(true) => Kind::End,
        Step::Looked(false) => Kind::Park,
        Step::Begin | Step::Decided | Step::Sent | Step::Burnt | Step::Found | Step::AskedChild | Step::Cancelled => {
            Kind::Look
        }
    }
}

/// External work is ended first.
fn next_of_killed(hand: &Hand) -> Kind {
    match (hand.checkpoint, hand.step) {
        (_, Step::Cancelled) | (Stage::Fresh, _) | (Stage::Intended(_), Step::Burnt) => Kind::End,
        (Stage::Intended(_), Step::Found) | (Stage::Submitted(_), _) => Kind::Cancel,
        (Stage::Intended(_), _) => Kind::Adopt,
        (Stage::Spawned, Step::AskedChild) => Kind::Look,
        (Stage::Spawned, Step::Looked(true)) => Kind::End,
        (Stage::Spawned, Step::Looked(false)) => Kind::Park,
        (Stage::Spawned, _) => Kind::KillChild,
    }
}

/// The name of the job, or of the open or next submission.
pub(crate) fn name(hand: &Hand, rules: Rules) -> u8 {
    match hand.checkpoint {
        Stage::Submitted(name) => name,
        Stage::Intended(_) if !rules.keep(Rule::TokenByTry) => hand.try_number,
        Stage::Intended(name) => name,
        Stage::Fresh | Stage::Spawned => hand.try_number + 1,
    }
}

/// The effect of a holder's write on the process.
pub(crate) fn verb(kind: Kind, desired: Desired) -> Verb {
    let killed = desired == Desired::Kill;
    if kind == Kind::Park {
        Verb::Park { killing: killed }
    } else if kind == Kind::Pause {
        Verb::Pause
    } else if kind == Kind::GiveBack {
        Verb::GiveBack
    } else if kind == Kind::End {
        Verb::End(if killed { Life::Killed } else { Life::Finished })
    } else {
        Verb::Keep
    }
}
