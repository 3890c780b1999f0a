//! Requests that race with everything that a process does. Each process is a round; its history decides.
//!
//! A short form runs with all other tests. `BATON_RACE_ROUNDS` is the number of processes in each race, and
//! `BATON_RACE_SEED` repeats the delays of an earlier run.

use std::cell::Cell;
use std::time::Duration;

use baton_common::state::Desired;
use baton_tests::dice::Dice;
use baton_tests::eventually;
use baton_tests::history::{Answered, History};
use baton_tests::journal;
use baton_tests::operator::Operator;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use futures_util::StreamExt;

/// The number of concurrent requests.
const UNDER_WAY: usize = 48;

/// Random delays and verbs.
trait Throw {
    async fn pause(&mut self, limit_ms: u64);
    fn verb(&mut self) -> Desired;
}

impl Throw for Dice {
    async fn pause(&mut self, limit_ms: u64) {
        tokio::time::sleep(Duration::from_micros(self.next(limit_ms * 1000))).await;
    }

    fn verb(&mut self) -> Desired {
        *self.pick(&[Desired::Run, Desired::Pause, Desired::Pause, Desired::Kill])
    }
}

fn seed() -> u64 {
    std::env::var("BATON_RACE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(Dice::seed)
}

fn rounds() -> u32 {
    std::env::var("BATON_RACE_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(200)
}

/// A fleet, its processes, and the answers that its operators received.
struct Race {
    scene: Scene,
    operators: [Operator; 2],
    pids: Vec<String>,
    seed: u64,
    dice: Dice,
}

impl Race {
    async fn new(spec: &str) -> (Self, Vec<Worker>) {
        let scene = Scene::new().await;
        journal::keep(&scene).await;
        let workers = vec![scene.worker("w1", &["--slots", "60"]).await, scene.worker("w2", &["--slots", "60"]).await];
        let operators = [Operator::new(&scene, "ann").await, Operator::new(&scene, "bob").await];
        let pids = scene.submit(spec, rounds()).await;
        let seed = seed();
        (Self { scene, operators, pids, seed, dice: Dice::seeded(seed) }, workers)
    }

    /// Sends the requests of every process, many processes at a time.
    async fn run(&self, requests: impl AsyncFn(&[Operator; 2], &str, Dice) -> Vec<Option<Answered>>) -> Vec<Answered> {
        let requests = &requests;
        let (operators, dice) = (&self.operators, &self.dice);
        let answered = futures_util::stream::iter(self.pids.iter().enumerate())
            .map(|(idx, pid)| requests(operators, pid, dice.of(idx)))
            .buffer_unordered(UNDER_WAY)
            .collect::<Vec<_>>()
            .await;
        answered.into_iter().flatten().flatten().collect()
    }

    /// Plays what is paused, waits until all have ended, and checks the history; returns how many were killed and
    /// finished.
    async fn judge(&self, answers: Vec<Answered>) -> (usize, usize) {
        eventually("every request is obeyed", Duration::from_secs(60), async || {
            let rest = self.scene.sql("SELECT count(*) FROM event WHERE outcome IS NULL AND pid IS NOT NULL").await;
            if rest.trim() == "0" { Ok(()) } else { Err(rest) }
        })
        .await;
        let history = History::read(&self.scene, answers.clone()).await;
        assert_eq!(history.violations(), Vec::<String>::new(), "before all are played; seed {}", self.seed);
        self.scene.baton(&["play", "--all"]).await.ok();
        eventually("all have ended", Duration::from_secs(240), async || {
            let rest =
                self.scene.sql("SELECT place, state, count(*) FROM process WHERE place <> 3 GROUP BY 1, 2").await;
            if rest.is_empty() { Ok(()) } else { Err(rest) }
        })
        .await;
        let history = History::read(&self.scene, answers).await;
        let history = history.accepting(&self.pids);
        assert_eq!(history.violations(), Vec::<String>::new(), "seed {}", self.seed);
        let count = |state: &str| history.processes.values().filter(|process| process.state == state).count();
        assert_eq!(count("killed") + count("finished"), self.pids.len());
        (count("killed"), count("finished"))
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn kill_against_end() {
    let spec = "{call: baton.count, hold: true, with: {advances: 3, every: 10ms}}";
    let (race, _workers) = Race::new(spec).await;
    // A kill that came in time delays the next ones, and one that came too late advances them, at most to the time of
    // the `play` itself. They thus stay close to the end, however slow the machine makes a request.
    let delay_us = Cell::new(50_000);
    let answers = race
        .run(async |operators, pid, mut dice| {
            let kill = async {
                tokio::time::sleep(Duration::from_micros(dice.next(2 * delay_us.get()))).await;
                let killed = operators[0].ask(pid, Desired::Kill).await;
                let (sooner_us, later_us) = (delay_us.get() * 15 / 16, delay_us.get() * 17 / 16);
                delay_us.set(if killed.is_some() { later_us } else { sooner_us.max(1_000) });
                killed
            };
            let (played, killed) = tokio::join!(operators[0].ask(pid, Desired::Run), kill);
            vec![played, killed]
        })
        .await;
    let (killed, finished) = race.judge(answers).await;
    assert!(killed > 0 && finished > 0, "{killed} killed, {finished} finished: the timing was not close");
}

/// Alternates `pause` and `play`, with delays below a limit.
async fn pause_and_play(spec: &str, verbs: &[Desired], delay_max_ms: u64) {
    let (race, _workers) = Race::new(spec).await;
    let answers = race
        .run(async |operators, pid, mut dice| {
            let mut answers = Vec::new();
            for verb in verbs {
                dice.pause(delay_max_ms).await;
                answers.push(operators[0].ask(pid, *verb).await);
            }
            answers
        })
        .await;
    let (killed, _) = race.judge(answers).await;
    assert_eq!(killed, 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn pause_against_play() {
    let verbs = [Desired::Pause, Desired::Run, Desired::Pause, Desired::Run, Desired::Pause];
    pause_and_play("{call: baton.count, with: {advances: 20, every: 20ms}}", &verbs, 60).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn pause_against_park_and_wake() {
    let verbs = [Desired::Pause, Desired::Run, Desired::Pause, Desired::Run];
    pause_and_play("{call: baton.count, with: {advances: 4, every: 1s}}", &verbs, 700).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn two_operators_at_once() {
    // On hold, so that each begins when its requests do.
    let (race, _workers) = Race::new("{call: baton.count, hold: true, with: {advances: 10, every: 20ms}}").await;
    let answers = race
        .run(async |operators, pid, mut dice| {
            let mut answers = vec![operators[0].ask(pid, Desired::Run).await];
            dice.pause(150).await;
            for _ in 0..3 {
                let verbs = [dice.verb(), dice.verb()];
                let (first, second) = tokio::join!(operators[0].ask(pid, verbs[0]), operators[1].ask(pid, verbs[1]));
                answers.extend([first, second]);
            }
            answers
        })
        .await;
    let (killed, finished) = race.judge(answers).await;
    assert!(killed > 0 && finished > 0, "{killed} killed, {finished} finished: the timing was not close");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn requests_against_takeover() {
    let (race, mut workers) = Race::new("{call: baton.count, with: {advances: 60, every: 50ms}}").await;
    let mut victim = workers.pop().expect("two workers");
    let deaths = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            victim.kill();
            victim = race.scene.worker("w2", &["--slots", "60"]).await;
        }
    };
    let requests = race.run(async |operators, pid, mut dice| {
        let mut answers = Vec::new();
        for _ in 0..3 {
            dice.pause(1_000).await;
            answers.push(operators[0].ask(pid, dice.verb()).await);
        }
        answers
    });
    let ((), answers) = tokio::join!(deaths, requests);
    let (killed, finished) = race.judge(answers).await;
    assert!(killed > 0 && finished > 0, "{killed} killed, {finished} finished: the timing was not close");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn broadcasts_while_workers_join_leave_and_freeze() {
    let (race, mut workers) = Race::new("{call: baton.count, with: {advances: 100, every: 100ms}}").await;
    let scene = &race.scene;
    let mut dice = race.dice.clone();
    let frozen = workers.pop().expect("two workers");
    let mut guests: Vec<Worker> = Vec::new();
    for turn in 0..8 {
        dice.pause(400).await;
        let verb = if turn % 2 == 0 { "pause" } else { "play" };
        let arguments = [verb, "--all", "-o", "json"];
        let broadcast = scene.baton(&arguments);
        let unrest = async {
            match turn {
                0 | 5 => guests.push(scene.worker(&format!("guest{turn}"), &["--slots", "60"]).await),
                2 => frozen.freeze(),
                3 => {
                    eventually("the frozen one is gone", Duration::from_secs(30), async || {
                        let n_gone = scene.sql("SELECT count(*) FROM worker WHERE name = 'w2' AND gone_at IS NOT NULL");
                        if n_gone.await.trim() == "1" { Ok(()) } else { Err("not yet") }
                    })
                    .await;
                    frozen.thaw();
                }
                4 => assert!(guests.pop().expect("one came before").terminate().await.success()),
                6 => guests.pop().expect("one came before").kill(),
                _ => {}
            }
        };
        let (output, ()) = tokio::join!(broadcast, unrest);
        output.ok();
    }
    let (killed, _) = race.judge(vec![]).await;
    assert_eq!(killed, 0);
}
