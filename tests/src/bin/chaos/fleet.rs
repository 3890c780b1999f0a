//! Workers on services of their own, each behind proxies of its own and with a clock of its own.

use std::path::PathBuf;

use baton_tests::journal;
use baton_tests::process::Worker;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use tokio::sync::{Mutex, MutexGuard};

/// Room for the database when its disk is to be filled: what ten minutes write, and the log.
const DISK_MB: u32 = 900;

/// What makes a worker believe in another time of day, but not in another uptime.
const FAKETIME: [(&str, &str); 4] = [
    ("LD_PRELOAD", "libfaketime.so.1"),
    ("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu/faketime:/usr/lib/aarch64-linux-gnu/faketime"),
    ("FAKETIME_NO_CACHE", "1"),
    ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
];

/// One worker, which is started again whenever it has ended.
pub(crate) struct Seat {
    name: String,
    pub(crate) worker: Worker,
    pub(crate) broker: Proxy,
    pub(crate) database: Proxy,
    clock: PathBuf,
}

pub(crate) struct Fleet {
    pub(crate) scene: Scene,
    seats: Vec<Mutex<Seat>>,
}

impl Fleet {
    pub(crate) async fn start(n_workers: usize, has_small_disk: bool) -> Self {
        let scene = if has_small_disk { Scene::on_small_disk(DISK_MB).await } else { Scene::private().await };
        journal::keep(&scene).await;
        shorten_consumer_timeout(&scene);
        let mut seats = Vec::new();
        for idx in 1..=n_workers {
            let name = format!("w{idx}");
            let clock = scene.path(&format!("clock-{name}"));
            std::fs::write(&clock, "+0").expect("own folder");
            let broker = Proxy::start(&scene.broker_url()).await;
            let database = Proxy::start(&scene.database_url()).await;
            let worker = worker(&scene, &name, &broker, &database, &clock);
            worker.ready().await;
            seats.push(Mutex::new(Seat { name, worker, broker, database, clock }));
        }
        Self { scene, seats }
    }

    pub(crate) fn len(&self) -> usize {
        self.seats.len()
    }

    pub(crate) async fn seat(&self, idx: usize) -> MutexGuard<'_, Seat> {
        self.seats[idx].lock().await
    }

    /// Starts again what has ended, as a supervisor does.
    pub(crate) async fn revive(&self) {
        for seat in &self.seats {
            let mut seat = seat.lock().await;
            if seat.worker.has_ended() {
                seat.worker = worker(&self.scene, &seat.name, &seat.broker, &seat.database, &seat.clock);
            }
        }
    }

    /// Ends every fault of a worker.
    pub(crate) async fn heal(&self) {
        for seat in &self.seats {
            let seat = seat.lock().await;
            seat.worker.thaw();
            seat.broker.set(Fault::Pass);
            seat.database.set(Fault::Pass);
            seat.set_clock("+0");
        }
        self.revive().await;
    }

    /// What has been done so far: it grows while the fleet goes on.
    pub(crate) fn progress(&self) -> u64 {
        std::fs::metadata(self.scene.path("witness")).map_or(0, |file| file.len())
    }

    /// After every start of the broker, which forgets it.
    pub(crate) fn broker_is_new(&self) {
        shorten_consumer_timeout(&self.scene);
    }
}

impl Seat {
    pub(crate) fn set_clock(&self, offset: &str) {
        std::fs::write(&self.clock, offset).expect("own folder");
    }
}

/// Deliveries that are not settled within seconds cost their channel, instead of within half an hour.
fn shorten_consumer_timeout(scene: &Scene) {
    let set = "application:set_env(rabbit, consumer_timeout, 8000), application:set_env(rabbit, channel_tick_interval, 3000).";
    scene.services().control_broker(&["eval", set]);
}

fn worker(scene: &Scene, name: &str, broker: &Proxy, database: &Proxy, clock: &std::path::Path) -> Worker {
    let clock = clock.display().to_string();
    let variables = [&FAKETIME[..], &[("FAKETIME_TIMESTAMP_FILE", clock.as_str())]].concat();
    let (broker, database) = (broker.through(&scene.broker_url()), database.through(&scene.database_url()));
    let arguments =
        ["--slots", "80", "--grace", "2s", "--broker-url", broker.as_str(), "--database-url", database.as_str()];
    scene.worker_with(&variables, name, &arguments)
}
