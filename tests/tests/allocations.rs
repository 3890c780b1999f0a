//! How often a worker asks for memory for each process and each advance, and how much it keeps for one that waits in memory.
//! It is this very program, so that its allocations can be counted; processes are submitted by another one.

use std::alloc::System;
use std::collections::BTreeMap;
use std::time::Duration;

use baton_common::communicator::Broker;
use baton_common::config;
use baton_common::objects::Objects;
use baton_common::store::{Location, Store};
use baton_tests::eventually;
use baton_tests::scene::Scene;
use baton_worker::registry::Registry;
use baton_worker::worker::{self, Limits, Options, Stop};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const COUNT: u32 = 500;

/// Of a process of one advance: its message, its claim with the spec, its end, and what is said of that. They are 138.
const OF_A_LAUNCH_MAX: f64 = 175.0;

/// Of an advance and its checkpoint. They are 22.
const OF_AN_ADVANCE_MAX: f64 = 30.0;

/// Bytes that are kept of a process that waits in memory. They are 3,700 in a build without optimization, whose futures are
/// larger than those of a release.
const HELD_BYTES_MAX: f64 = 4_200.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs services: run tests/run"]
async fn a_process_and_an_advance_ask_for_memory_so_often_at_most_and_a_wait_for_so_much() {
    let scene = Scene::new().await;
    let objects = config::Objects { url: Some(scene.path("objects").display().to_string()), ..Default::default() };
    let options = Options {
        name: "counted".into(),
        host: "here".into(),
        queues: vec!["default".into()],
        slots: COUNT,
        threads: 2,
        root: scene.path("root"),
        grace: Duration::from_secs(1),
        limits: Limits::default(),
        registry: Registry::new(),
        sites: BTreeMap::new(),
        ssh: BTreeMap::new(),
        objects: Objects::open(&objects).unwrap(),
        store: Store::open(Location::parse(&scene.database_url()).unwrap()).await.unwrap(),
        broker: Broker::Amqp(scene.broker_urls()),
    };
    let stop = Stop::default();
    let counted = async {
        // Connections open, statements are prepared, buffers grow.
        allocations(&scene, 10).await;
        let of_one = allocations(&scene, 1).await;
        let of_eleven = allocations(&scene, 11).await;
        let of_a_wait = kept(&scene).await;
        stop.drain();
        (of_one, (of_eleven - of_one) / 10.0, of_a_wait)
    };
    let (worked, (of_a_launch, of_an_advance, of_a_wait)) = tokio::join!(worker::run(&options, &stop), counted);
    worked.unwrap();
    let counts = format!("{of_a_launch:.1} for a process of one advance, {of_an_advance:.1} for each other advance");
    assert!(of_a_launch < OF_A_LAUNCH_MAX && of_an_advance < OF_AN_ADVANCE_MAX, "{counts}");
    assert!(of_a_wait < HELD_BYTES_MAX, "{of_a_wait:.0} bytes for a process that waits in memory");
}

/// How many a process of so many advances needs.
async fn allocations(scene: &Scene, n_advances: u32) -> f64 {
    let region = Region::new(ALLOCATOR);
    scene.submit(&format!("call: baton.count\nwith: {{advances: {n_advances}}}\n"), COUNT).await;
    eventually("all have ended", Duration::from_secs(60), async || match scene.count("place <> 3").await {
        0 => Ok(()),
        n_left => Err(n_left),
    })
    .await;
    let change = region.change();
    let count = u32::try_from(change.allocations + change.reallocations).expect("millions at most");
    f64::from(count) / f64::from(COUNT)
}

/// How many bytes are kept of a process that waits in memory.
async fn kept(scene: &Scene) -> f64 {
    let region = Region::new(ALLOCATOR);
    scene.submit("call: baton.count\nwith: {advances: 9, every: 1h, stay: true}\n", COUNT).await;
    eventually("all wait", Duration::from_secs(60), async || match scene.count("place = 1 AND seq > 0").await {
        n_waiting if n_waiting == u64::from(COUNT) => Ok(()),
        n_waiting => Err(n_waiting),
    })
    .await;
    // What was needed for the last checkpoints goes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let change = region.change();
    let kept = change.bytes_allocated.cast_signed() - change.bytes_deallocated.cast_signed() + change.bytes_reallocated;
    f64::from(i32::try_from(kept).expect("some megabytes")) / f64::from(COUNT)
}
