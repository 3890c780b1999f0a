//! The possible actions in a state, and their effects.

use std::sync::atomic::Ordering;

use baton_common::state::{Desired, Place};
use stateright::{Model, Property};

use crate::action::{Action, Kind};
use crate::row::{Incarnation, Row, Stage, Write};
use crate::rule::Rule;
use crate::state::{Alive, CHILD, Delivery, FIRST, Hand, State, Step, Worker, bit};
use crate::{Baton, property, work};

/// Epochs and tries never reach this number, as [`property::WITHIN_BOUNDS`] checks; names are bits of 16.
const NUMBER_MAX: u8 = 15;

impl Model for Baton {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.n_asked < self.scenario.requests.len() {
            actions.push(Action::of(Kind::Ask));
        }
        for process in [FIRST, CHILD] {
            if let Some(row) = &state.rows[process] {
                self.actions_of_sweeps(state, process, row, actions);
                for worker in 0..state.workers.len() {
                    self.actions_of_worker(state, worker, process, row, actions);
                }
            }
        }
        for worker in 0..state.workers.len() {
            actions_of_life(state, worker, actions);
        }
        actions_of_site(state, actions);
        if state.n_faults < self.scenario.faults_max {
            faults(state, actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        self.taken.fetch_or(1 << action.kind as u64, Ordering::Relaxed);
        let mut state = last.clone();
        state.n_faults += u8::from(action.kind.is_fault());
        self.act(&mut state, action);
        self.settle(last, &mut state, action);
        state.forget();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Baton>> {
        property::all()
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.rows.iter().flatten().all(|row| row.epoch <= NUMBER_MAX && row.try_number <= NUMBER_MAX)
    }
}

impl Baton {
    /// Whether the search is about to be cut off, which is allowed only for a protocol without one of its rules.
    pub(crate) fn is_at_bound(&self, state: &State) -> bool {
        self.rules.without.is_none()
            && state.rows.iter().flatten().any(|row| row.epoch == NUMBER_MAX || row.try_number == NUMBER_MAX)
    }

    fn actions_of_sweeps(&self, state: &State, process: usize, row: &Row, actions: &mut Vec<Action>) {
        if row.place == Place::Queued && !state.is_told(process) && self.rules.keep(Rule::HeadRule) {
            actions.push(Action::about(Kind::Tell, process));
        }
        if is_orphan(state, row) && self.rules.keep(Rule::FreeRepeats) {
            actions.push(Action::about(Kind::Free, process));
        }
    }

    fn actions_of_worker(&self, state: &State, worker: usize, process: usize, row: &Row, actions: &mut Vec<Action>) {
        let Worker { alive: Alive::Up, deliveries, hands, claimed_late, .. } = &state.workers[worker] else { return };
        let me = state.incarnation(worker);
        let mut push = |kind| actions.push(Action::by(kind, worker, process));
        match deliveries[process] {
            Delivery::None if state.messages[process] => push(Kind::Take),
            Delivery::Taken | Delivery::TakenAndAcknowledged if !claimed_late => {
                push(Kind::Claim);
            }
            Delivery::Claimed => push(Kind::Acknowledge),
            Delivery::None | Delivery::Taken | Delivery::TakenAndAcknowledged => {}
        }
        let is_mine = row.place == Place::Held && row.owner == Some(me) && !state.is_gone(me);
        let Some(hand) = &hands[process] else {
            if is_mine && self.rules.keep(Rule::GiveBackUnknown) {
                push(Kind::GiveBack);
            }
            return;
        };
        if is_mine && hand.epoch == row.epoch && hand.desired != row.desired {
            push(Kind::Read);
        }
        let next = work::next(self.scenario.work, process, hand, self.rules);
        // The sender of a submission waits until it has arrived or is surely lost.
        let waits = next == Kind::Adopt
            && hand.step == Step::Sent
            && hand.desired == Desired::Run
            && state.site.flying & bit(work::name(hand, self.rules)) != 0;
        if !waits {
            push(next);
        }
    }

    fn act(&self, state: &mut State, action: Action) {
        let Action { kind, worker, process, number } = action;
        match kind {
            Kind::Ask => {
                let verb = self.scenario.requests[state.n_asked];
                state.n_asked += 1;
                if !state.has_ended(FIRST) && state.asked != Desired::Kill {
                    state.asked = verb;
                }
                self.control(state, FIRST, verb);
            }
            Kind::Tell | Kind::Duplicate => state.publish(process),
            Kind::Free => self.free(state, process),
            Kind::Declare | Kind::DeclareFalsely => {
                state.declare(Incarnation { worker, generation: number });
                if !self.rules.keep(Rule::FreeRepeats) {
                    for process in [FIRST, CHILD] {
                        if state.rows[process].is_some_and(|row| is_orphan(state, &row)) {
                            self.free(state, process);
                        }
                    }
                }
            }
            Kind::Take => {
                state.messages[process] = false;
                let acknowledged = !self.rules.keep(Rule::ClaimThenAcknowledge);
                state.workers[worker].deliveries[process] =
                    if acknowledged { Delivery::TakenAndAcknowledged } else { Delivery::Taken };
            }
            Kind::Claim => self.claim(state, worker, process),
            Kind::ClaimUnknown => {
                let me = state.incarnation(worker);
                row(state, process).claim(me, self.rules);
                state.workers[worker].deliveries[process] = Delivery::None;
                state.publish(process);
            }
            Kind::Acknowledge => state.workers[worker].deliveries[process] = Delivery::None,
            Kind::LoseAcknowledgement => {
                state.workers[worker].deliveries[process] = Delivery::None;
                state.publish(process);
            }
            Kind::Read => {
                let desired = row(state, process).desired;
                let hand = hand(state, worker, process);
                hand.desired = desired;
                if let Step::Looked(_) = hand.step {
                    hand.step = Step::Begin;
                }
            }
            Kind::Notice | Kind::Restart => {
                state.requeue(worker);
                state.workers[worker] = Worker::fresh(state.workers[worker].generation + 1);
            }
            Kind::Crash => {
                state.requeue(worker);
                let generation = state.workers[worker].generation;
                state.workers[worker] = Worker { alive: Alive::Down, ..Worker::fresh(generation) };
            }
            Kind::Stop => state.workers[worker].alive = Alive::Stopped,
            Kind::Continue => state.workers[worker].alive = Alive::Up,
            Kind::GiveBack => {
                let epoch = row(state, process).epoch;
                let write = Write { epoch, checkpoint: None, verb: work::verb(kind, Desired::Run) };
                row(state, process).write(write, self.rules);
            }
            Kind::Look => {
                let stage = hand(state, worker, process).checkpoint;
                let has_come = match stage {
                    Stage::Submitted(name) => state.site.ended & bit(name) != 0,
                    Stage::Spawned => state.has_ended(CHILD),
                    Stage::Fresh | Stage::Intended(_) => false,
                };
                hand(state, worker, process).step = Step::Looked(has_come);
            }
            Kind::Intend | Kind::Record | Kind::Spawn | Kind::Park | Kind::Pause | Kind::End => {
                self.write(state, worker, process, kind);
            }
            Kind::Submit | Kind::Adopt | Kind::Cancel => self.reach_out(state, worker, process, kind),
            Kind::KillChild => {
                let parent = *row(state, process);
                let hand = hand(state, worker, process);
                if parent.place == Place::Held && parent.epoch == hand.epoch {
                    hand.step = Step::AskedChild;
                    self.control(state, CHILD, Desired::Kill);
                } else {
                    state.workers[worker].hands[process] = None;
                }
            }
            Kind::Wake => {
                state.workers[worker].owes_wake = false;
                row(state, FIRST).wake(self.rules);
            }
            Kind::Land => {
                let site = &mut state.site;
                site.flying &= !bit(number);
                let is_taken = site.locked & bit(number) != 0 && self.rules.keep(Rule::FarEndLock);
                if !is_taken {
                    site.locked |= bit(number);
                    site.made |= bit(number);
                    site.n_made += 1;
                }
            }
            Kind::LoseSubmission => state.site.flying &= !bit(number),
            Kind::JobEnds => state.site.ended |= bit(number),
            Kind::Report => {
                state.site.reported |= bit(number);
                row(state, FIRST).wake(self.rules);
            }
            Kind::LoseMessage => state.messages[process] = false,
            Kind::Purge => state.messages = [false; 2],
        }
    }

    fn claim(&self, state: &mut State, worker: usize, process: usize) {
        let me = state.incarnation(worker);
        let is_gone = state.is_gone(me);
        let row = row(state, process);
        let is_claimed = row.claim(me, self.rules);
        let hand = Hand {
            epoch: row.epoch,
            checkpoint: row.checkpoint,
            try_number: row.try_number,
            desired: row.desired,
            step: Step::Begin,
        };
        let worker = &mut state.workers[worker];
        let to_acknowledge = worker.deliveries[process] == Delivery::Taken;
        worker.deliveries[process] = if is_claimed && to_acknowledge { Delivery::Claimed } else { Delivery::None };
        if is_claimed {
            worker.hands[process] = Some(hand);
            worker.claimed_late = is_gone;
        }
    }

    /// The statement that records a request, in one transaction with all its consequences.
    fn control(&self, state: &mut State, process: usize, verb: Desired) {
        let is_outside = state.is_outside(process);
        if state.rows[process].is_some() {
            row(state, process).control(verb, is_outside, self.rules);
        }
    }

    fn free(&self, state: &mut State, process: usize) {
        let is_outside = state.is_outside(process);
        row(state, process).free(is_outside, self.rules);
    }

    /// A write of the holder, with its checkpoint if it made progress.
    fn write(&self, state: &mut State, worker: usize, process: usize, kind: Kind) {
        let held = *hand(state, worker, process);
        let name = if kind == Kind::Intend { held.try_number + 1 } else { work::name(&held, self.rules) };
        let checkpoint = if kind == Kind::Intend {
            Some(Stage::Intended(name))
        } else if kind == Kind::Record {
            Some(Stage::Submitted(name))
        } else if kind == Kind::Spawn {
            Some(Stage::Spawned)
        } else {
            None
        };
        let write = Write { epoch: held.epoch, checkpoint, verb: work::verb(kind, held.desired) };
        let before = *row(state, process);
        let is_written = row(state, process).write(write, self.rules);
        let after = *row(state, process);
        if !is_written || after.place != Place::Held {
            state.workers[worker].hands[process] = None;
        } else {
            let hand = hand(state, worker, process);
            hand.checkpoint = checkpoint.unwrap_or(hand.checkpoint);
            hand.try_number += u8::from(kind == Kind::Intend);
            hand.desired = after.desired;
            hand.step = if kind == Kind::Intend { Step::Decided } else { Step::Begin };
        }
        if !is_written {
            return;
        }
        state.harm.older_wrote |= held.epoch < before.epoch;
        state.harm.gap |= checkpoint.is_some() && held.checkpoint != before.checkpoint;
        if kind == Kind::Intend {
            state.site.intended |= bit(name);
        }
        if kind == Kind::Spawn {
            state.rows[CHILD] = Some(Row::accepted());
        }
    }

    /// The worker's actions at the site.
    fn reach_out(&self, state: &mut State, worker: usize, process: usize, kind: Kind) {
        let held = *hand(state, worker, process);
        let name = bit(work::name(&held, self.rules));
        let site = &mut state.site;
        let step = if kind == Kind::Submit {
            site.flying |= name;
            Step::Sent
        } else if kind == Kind::Cancel {
            site.ended |= name;
            Step::Cancelled
        } else {
            let is_taken = site.locked & name != 0;
            if self.rules.keep(Rule::FarEndLock) {
                site.locked |= name;
            }
            if is_taken && site.made & name != 0 { Step::Found } else { Step::Burnt }
        };
        hand(state, worker, process).step = step;
    }

    /// The side effects of each transaction, and the consequences of its commit.
    fn settle(&self, last: &State, state: &mut State, action: Action) {
        if state.has_ended(CHILD) && !last.has_ended(CHILD) {
            if action.kind == Kind::End && !self.rules.keep(Rule::WakeWithTheEnd) {
                state.workers[action.worker].owes_wake = true;
            } else {
                row(state, FIRST).wake(self.rules);
            }
        }
        for process in [FIRST, CHILD] {
            let Some(row) = state.rows[process] else { continue };
            let before = last.rows[process];
            let was_queued = before.is_some_and(|row| row.place == Place::Queued);
            if row.place == Place::Queued && !was_queued {
                state.publish(process);
            }
            let is_queued_untold = row.place == Place::Queued && !state.is_told(process);
            let is_brokers = matches!(action.kind, Kind::LoseMessage | Kind::Purge);
            state.lost[process] = is_queued_untold && (state.lost[process] || is_brokers);
            if let Some(before) = before {
                state.harm.end_changed |= before.place == Place::Ended && before != row;
            }
        }
    }
}

/// Starts, declarations and their consequences, without faults.
fn actions_of_life(state: &State, worker: usize, actions: &mut Vec<Action>) {
    let Worker { alive, generation, owes_wake, .. } = state.workers[worker];
    match alive {
        Alive::Up => {
            if state.is_gone(state.incarnation(worker)) {
                actions.push(Action::by(Kind::Notice, worker, FIRST));
            }
            if owes_wake {
                actions.push(Action::by(Kind::Wake, worker, FIRST));
            }
        }
        Alive::Stopped => actions.push(Action::by(Kind::Continue, worker, FIRST)),
        Alive::Down => actions.push(Action::by(Kind::Restart, worker, FIRST)),
    }
    for number in 0..=generation {
        let is_silent = number < generation || alive != Alive::Up;
        if is_silent && !state.is_gone(Incarnation { worker, generation: number }) {
            actions.push(Action { number, ..Action::by(Kind::Declare, worker, FIRST) });
        }
    }
}

/// Actions at the site, without faults.
fn actions_of_site(state: &State, actions: &mut Vec<Action>) {
    let site = &state.site;
    for number in 0..=NUMBER_MAX {
        let mut push = |kind| actions.push(Action { number, ..Action::of(kind) });
        let has = |set: u16| set & bit(number) != 0;
        if has(site.flying) {
            push(Kind::Land);
        }
        if has(site.made) && !has(site.ended) {
            push(Kind::JobEnds);
        }
        if has(site.ended) && !has(site.reported) && !state.has_ended(FIRST) {
            push(Kind::Report);
        }
    }
}

fn faults(state: &State, actions: &mut Vec<Action>) {
    for (worker, it) in state.workers.iter().enumerate() {
        if it.alive == Alive::Down {
            continue;
        }
        actions.push(Action::by(Kind::Crash, worker, FIRST));
        if it.alive == Alive::Stopped {
            continue;
        }
        actions.push(Action::by(Kind::Stop, worker, FIRST));
        if !state.is_gone(state.incarnation(worker)) {
            actions.push(Action { number: it.generation, ..Action::by(Kind::DeclareFalsely, worker, FIRST) });
        }
        for (process, row) in state.rows.iter().enumerate() {
            let is_queued = row.is_some_and(|row| row.place == Place::Queued);
            match it.deliveries[process] {
                Delivery::Taken if is_queued => actions.push(Action::by(Kind::ClaimUnknown, worker, process)),
                Delivery::Claimed => actions.push(Action::by(Kind::LoseAcknowledgement, worker, process)),
                Delivery::None | Delivery::Taken | Delivery::TakenAndAcknowledged => {}
            }
        }
    }
    for (process, is_there) in state.messages.iter().enumerate() {
        if *is_there {
            actions.push(Action::about(Kind::LoseMessage, process));
        }
        if !*is_there && state.rows[process].is_some() {
            actions.push(Action::about(Kind::Duplicate, process));
        }
    }
    if state.messages != [false; 2] {
        actions.push(Action::of(Kind::Purge));
    }
    for number in 0..=NUMBER_MAX {
        if state.site.flying & bit(number) != 0 {
            actions.push(Action { number, ..Action::of(Kind::LoseSubmission) });
        }
    }
}

/// Whether a gone worker holds the row.
fn is_orphan(state: &State, row: &Row) -> bool {
    row.place == Place::Held && row.owner.is_some_and(|owner| state.is_gone(owner))
}

fn row(state: &mut State, process: usize) -> &mut Row {
    state.rows[process].as_mut().expect("actions are about processes that are there")
}

fn hand(state: &mut State, worker: usize, process: usize) -> &mut Hand {
    state.workers[worker].hands[process].as_mut().expect("a worker acts on what it holds")
}
