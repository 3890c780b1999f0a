//! The invariants, in the words of `docs/src/internals/protocol.md`.

use baton_common::state::{Desired, Place, State as Life};
use stateright::{Model, Property};

use crate::Baton;
use crate::row::Row;
use crate::state::{Alive, FIRST, State};

/// A property that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invariant {
    /// I1 and I5: no dead end.
    NoDeadEnd,
    /// I2.
    OlderEpochWritesNothing,
    /// I3.
    CheckpointsGrow,
    /// I4.
    EndIsFinal,
    /// I5, of leases.
    LeaseIsKept,
    /// I5, of messages.
    OnlyTheBrokerLoses,
    /// I7, of what is desired.
    RequestIsDurable,
    /// I7, of what is obeyed.
    UnheldHasObeyed,
    /// I9, of the record.
    IntentBeforeEffect,
    /// I9, of the number.
    EffectOnce,
    /// I9, of the end.
    NothingOutlives,
}

impl Invariant {
    /// The text of the invariant.
    pub fn text(self) -> &'static str {
        match self {
            Invariant::NoDeadEnd => {
                "I1, I5: where only a fault can still happen, everything has ended or is rightly paused"
            }
            Invariant::OlderEpochWritesNothing => "I2: nothing that bears an older epoch changes a row",
            Invariant::CheckpointsGrow => "I3: checkpoints only grow, without a gap",
            Invariant::EndIsFinal => "I4: nothing changes after the end",
            Invariant::LeaseIsKept => "I5: a worker that is not gone has the lease of what it works on",
            Invariant::OnlyTheBrokerLoses => "I5: what is queued has a message, unless the broker has lost it",
            Invariant::RequestIsDurable => "I7: what is desired is what was asked last",
            Invariant::UnheldHasObeyed => "I7: what nobody holds has obeyed",
            Invariant::IntentBeforeEffect => "I9: no job without the record of its intent",
            Invariant::EffectOnce => "I9: no job is made twice",
            Invariant::NothingOutlives => "I9: no job outlives its process",
        }
    }
}

/// The name of the property that the search was not cut off.
pub const WITHIN_BOUNDS: &str = "epochs and tries stay below the model's bound";

/// All properties.
pub(crate) fn all() -> Vec<Property<Baton>> {
    fn always(invariant: Invariant, condition: fn(&Baton, &State) -> bool) -> Property<Baton> {
        Property::always(invariant.text(), condition)
    }
    use Invariant as I;
    vec![
        always(I::OlderEpochWritesNothing, |model, state| model.is_first(!state.harm.older_wrote)),
        always(I::CheckpointsGrow, |model, state| model.is_first(!state.harm.gap)),
        always(I::EndIsFinal, |model, state| model.is_first(!state.harm.end_changed)),
        always(I::LeaseIsKept, |model, state| model.is_first(lease_is_kept(state))),
        always(I::OnlyTheBrokerLoses, |model, state| model.is_first(only_the_broker_loses(state))),
        always(I::RequestIsDurable, |model, state| model.is_first(request_is_durable(state))),
        always(I::UnheldHasObeyed, |model, state| model.is_first(unheld_has_obeyed(state))),
        always(I::IntentBeforeEffect, |model, state| model.is_first(state.site.made & !state.site.intended == 0)),
        always(I::EffectOnce, |model, state| model.is_first(state.site.n_made <= 1)),
        always(I::NothingOutlives, |model, state| model.is_first(nothing_outlives(state))),
        always(I::NoDeadEnd, |model, state| model.is_first(!is_dead_end(model, state))),
        Property::always(WITHIN_BOUNDS, |model, state| model.is_first(!model.is_at_bound(state))),
    ]
}

fn rows(state: &State) -> impl Iterator<Item = (usize, &Row)> {
    state.rows.iter().enumerate().filter_map(|(process, row)| row.as_ref().map(|row| (process, row)))
}

fn request_is_durable(state: &State) -> bool {
    state.rows[FIRST].is_some_and(|row| row.place == Place::Ended || row.desired == state.asked)
}

fn unheld_has_obeyed(state: &State) -> bool {
    rows(state).all(|(process, row)| has_obeyed(row, state.is_outside(process)))
}

fn nothing_outlives(state: &State) -> bool {
    !state.has_ended(FIRST) || state.site.made & !state.site.ended == 0
}

fn lease_is_kept(state: &State) -> bool {
    (0..state.workers.len()).all(|worker| {
        let me = state.incarnation(worker);
        let keeps = |(process, row): (usize, &Row)| match state.workers[worker].hands[process] {
            Some(hand) => row.place == Place::Held && row.owner == Some(me) && row.epoch == hand.epoch,
            None => true,
        };
        state.workers[worker].alive == Alive::Down || state.is_gone(me) || rows(state).all(keeps)
    })
}

fn only_the_broker_loses(state: &State) -> bool {
    rows(state).all(|(process, row)| row.place != Place::Queued || state.is_told(process) || state.lost[process])
}

fn has_obeyed(row: &Row, is_outside: bool) -> bool {
    let is_paused = matches!(row.state, Life::Paused(_));
    match (row.place, row.desired) {
        (Place::Held, _) => true,
        (Place::Ended, desired) => row.state != Life::Killed || desired == Desired::Kill,
        (Place::Queued | Place::Parked, Desired::Kill) => !is_paused && (is_outside || row.place == Place::Queued),
        (Place::Queued | Place::Parked, Desired::Pause) => is_paused && row.place == Place::Parked,
        (Place::Queued | Place::Parked, Desired::Run) => !is_paused,
    }
}

fn is_dead_end(model: &Baton, state: &State) -> bool {
    let mut actions = Vec::new();
    model.actions(state, &mut actions);
    let rightly_paused = |row: &Row| matches!(row.state, Life::Paused(_)) && row.desired == Desired::Pause;
    let is_at_rest = rows(state).all(|(_, row)| row.place == Place::Ended || rightly_paused(row));
    actions.iter().all(|action| action.kind.is_fault()) && !is_at_rest
}
