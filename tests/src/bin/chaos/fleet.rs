//! Workers on private services, each behind its own proxies and with its own clock.

use std::path::PathBuf;

use baton_tests::journal;
use baton_tests::process::Worker;
use baton_tests::proxy::{Fault, Proxy};
use baton_tests::scene::Scene;
use tokio::sync::{Mutex, MutexGuard};

/// Room for the database when the disk will be filled: the data of ten minutes, and the WAL.
const DISK_MB: u32 = 900;

/// Variables that fake a worker's time of day, but not its uptime.
const FAKETIME: [(&str, &str); 4] = [
    ("LD_PRELOAD", "libfaketime.so.1"),
    ("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu/faketime:/usr/lib/aarch64-linux-gnu/faketime"),
    ("FAKETIME_NO_CACHE", "1"),
    ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
];

/// A worker that is restarted whenever it exits.
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

    /// Restarts the workers that have exited, as a supervisor does.
    pub(crate) async fn revive(&self) {
        for seat in &self.seats {
            let mut seat = seat.lock().await;
            if seat.worker.has_ended() {
                seat.worker = worker(&self.scene, &seat.name, &seat.broker, &seat.database, &seat.clock);
            }
        }
    }

    /// Ends every fault of every worker.
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

    /// Returns a measure of progress that grows while the fleet works.
    pub(crate) fn progress(&self) -> u64 {
        std::fs::metadata(self.scene.path("witness")).map_or(0, |file| file.len())
    }

    /// Call after every start of the broker, which forgets this setting.
    pub(crate) fn broker_is_new(&self) {
        shorten_consumer_timeout(&self.scene);
    }
}

impl Seat {
    pub(crate) fn set_clock(&self, offset: &str) {
        std::fs::write(&self.clock, offset).expect("own folder");
    }
}

/// Closes the channel of a delivery that is not settled within seconds, instead of half an hour.
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
