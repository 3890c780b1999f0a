//! Statements that run again and again, or that a person waits for, read no table from its beginning to its end.
//!
//! Every method is called on a connection of its own, and PostgreSQL's own counts say afterwards what was scanned.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_common::id::{Incarnation, RequestId};
use baton_common::select::Select;
use baton_common::state::{Desired, Place, State};
use baton_common::store::blob::{Checkpoint, Outcome};
use baton_common::store::control::Request;
use baton_common::store::query::{Cursor, Filter};
use baton_common::store::submit::NewProcess;
use baton_common::store::worker::Load;
use baton_common::store::writer::{Attempt, Claim, Fenced, How, Verb, Writer};
use baton_common::store::{Location, Store};

use crate::{Scene, new_process, psql};

/// Rows in each place. With fewer, reading all of them is cheap enough to be right.
const ROWS: u32 = 20_000;

/// Processes that come while a worker runs.
const OTHERS: u64 = 3_000;

/// Entries of indexes that ten processes may read in their lives, or a list of fifty: some ten each, where one look too much
/// would be [`OTHERS`].
const N_READ_MAX: u64 = 1_000;

/// Entries of indexes that a call to a session may read for each of its processes: a few looks, where a comparison of each
/// with each other would be [`OTHERS`] for each further condition.
const N_LOOKS_MAX: u64 = 30;

/// What is called, under a name for its failure.
type Call<'a> = (String, Box<dyn AsyncCall + 'a>);

trait AsyncCall {
    fn call<'a>(&'a self, store: &'a Store) -> futures_util::future::LocalBoxFuture<'a, ()>;
}

impl<F: AsyncFn(&Store)> AsyncCall for F {
    fn call<'a>(&'a self, store: &'a Store) -> futures_util::future::LocalBoxFuture<'a, ()> {
        Box::pin(self(store))
    }
}

fn list(name: &str, select: Select) -> Call<'static> {
    let call = async move |store: &Store| {
        let filter = Filter { select: select.clone(), after: None, limit: 50 };
        let page = store.list(&filter).await.unwrap();
        if let Some(last) = page.last() {
            let after = Some(Cursor { pid: last.pid, created_at: last.created_at });
            store.list(&Filter { after, ..filter }).await.unwrap();
        }
    };
    (format!("list {name}"), Box::new(call))
}

fn calls() -> Vec<Call<'static>> {
    let all = Select::default;
    let label = |key: &str, value: &str| Select { labels: Some([(key.to_owned(), value.to_owned())].into()), ..all() };
    let older = |seconds| Select { older_than: Some(Duration::from_secs(seconds)), ..all() };
    let mut calls = vec![
        list("all", all()),
        list("a session of half of them", Select { session: Some("night".into()), ..all() }),
        list("a session of three", Select { session: Some("rare".into()), ..all() }),
        list("a session of none", Select { session: Some("nix".into()), ..all() }),
        list("a label of all", label("campaign", "si")),
        list("a label of three", label("rare", "yes")),
        list("a label of none", label("campaign", "nix")),
        list("a queue", Select { queue: Some("gpu".into()), ..all() }),
        list("an empty queue", Select { queue: Some("nix".into()), ..all() }),
        list("a kind", Select { kind: Some("program".into()), ..all() }),
        list("no kind", Select { kind: Some("nix".into()), ..all() }),
        list("a worker", Select { worker: Some("w3".into()), ..all() }),
        list("no worker", Select { worker: Some("nix".into()), ..all() }),
        list("older than all but one in thirty", older(86_400)),
        list("older than all", older(40 * 86_400)),
    ];
    for states in
        ["created", "running", "waiting", "paused", "finished", "excepted", "killed", "running,excepted,killed"]
    {
        let select = Select { states: Some(states.split(',').map(str::to_owned).collect()), ..all() };
        calls.push(list(states, select.clone()));
        calls.push(list(&format!("{states} with a label"), Select { states: select.states, ..label("rare", "yes") }));
    }
    let mut sweep = |name: &str, call: Box<dyn AsyncCall>| calls.push((name.to_owned(), call));
    sweep("free", Box::new(async |store: &Store| drop(store.free().await.unwrap())));
    sweep("wake_due", Box::new(async |store: &Store| assert!(store.wake_due().await.unwrap().is_empty())));
    sweep("next_wake_us", Box::new(async |store: &Store| assert!(store.next_wake_us().await.unwrap().is_some())));
    sweep("announce_lost", Box::new(async |store: &Store| drop(store.announce_lost("default", 0).await.unwrap())));
    sweep(
        "queued_in",
        Box::new(async |store: &Store| {
            assert_eq!(store.queued_in("default", 200).await.unwrap().len(), 200);
        }),
    );
    sweep("end_overdue", Box::new(async |store: &Store| assert!(store.end_overdue().await.unwrap().is_empty())));
    sweep("forget_gone", Box::new(async |store: &Store| store.forget_gone().await.unwrap()));
    sweep(
        "beat, held_by, desired_of",
        Box::new(async |store: &Store| {
            let me = store.peers().await.unwrap().remove(0).id;
            store.beat(me, &Load::default()).await.unwrap();
            assert_eq!(store.held_by(me).await.unwrap().len(), store.desired_of(me, true).await.unwrap().len());
        }),
    );
    sweep("workers", Box::new(async |store: &Store| assert_eq!(store.workers(&[], false).await.unwrap()[0].held, 50)));
    calls
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn lists_and_sweeps_read_no_table_from_end_to_end() {
    let (url, schema) = Scene::schema().await;
    Store::open(Location::parse(&url).unwrap()).await.unwrap();
    let fill = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/bench/fill.sql");
    psql(&url, &["-v", &format!("n={ROWS}"), "-f", fill]).await;
    let scans = async |name: &str| {
        wait_for_the_end_of(&url, name).await;
        let scans = format!(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE schemaname = '{schema}'
             AND relname IN ('process', 'spec', 'attempt', 'label', 'event') ORDER BY relname"
        );
        psql(&url, &["-c", &scans]).await
    };
    let calls = calls();
    let (all, each) = (vec![&calls[..]], calls.chunks(1).collect::<Vec<_>>());
    let mut found = Vec::new();
    // All at once, and one by one only to find out which it was.
    for groups in [all, each] {
        found.clear();
        for group in groups {
            let before = scans("nobody").await;
            let name = Incarnation::generate().to_string();
            let store = Store::open(Location::parse(&format!("{url}&application_name={name}")).unwrap()).await.unwrap();
            for (_, call) in group {
                call.call(&store).await;
            }
            drop(store);
            let after = scans(&name).await;
            if after != before {
                let whats: Vec<&str> = group.iter().map(|(what, _)| what.as_str()).collect();
                found.push(format!("{}:\n{before}to\n{after}", whats.join(", ")));
            }
        }
        if found.is_empty() {
            return;
        }
    }
    panic!("{}", found.join("\n"));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_began_with_empty_tables_reads_no_more_of_full_ones() {
    let hot = HotPath::begin().await;
    // As after everything was pruned: the server knows that hardly anything is there.
    psql(&hot.url, &["-c", "VACUUM ANALYZE process", "-c", "VACUUM ANALYZE spec"]).await;
    // Every lane has its plans now: a statement that may have plans for its values gets one for all after five times.
    hot.run(8).await;
    hot.submit(OTHERS).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let read = hot.count_read(10).await;
    assert!(read.is_by_key() && read.n_entries < N_READ_MAX, "{read:?}");
}

/// The last page has a row, so that the vacuum keeps all of them, and takes them for empty ones. If the server knows that
/// ids come in the order of their rows, it even takes a look by the key for more than a walk through any other index that
/// has the id.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn rows_are_found_by_their_key_in_tables_that_the_server_takes_for_empty() {
    for first in ["VACUUM", "VACUUM ANALYZE"] {
        let hot = HotPath::with_tables_taken_for_empty(first).await;
        hot.submit(OTHERS).await;
        let read = hot.count_read(10).await;
        assert!(read.is_by_key() && read.n_entries < N_READ_MAX, "{first}: {read:?}");
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_processes_of_a_session_are_watched_by_their_keys() {
    let hot = HotPath::with_tables_taken_for_empty("VACUUM ANALYZE").await;
    hot.submit_as("session: fresh\nrun: ['true']", OTHERS).await;
    let read = hot
        .count(async |hot| {
            let watcher = hot.store.watcher().await.unwrap();
            assert_eq!(watcher.count_in("fresh", Place::Queued).await.unwrap(), OTHERS);
            assert_eq!(watcher.sums("fresh").await.unwrap().good, 0);
        })
        .await;
    assert_eq!(read.elsewhere, [("spec_session".to_owned(), 2)].into(), "{read:?}");
}

/// Just after many of a session were accepted, the server knows of none of them: each condition about them seems to be met by
/// one row, and any order of tables as good as any other.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_asked_of_a_session_just_accepted_compares_no_process_with_each_other() {
    let fresh = Some("fresh".to_owned());
    let paused = Select { session: fresh, states: Some(vec!["paused".into()]), ..Select::default() };
    let labelled = Select { labels: Some([("campaign".to_owned(), "si".to_owned())].into()), ..paused.clone() };
    let mut found = Vec::new();
    for select in [paused, labelled] {
        let calls: Vec<Call<'_>> = vec![
            list("", select.clone()),
            (
                "count_selected".into(),
                Box::new(async |store: &Store| {
                    let counts = store.count_selected(&select, Desired::Kill).await.unwrap();
                    assert_eq!(counts["parked"], OTHERS);
                }),
            ),
            (
                "control_many".into(),
                Box::new(async |store: &Store| {
                    assert_eq!(kill(store, &select).await, OTHERS);
                }),
            ),
        ];
        for (what, call) in calls {
            let hot = HotPath::begin().await;
            hot.submit_as("labels: {campaign: cu}\nsession: old\nhold: true\nrun: ['true']", OTHERS / 10).await;
            kill(&hot.store, &Select { session: Some("old".into()), ..Select::default() }).await;
            vacuum(&hot.url).await;
            hot.submit_as("labels: {campaign: si}\nsession: fresh\nhold: true\nrun: ['true']", OTHERS).await;
            let n_read = hot.count_read_by(&*call).await;
            if n_read > N_LOOKS_MAX * OTHERS {
                found.push(format!("{what} of {select:?}: {n_read}"));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// Of two conditions, thousands of the newest meet one, thousands of older ones the other, and only the oldest both.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn thousands_that_meet_only_one_of_two_conditions_are_passed_at_once() {
    const BOTH: u64 = 50;
    let session = |name: &str| Select { session: Some(name.to_owned()), ..Select::default() };
    let killed = |select| Select { states: Some(vec!["killed".into()]), ..select };
    let hydrogen = Select { labels: Some([("campaign".to_owned(), "h".to_owned())].into()), ..Select::default() };
    let calls: Vec<Call<'_>> = vec![
        list("killed of a session", killed(session("night"))),
        list("killed with a label", killed(hydrogen)),
        (
            "control_many of what there is not".into(),
            Box::new(async |store: &Store| {
                let select = Select { states: Some(vec!["paused".into()]), ..session("day") };
                assert_eq!(kill(store, &select).await, 0);
            }),
        ),
    ];
    let mut found = Vec::new();
    for (what, call) in calls {
        let hot = HotPath::begin().await;
        let night = "labels: {campaign: h}\nsession: night\nhold: true\nrun: ['true']";
        hot.submit_as(night, BOTH).await;
        hot.submit_as("labels: {campaign: he}\nsession: day\nhold: true\nrun: ['true']", OTHERS).await;
        assert_eq!(
            kill(&hot.store, &Select { states: Some(vec!["paused".into()]), ..Select::default() }).await,
            BOTH + OTHERS
        );
        hot.submit_as(night, OTHERS).await;
        vacuum(&hot.url).await;
        let n_read = hot.again().await.count_read_by(&*call).await;
        if n_read > N_READ_MAX {
            found.push(format!("{what}: {n_read}"));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// Removes dead row versions. It first waits for older transactions, of other tests too, which would keep them.
async fn vacuum(url: &str) {
    let wait = "DO $$
        DECLARE mine xid := pg_current_xact_id()::xid;
        BEGIN
            LOOP
                PERFORM pg_stat_clear_snapshot();
                EXIT WHEN NOT EXISTS (
                    SELECT FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()
                      AND (age(backend_xmin) > age(mine) OR age(backend_xid) > age(mine)));
                PERFORM pg_sleep(0.05);
            END LOOP;
        END $$";
    psql(url, &["-c", wait, "-c", "VACUUM ANALYZE process, spec, label"]).await;
}

/// Kills a selection, and says how many that were.
async fn kill(store: &Store, select: &Select) -> u64 {
    let kill = Request::new(Desired::Kill, "test");
    let mut many = store.control_many(RequestId::generate(), select, &kill).await.unwrap().unwrap();
    let mut n_asked = 0;
    while let Some(page) = many.next().await.unwrap() {
        n_asked += page.len() as u64;
    }
    n_asked
}

/// What was read of processes, specs and labels.
#[derive(Debug)]
struct Read {
    /// Entries of indexes, and rows of tables that were gone through.
    n_entries: u64,
    /// How often each index was searched that is not a key. What such a search passes without returning it, as when it
    /// goes through all of an index, is counted nowhere.
    elsewhere: BTreeMap<String, u64>,
}

impl Read {
    fn is_by_key(&self) -> bool {
        self.elsewhere.is_empty()
    }
}

/// A worker's writer, and what it reads.
struct HotPath {
    url: String,
    schema: String,
    /// Of its connections.
    name: String,
    store: Store,
    writer: Writer,
}

impl HotPath {
    async fn begin() -> Self {
        let (url, schema) = Scene::schema().await;
        Self::connected(url, schema).await
    }

    /// One of tables that had many rows, with a `VACUUM` of them, and have one.
    async fn with_tables_taken_for_empty(vacuum: &str) -> Self {
        let hot = Self::begin().await;
        hot.submit(OTHERS).await;
        for table in ["process", "spec"] {
            let delete = format!("DELETE FROM {table} WHERE ctid <> (SELECT MAX(ctid) FROM {table})");
            let statements = [format!("{vacuum} {table}"), delete, format!("VACUUM {table}")];
            psql(&hot.url, &statements.each_ref().map(|sql| ["-c", sql]).concat()).await;
        }
        hot
    }

    async fn connected(url: String, schema: String) -> Self {
        let name = Incarnation::generate().to_string();
        let store = Store::open(Location::parse(&format!("{url}&application_name={name}")).unwrap()).await.unwrap();
        let writer = Scene::writer(&store, Incarnation::generate()).await;
        Self { url, schema, name, store, writer }
    }

    /// The same with other connections; what the former have read is counted by now.
    async fn again(self) -> Self {
        drop((self.writer, self.store));
        wait_for_the_end_of(&self.url, &self.name).await;
        Self::connected(self.url, self.schema).await
    }

    async fn submit(&self, count: u64) -> Vec<NewProcess> {
        self.submit_as("run: ['true']", count).await
    }

    async fn submit_as(&self, spec: &str, count: u64) -> Vec<NewProcess> {
        let processes: Vec<_> = (0..count).map(|_| new_process(spec)).collect();
        self.store.submit(&processes).await.unwrap();
        processes
    }

    /// Takes so many through their lives, one after the other.
    async fn run(&self, count: u64) {
        for process in self.submit(count).await {
            let claim = self.writer.claim(process.pid, "default".into(), None).await.unwrap();
            let Claim::Claimed(claimed) = claim else { panic!("not claimed: {claim:?}") };
            let first = Checkpoint { advances: 1, ..Checkpoint::default() };
            assert!(self.writer.checkpoint(claimed.fence, &first).await.unwrap().is_some());
            let verb = Verb::End { state: State::Finished, outcome: Outcome::default() };
            let ended = Some(Attempt { started_at: 1, how: How::Ok, reason: None });
            let end = Fenced { fence: claimed.fence, verb, checkpoint: None, try_number: 1, ended, outputs: vec![] };
            assert!(self.writer.write(end).await.unwrap().is_some());
        }
    }

    /// What is read while so many go through.
    async fn count_read(self, count: u64) -> Read {
        self.count(async |hot| hot.run(count).await).await
    }

    async fn count_read_by(self, call: &dyn AsyncCall) -> u64 {
        self.count(async |hot| call.call(&hot.store).await).await.n_entries
    }

    async fn count(self, measured: impl AsyncFnOnce(&Self)) -> Read {
        let of_schema = format!("WHERE schemaname = '{}' AND relname IN ('process', 'spec', 'label')", self.schema);
        let sql = format!(
            "SELECT indexrelname, idx_tup_read, idx_scan FROM pg_stat_user_indexes {of_schema}
             UNION ALL SELECT relname, seq_tup_read, 0 FROM pg_stat_user_tables {of_schema}"
        );
        let read = async || -> BTreeMap<String, (u64, u64)> {
            let rows = psql(&self.url, &["-c", &sql]).await;
            let row = |row: &str| {
                let [name, entries, scans] = row.split('|').collect::<Vec<_>>().try_into().unwrap();
                (name.to_owned(), (entries.parse().unwrap(), scans.parse().unwrap()))
            };
            rows.lines().map(row).collect()
        };
        let before = read().await;
        measured(&self).await;
        drop((self.writer, self.store));
        wait_for_the_end_of(&self.url, &self.name).await;
        let after = read().await;
        let n_entries = |of: &BTreeMap<String, (u64, u64)>| of.values().map(|(entries, _)| entries).sum::<u64>();
        let elsewhere = after
            .iter()
            .map(|(name, (_, scans))| (name.clone(), scans - before[name].1))
            .filter(|(name, scans)| *scans > 0 && !name.ends_with("_pkey"))
            .collect();
        Read { n_entries: n_entries(&after) - n_entries(&before), elsewhere }
    }
}

/// A session's counts are certain once it is gone.
async fn wait_for_the_end_of(url: &str, application_name: &str) {
    let sessions = format!("SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = '{application_name}'");
    while psql(url, &["-c", &sessions]).await.trim() != "0" {}
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_checkpoint_writes_no_index() {
    let (url, schema) = Scene::schema().await;
    Store::open(Location::parse(&url).unwrap()).await.unwrap();
    // PostgreSQL writes no index entry for a row in which no column of an index has changed, neither as its key nor in its
    // condition, if its page has space.
    let sql = format!(
        "SELECT indexdef FROM pg_indexes WHERE schemaname = '{schema}' AND tablename = 'process'
         AND indexdef ~ '\\m(seq|checkpoint|woken|claimed_at|changed_at|deaths|try)\\M'"
    );
    assert_eq!(psql(&url, &["-c", &sql]).await, "");
}
