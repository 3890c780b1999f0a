//! Jobs at sites: intents, limits, kills that must end a job first, and permits.

use std::time::Duration;

use baton_common::config::SiteLimits;
use baton_common::id::{Incarnation, Pid, RequestId};
use baton_common::message::Effect;
use baton_common::select::Select;
use baton_common::state::{Desired, Place, State};
use baton_common::store::control::Answer;
use baton_common::store::site::{Door, Intent, Seen};
use baton_common::store::sweep::DEATHS_MAX;
use baton_common::store::writer::{Fence, Verb};
use baton_common::store::{Location, Store};

use crate::{Scene, end};

on_both! {
    an_intent_is_recorded_once_and_only_by_the_holder
    only_the_holder_withdraws_an_intent_and_only_before_there_is_a_job
    site_limits_hold_for_the_whole_fleet
    kill_with_a_job_outside_waits_for_the_end_of_the_job
    kill_with_a_job_outside_survives_the_death_of_the_holder
    forced_kill_leaves_the_job_open
    holder_pauses_only_its_own_process
    the_end_of_a_job_wakes_its_process_even_while_it_parks
    killed_process_waits_for_its_job
    poll_and_request_to_the_same_processes_do_not_deadlock
    longest_waiting_process_is_woken_first
    permit_belongs_to_one_worker_until_it_is_gone
    failing_site_is_retried_after_growing_pauses
}

const SPEC: &str = "at: s\nrun: ['true']";
const NO_LIMITS: SiteLimits = SiteLimits { queued: None, running: None, submit_per_min: None };

fn wait(waits_for: &str, killing: bool) -> Verb {
    Verb::Wait { waits_for: waits_for.into(), wake_in: Duration::from_secs(3600), killing }
}

impl Scene {
    async fn site(&self) {
        self.store.announce_site("s", "slurm", "/r", 2).await.unwrap();
    }

    /// A held process with a job outside.
    async fn with_job(&self) -> (Pid, Fence) {
        let pid = self.submit(SPEC).await;
        let fence = self.claimed(pid).await.fence;
        assert_eq!(self.store.intend(fence, 1, "s", NO_LIMITS).await.unwrap(), Intent::Recorded);
        self.store.submitted(pid, 1, "7").await.unwrap();
        (pid, fence)
    }

    async fn end_job(&self, pid: Pid) -> usize {
        let job = self.store.job(pid, 1).await.unwrap().unwrap();
        let queued = self.store.record_seen(&[Seen::ended(&job, "COMPLETED")]).await.unwrap();
        queued.values().map(Vec::len).sum()
    }
}

async fn an_intent_is_recorded_once_and_only_by_the_holder(scene: Scene) {
    scene.site().await;
    let pid = scene.submit(SPEC).await;
    let old = scene.claimed(pid).await.fence;
    scene.write(old, Verb::GiveBack).await.unwrap();
    let fence = scene.claimed(pid).await.fence;
    let intend = async |fence| scene.store.intend(fence, 1, "s", NO_LIMITS).await.unwrap();
    assert_eq!(intend(old).await, Intent::Lost, "an old epoch");
    assert_eq!(scene.store.job(pid, 1).await.unwrap(), None);
    assert_eq!([intend(fence).await, intend(fence).await], [Intent::Recorded, Intent::Known]);
    scene.store.submitted(pid, 1, "7").await.unwrap();
    scene.store.submitted(pid, 1, "8").await.unwrap();
    let job = scene.store.job(pid, 1).await.unwrap().unwrap();
    assert_eq!((job.external_id.as_deref(), job.is_doomed), (Some("7"), false), "the first id stays");
    scene.write(fence, wait("", false)).await.unwrap();
    assert_eq!(intend(fence).await, Intent::Lost, "it is not held");
}

async fn only_the_holder_withdraws_an_intent_and_only_before_there_is_a_job(scene: Scene) {
    scene.site().await;
    let pid = scene.submit(SPEC).await;
    let old = scene.claimed(pid).await.fence;
    scene.write(old, Verb::GiveBack).await.unwrap();
    let claimed = scene.claimed(pid).await;
    let intend = async || scene.store.intend(claimed.fence, 1, "s", NO_LIMITS).await.unwrap();
    let withdraw = async |fence| {
        scene.store.withdraw(fence, 1).await.unwrap();
        scene.store.job(pid, 1).await.unwrap().is_some()
    };
    assert_eq!(intend().await, Intent::Recorded);
    assert!(withdraw(old).await, "an old epoch");
    assert!(!withdraw(claimed.fence).await);
    assert_eq!(intend().await, Intent::Recorded, "a withdrawn intent leaves no trace");
    assert!(!withdraw(claimed.fence).await);
    scene.write(claimed.fence, Verb::GiveBack).await.unwrap();
    let claimed = scene.claimed(pid).await;
    assert!(!claimed.has_outside, "nothing is outside");
    assert_eq!(scene.store.intend(claimed.fence, 1, "s", NO_LIMITS).await.unwrap(), Intent::Recorded);
    scene.store.submitted(pid, 1, "7").await.unwrap();
    assert!(withdraw(claimed.fence).await, "there is a job");
    scene.write(claimed.fence, Verb::GiveBack).await.unwrap();
    assert!(scene.claimed(pid).await.has_outside);
}

async fn site_limits_hold_for_the_whole_fleet(scene: Scene) {
    scene.site().await;
    let mut fences = Vec::new();
    for _ in 0..4 {
        let pid = scene.submit(SPEC).await;
        fences.push(scene.claimed(pid).await.fence);
    }
    let limits = SiteLimits { queued: Some(2), running: Some(3), submit_per_min: Some(3) };
    let intend = async |idx: usize| scene.store.intend(fences[idx], 1, "s", limits).await.unwrap();
    assert_eq!(scene.store.room("s", limits).await.unwrap(), 2);
    assert_eq!([intend(0).await, intend(1).await, intend(2).await], [Intent::Recorded, Intent::Recorded, Intent::Full]);
    assert_eq!(scene.store.room("s", limits).await.unwrap(), 0);
    scene.end_job(fences[0].pid).await;
    assert_eq!(scene.store.room("s", limits).await.unwrap(), 1);
    assert_eq!(intend(2).await, Intent::Recorded);
    scene.end_job(fences[1].pid).await;
    let Intent::TooSoon(micros) = intend(3).await else { panic!("a fourth within a minute") };
    assert!((50_000_000..=60_000_000).contains(&micros), "{micros}");
    assert_eq!(scene.store.job(fences[3].pid, 1).await.unwrap(), None);
}

async fn kill_with_a_job_outside_waits_for_the_end_of_the_job(scene: Scene) {
    scene.site().await;
    let (pid, fence) = scene.with_job().await;
    scene.write(fence, wait("", false)).await.unwrap();
    let controlled = scene.recorded(pid, Desired::Kill).await;
    assert_eq!((controlled.place, controlled.effect), (Place::Queued, Effect::pending(Desired::Kill)));
    assert!(controlled.announced.is_some(), "a worker must end the job");
    assert_eq!(scene.store.settled(controlled.event).await.unwrap(), None);
    let claimed = scene.claimed(pid).await;
    assert!(claimed.has_outside && claimed.desired == Desired::Kill);
    scene.end_job(pid).await;
    scene.write(claimed.fence, end(State::Killed)).await.unwrap();
    assert_eq!(scene.state(pid).await, (Place::Ended, State::Killed));
    assert!(scene.store.settled(controlled.event).await.unwrap().is_some());
}

async fn kill_with_a_job_outside_survives_the_death_of_the_holder(scene: Scene) {
    scene.site().await;
    let (pid, _) = scene.with_job().await;
    scene.recorded(pid, Desired::Kill).await;
    scene.store.leave(scene.me).await.unwrap();
    assert_eq!(scene.store.free().await.unwrap().queued["default"].len(), 1);
    assert_eq!(scene.state(pid).await.0, Place::Queued, "{DEATHS_MAX} deaths would end it");
}

async fn holder_pauses_only_its_own_process(scene: Scene) {
    let pid = scene.submit(SPEC).await;
    let old = scene.claimed(pid).await.fence;
    scene.write(old, Verb::GiveBack).await.unwrap();
    let request = crate::request(Desired::Pause);
    let pause = async |fence| scene.store.control_held(fence, &request).await.unwrap();
    assert!(matches!(pause(old).await, Answer::Absent), "it is queued");
    let fence = scene.claimed(pid).await.fence;
    assert!(matches!(pause(old).await, Answer::Absent), "another holds it");
    let row = scene.store.show(pid).await.unwrap().unwrap();
    assert!(row.summary.desired == Desired::Run && row.events.is_empty(), "{row:?}");
    assert!(matches!(pause(fence).await, Answer::Recorded(_)));
    scene.write(fence, Verb::Pause).await.unwrap();
    assert!(matches!(scene.state(pid).await, (Place::Parked, State::Paused(_))));
}

async fn forced_kill_leaves_the_job_open(scene: Scene) {
    scene.site().await;
    let (pid, _) = scene.with_job().await;
    let mut request = crate::request(Desired::Kill);
    request.force = true;
    scene.store.control(pid, &request).await.unwrap();
    assert_eq!(scene.state(pid).await, (Place::Ended, State::Killed));
    let open = scene.store.open_jobs("s").await.unwrap();
    assert!(open.len() == 1 && open[0].is_doomed, "{open:?}");
}

async fn the_end_of_a_job_wakes_its_process_even_while_it_parks(scene: Scene) {
    scene.site().await;
    let (parked, fence) = scene.with_job().await;
    scene.write(fence, wait("", false)).await.unwrap();
    assert_eq!(scene.end_job(parked).await, 1);
    assert_eq!(scene.state(parked).await, (Place::Queued, State::Running));
    let (parking, fence) = scene.with_job().await;
    assert_eq!(scene.end_job(parking).await, 0, "it is held");
    let written = scene.write(fence, wait("", false)).await.unwrap();
    assert_eq!(written.place, Place::Held, "it was woken while it parked");
    let (paused, fence) = scene.with_job().await;
    scene.recorded(paused, Desired::Pause).await;
    scene.write(fence, wait("", false)).await.unwrap();
    assert_eq!(scene.end_job(paused).await, 0);
    assert_eq!(scene.state(paused).await.0, Place::Parked, "a wake-up respects a pause");
    scene.recorded(paused, Desired::Run).await;
    assert_eq!(scene.state(paused).await.0, Place::Queued, "`play` applies the wake-up");
}

async fn killed_process_waits_for_its_job(scene: Scene) {
    scene.site().await;
    let (pid, fence) = scene.with_job().await;
    scene.recorded(pid, Desired::Kill).await;
    assert_eq!(scene.write(fence, wait("", false)).await.unwrap().place, Place::Held, "a parking write sees a kill");
    let again = Fence { epoch: fence.epoch, ..fence };
    assert_eq!(scene.write_with(again, wait("", true), None).await.unwrap().place, Place::Parked);
    assert_eq!(scene.end_job(pid).await, 1);
}

async fn poll_and_request_to_the_same_processes_do_not_deadlock(scene: Scene) {
    scene.site().await;
    let mut looks = Vec::new();
    for _ in 0..60 {
        let pid = scene.submit(SPEC).await;
        let fence = scene.claimed(pid).await.fence;
        scene.store.intend(fence, 1, "s", NO_LIMITS).await.unwrap();
        scene.write(fence, wait("", false)).await.unwrap();
        looks.push(Seen::ended(&scene.store.job(pid, 1).await.unwrap().unwrap(), "COMPLETED"));
    }
    // The plan for large tables: row by row in the order of the batch.
    let plans = ["seqscan", "hashjoin", "mergejoin"].map(|plan| format!("%20-cenable_{plan}%3Doff")).concat();
    let url = if scene.store.is_embedded() { scene.url.clone() } else { format!("{}{plans}", scene.url) };
    let store = Store::open(Location::parse(&url).unwrap()).await.unwrap();
    let backward: Vec<Seen> = looks.iter().rev().cloned().collect();
    for round in 0..20 {
        let verb = if round % 2 == 0 { Desired::Pause } else { Desired::Run };
        let (everything, request) = (Select::default(), RequestId::generate());
        let (first, second, asked) = tokio::join!(
            store.record_seen(&looks),
            store.record_seen(&backward),
            scene.ask_many(request, &everything, verb)
        );
        first.unwrap();
        second.unwrap();
        assert_eq!(asked.unwrap().len(), 60);
    }
}

async fn longest_waiting_process_is_woken_first(scene: Scene) {
    scene.site().await;
    let mut pids = Vec::new();
    for idx in 0..3 {
        let pid = scene.submit(SPEC).await;
        let fence = scene.claimed(pid).await.fence;
        scene.write(fence, wait(if idx == 1 { "room/s" } else { "slot/s" }, false)).await.unwrap();
        pids.push(pid);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let queues = ["default".to_owned()];
    let work = scene.store.site_work("s").await.unwrap();
    assert!(work.waits_for_slot && work.waits_for_room && !work.has_jobs && !work.is_down);
    assert!(scene.store.wake_waiting("slot/s", &["other".into()], 9).await.unwrap().is_empty(), "another queue");
    let woken = scene.store.wake_waiting("slot/s", &queues, 1).await.unwrap();
    assert_eq!(woken["default"].iter().map(|row| row.pid).collect::<Vec<_>>(), [pids[0]]);
    let woken = scene.store.wake_waiting("slot/s", &queues, 9).await.unwrap();
    assert_eq!(woken["default"].iter().map(|row| row.pid).collect::<Vec<_>>(), [pids[2]]);
    assert_eq!(scene.state(pids[1]).await.0, Place::Parked);
}

async fn permit_belongs_to_one_worker_until_it_is_gone(scene: Scene) {
    if scene.store.is_embedded() {
        // SQLite has one worker at a time, whose start declares all others gone.
        return;
    }
    let other = Incarnation::generate();
    scene.store.register(other, &crate::worker("w2")).await.unwrap();
    let take = async |me: Incarnation| scene.store.take_permit("slot/s/0", me).await.unwrap();
    assert_eq!([take(scene.me).await, take(scene.me).await, take(other).await], [true, true, false]);
    scene.store.give_permit("slot/s/0", other).await.unwrap();
    assert!(!take(other).await, "only its owner releases it");
    scene.store.leave(scene.me).await.unwrap();
    assert!(take(other).await);
}

async fn failing_site_is_retried_after_growing_pauses(scene: Scene) {
    scene.site().await;
    let knock = async |pause| scene.store.knock("s", pause).await.unwrap();
    assert_eq!([knock(0).await, knock(60_000_000).await], [Door::Open, Door::TooSoon]);
    scene.store.note_site("s", Some("no route")).await.unwrap();
    scene.store.note_site("s", Some("no route")).await.unwrap();
    assert_eq!(knock(0).await, Door::Down);
    let facts = scene.store.sites(Some("s")).await.unwrap().remove(0);
    assert_eq!(
        (facts.failures, facts.last_error.as_deref()),
        (1, Some("no route")),
        "simultaneous failures count as one"
    );
    assert!(facts.retry_in.is_some_and(|micros| micros <= 5_000_000));
    scene.store.note_site("s", None).await.unwrap();
    assert_eq!(knock(0).await, Door::Open);
}
