//! The states of Slurm's jobs: the only file that says what each means.

use crate::site::launcher::{End, Phase};

/// A job that waits for the first time.
pub(super) const PENDING: &str = "PENDING";

/// The phase of a job in this state. A running job may wait again, if its node was lost or it was requeued.
pub(super) fn phase(state: &str) -> Phase {
    match state {
        // A job that one cluster of a federation has revoked exists on another.
        PENDING | "CONFIGURING" | "REQUEUED" | "REQUEUE_HOLD" | "REQUEUE_FED" | "RESV_DEL_HOLD" | "SPECIAL_EXIT"
        | "REVOKED" => Phase::Waiting,
        "RUNNING" | "COMPLETING" | "SUSPENDED" | "STOPPED" | "SIGNALING" | "STAGE_OUT" | "RESIZING" => Phase::Running,
        "BOOT_FAIL" | "CANCELLED" | "COMPLETED" | "DEADLINE" | "FAILED" | "NODE_FAIL" | "OUT_OF_MEMORY"
        | "PREEMPTED" | "TIMEOUT" => Phase::Ended,
        _ => Phase::Unknown,
    }
}

/// How a job in this state ended.
pub(super) fn end(state: &str) -> End {
    match state {
        "COMPLETED" | "FAILED" => End::Exited,
        "TIMEOUT" | "DEADLINE" => End::TimeLimit,
        "OUT_OF_MEMORY" => End::OutOfMemory,
        "CANCELLED" => End::Cancelled,
        "BOOT_FAIL" | "NODE_FAIL" | "PREEMPTED" => End::Interrupted,
        _ => End::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_an_ended_job_says_how_it_ended() {
        let states = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT";
        for state in states.split(' ') {
            assert_eq!(phase(state), Phase::Ended, "{state}");
            assert_ne!(end(state), End::Unknown, "{state}");
        }
        assert_eq!(end("REQUEUED"), End::Unknown);
    }
}
