//! Whole runs with crashes, compared to one without.

use super::{End, Harness, Step};

/// How many more advances a run with crashes may make than one without.
const MORE_ADVANCES_MAX: u64 = 100;

/// Runs a process twice: once without a crash, and once with a crash of the worker after every advance. Returns the end.
///
/// `make` makes the process, the same each time, for example `|| Harness::new::<Count>(json!({"to": 3}))`. State outside of
/// the checkpoint is lost in a crash, so this catches a process that keeps what it needs in a `#[serde(skip)]` field.
///
/// # Panics
/// The two runs do not end with the same exit, reason, values and progress.
#[track_caller]
pub fn run_with_crash_after_every_advance(make: impl Fn() -> Harness) -> End {
    compare(make, "after every advance", |harness| {
        let step = harness.advance();
        harness.crash();
        step
    })
}

/// Runs a process twice: once without a crash, and once with a crash of the worker before every commit, so that every
/// advance is made twice. Returns the end. Use it to show that the side effects of an advance can be repeated.
///
/// `make` makes the process, the same each time. The two processes have different pids: if an advance writes files, give
/// each run a directory of its own.
///
/// # Panics
/// The two runs do not end with the same exit, reason, values and progress.
#[track_caller]
pub fn run_with_crash_in_every_advance(make: impl Fn() -> Harness) -> End {
    compare(make, "before every commit", |harness| {
        if harness.crash_before_commit() {
            return harness.advance();
        }
        let end = harness.end_state().expect("a process that could not start has ended");
        Step::Ended(end.clone())
    })
}

#[track_caller]
fn compare(make: impl Fn() -> Harness, when: &str, mut step: impl FnMut(&mut Harness) -> Step) -> End {
    let mut plain = make();
    let expected = plain.run_to_end();
    let most = 2 * plain.advances() + MORE_ADVANCES_MAX;
    let mut crashed = make();
    let mut n_steps = 0;
    let end = loop {
        match step(&mut crashed) {
            Step::Ended(end) => break end,
            Step::Paused { reason } => panic!("with a crash {when}, the process is paused: {reason}"),
            Step::Again
            | Step::After(_)
            | Step::Linger(_)
            | Step::Retried { .. }
            | Step::GivenBack { .. }
            | Step::Waits(_) => n_steps += 1,
        }
        assert!(
            n_steps <= most,
            "with a crash {when}, the process has not ended after {n_steps} advances; without one it ends after {}. Is a \
             part of its state not serialized?",
            plain.advances()
        );
    };
    let (progress, expected_progress) = (crashed.progress(), plain.progress());
    assert!(
        end == expected && progress == expected_progress,
        "with a crash {when}, the process ends differently. Is a part of its state not serialized?\n  without: {expected:?}, \
         progress {expected_progress:?}\n  with:    {end:?}, progress {progress:?}"
    );
    end
}
