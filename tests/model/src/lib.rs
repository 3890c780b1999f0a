//! A model of the protocol: claim, lease, park, wake, control, takeover, and an effect outside that is made once.
//!
//! Two workers share one process (a leaf with an external submission, or a parent with a child) while an operator makes
//! requests and a few faults happen at the worst moments. Every order of events is searched. What holds at every
//! moment is in [`property`], the rules that can be taken away in [`rule`].

pub mod action;
pub mod property;
pub mod row;
pub mod rule;
pub mod state;

mod model;
mod work;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use baton_common::state::Desired;
use stateright::{Checker, HasDiscoveries, Model};

use crate::action::{Action, Kind};
use crate::rule::Rules;
use crate::state::State;

/// What the first process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It submits a job to a site, waits for its end, and finishes.
    Leaf,
    /// It inserts a child, waits for its end, and finishes.
    Parent,
}

/// What happens besides the work itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// What the first process does.
    pub work: Work,
    /// What the operator asks of it, one after the other, each at any time.
    pub requests: Vec<Desired>,
    /// How many faults may happen, 3 at most.
    pub faults_max: u8,
}

impl Scenario {
    /// What a trace calls a process.
    pub fn name(&self, process: usize) -> &'static str {
        match (self.work, process) {
            (Work::Leaf, _) => "leaf",
            (Work::Parent, state::FIRST) => "parent",
            (Work::Parent, _) => "child",
        }
    }
}

/// The sequences of requests that are searched.
pub const REQUESTS: [&[Desired]; 6] = [
    &[],
    &[Desired::Pause],
    &[Desired::Kill],
    &[Desired::Pause, Desired::Run],
    &[Desired::Pause, Desired::Kill],
    &[Desired::Pause, Desired::Run, Desired::Kill],
];

/// The model.
#[derive(Clone, Debug)]
pub struct Baton {
    scenario: Scenario,
    rules: Rules,
    /// Kinds of actions that were taken, a bit each.
    taken: Arc<AtomicU64>,
    /// A violation was found.
    is_violated: Arc<AtomicBool>,
}

impl Baton {
    /// Lets only the first violation count. The checker goes on for some states after it, and would report a later one
    /// of the same property, whose way is longer.
    fn is_first(&self, holds: bool) -> bool {
        holds || self.is_violated.swap(true, Ordering::Relaxed)
    }
}

/// What a search has found.
#[derive(Debug)]
pub struct Found {
    /// How many different moments there are; those up to the first violation if there is one.
    pub n_states: usize,
    /// The longest of the shortest ways to a moment.
    pub depth: usize,
    /// What kinds of actions were taken.
    pub taken: Vec<Kind>,
    /// What is violated, with a shortest way there; nothing in a protocol that holds.
    pub violation: Option<(&'static str, Vec<String>)>,
}

/// How many faults a search is to have: `BATON_MODEL_FAULTS`, or `otherwise`.
pub fn faults_max(otherwise: u8) -> u8 {
    let faults = std::env::var("BATON_MODEL_FAULTS").ok().and_then(|text| text.parse().ok());
    faults.unwrap_or(otherwise).min(FAULTS_MAX)
}

/// More faults make more incarnations than a moment has bits for.
const FAULTS_MAX: u8 = 3;

/// Searches every order of events, breadth first, up to the first violation.
pub fn search(scenario: &Scenario, rules: Rules) -> Found {
    let taken = Arc::new(AtomicU64::new(0));
    let model = Baton { scenario: scenario.clone(), rules, taken: Arc::clone(&taken), is_violated: Arc::default() };
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let sentences = |path: stateright::Path<State, Action>| {
        path.into_actions().iter().map(|action| action.sentence(scenario)).collect()
    };
    let taken = taken.load(Ordering::Relaxed);
    Found {
        n_states: checker.unique_state_count(),
        depth: checker.max_depth(),
        taken: Kind::ALL.into_iter().filter(|kind| taken & (1 << *kind as u64) != 0).collect(),
        violation: checker.discoveries().into_iter().map(|(text, path)| (text, sentences(path))).next(),
    }
}
