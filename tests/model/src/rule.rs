//! The rules of the protocol that can be removed, to show that each is needed and that the model notices.

/// A rule. A model without one must violate an invariant; a model with all of them must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A claim takes only a queued process.
    ClaimOnlyQueued,
    /// A holder's write checks its epoch.
    FenceByEpoch,
    /// A holder's write checks that the row is held.
    FenceByPlace,
    /// A message is acknowledged only after the claim is committed.
    ClaimThenAcknowledge,
    /// A process that is woken while it parks stays held.
    ParkSeesWoken,
    /// Every statement that takes a row out of `held` applies what is desired.
    LeavingHeldObeys,
    /// The write that pauses checks whether a pause is still desired.
    PauseAsksTheRow,
    /// A wake-up does not start a paused process.
    WakeRespectsPause,
    /// `play` queues a process that was woken while paused.
    PlayLooksAtWoken,
    /// What a gone worker holds is freed repeatedly.
    FreeRepeats,
    /// A child's end and its parent's wake-up are one transaction.
    WakeWithTheEnd,
    /// A queued process without a message is announced again.
    HeadRule,
    /// A worker gives back a process that it holds by the database but does not know of.
    GiveBackUnknown,
    /// A submission is named after its try, which changes only when a new submission is decided.
    TokenByTry,
    /// The intent is recorded before the effect is made.
    IntentFirst,
    /// The site takes each name once, and a worker that finds an open intent takes its name first.
    FarEndLock,
}

impl Rule {
    /// All rules.
    pub const ALL: [Rule; 16] = [
        Rule::ClaimOnlyQueued,
        Rule::FenceByEpoch,
        Rule::FenceByPlace,
        Rule::ClaimThenAcknowledge,
        Rule::ParkSeesWoken,
        Rule::LeavingHeldObeys,
        Rule::PauseAsksTheRow,
        Rule::WakeRespectsPause,
        Rule::PlayLooksAtWoken,
        Rule::FreeRepeats,
        Rule::WakeWithTheEnd,
        Rule::HeadRule,
        Rule::GiveBackUnknown,
        Rule::TokenByTry,
        Rule::IntentFirst,
        Rule::FarEndLock,
    ];

    /// The name of the rule on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Rule::ClaimOnlyQueued => "claim-only-queued",
            Rule::FenceByEpoch => "fence-by-epoch",
            Rule::FenceByPlace => "fence-by-place",
            Rule::ClaimThenAcknowledge => "claim-then-acknowledge",
            Rule::ParkSeesWoken => "park-sees-woken",
            Rule::LeavingHeldObeys => "leaving-held-obeys",
            Rule::PauseAsksTheRow => "pause-asks-the-row",
            Rule::WakeRespectsPause => "wake-respects-pause",
            Rule::PlayLooksAtWoken => "play-looks-at-woken",
            Rule::FreeRepeats => "free-repeats",
            Rule::WakeWithTheEnd => "wake-with-the-end",
            Rule::HeadRule => "head-rule",
            Rule::GiveBackUnknown => "give-back-unknown",
            Rule::TokenByTry => "token-by-try",
            Rule::IntentFirst => "intent-first",
            Rule::FarEndLock => "far-end-lock",
        }
    }

    /// Returns the rule of this name.
    pub fn from_word(word: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.word() == word)
    }
}

/// The rules in force: all, or all but one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The rule that is not in force.
    pub without: Option<Rule>,
}

impl Rules {
    /// Returns whether the rule is in force.
    pub fn keep(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}
