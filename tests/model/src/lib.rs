//! A model of the protocol: claim, lease, park, wake, control, takeover, and an external effect that is made once.
//!
//! Two workers share one process (a leaf with an external submission, or a parent with a child) while an operator makes
//! requests and a few faults happen at the worst moments. The search covers every order of actions. The invariants are
//! in [`property`], and the rules that can be removed in [`rule`].

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

/// What happens in addition to the work itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// What the first process does.
    pub work: Work,
    /// What the operator requests, in this order, each at any time.
    pub requests: Vec<Desired>,
    /// The maximum number of faults, at most 3.
    pub faults_max: u8,
}

impl Scenario {
    /// The name of a process in a trace.
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
    /// The kinds of actions that were taken, one bit each.
    taken: Arc<AtomicU64>,
    /// Whether a violation was found.
    is_violated: Arc<AtomicBool>,
}

impl Baton {
    /// Records only the first violation. The checker continues for some states after it, and would report a later
    /// violation of the same property, with a longer trace.
    fn is_first(&self, holds: bool) -> bool {
        holds || self.is_violated.swap(true, Ordering::Relaxed)
    }
}

/// The result of a search.
#[derive(Debug)]
pub struct Found {
    /// The number of different states; up to the first violation if there is one.
    pub n_states: usize,
    /// The depth of the search: the longest of the shortest traces to a state.
    pub depth: usize,
    /// The kinds of actions that were taken.
    pub taken: Vec<Kind>,
    /// The violated property, with a shortest trace to it; `None` if the protocol holds.
    pub violation: Option<(&'static str, Vec<String>)>,
}

/// The number of faults in a search: `BATON_MODEL_FAULTS`, or `otherwise`.
pub fn faults_max(otherwise: u8) -> u8 {
    let faults = std::env::var("BATON_MODEL_FAULTS").ok().and_then(|text| text.parse().ok());
    faults.unwrap_or(otherwise).min(FAULTS_MAX)
}

/// More faults create more incarnations than a state has bits for.
const FAULTS_MAX: u8 = 3;

/// Searches every order of actions, breadth first, up to the first violation.
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
