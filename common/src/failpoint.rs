//! Borders at which a test can end this program as if by SIGKILL: between a commit, a message, an acknowledgement and what
//! a program does outside.
//!
//! They are there only in builds with the feature `failpoints`. `FAILPOINTS` names one and what happens there, in the words
//! of the crate `fail`: `FAILPOINTS='claim-committed=49*off->return'` ends the program at the fiftieth claim, and
//! `pause`, `sleep(500)` and `panic` do what they say.
//!
//! Where `return` is something else, the name is not among [`ALL`]: at `claim-unanswered`, `checkpoint-unanswered` and
//! `departure-unanswered` the answer to a commit is lost, and at `submission-refused` a server has no channel left.

pub use fail::fail_point;

/// All of them, each with what has happened when it is reached.
pub const ALL: &[(&str, &str)] = &[
    ("submit-begun", "a page of processes is about to be inserted"),
    ("submit-committed", "a page of processes is committed, and no message has been published"),
    ("publish-sent", "a task was published and is not confirmed"),
    ("publish-confirmed", "a task is confirmed, and whoever asked for it does not know"),
    ("request-committed", "a request of an operator is in the rows, and nobody has been told"),
    ("task-taken", "a delivery has arrived, and nothing is claimed"),
    ("claim-committed", "a claim is committed, and the message is not acknowledged"),
    ("launch-answered", "the sender of a launch was answered, and the message is not acknowledged"),
    ("advance-made", "an advance has done what it does, and is not recorded"),
    ("checkpoint-committed", "a checkpoint is committed, and the process does not know"),
    ("departure-committed", "a process is parked, paused, given back or ended, and nobody has been told"),
    ("program-started", "a local program runs"),
    ("program-ended", "a local program has ended, and its end is not recorded"),
    ("free-committed", "processes of a dead worker are queued, and no message has been published"),
    ("wake-committed", "processes whose time has come are queued, and no message has been published"),
    ("letter-published", "a dead letter is published, and its message is not acknowledged"),
    ("acknowledged", "a task is acknowledged"),
    ("job-staged", "everything that a job needs is at its site, and this is not recorded"),
    ("job-intended", "the intent to submit a job is recorded, and nothing is submitted"),
    ("job-submitted", "a job is submitted, and nobody knows what it is called"),
    ("job-known", "what a job is called is recorded, and its process does not know"),
    ("job-seen", "the end of a job is recorded, and nobody has been told"),
    ("job-collected", "everything that a job has made is in the object store, and this is not recorded"),
    ("job-never", "that there never was a job is recorded, and its process does not know"),
    ("job-given-up", "a try is given up at its site, and this is not recorded"),
    ("job-cancelled", "a job is cancelled, and this is not recorded"),
];

/// Names a border. In a function that returns something, the border must not be inside of an expression.
#[macro_export]
macro_rules! border {
    ($name:expr) => {
        $crate::failpoint::fail_point!($name, |_| $crate::failpoint::end())
    };
}

/// Reads `FAILPOINTS`; the value is to live as long as the program.
#[cfg(feature = "failpoints")]
pub fn init() -> impl Sized {
    fail::FailScenario::setup()
}

/// Nothing, without the feature.
#[cfg(not(feature = "failpoints"))]
pub fn init() -> impl Sized {}

/// Ends the program, and nothing of it runs any more.
pub fn end() -> ! {
    std::process::abort()
}
