//! The model's statements match those of the store: after any sequence of operations, both have the same row.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::Duration;

use baton_common::id::{self, Pid};
use baton_common::spec::{self, Format};
use baton_common::state::{Desired, Place, State};
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::control::Request;
use baton_common::store::submit::NewProcess;
use baton_common::store::worker::NewWorker;
use baton_common::store::writer::{self, Claim, Fence, Fenced, Writer};
use baton_common::store::{Location, Store};
use baton_model::row::{Incarnation, Row, Verb, Write};
use baton_model::rule::Rules;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::sync::Semaphore;

/// An operation on the process.
#[derive(Clone, Debug)]
enum Step {
    /// A worker receives its message.
    Claim,
    /// A holder writes, under a lease `n_old` epochs ago.
    Write { n_old: u8, verb: Verb },
    /// An operator makes a request.
    Ask(Desired),
    /// Something that it waits for occurs.
    Wake,
    /// Its worker dies, and another worker frees what it held.
    Die,
}

/// A death without a checkpoint counts, and the fifth one ends the process; the model omits this.
const DEATHS_MAX: usize = 4;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let verb = prop_oneof![
        3 => Just(Verb::Keep),
        3 => Just(Verb::Park { killing: false }),
        2 => Just(Verb::Pause),
        2 => Just(Verb::GiveBack),
        1 => prop::sample::select(vec![State::Finished, State::Excepted, State::Killed]).prop_map(Verb::End),
    ];
    let step = prop_oneof![
        6 => Just(Step::Claim),
        6 => (prop::sample::select(vec![0, 0, 0, 1]), verb).prop_map(|(n_old, verb)| Step::Write { n_old, verb }),
        1 => Just(Step::Ask(Desired::Kill)),
        3 => Just(Step::Ask(Desired::Pause)),
        3 => Just(Step::Ask(Desired::Run)),
        3 => Just(Step::Wake),
        1 => Just(Step::Die),
    ];
    prop::collection::vec(step, 1..20)
}

struct Real {
    store: Store,
    writer: Writer,
    pid: Pid,
}

impl Real {
    async fn new(url: &str) -> Self {
        let store = Store::open(Location::parse(url).unwrap()).await.unwrap();
        let process = NewProcess {
            pid: Pid::generate(),
            spec: spec::parse("call: own.x", Format::Yaml).unwrap(),
            created_by: "ann@h".into(),
            traceparent: None,
            reply_to: None,
            run_key: None,
        };
        let pid = process.pid;
        store.submit(&[process]).await.unwrap();
        let writer = start_worker(&store).await;
        Self { store, writer, pid }
    }

    async fn step(&mut self, step: &Step, epoch: u8) {
        match step {
            Step::Claim => {
                let claim = self.writer.claim(self.pid, "default".into(), None).await.unwrap();
                assert!(matches!(claim, Claim::Claimed(_) | Claim::NotQueued), "{claim:?}");
            }
            Step::Write { n_old, verb } => {
                let verb = match verb {
                    Verb::Keep => writer::Verb::Keep,
                    // The process is due at once, and so sleeps until the sweep runs.
                    Verb::Park { .. } => writer::Verb::Park { wake_in: Duration::ZERO },
                    Verb::Pause => writer::Verb::Pause,
                    Verb::GiveBack => writer::Verb::GiveBack,
                    Verb::End(state) => writer::Verb::End { state: *state, outcome: Outcome::default() },
                };
                let fence = Fence { pid: self.pid, epoch: i64::from(epoch) - i64::from(*n_old) };
                let checkpoint = Some((&Checkpoint::default()).into());
                let fenced = Fenced { fence, verb, checkpoint, try_number: 1, ended: None, outputs: vec![] };
                self.writer.write(fenced).await.unwrap();
            }
            Step::Ask(verb) => {
                self.store.control(self.pid, &Request::new(*verb, "ann")).await.unwrap();
            }
            Step::Wake => {
                self.store.wake_due().await.unwrap();
            }
            Step::Die => {
                // In SQLite, a worker that registers is the only one.
                self.writer = start_worker(&self.store).await;
                self.store.free().await.unwrap();
            }
        }
    }
}

async fn start_worker(store: &Store) -> Writer {
    let me = id::Incarnation::generate();
    let (name, host, version) = ("w".into(), "h".into(), "0".into());
    let worker = NewWorker { name, host, os_pid: 1, version, queues: vec!["default".into()], slots: 8, sites: vec![] };
    store.register(me, &worker).await.unwrap();
    let (writer, task) = Writer::new(store, me, &Arc::new(Semaphore::new(8))).await.unwrap();
    #[expect(clippy::disallowed_methods, reason = "the task ends with the test's runtime")]
    tokio::task::spawn(task);
    writer
}

fn model_step(row: &mut Row, step: &Step) {
    let rules = Rules::default();
    match step {
        Step::Claim => {
            row.claim(Incarnation { worker: 0, generation: 0 }, rules);
        }
        Step::Write { n_old, verb } => {
            // Before the first lease there is none.
            if let Some(epoch) = row.epoch.checked_sub(*n_old) {
                row.write(Write { epoch, checkpoint: None, verb: *verb }, rules);
            }
        }
        Step::Ask(verb) => row.control(*verb, false, rules),
        // The sweep of the timers sees only sleeping processes.
        Step::Wake if row.place == Place::Parked && row.state == State::Waiting => row.wake(rules),
        Step::Die if row.place == Place::Held => row.free(false, rules),
        Step::Wake | Step::Die => {}
    }
}

#[test]
fn the_model_and_the_store_say_the_same_after_every_step() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let n_cases = std::cell::Cell::new(0);
    let mut runner = TestRunner::new(Config { cases: 64, failure_persistence: None, ..Config::default() });
    let result = runner.run(&steps(), |steps| {
        n_cases.set(n_cases.get() + 1);
        let url = format!("sqlite:{}/{}.db", folder.path().display(), n_cases.get());
        runtime.block_on(async {
            let (mut real, mut row) = (Real::new(&url).await, Row::accepted());
            let mut n_deaths = 0;
            for (step_idx, step) in steps.iter().enumerate() {
                n_deaths += usize::from(matches!(step, Step::Die));
                if n_deaths > DEATHS_MAX {
                    break;
                }
                real.step(step, row.epoch).await;
                model_step(&mut row, step);
                let shown = real.store.show(real.pid).await.unwrap().unwrap().summary;
                prop_assert_eq!(
                    (shown.place, shown.state, shown.desired, shown.epoch, shown.owner.is_some()),
                    (row.place, row.state, row.desired, i64::from(row.epoch), row.owner.is_some()),
                    "after step {} of {:?}",
                    step_idx + 1,
                    steps
                );
            }
            Ok(())
        })
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
