//! The statements of the store, on SQLite always and on PostgreSQL if the environment names one.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::sync::Arc;
use std::time::Duration;

use baton_common::id::{Incarnation, Pid, RequestId};
use baton_common::select::Select;
use baton_common::spec::{self, Format};
use baton_common::state::{Desired, Input, Live, Place, State};
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::control::{Answer, Controlled, Request};
use baton_common::store::query::{Filter, WorkerState};
use baton_common::store::submit::NewProcess;
use baton_common::store::worker::{Load, NewWorker};
use baton_common::store::writer::{Attempt, Claim, Claimed, Fence, Fenced, How, Output, Stream, Verb, Writer, Written};
use baton_common::store::{Location, Store};
use sea_orm::{ConnectionTrait, Database, QueryResult, Statement};
use tokio::sync::Semaphore;
use uuid::Uuid;

/// A private database with one registered worker and its writer.
struct Scene {
    store: Store,
    me: Incarnation,
    writer: Writer,
    url: String,
    _folder: tempfile::TempDir,
}

impl Scene {
    async fn new(url: String, folder: tempfile::TempDir) -> Self {
        let store = Store::open(Location::parse(&url).unwrap()).await.unwrap();
        let me = Incarnation::generate();
        store.register(me, &worker("w1")).await.unwrap();
        let writer = Scene::writer(&store, me).await;
        Self { store, me, writer, url, _folder: folder }
    }

    async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::new(format!("sqlite:{}", folder.path().join("baton.db").display()), folder).await
    }

    async fn postgres() -> Self {
        Self::new(Self::schema().await.0, tempfile::tempdir().unwrap()).await
    }

    /// Creates a schema; returns its URL and its name.
    async fn schema() -> (String, String) {
        let url = std::env::var("BATON_TEST_DATABASE").expect("tests/run names a database");
        let schema = format!("t{}", Incarnation::generate().to_string().replace('-', ""));
        psql(&url, &["-c", &format!("CREATE SCHEMA {schema}")]).await;
        (format!("{url}?options=-csearch_path%3D{schema}"), schema)
    }

    /// Runs SQL outside the store.
    async fn sql(&self, sql: &str) -> Vec<QueryResult> {
        let db = Database::connect(self.url.replacen("sqlite:", "sqlite://", 1)).await.unwrap();
        let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.unwrap();
        db.close().await.unwrap();
        rows
    }

    /// Counts the rows of a process in all tables.
    async fn rows_of(&self, pid: Pid) -> i64 {
        let hex = Uuid::from(pid).simple();
        let id = if self.store.is_embedded() { format!("x'{hex}'") } else { format!("'{hex}'") };
        let tables = [
            ("process", "id"),
            ("spec", "id"),
            ("label", "id"),
            ("attempt", "pid"),
            ("event", "pid"),
            ("output", "pid"),
        ];
        let counts = tables.map(|(table, column)| format!("(SELECT COUNT(*) FROM {table} WHERE {column} = {id})"));
        let rows = self.sql(&format!("SELECT {} AS n", counts.join(" + "))).await;
        rows[0].try_get("", "n").unwrap()
    }

    async fn writer(store: &Store, me: Incarnation) -> Writer {
        let (writer, task) = Writer::new(store, me, &Arc::new(Semaphore::new(8))).await.unwrap();
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's runtime")]
        tokio::task::spawn(task);
        writer
    }

    async fn submit(&self, yaml: &str) -> Pid {
        let process = new_process(yaml);
        let pid = process.pid;
        self.store.submit(&[process]).await.unwrap();
        pid
    }

    async fn claim(&self, pid: Pid) -> Claim {
        self.writer.claim(pid, "default".into(), None).await.unwrap()
    }

    async fn claimed(&self, pid: Pid) -> Claimed {
        let claim = self.claim(pid).await;
        let Claim::Claimed(claimed) = claim else { panic!("not claimed: {claim:?}") };
        *claimed
    }

    async fn write(&self, fence: Fence, verb: Verb) -> Option<Written> {
        self.write_with(fence, verb, Some(Checkpoint { advances: 1, ..Checkpoint::default() })).await
    }

    async fn write_with(&self, fence: Fence, verb: Verb, checkpoint: Option<Checkpoint>) -> Option<Written> {
        let ended = Some(Attempt { started_at: 1, how: How::Ok, reason: None });
        let checkpoint = checkpoint.as_ref().map(Into::into);
        let fenced = Fenced { fence, verb, checkpoint, try_number: 1, ended, outputs: vec![] };
        self.writer.write(fenced).await.unwrap()
    }

    async fn ask(&self, pid: Pid, verb: Desired) -> Answer {
        self.store.control(pid, &request(verb)).await.unwrap()
    }

    async fn recorded(&self, pid: Pid, verb: Desired) -> Controlled {
        let answer = self.ask(pid, verb).await;
        let Answer::Recorded(controlled) = answer else { panic!("not recorded: {answer:?}") };
        controlled
    }

    /// Sends a request to a selection and returns the changed processes; `None` if it was completed before.
    async fn ask_many(&self, id: RequestId, select: &Select, verb: Desired) -> Option<Vec<Pid>> {
        let mut many = self.store.control_many(id, select, &request(verb)).await.unwrap()?;
        let mut asked = Vec::new();
        while let Some(page) = many.next().await.unwrap() {
            asked.extend(page.into_iter().map(|row| row.pid));
        }
        Some(asked)
    }

    async fn state(&self, pid: Pid) -> (Place, State) {
        let summary = self.store.show(pid).await.unwrap().unwrap().summary;
        (summary.place, summary.state)
    }
}

/// Returns the output of psql, unaligned and without headers.
async fn psql(url: &str, arguments: &[&str]) -> String {
    let output = tokio::process::Command::new("psql").args([url, "-qtA"]).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn worker(name: &str) -> NewWorker {
    NewWorker {
        name: name.into(),
        host: "h".into(),
        os_pid: 1,
        version: "0".into(),
        queues: vec!["default".into()],
        slots: 8,
        sites: vec![],
    }
}

fn request(verb: Desired) -> Request {
    Request::new(verb, "ann")
}

fn new_process(yaml: &str) -> NewProcess {
    NewProcess {
        pid: Pid::generate(),
        spec: spec::parse(yaml, Format::Yaml).unwrap(),
        created_by: "ann@h".into(),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        reply_to: None,
        run_key: Some(b"key".to_vec()),
    }
}

fn end(state: State) -> Verb {
    Verb::End { state, outcome: Outcome { exit: Some(0), ..Outcome::default() } }
}

/// Makes a test of each function for each database.
macro_rules! on_both {
    ($($name:ident)*) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(crate::Scene::sqlite().await).await; })*
        }
        mod postgres {
            $(#[tokio::test]
            #[ignore = "needs services: run tests/run"]
            async fn $name() { super::$name(crate::Scene::postgres().await).await; })*
        }
    };
}

mod control;
mod deaths;
mod gc_roots;
mod lists;
mod plans;
mod prune;
mod sites;
mod versions;
mod writer;

on_both! {
    process_runs_from_submission_to_end
    repeated_submission_is_accepted_once
    claim_takes_only_queued_processes_of_its_queue
    a_write_with_an_old_epoch_changes_nothing
    a_write_after_the_sweep_freed_the_row_changes_nothing
    parking_wakes_by_time
    a_wake_while_it_parks_is_seen
    a_checkpoint_without_its_predecessor_changes_nothing
    leaving_held_obeys_a_pause
    a_pausing_write_asks_the_row
    give_back_without_a_try_number_keeps_the_try
    head_rule_announces_only_older_rows
    every_condition_of_a_selection_narrows_it
    launch_inserts_and_claims_and_detects_another_spec
    outputs_are_kept_and_replaced
    an_overdue_process_is_killed_with_the_reason
    every_transition_is_one_of_the_state_machine
    checkpoint_survives_a_give_back
    summary_names_the_pause_and_the_failed_try
    facts_name_the_holder_and_the_position_in_the_queue
    workers_are_found_by_name_and_by_incarnation
}

async fn process_runs_from_submission_to_end(scene: Scene) {
    let pid = scene.submit("{call: baton.noop, labels: {a: b}}").await;
    assert_eq!(scene.state(pid).await, (Place::Queued, State::Created));
    let claimed = scene.claimed(pid).await;
    assert_eq!((claimed.fence.epoch, claimed.try_number, claimed.desired), (1, 1, Desired::Run));
    assert!(claimed.traceparent.is_some_and(|text| text.starts_with("00-")));
    assert_eq!(claimed.spec.unwrap().kind(), "baton.noop");
    let written = scene.write(claimed.fence, Verb::Keep).await.unwrap();
    assert_eq!((written.place, written.state), (Place::Held, State::Running));
    let written = scene.write(claimed.fence, end(State::Finished)).await.unwrap();
    assert_eq!((written.place, written.state), (Place::Ended, State::Finished));
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert_eq!(details.attempts.len(), 1);
    assert_eq!((details.attempts[0].how.as_str(), details.attempts[0].worker.as_str()), ("ok", "w1"));
    assert_eq!(details.summary.outcome.unwrap().exit, Some(0));
    assert!(matches!(scene.claim(pid).await, Claim::NotQueued));
}

async fn repeated_submission_is_accepted_once(scene: Scene) {
    let process = new_process("call: baton.noop");
    assert_eq!(scene.store.submit(std::slice::from_ref(&process)).await.unwrap().queued["default"].len(), 1);
    assert!(scene.store.submit(&[process]).await.unwrap().queued.is_empty());
}

async fn claim_takes_only_queued_processes_of_its_queue(scene: Scene) {
    let elsewhere = scene.submit("{call: baton.noop, queue: gpu}").await;
    assert!(matches!(scene.claim(elsewhere).await, Claim::NotQueued));
    let paused = scene.submit("call: baton.noop").await;
    scene.recorded(paused, Desired::Pause).await;
    assert!(matches!(scene.claim(paused).await, Claim::NotQueued));
    let held = scene.submit("call: baton.noop").await;
    scene.claimed(held).await;
    assert!(matches!(scene.claim(held).await, Claim::NotQueued));
    assert!(matches!(scene.claim(Pid::generate()).await, Claim::Absent));
}

async fn a_write_with_an_old_epoch_changes_nothing(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let old = Fence { epoch: fence.epoch - 1, ..fence };
    assert!(scene.write(old, end(State::Finished)).await.is_none());
    assert_eq!(scene.state(pid).await, (Place::Held, State::Running));
}

async fn a_write_after_the_sweep_freed_the_row_changes_nothing(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    assert!(scene.store.declare_gone(scene.me, 0).await.unwrap());
    let freed = scene.store.free().await.unwrap();
    assert_eq!(freed.queued["default"][0].pid, pid);
    // The epoch is still that of the dead holder; only the place differs.
    assert!(scene.write(fence, end(State::Finished)).await.is_none());
    assert_eq!(scene.state(pid).await, (Place::Queued, State::Running));
    let details = scene.store.show(pid).await.unwrap().unwrap();
    assert_eq!(details.attempts[0].how, "lost");
    // The next sweep frees a dead worker's claim that commits after a sweep.
    scene.claimed(pid).await;
    assert_eq!(scene.store.free().await.unwrap().count(), 1);
}

async fn parking_wakes_by_time(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let written = scene.write(fence, Verb::Park { wake_in: Duration::from_millis(30) }).await.unwrap();
    assert_eq!((written.place, written.state), (Place::Parked, State::Waiting));
    assert!(scene.store.next_wake_us().await.unwrap().unwrap() <= 30_000);
    let woken = loop {
        let woken = scene.store.wake_due().await.unwrap();
        if !woken.is_empty() {
            break woken;
        }
        assert_eq!(scene.state(pid).await.0, Place::Parked);
    };
    assert_eq!(woken["default"][0].pid, pid);
    assert!(woken["default"][0].traceparent.is_some());
    assert_eq!(scene.state(pid).await, (Place::Queued, State::Running));
    assert_eq!(scene.claimed(pid).await.fence.epoch, 2);
}

async fn a_wake_while_it_parks_is_seen(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    // A kill is a wake-up too; the holder must see it instead of parking for an hour.
    scene.recorded(pid, Desired::Kill).await;
    let written = scene.write(fence, Verb::Park { wake_in: Duration::from_secs(3600) }).await.unwrap();
    assert_eq!((written.place, written.desired), (Place::Held, Desired::Kill));

    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.sql("UPDATE process SET woken = true WHERE desired = 0").await;
    let written = scene.write(fence, Verb::Park { wake_in: Duration::from_secs(3600) }).await.unwrap();
    assert_eq!((written.place, written.state), (Place::Held, State::Running), "it was woken");
    let checkpoint = Some(Checkpoint { advances: 2, ..Checkpoint::default() });
    let written = scene.write_with(fence, Verb::Park { wake_in: Duration::from_secs(3600) }, checkpoint).await.unwrap();
    assert_eq!((written.place, written.state), (Place::Parked, State::Waiting), "the wake-up is consumed");
}

async fn a_checkpoint_without_its_predecessor_changes_nothing(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let at = |advances: u64| Checkpoint { advances, ..Checkpoint::default() };
    assert!(scene.writer.checkpoint(fence, &at(1)).await.unwrap().is_some());
    assert!(scene.writer.checkpoint(fence, &at(1)).await.unwrap().is_some(), "sent again after a lost answer");
    assert!(scene.writer.checkpoint(fence, &at(3)).await.unwrap().is_none());
    assert!(scene.write_with(fence, Verb::GiveBack, Some(at(3))).await.is_none());
    assert!(scene.write_with(fence, end(State::Finished), Some(at(0))).await.is_none());
    assert!(scene.write_with(fence, end(State::Finished), Some(at(2))).await.is_some());
}

async fn leaving_held_obeys_a_pause(scene: Scene) {
    for (verb, before) in [
        (Verb::Park { wake_in: Duration::from_secs(60) }, Live::Waiting),
        (Verb::GiveBack, Live::Running),
        (Verb::Pause, Live::Running),
    ] {
        let pid = scene.submit("call: baton.noop").await;
        let fence = scene.claimed(pid).await.fence;
        assert_eq!(scene.recorded(pid, Desired::Pause).await.place, Place::Held);
        let written = scene.write(fence, verb).await.unwrap();
        assert_eq!((written.place, written.state), (Place::Parked, State::Paused(before)));
    }
    let pid = scene.submit("call: baton.noop").await;
    scene.claimed(pid).await;
    scene.recorded(pid, Desired::Pause).await;
    scene.store.declare_gone(scene.me, 0).await.unwrap();
    assert_eq!(scene.store.free().await.unwrap().paused, [pid]);
    assert_eq!(scene.state(pid).await, (Place::Parked, State::Paused(Live::Running)));
}

async fn a_pausing_write_asks_the_row(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    scene.recorded(pid, Desired::Pause).await;
    scene.recorded(pid, Desired::Run).await;
    let written = scene.write(fence, Verb::Pause).await.unwrap();
    assert_eq!((written.place, written.desired), (Place::Held, Desired::Run));
}

async fn give_back_without_a_try_number_keeps_the_try(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let give_back = |fence, try_number| {
        let verb = Verb::GiveBack;
        scene.writer.write(Fenced { fence, verb, checkpoint: None, try_number, ended: None, outputs: vec![] })
    };
    give_back(scene.claimed(pid).await.fence, 3).await.unwrap().unwrap();
    give_back(scene.claimed(pid).await.fence, 0).await.unwrap().unwrap();
    assert_eq!(scene.claimed(pid).await.try_number, 3);
}

async fn head_rule_announces_only_older_rows(scene: Scene) {
    let old = scene.submit("call: baton.noop").await;
    let head = scene.store.now().await.unwrap() + 1;
    while scene.store.now().await.unwrap() <= head {}
    let young = scene.submit("call: baton.noop").await;
    let announced = scene.store.announce_lost("default", head).await.unwrap();
    assert_eq!(announced["default"].iter().map(|row| row.pid).collect::<Vec<_>>(), [old]);
    assert!(scene.store.announce_lost("default", head).await.unwrap().is_empty(), "it was announced just now");
    assert!(matches!(scene.claim(young).await, Claim::Claimed(_)));
}

async fn every_condition_of_a_selection_narrows_it(scene: Scene) {
    let odd = scene.submit("{call: baton.noop, session: night, queue: gpu, labels: {a: b}}").await;
    let held = scene.submit("call: baton.sleep\nwith: {for: 1s}").await;
    scene.claimed(held).await;
    let selects = [
        (Select::one(odd), vec![odd]),
        (Select { session: Some("night".into()), ..Select::default() }, vec![odd]),
        (Select { queue: Some("gpu".into()), ..Select::default() }, vec![odd]),
        (Select { labels: Some([("a".to_owned(), "b".to_owned())].into()), ..Select::default() }, vec![odd]),
        (Select { states: Some(vec!["running".into()]), ..Select::default() }, vec![held]),
        (Select { kind: Some("baton.sleep".into()), ..Select::default() }, vec![held]),
        (Select { worker: Some("w1".into()), ..Select::default() }, vec![held]),
        (Select { older_than: Some(Duration::from_secs(60)), ..Select::default() }, vec![]),
        (Select { older_than: Some(Duration::ZERO), ..Select::default() }, vec![held, odd]),
    ];
    for (select, pids) in selects {
        let listed = scene.store.list(&Filter { select: select.clone(), after: None, limit: 10 }).await.unwrap();
        assert_eq!(listed.iter().map(|row| row.pid).collect::<Vec<_>>(), pids, "{select:?}");
        let counts = scene.store.count_selected(&select, Desired::Pause).await.unwrap();
        assert_eq!(counts.values().sum::<u64>(), pids.len() as u64, "{select:?}");
    }
}

async fn launch_inserts_and_claims_and_detects_another_spec(scene: Scene) {
    let launch = new_process("call: baton.noop");
    let claim = |launch: &NewProcess| scene.writer.claim(launch.pid, "default".into(), Some(launch.clone().into()));
    let (first, second) = tokio::join!(claim(&launch), claim(&launch));
    let claims = [first.unwrap(), second.unwrap()];
    assert!(matches!(claims[0], Claim::Claimed(_)), "{claims:?}");
    assert!(matches!(claims[1], Claim::NotQueued), "{claims:?}");
    let other = NewProcess { spec: new_process("call: baton.fail").spec, ..launch };
    assert!(matches!(claim(&other).await.unwrap(), Claim::OtherSpec));
}

async fn outputs_are_kept_and_replaced(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    for text in ["a", "ab"] {
        let output = Output { stream: Stream::Stdout, head: text.into(), tail: vec![], total_bytes: text.len() as u64 };
        let fenced =
            Fenced { fence, verb: Verb::Keep, checkpoint: None, try_number: 1, ended: None, outputs: vec![output] };
        scene.writer.write(fenced).await.unwrap().unwrap();
    }
    let (epoch, outputs) = scene.store.output(pid).await.unwrap().unwrap();
    assert_eq!((epoch, outputs.len(), outputs[0].head.as_slice()), (1, 1, b"ab".as_slice()));
}

async fn an_overdue_process_is_killed_with_the_reason(scene: Scene) {
    let waiting = scene.submit("{call: baton.noop, timeout: {queue: 1ms}}").await;
    let running = scene.submit("{call: baton.noop, timeout: {total: 1ms, queue: 1h}}").await;
    scene.claimed(running).await;
    let start = scene.store.now().await.unwrap();
    while scene.store.now().await.unwrap() < start + 2_000 {}
    assert_eq!(scene.store.end_overdue().await.unwrap().len(), 2);
    assert_eq!(scene.state(waiting).await, (Place::Ended, State::Killed));
    let reason = scene.store.show(waiting).await.unwrap().unwrap().summary.outcome.unwrap().reason.unwrap();
    assert!(reason.contains("`timeout.queue`"), "{reason}");
    let wishes = scene.store.desired_of(scene.me, false).await.unwrap();
    assert_eq!(
        wishes.iter().map(|wish| (wish.fence.pid, wish.desired)).collect::<Vec<_>>(),
        [(running, Desired::Kill)]
    );
    assert!(scene.store.end_overdue().await.unwrap().is_empty());
}

async fn every_transition_is_one_of_the_state_machine(scene: Scene) {
    // For each state and request, the database must agree with `State::next`.
    for setup in ["created", "running", "waiting", "paused created", "paused running", "paused waiting"] {
        for (verb, event) in [(Desired::Run, Input::Play), (Desired::Pause, Input::Pause), (Desired::Kill, Input::Kill)]
        {
            let pid = scene.submit("call: baton.noop").await;
            if setup.contains("running") {
                let fence = scene.claimed(pid).await.fence;
                scene.write(fence, Verb::GiveBack).await.unwrap();
            }
            if setup.contains("waiting") {
                let fence = scene.claimed(pid).await.fence;
                scene.write(fence, Verb::Park { wake_in: Duration::from_secs(60) }).await.unwrap();
            }
            if setup.contains("paused") {
                scene.recorded(pid, Desired::Pause).await;
            }
            let before = scene.state(pid).await.1;
            scene.recorded(pid, verb).await;
            assert_eq!(scene.state(pid).await.1, before.next(event).unwrap(), "{setup} {event:?}");
        }
    }
}

async fn checkpoint_survives_a_give_back(scene: Scene) {
    let pid = scene.submit("call: baton.noop").await;
    let fence = scene.claimed(pid).await.fence;
    let checkpoint = Checkpoint { state: vec![1, 2, 3], advances: 1, ..Checkpoint::default() };
    scene.write_with(fence, Verb::GiveBack, Some(checkpoint.clone())).await.unwrap();
    let claimed = scene.claimed(pid).await;
    assert_eq!(claimed.checkpoint.unwrap().unwrap(), checkpoint);
}

async fn summary_names_the_pause_and_the_failed_try(scene: Scene) {
    let summary = async |pid| scene.store.show(pid).await.unwrap().unwrap().summary;
    let park = |fence, try_number, ended| Fenced {
        fence,
        verb: Verb::Park { wake_in: Duration::ZERO },
        checkpoint: None,
        try_number,
        ended,
        outputs: vec![],
    };
    let pid = scene.submit("{call: baton.noop, retry: {max: 3}}").await;
    let fence = scene.claimed(pid).await.fence;
    let failed = Attempt { started_at: 1, how: How::Error, reason: Some("exit 1".into()) };
    scene.writer.write(park(fence, 2, Some(failed))).await.unwrap().unwrap();
    let retried = summary(pid).await;
    assert_eq!((retried.last_error.as_deref(), retried.waits_for_retry), (Some("exit 1"), true));
    // The next attempt ends in an ordinary wait, so the process no longer waits for a retry.
    while scene.store.wake_due().await.unwrap().is_empty() {}
    let fence = scene.claimed(pid).await.fence;
    scene.writer.write(park(fence, 2, None)).await.unwrap().unwrap();
    let waits = summary(pid).await;
    assert_eq!((waits.last_error.as_deref(), waits.waits_for_retry), (Some("exit 1"), false));

    let on_hold = scene.submit("{call: baton.noop, hold: true}").await;
    assert_eq!(summary(on_hold).await.paused, None);
    scene.recorded(on_hold, Desired::Run).await;
    let first = Request { reason: Some("first".into()), ..request(Desired::Pause) };
    scene.store.control(on_hold, &first).await.unwrap();
    scene.recorded(on_hold, Desired::Run).await;
    assert_eq!(summary(on_hold).await.paused, None);
    let last = Request { by: "bob".into(), reason: Some("last".into()), ..request(Desired::Pause) };
    scene.store.control(on_hold, &last).await.unwrap();
    let paused = summary(on_hold).await.paused.unwrap();
    assert_eq!((paused.by.as_str(), paused.reason.as_deref()), ("bob", Some("last")));
}

async fn facts_name_the_holder_and_the_position_in_the_queue(scene: Scene) {
    assert!(scene.store.facts(Pid::generate()).await.unwrap().is_none());
    let processes = ["default", "default", "gpu", "default"]
        .map(|queue| new_process(&format!("{{call: baton.noop, queue: {queue}}}")));
    let pids = processes.each_ref().map(|process| process.pid);
    scene.store.submit(&processes).await.unwrap();
    let facts = async |pid| scene.store.facts(pid).await.unwrap().unwrap();
    assert_eq!((facts(pids[3]).await.n_before, facts(pids[2]).await.n_before), (2, 0));
    let backlogs = scene.store.backlogs().await.unwrap();
    let counts: Vec<(&str, i64)> = backlogs.iter().map(|backlog| (backlog.queue.as_str(), backlog.count)).collect();
    assert_eq!(counts, [("default", 3), ("gpu", 1)]);
    scene.claimed(pids[0]).await;
    assert_eq!(facts(pids[3]).await.n_before, 1);
    let held = facts(pids[0]).await;
    assert_eq!((held.n_before, held.holder.unwrap().name.as_str()), (0, "w1"));
    assert_eq!(scene.store.list_held(scene.me, 5).await.unwrap()[0].pid, pids[0]);
    scene.store.declare_gone(scene.me, 0).await.unwrap();
    let orphan = facts(pids[0]).await;
    assert!(orphan.workers.is_empty() && orphan.holder.unwrap().gone_at.is_some());
}

async fn workers_are_found_by_name_and_by_incarnation(scene: Scene) {
    let names = async |wanted: &[String], with_gone| {
        let rows = scene.store.workers(wanted, with_gone).await.unwrap();
        rows.into_iter().map(|row| row.name).collect::<Vec<_>>()
    };
    let second = Incarnation::generate();
    scene.store.register(second, &worker("w2")).await.unwrap();
    if scene.store.is_embedded() {
        // On SQLite, registration declares all other workers gone.
        assert_eq!(names(&[], false).await, ["w2"]);
    }
    assert_eq!(names(&["w2".into()], false).await, ["w2"]);
    assert_eq!(names(&[scene.me.to_string()], true).await, ["w1"]);
    assert!(names(&["w3".into()], true).await.is_empty());
    let before = scene.store.workers(&["w2".into()], false).await.unwrap().remove(0);
    scene.store.beat(second, &Load::default()).await.unwrap();
    let after = scene.store.workers(&["w2".into()], false).await.unwrap().remove(0);
    assert!(after.beat == before.beat + 1 && after.beat_at >= before.beat_at && after.state() == WorkerState::Live);
    scene.store.leave(second).await.unwrap();
    assert!(names(&["w2".into()], false).await.is_empty());
    assert_eq!(scene.store.workers(&["w2".into()], true).await.unwrap()[0].state(), WorkerState::Gone);
}
