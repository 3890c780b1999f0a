//! Every action that can happen next, with its text for a trace.

use std::fmt;

use crate::Scenario;

/// An action. `worker`, `process` and `number` are 0 for a kind that does not use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Action {
    /// The kind of action.
    pub kind: Kind,
    /// The worker, if any.
    pub worker: usize,
    /// The process, if any.
    pub process: usize,
    /// The name of a submission, or an incarnation of the worker.
    pub number: u8,
}

/// The kinds of actions. Those from [`Kind::Crash`] on are faults, whose number is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The operator makes the next request.
    Ask,
    /// A sweep publishes a message for a queued process that has none.
    Tell,
    /// A sweep frees what a gone worker holds.
    Free,
    /// A dead or frozen incarnation is declared gone.
    Declare,
    /// A worker takes a message.
    Take,
    /// It claims the process.
    Claim,
    /// It acknowledges the message.
    Acknowledge,
    /// It reads at its beat what is desired.
    Read,
    /// It learns at its beat that it is gone, and starts a new incarnation.
    Notice,
    /// It gives back a process that it holds by the database but does not know of.
    GiveBack,
    /// A dead worker starts again.
    Restart,
    /// A frozen worker resumes.
    Continue,
    /// A worker records the intent of a new submission.
    Intend,
    /// It sends the submission.
    Submit,
    /// The submission reaches the site.
    Land,
    /// A worker takes the name of an open submission, or finds its job.
    Adopt,
    /// It records the job.
    Record,
    /// The job ends by itself.
    JobEnds,
    /// The watcher wakes the process whose job has ended.
    Report,
    /// The worker cancels the job.
    Cancel,
    /// It inserts the child.
    Spawn,
    /// It kills the child.
    KillChild,
    /// It checks whether the event that the process waits for has occurred.
    Look,
    /// It parks the process.
    Park,
    /// It pauses the process.
    Pause,
    /// It ends the process.
    End,
    /// It wakes the parent of the child that it has ended.
    Wake,
    /// A worker dies.
    Crash,
    /// A worker freezes.
    Stop,
    /// A live worker is declared gone.
    DeclareFalsely,
    /// A claim is committed, but the answer is lost.
    ClaimUnknown,
    /// An acknowledgement is lost.
    LoseAcknowledgement,
    /// A message is lost, or was never published.
    LoseMessage,
    /// A message is duplicated, or redelivered long after.
    Duplicate,
    /// The queue is purged.
    Purge,
    /// A submission never reaches the site.
    LoseSubmission,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 36] = [
        Kind::Ask,
        Kind::Tell,
        Kind::Free,
        Kind::Declare,
        Kind::Take,
        Kind::Claim,
        Kind::Acknowledge,
        Kind::Read,
        Kind::Notice,
        Kind::GiveBack,
        Kind::Restart,
        Kind::Continue,
        Kind::Intend,
        Kind::Submit,
        Kind::Land,
        Kind::Adopt,
        Kind::Record,
        Kind::JobEnds,
        Kind::Report,
        Kind::Cancel,
        Kind::Spawn,
        Kind::KillChild,
        Kind::Look,
        Kind::Park,
        Kind::Pause,
        Kind::End,
        Kind::Wake,
        Kind::Crash,
        Kind::Stop,
        Kind::DeclareFalsely,
        Kind::ClaimUnknown,
        Kind::LoseAcknowledgement,
        Kind::LoseMessage,
        Kind::Duplicate,
        Kind::Purge,
        Kind::LoseSubmission,
    ];

    /// Returns whether the action is a fault.
    pub fn is_fault(self) -> bool {
        self >= Kind::Crash
    }
}

impl Action {
    /// Creates an action without a worker or process.
    pub fn of(kind: Kind) -> Self {
        Action { kind, worker: 0, process: 0, number: 0 }
    }

    /// Creates an action about a process.
    pub fn about(kind: Kind, process: usize) -> Self {
        Action { process, ..Action::of(kind) }
    }

    /// Creates an action that a worker takes, or that happens to it.
    pub fn by(kind: Kind, worker: usize, process: usize) -> Self {
        Action { worker, process, ..Action::of(kind) }
    }

    /// Describes the action in a sentence.
    pub fn sentence(&self, scenario: &Scenario) -> String {
        Sentence { action: self, scenario }.to_string()
    }
}

struct Sentence<'a> {
    action: &'a Action,
    scenario: &'a Scenario,
}

impl fmt::Display for Sentence<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Action { kind, worker, process, number } = *self.action;
        let worker = ["worker A", "worker B"][worker];
        let process = self.scenario.name(process);
        match kind {
            Kind::Ask => f.write_str("the operator makes the next request"),
            Kind::Tell => write!(f, "a sweep publishes a message for the {process} again"),
            Kind::Free => write!(f, "a sweep frees the {process}, whose holder is gone"),
            Kind::Declare => write!(f, "incarnation {} of {worker}, which is silent, is declared gone", number + 1),
            Kind::Take => write!(f, "{worker} takes a message for the {process}"),
            Kind::Claim => write!(f, "{worker} claims the {process}"),
            Kind::Acknowledge => write!(f, "{worker} acknowledges the message for the {process}"),
            Kind::Read => write!(f, "{worker} reads at its beat what is desired of the {process}"),
            Kind::Notice => {
                write!(f, "{worker} learns at its beat that it is gone, drops everything and starts a new incarnation")
            }
            Kind::GiveBack => write!(f, "{worker} gives back the {process}, which it holds without knowing"),
            Kind::Restart => write!(f, "{worker} starts again"),
            Kind::Continue => write!(f, "{worker} resumes"),
            Kind::Intend => write!(f, "{worker} records the intent of a new submission of the {process}"),
            Kind::Submit => write!(f, "{worker} sends the submission of the {process}"),
            Kind::Land => write!(f, "submission {number} reaches the site"),
            Kind::Adopt => write!(f, "{worker} takes the name of the {process}'s open submission, or finds its job"),
            Kind::Record => write!(f, "{worker} records the job of the {process}"),
            Kind::JobEnds => write!(f, "job {number} ends"),
            Kind::Report => write!(f, "the watcher reports the end of job {number} and wakes the {process}"),
            Kind::Cancel => write!(f, "{worker} cancels the job of the {process}"),
            Kind::Spawn => write!(f, "{worker} inserts the child of the {process}"),
            Kind::KillChild => write!(f, "{worker} kills the child of the {process}"),
            Kind::Look => write!(f, "{worker} checks whether the {process} still has to wait"),
            Kind::Park => write!(f, "{worker} parks the {process}"),
            Kind::Pause => write!(f, "{worker} pauses the {process}"),
            Kind::End => write!(f, "{worker} ends the {process}"),
            Kind::Wake => write!(f, "{worker} wakes the parent of the child that it has ended"),
            Kind::Crash => write!(f, "FAULT: {worker} dies"),
            Kind::Stop => write!(f, "FAULT: {worker} freezes"),
            Kind::DeclareFalsely => write!(f, "FAULT: {worker} is declared gone although it is alive"),
            Kind::ClaimUnknown => {
                write!(f, "FAULT: {worker} claims the {process}, and the answer to its commit is lost")
            }
            Kind::LoseAcknowledgement => {
                write!(f, "FAULT: {worker}'s acknowledgement of the message for the {process} is lost")
            }
            Kind::LoseMessage => write!(f, "FAULT: a message for the {process} is lost"),
            Kind::Duplicate => write!(f, "FAULT: a message for the {process} is delivered once more"),
            Kind::Purge => f.write_str("FAULT: the queue is purged"),
            Kind::LoseSubmission => write!(f, "FAULT: submission {number} is lost in flight"),
        }
    }
}
