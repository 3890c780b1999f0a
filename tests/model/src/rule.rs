//! The rules of the protocol that can be taken away, to see that each is needed and that the model would notice.

/// A rule. A model without one must come to harm; one with all of them must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A claim takes only what is queued.
    ClaimOnlyQueued,
    /// A holder's write says its epoch.
    FenceByEpoch,
    /// A holder's write says that the row is held.
    FenceByPlace,
    /// A message is acknowledged after the claim is committed.
    ClaimThenAcknowledge,
    /// A process that was woken while it parked stays held.
    ParkSeesWoken,
    /// Every statement that takes a row out of `held` applies what is desired.
    LeavingHeldObeys,
    /// The write that pauses asks the row whether a pause is still desired.
    PauseAsksTheRow,
    /// A wake-up does not start what is paused.
    WakeRespectsPause,
    /// `play` queues what was woken while it was paused.
    PlayLooksAtWoken,
    /// What a gone worker holds is freed again and again.
    FreeRepeats,
    /// A child's end and its parent's wake-up are one transaction.
    WakeWithTheEnd,
    /// What is queued and has no message is told again.
    HeadRule,
    /// A worker gives back what it holds by the database and does not know of.
    GiveBackUnknown,
    /// A submission is named by its try, which changes only when a new one is decided.
    TokenByTry,
    /// The intent is recorded before the effect is made.
    IntentFirst,
    /// The far end takes each name once, and whoever finds an open intent takes its name first.
    FarEndLock,
}

impl Rule {
    /// All of them.
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

    /// What the command line calls it.
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

    /// The rule of this name.
    pub fn from_word(word: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.word() == word)
    }
}

/// The rules that are in force: all, or all but one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The one that is not.
    pub without: Option<Rule>,
}

impl Rules {
    /// Whether it is in force.
    pub fn keep(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}
