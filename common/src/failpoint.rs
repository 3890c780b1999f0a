//! Borders: points between a commit, a message, an acknowledgement and an external effect, at which a test can end this
//! program as if by SIGKILL.
//!
//! They exist only in builds with the feature `failpoints`. The variable `FAILPOINTS` has the name and action of a
//! border in the syntax of the crate `fail`: `FAILPOINTS='claim-committed=49*off->return'` ends the program at the
//! fiftieth claim. The actions `pause`, `sleep(500)` and `panic` work, too.
//!
//! Fail points with another effect of `return` are not in [`ALL`]: at `claim-unanswered`, `checkpoint-unanswered` and
//! `departure-unanswered` the answer to a commit is lost, and at `submission-refused` a server has no free channel.

pub use fail::fail_point;

/// All borders, each with the state at this point.
pub const ALL: &[(&str, &str)] = &[
    ("submit-begun", "a page of processes is about to be inserted"),
    ("submit-committed", "a page of processes is committed, and no message has been published"),
    ("publish-sent", "a task is published and not confirmed"),
    ("publish-confirmed", "a task is confirmed, and its publisher does not know"),
    ("request-committed", "a request of an operator is in the rows, and no worker is notified"),
    ("task-taken", "a delivery has arrived, and its process is not claimed"),
    ("claim-committed", "a claim is committed, and the message is not acknowledged"),
    ("launch-answered", "the reply to a launch is sent, and the message is not acknowledged"),
    ("advance-made", "an advance is done, and not recorded"),
    ("checkpoint-committed", "a checkpoint is committed, and the process does not know"),
    ("departure-committed", "a process is parked, paused, given back or ended, and no one is notified"),
    ("program-started", "a local program is running"),
    ("program-ended", "a local program has ended, and its end is not recorded"),
    ("free-committed", "processes of a dead worker are queued, and no message has been published"),
    ("wake-committed", "processes whose timers have expired are queued, and no message has been published"),
    ("letter-published", "a dead letter is published, and its message is not acknowledged"),
    ("acknowledged", "a task is acknowledged"),
    ("job-staged", "all inputs of a job are at its site, and this is not recorded"),
    ("job-intended", "the intent to submit a job is recorded, and nothing is submitted"),
    ("job-submitted", "a job is submitted, and its id is unknown"),
    ("job-known", "the id of a job is recorded, and its process does not know"),
    ("job-seen", "the end of a job is recorded, and its process is not notified"),
    ("job-collected", "all outputs of a job are in the object store, and this is not recorded"),
    ("job-never", "it is recorded that a job never existed, and its process does not know"),
    ("job-given-up", "a try is given up at its site, and this is not recorded"),
    ("job-cancelled", "a job is cancelled, and this is not recorded"),
];

/// Marks a border. In a function with a return value, it must not be inside an expression.
#[macro_export]
macro_rules! border {
    ($name:expr) => {
        $crate::failpoint::fail_point!($name, |_| $crate::failpoint::end())
    };
}

/// Reads `FAILPOINTS`. The returned value must live as long as the program.
#[cfg(feature = "failpoints")]
pub fn init() -> impl Sized {
    fail::FailScenario::setup()
}

/// Does nothing without the feature.
#[cfg(not(feature = "failpoints"))]
pub fn init() -> impl Sized {}

/// Ends the program at once.
pub fn end() -> ! {
    std::process::abort()
}
