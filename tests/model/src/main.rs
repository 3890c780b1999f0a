//! Searches the model without one of its rules and prints a shortest trace to a violation, or searches with all rules.

use std::io::Write as _;
use std::process::ExitCode;

use baton_common::state::Desired;
use baton_model::rule::{Rule, Rules};
use baton_model::{Found, REQUESTS, Scenario, Work, search};

const USAGE: &str = "usage: baton-model [RULE]\n\nWithout RULE all rules are in force. Rules that can be removed:\n";

/// Faults in a search, unless BATON_MODEL_FAULTS says otherwise.
const FAULTS_MAX: u8 = 2;

fn main() -> ExitCode {
    let faults_max = baton_model::faults_max(FAULTS_MAX);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let without = match arguments.as_slice() {
        [] => None,
        [word] => match Rule::from_word(word) {
            Some(rule) => Some(rule),
            None => return usage(),
        },
        _ => return usage(),
    };
    let rules = Rules { without };
    // Without a rule, start with few faults: they give the simplest example.
    let least = if without.is_some() { 0 } else { faults_max };
    for faults_max in least..=faults_max {
        for work in [Work::Leaf, Work::Parent] {
            for requests in REQUESTS {
                let scenario = Scenario { work, requests: requests.to_vec(), faults_max };
                let found = search(&scenario, rules);
                say(&heading(&scenario, &found));
                if let Some((text, steps)) = &found.violation {
                    say(&format!("violated: {text}"));
                    for (step_idx, step) in steps.iter().enumerate() {
                        say(&format!("{:4}. {step}", step_idx + 1));
                    }
                    return if without.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
                }
            }
        }
    }
    if without.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn heading(scenario: &Scenario, found: &Found) -> String {
    let requests: Vec<&str> = scenario.requests.iter().copied().map(Desired::verb).collect();
    let requests = if requests.is_empty() { "no request".to_owned() } else { requests.join(", ") };
    let (faults, work) = (scenario.faults_max, scenario.name(0));
    format!("{work}, {requests}, up to {faults} faults: {} states, {} deep", found.n_states, found.depth)
}

fn usage() -> ExitCode {
    let words: Vec<&str> = Rule::ALL.into_iter().map(Rule::word).collect();
    say(&format!("{USAGE}  {}", words.join("\n  ")));
    ExitCode::from(2)
}

fn say(text: &str) {
    // A closed pipe is harmless here.
    let _ = writeln!(std::io::stdout(), "{text}");
}
