//! Requests: their effect on a process, their history, and how holders learn of them.

use std::time::Duration;

use baton_common::id::{Pid, RequestId};
use baton_common::message::Effect;
use baton_common::select::Select;
use baton_common::state::{Desired, Live, Place, State};
use baton_common::store::control::{Answer, Request, Settled};
use baton_common::store::worker::{Beat, Load};
use baton_common::store::writer::{Claim, Verb};

use crate::{Scene, end, new_process, request};

on_both! {
    control_of_a_process_that_is_not_held_applies_at_once
    kill_absorbs_other_requests_and_is_final
    play_returns_a_waiting_process_to_waiting
    process_on_hold_is_accepted_and_not_run
    request_to_many_selects_by_labels
    every_request_gets_an_outcome
    forced_kill_bypasses_the_holder_and_writes_the_attempt
    interrupted_request_to_many_resumes_and_respects_later_requests
    beat_reports_fleet_pause_and_drain
}

async fn control_of_a_process_that_is_not_held_applies_at_once(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let paused = scene.recorded(pid, Desired::Pause).await;
    assert_eq!((paused.place, paused.state), (Place::Parked, State::Paused(Live::Created)));
    assert_eq!(paused.effect, Effect::Paused);
    assert_eq!(scene.recorded(pid, Desired::Pause).await.effect, Effect::AlreadyPaused);
    assert_eq!(scene.state(pid).await.1, State::Paused(Live::Created));
    let played = scene.recorded(pid, Desired::Run).await;
    assert_eq!((played.place, played.state), (Place::Queued, State::Created));
    assert_eq!(played.announced.unwrap().0, "default");
    assert!(scene.recorded(pid, Desired::Run).await.announced.is_none());
    let killed = scene.recorded(pid, Desired::Kill).await;
    assert_eq!((killed.place, killed.state), (Place::Ended, State::Killed));
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert_eq!(details.events.len(), 5);
    assert_eq!(details.summary.outcome.unwrap().reason.unwrap(), "killed by ann");
}

async fn kill_absorbs_other_requests_and_is_final(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.recorded(pid, Desired::Kill).await;
    assert!(matches!(scene.ask(pid, Desired::Run).await, Answer::Dying));
    assert!(matches!(scene.ask(pid, Desired::Pause).await, Answer::Dying));
    scene.write(fence, end(State::Killed)).await.unwrap();
    assert!(matches!(scene.ask(pid, Desired::Run).await, Answer::Ended(State::Killed)));
    assert!(matches!(scene.ask(Pid::generate(), Desired::Run).await, Answer::Absent));
}

async fn play_returns_a_waiting_process_to_waiting(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.write(fence, Verb::Park { wake_in: Duration::from_secs(60) }).await.unwrap();
    scene.recorded(pid, Desired::Pause).await;
    let played = scene.recorded(pid, Desired::Run).await;
    assert_eq!((played.place, played.state, played.announced), (Place::Parked, State::Waiting, None));
}

async fn process_on_hold_is_accepted_and_not_run(scene: Scene) {
    let process = new_process("{call: baton.noop, hold: true}");
    let pid = process.pid;
    let accepted = scene.store.submit(&[process]).await.unwrap();
    assert!(accepted.queued.is_empty());
    assert_eq!(accepted.held_back, [pid]);
    assert!(matches!(scene.claim(pid).await, Claim::NotQueued));
    assert_eq!(scene.recorded(pid, Desired::Run).await.place, Place::Queued);
}

async fn request_to_many_selects_by_labels(scene: Scene) {
    let mut si = Vec::new();
    for _ in 0..3 {
        si.push(scene.submit("{call: baton.noop, labels: {campaign: si}}").await);
    }
    let ge = scene.submit("{call: baton.noop, labels: {campaign: ge}}").await;
    let select = Select { labels: Some([("campaign".to_owned(), "si".to_owned())].into()), ..Select::default() };
    let asked = scene.ask_many(RequestId::generate(), &select, Desired::Pause).await;
    assert_eq!(asked, Some(si));
    assert_eq!(scene.state(ge).await.1, State::Created);
    let id = RequestId::of_message("chosen by the sender");
    assert_eq!(scene.ask_many(id, &Select::default(), Desired::Kill).await.unwrap().len(), 4);
    assert_eq!(scene.ask_many(id, &Select::default(), Desired::Kill).await, None);
}

/// The history of a process: requests and their outcomes.
async fn history(scene: &Scene, pid: Pid) -> Vec<(String, Option<String>)> {
    let events = scene.store.show(pid).await.unwrap().unwrap().events;
    events.into_iter().map(|event| (event.what, event.outcome)).collect()
}

fn was(what: &str, outcome: &str) -> (String, Option<String>) {
    (what.to_owned(), (!outcome.is_empty()).then(|| outcome.to_owned()))
}

async fn every_request_gets_an_outcome(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let paused = scene.recorded(pid, Desired::Pause).await;
    assert_eq!((paused.effect, scene.store.settled(paused.event).await.unwrap()), (Effect::Pausing, None));
    scene.recorded(pid, Desired::Run).await;
    assert_eq!(scene.store.settled(paused.event).await.unwrap(), Some(Settled::Superseded));
    let paused = scene.recorded(pid, Desired::Pause).await;
    scene.write(fence, Verb::Pause).await.unwrap();
    assert_eq!(scene.store.settled(paused.event).await.unwrap(), Some(Settled::Applied));
    scene.recorded(pid, Desired::Run).await;
    let fence = scene.claimed(pid).await.fence;
    let killed = scene.recorded(pid, Desired::Kill).await;
    scene.write(fence, end(State::Finished)).await.unwrap();
    assert_eq!(scene.store.settled(killed.event).await.unwrap(), Some(Settled::Ended));
    let expected = [
        was("pause", "superseded"),
        was("play", "applied"),
        was("pause", "applied"),
        was("play", "applied"),
        was("kill", "ended"),
    ];
    assert_eq!(history(&scene, pid).await, expected);
}

async fn forced_kill_bypasses_the_holder_and_writes_the_attempt(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let asked = scene.recorded(pid, Desired::Kill).await;
    let forced = Request { force: true, ..request(Desired::Kill) };
    let Answer::Recorded(row) = scene.store.control(pid, &forced).await.unwrap() else { panic!("not recorded") };
    assert_eq!((row.place, row.effect, row.owner), (Place::Ended, Effect::Killed, Some(scene.me)));
    assert!(scene.write(fence, end(State::Finished)).await.is_none(), "the lease is lost");
    assert_eq!(scene.store.settled(asked.event).await.unwrap(), Some(Settled::Applied));
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert_eq!(details.summary.state, State::Killed);
    assert_eq!(details.attempts.iter().map(|attempt| attempt.how.as_str()).collect::<Vec<_>>(), ["killed"]);
}

async fn interrupted_request_to_many_resumes_and_respects_later_requests(scene: Scene) {
    let (first, second) = (scene.submit("call: baton.noop").await, scene.submit("call: baton.noop").await);
    let id = RequestId::generate();
    let pause = request(Desired::Pause);
    // The recorder dies after the first page.
    let mut dies = scene.store.control_many(id, &Select::one(first), &pause).await.unwrap().unwrap();
    assert_eq!(dies.next().await.unwrap().unwrap().len(), 1);
    drop(dies);
    assert_eq!(scene.state(first).await.1, State::Paused(Live::Created));
    scene.recorded(first, Desired::Run).await;
    let asked = scene.ask_many(id, &Select::default(), Desired::Pause).await;
    assert_eq!(asked, Some(vec![second]), "a later `play` stays in force");
    assert_eq!(scene.state(first).await.1, State::Created);
}

async fn beat_reports_fleet_pause_and_drain(scene: Scene) {
    let beat = async || scene.store.beat(scene.me, &Load::default()).await.unwrap();
    let id = RequestId::generate();
    assert!(scene.store.control_fleet(id, &request(Desired::Pause)).await.unwrap());
    assert!(!scene.store.control_fleet(id, &request(Desired::Pause)).await.unwrap(), "once");
    assert_eq!(scene.store.fleet_pause().await.unwrap().unwrap().by, "ann");
    assert_eq!(beat().await, Beat::Alive { beat: 1, drain: false, is_fleet_paused: true });
    scene.store.control_fleet(RequestId::generate(), &request(Desired::Run)).await.unwrap();
    assert_eq!(scene.store.fleet_pause().await.unwrap(), None);
    assert!(scene.store.drain("nobody", &request(Desired::Run)).await.unwrap().is_empty());
    let drained = scene.store.drain("w1", &request(Desired::Run)).await.unwrap();
    assert_eq!(drained.iter().map(|peer| peer.id).collect::<Vec<_>>(), [scene.me]);
    assert_eq!(beat().await, Beat::Alive { beat: 2, drain: true, is_fleet_paused: false });
}
