//! The state machine of a shim: pure decisions from inputs and times.

use std::time::{Duration, Instant};

use super::wire::{EndedBy, Request};

/// How long the shim keeps sending KILL. A process that is still there then hangs in the kernel (a dead network file
/// system) with its KILL pending, so waiting longer changes nothing.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(30);

/// The longest pause between two checks of the lease, whose clock runs while the machine is suspended.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The first pause after a KILL. Each pause doubles the last, up to [`KILL_PAUSE_MAX`].
const KILL_PAUSE_MIN: Duration = Duration::from_millis(1);
const KILL_PAUSE_MAX: Duration = Duration::from_millis(200);

/// An input of the state machine.
#[derive(Clone, Copy, Debug)]
pub(super) enum Input {
    /// The worker sent a request.
    Asked(Request),
    /// Standard input reached its end.
    WorkerGone,
    /// The program itself has ended.
    MainEnded,
    /// No process is left below the shim.
    AllGone,
    /// Time has passed.
    Tick,
}

/// The action that follows an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Nothing,
    /// Send TERM to everything.
    Term,
    /// Send KILL to everything.
    Kill,
    /// Report the end of the program.
    Finish,
}

/// The current time on both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) at: Instant,
    pub(super) boottime_ms: u64,
}

/// The state of a shim between the start of its program and the end.
#[derive(Debug)]
pub(super) struct Policy {
    phase: Phase,
    ended_by: Option<EndedBy>,
    time_limit: Option<Instant>,
    grace: Duration,
    lease_ms: u64,
    leased_at_ms: u64,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Running,
    Terminating { until: Instant },
    Killing { until: Instant, pause: Duration },
}

impl Policy {
    pub(super) fn new(
        now: Now,
        time_limit: Option<Duration>,
        grace: Duration,
        lease_ms: u64,
        leased_at_ms: u64,
    ) -> Self {
        let time_limit = time_limit.and_then(|limit| now.at.checked_add(limit));
        Self { phase: Phase::Running, ended_by: None, time_limit, grace, lease_ms, leased_at_ms }
    }

    /// What made the program end; `None` while it runs.
    pub(super) fn ended_by(&self) -> Option<EndedBy> {
        self.ended_by
    }

    /// How long to wait for an input before the next tick.
    pub(super) fn pause(&self, now: Now) -> Duration {
        let lease_left = Duration::from_millis(self.lease_ends_ms().saturating_sub(now.boottime_ms));
        let left = |until: Instant| until.saturating_duration_since(now.at);
        match self.phase {
            Phase::Running => self.time_limit.map_or(LOOK_INTERVAL, left).min(lease_left).min(LOOK_INTERVAL),
            Phase::Terminating { until } => left(until).min(lease_left).min(LOOK_INTERVAL),
            Phase::Killing { pause, .. } => pause,
        }
    }

    /// Handles an input and returns the action that follows.
    pub(super) fn on(&mut self, input: Input, now: Now) -> Act {
        match input {
            Input::AllGone => Act::Finish,
            Input::MainEnded => self.on_main_ended(now),
            Input::WorkerGone => self.kill(EndedBy::WorkerGone, now),
            Input::Asked(Request::Kill) => self.kill(EndedBy::Kill, now),
            Input::Asked(Request::Term) => self.terminate(EndedBy::Term, now),
            Input::Asked(Request::Renew { leased_at_ms }) => {
                self.leased_at_ms = self.leased_at_ms.max(leased_at_ms);
                Act::Nothing
            }
            Input::Tick => self.on_tick(now),
        }
    }

    fn on_tick(&mut self, now: Now) -> Act {
        let lease_lost = now.boottime_ms >= self.lease_ends_ms();
        match self.phase {
            Phase::Running | Phase::Terminating { .. } if lease_lost => self.kill(EndedBy::Lease, now),
            Phase::Running if self.time_limit.is_some_and(|limit| now.at >= limit) => {
                self.terminate(EndedBy::TimeLimit, now)
            }
            Phase::Terminating { until } if now.at >= until => self.kill(EndedBy::Kill, now),
            Phase::Running | Phase::Terminating { .. } => Act::Nothing,
            Phase::Killing { until, .. } if now.at >= until => Act::Finish,
            Phase::Killing { until, pause } => {
                self.phase = Phase::Killing { until, pause: (pause * 2).min(KILL_PAUSE_MAX) };
                Act::Kill
            }
        }
    }

    fn on_main_ended(&mut self, now: Now) -> Act {
        match self.phase {
            // Usually nothing else is left, and `AllGone` follows at once; otherwise the next tick sends KILL.
            Phase::Running => {
                self.start_killing(EndedBy::Own, now);
                Act::Nothing
            }
            // The children of the program received TERM as well and have the same grace: `sh -c` exits at once while the
            // program in it still writes its last file.
            Phase::Terminating { .. } | Phase::Killing { .. } => Act::Nothing,
        }
    }

    fn terminate(&mut self, why: EndedBy, now: Now) -> Act {
        match self.phase {
            Phase::Running => {
                self.ended_by = Some(why);
                // If the clock cannot represent the grace, use another limit; the lease ends the program anyway.
                let until = now.at.checked_add(self.grace).unwrap_or(now.at + KILL_LIMIT);
                self.phase = Phase::Terminating { until };
                Act::Term
            }
            Phase::Terminating { .. } | Phase::Killing { .. } => Act::Nothing,
        }
    }

    fn kill(&mut self, why: EndedBy, now: Now) -> Act {
        match self.phase {
            Phase::Running | Phase::Terminating { .. } => {
                self.start_killing(why, now);
                Act::Kill
            }
            Phase::Killing { .. } => Act::Nothing,
        }
    }

    fn start_killing(&mut self, why: EndedBy, now: Now) {
        self.ended_by.get_or_insert(why);
        self.phase = Phase::Killing { until: now.at + KILL_LIMIT, pause: KILL_PAUSE_MIN };
    }

    fn lease_ends_ms(&self) -> u64 {
        self.leased_at_ms.saturating_add(self.lease_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE_MS: u64 = 10_000;

    struct Clock {
        start: Instant,
    }

    impl Clock {
        fn at(&self, ms: u64) -> Now {
            Now { at: self.start + Duration::from_millis(ms), boottime_ms: ms }
        }
    }

    fn policy(time_limit_ms: Option<u64>) -> (Policy, Clock) {
        let clock = Clock { start: Instant::now() };
        let limit = time_limit_ms.map(Duration::from_millis);
        (Policy::new(clock.at(0), limit, Duration::from_millis(500), LEASE_MS, 0), clock)
    }

    #[test]
    fn children_of_a_program_are_killed_when_it_exits() {
        let (mut policy, clock) = policy(None);
        assert_eq!(policy.on(Input::MainEnded, clock.at(10)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(11)), Act::Kill);
        assert_eq!(policy.on(Input::WorkerGone, clock.at(12)), Act::Nothing);
        assert_eq!(policy.on(Input::AllGone, clock.at(13)), Act::Finish);
        assert_eq!(policy.ended_by(), Some(EndedBy::Own));
    }

    #[test]
    fn the_time_limit_sends_term_and_after_the_grace_kill() {
        let (mut policy, clock) = policy(Some(100));
        assert_eq!(policy.pause(clock.at(0)), Duration::from_millis(100));
        assert_eq!(policy.on(Input::Tick, clock.at(99)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(100)), Act::Term);
        assert_eq!(policy.on(Input::Asked(Request::Term), clock.at(101)), Act::Nothing, "TERM is sent once");
        assert_eq!(policy.on(Input::MainEnded, clock.at(200)), Act::Nothing, "its children have the whole grace");
        assert_eq!(policy.on(Input::Tick, clock.at(599)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(600)), Act::Kill);
        assert_eq!(policy.ended_by(), Some(EndedBy::TimeLimit));
    }

    #[test]
    fn a_lease_that_is_not_renewed_kills_the_program() {
        let (mut policy, clock) = policy(None);
        assert_eq!(policy.on(Input::Asked(Request::Renew { leased_at_ms: 9_000 }), clock.at(9_001)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(18_999)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(19_000)), Act::Kill);
        assert_eq!(policy.ended_by(), Some(EndedBy::Lease));
    }

    #[test]
    fn a_renewal_from_before_a_freeze_is_stale() {
        let (mut policy, clock) = policy(None);
        assert_eq!(policy.on(Input::Asked(Request::Renew { leased_at_ms: 1_000 }), clock.at(60_000)), Act::Nothing);
        assert_eq!(policy.on(Input::Tick, clock.at(60_000)), Act::Kill);
    }

    #[test]
    fn the_program_of_a_dead_worker_gets_no_grace() {
        let (mut policy, clock) = policy(None);
        assert_eq!(policy.on(Input::Asked(Request::Term), clock.at(10)), Act::Term);
        assert_eq!(policy.on(Input::WorkerGone, clock.at(20)), Act::Kill);
        assert_eq!(policy.ended_by(), Some(EndedBy::Term), "the first cause stays");
    }

    #[test]
    fn unkillable_processes_are_given_up_after_the_limit() {
        let (mut policy, clock) = policy(None);
        assert_eq!(policy.on(Input::Asked(Request::Kill), clock.at(0)), Act::Kill);
        assert_eq!(policy.on(Input::Tick, clock.at(29_999)), Act::Kill);
        assert_eq!(policy.on(Input::Tick, clock.at(30_000)), Act::Finish);
    }
}
