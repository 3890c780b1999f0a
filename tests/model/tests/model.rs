//! The protocol holds in every order of actions, and fails without any one of its rules.

#![expect(clippy::print_stdout, reason = "prints the size of the search")]

use baton_common::state::Desired::{self, Kill, Pause, Run};
use baton_model::Work::{self, Leaf, Parent};
use baton_model::action::Kind;
use baton_model::property::Invariant;
use baton_model::rule::{Rule, Rules};
use baton_model::{REQUESTS, Scenario, search};

/// Searches all sequences of requests. Asserts that nothing is violated, that the search was large, and that all kinds
/// of actions but `never` were taken: a model that cannot do something proves nothing about it.
fn holds(work: Work, never: &[Kind]) {
    let mut untaken = Kind::ALL.to_vec();
    for requests in REQUESTS {
        let scenario = Scenario { work, requests: requests.to_vec(), faults_max: baton_model::faults_max(1) };
        let found = search(&scenario, Rules::default());
        println!("{scenario:?}: {} states, {} deep", found.n_states, found.depth);
        assert_eq!(found.violation, None, "{scenario:?}");
        assert!(found.n_states > 5_000 * (1 + requests.len()), "{scenario:?} has only {} states", found.n_states);
        untaken.retain(|kind| !found.taken.contains(kind));
    }
    assert_eq!(untaken, never);
}

#[test]
fn a_leaf_with_a_submission_comes_to_no_harm() {
    holds(Leaf, &[Kind::Spawn, Kind::KillChild, Kind::Wake]);
}

#[test]
fn a_parent_and_its_child_come_to_no_harm() {
    let far_end = [Kind::Intend, Kind::Submit, Kind::Land, Kind::Adopt, Kind::Record, Kind::JobEnds, Kind::Report];
    holds(Parent, &[&far_end[..], &[Kind::Cancel, Kind::Wake, Kind::LoseSubmission]].concat());
}

#[test]
fn without_any_one_rule_something_breaks() {
    use Invariant as I;
    let cases: [(Rule, Work, &[Desired], u8, Invariant); 20] = [
        (Rule::ClaimOnlyQueued, Leaf, &[], 1, I::LeaseIsKept),
        (Rule::ClaimOnlyQueued, Parent, &[Pause, Run], 0, I::LeaseIsKept),
        (Rule::FenceByEpoch, Leaf, &[], 1, I::OlderEpochWritesNothing),
        (Rule::FenceByPlace, Leaf, &[Kill], 1, I::EndIsFinal),
        (Rule::ClaimThenAcknowledge, Leaf, &[], 1, I::OnlyTheBrokerLoses),
        (Rule::ParkSeesWoken, Leaf, &[], 0, I::NoDeadEnd),
        (Rule::ParkSeesWoken, Parent, &[], 0, I::NoDeadEnd),
        (Rule::LeavingHeldObeys, Leaf, &[Pause], 0, I::UnheldHasObeyed),
        (Rule::PauseAsksTheRow, Leaf, &[Pause, Run], 0, I::UnheldHasObeyed),
        (Rule::WakeRespectsPause, Leaf, &[Pause], 0, I::UnheldHasObeyed),
        (Rule::PlayLooksAtWoken, Leaf, &[Pause, Run], 0, I::NoDeadEnd),
        (Rule::FreeRepeats, Leaf, &[], 1, I::NoDeadEnd),
        (Rule::WakeWithTheEnd, Parent, &[], 1, I::NoDeadEnd),
        (Rule::HeadRule, Leaf, &[], 1, I::NoDeadEnd),
        (Rule::GiveBackUnknown, Leaf, &[], 1, I::NoDeadEnd),
        (Rule::TokenByTry, Leaf, &[], 1, I::EffectOnce),
        (Rule::IntentFirst, Leaf, &[], 0, I::IntentBeforeEffect),
        (Rule::FarEndLock, Leaf, &[], 1, I::EffectOnce),
        (Rule::FarEndLock, Leaf, &[Kill], 0, I::NothingOutlives),
        (Rule::FreeRepeats, Parent, &[Kill], 1, I::NoDeadEnd),
    ];
    for rule in Rule::ALL {
        assert!(cases.iter().any(|case| case.0 == rule), "{rule:?} is never taken away");
    }
    for (rule, work, requests, faults_max, expected) in cases {
        let scenario = Scenario { work, requests: requests.to_vec(), faults_max };
        assert_eq!(search(&scenario, Rules::default()).violation, None, "{scenario:?}");
        let violation = search(&scenario, Rules { without: Some(rule) }).violation;
        let (text, steps) = violation.unwrap_or_else(|| panic!("nothing breaks without {rule:?} in {scenario:?}"));
        assert_eq!(text, expected.text(), "without {rule:?} in {scenario:?}:\n{}", steps.join("\n"));
    }
}
