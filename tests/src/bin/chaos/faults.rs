//! The faults. Each fault is over when its function returns.

use std::time::Duration;

use baton_tests::dice::Dice;
use baton_tests::proxy;
use tokio::time::sleep;

use crate::fleet::Fleet;

/// One kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    KillWorker,
    KillAllWorkers,
    FreezeWorker,
    CutBroker,
    SilenceBroker,
    CutDatabase,
    SilenceDatabase,
    StopBroker,
    KillBroker,
    EmptyBroker,
    RestartDatabase,
    KillDatabase,
    EndSessions,
    StallClaims,
    Purge,
    DeleteQueue,
    MemoryAlarm,
    DiskAlarm,
    FullDisk,
    JumpClock,
}

impl Fault {
    pub(crate) const ALL: [Fault; 20] = [
        Fault::KillWorker,
        Fault::KillAllWorkers,
        Fault::FreezeWorker,
        Fault::CutBroker,
        Fault::SilenceBroker,
        Fault::CutDatabase,
        Fault::SilenceDatabase,
        Fault::StopBroker,
        Fault::KillBroker,
        Fault::EmptyBroker,
        Fault::RestartDatabase,
        Fault::KillDatabase,
        Fault::EndSessions,
        Fault::StallClaims,
        Fault::Purge,
        Fault::DeleteQueue,
        Fault::MemoryAlarm,
        Fault::DiskAlarm,
        Fault::FullDisk,
        Fault::JumpClock,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Fault::KillWorker => "kill-worker",
            Fault::KillAllWorkers => "kill-all-workers",
            Fault::FreezeWorker => "freeze-worker",
            Fault::CutBroker => "cut-broker",
            Fault::SilenceBroker => "silence-broker",
            Fault::CutDatabase => "cut-database",
            Fault::SilenceDatabase => "silence-database",
            Fault::StopBroker => "stop-broker",
            Fault::KillBroker => "kill-broker",
            Fault::EmptyBroker => "empty-broker",
            Fault::RestartDatabase => "restart-database",
            Fault::KillDatabase => "kill-database",
            Fault::EndSessions => "end-sessions",
            Fault::StallClaims => "stall-claims",
            Fault::Purge => "purge",
            Fault::DeleteQueue => "delete-queue",
            Fault::MemoryAlarm => "memory-alarm",
            Fault::DiskAlarm => "disk-alarm",
            Fault::FullDisk => "full-disk",
            Fault::JumpClock => "jump-clock",
        }
    }

    /// The single service that the fault breaks, if any.
    fn service(self) -> Option<&'static str> {
        match self {
            Fault::KillWorker
            | Fault::KillAllWorkers
            | Fault::FreezeWorker
            | Fault::CutBroker
            | Fault::SilenceBroker
            | Fault::CutDatabase
            | Fault::SilenceDatabase
            | Fault::JumpClock => None,
            Fault::StopBroker
            | Fault::KillBroker
            | Fault::EmptyBroker
            | Fault::Purge
            | Fault::DeleteQueue
            | Fault::MemoryAlarm
            | Fault::DiskAlarm => Some("broker"),
            Fault::RestartDatabase
            | Fault::KillDatabase
            | Fault::EndSessions
            | Fault::StallClaims
            | Fault::FullDisk => Some("database"),
        }
    }

    /// Whether both can be injected at once: two faults of one service would end each other.
    pub(crate) fn goes_with(self, other: Fault) -> bool {
        self != other && (self.service().is_none() || self.service() != other.service())
    }

    pub(crate) async fn strike(self, fleet: &Fleet, dice: &mut Dice) {
        let idx = usize::try_from(dice.next(fleet.len() as u64)).expect("few workers");
        let services = fleet.scene.services();
        let long = dice.time(3_000, 16_000);
        let short = dice.time(0, 4_000);
        match self {
            Fault::KillWorker => {
                fleet.seat(idx).await.worker.kill();
                sleep(short).await;
            }
            Fault::KillAllWorkers => {
                for idx in 0..fleet.len() {
                    fleet.seat(idx).await.worker.kill();
                }
                sleep(short).await;
            }
            Fault::FreezeWorker => {
                fleet.seat(idx).await.worker.freeze();
                sleep(long).await;
                fleet.seat(idx).await.worker.thaw();
            }
            Fault::CutBroker => {
                for _ in 0..=dice.next(5) {
                    fleet.seat(idx).await.broker.reset();
                    sleep(dice.time(0, 1_500)).await;
                }
            }
            Fault::CutDatabase => {
                for _ in 0..=dice.next(5) {
                    fleet.seat(idx).await.database.reset();
                    sleep(dice.time(0, 1_500)).await;
                }
            }
            Fault::SilenceBroker => {
                fleet.seat(idx).await.broker.set(proxy::Fault::Blackhole);
                sleep(long).await;
                fleet.seat(idx).await.broker.set(proxy::Fault::Pass);
            }
            Fault::SilenceDatabase => {
                fleet.seat(idx).await.database.set(proxy::Fault::Blackhole);
                sleep(long).await;
                fleet.seat(idx).await.database.set(proxy::Fault::Pass);
            }
            Fault::StopBroker => {
                blocking(|| services.control_broker(&["stop_app"]));
                sleep(short).await;
                blocking(|| services.control_broker(&["start_app"]));
            }
            Fault::KillBroker => {
                blocking(|| services.kill_broker());
                sleep(long).await;
                blocking(|| services.start_broker());
                blocking(|| fleet.broker_is_new());
            }
            Fault::EmptyBroker => {
                blocking(|| services.restart_broker_empty());
                fleet.scene.make_vhost().await;
                blocking(|| fleet.broker_is_new());
            }
            Fault::RestartDatabase => blocking(|| services.restart_database()),
            Fault::KillDatabase => {
                blocking(|| services.kill_database());
                sleep(short).await;
                blocking(|| services.start_database());
            }
            Fault::EndSessions => {
                for _ in 0..=dice.next(8) {
                    let all = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                               WHERE datname = current_database() AND pid <> pg_backend_pid()";
                    fleet.scene.sql(all).await;
                    sleep(dice.time(0, 700)).await;
                }
            }
            Fault::StallClaims => {
                let seconds = long.as_secs_f64();
                let lock = format!("BEGIN; LOCK TABLE process IN EXCLUSIVE MODE; SELECT pg_sleep({seconds}); COMMIT");
                fleet.scene.sql(&lock).await;
            }
            Fault::Purge => fleet.scene.purge_all().await,
            Fault::DeleteQueue => fleet.scene.delete_queue("baton.task.default").await,
            Fault::MemoryAlarm => {
                blocking(|| services.control_broker(&["set_vm_memory_high_watermark", "0.00001"]));
                sleep(long).await;
                blocking(|| services.control_broker(&["set_vm_memory_high_watermark", "0.4"]));
            }
            Fault::DiskAlarm => {
                blocking(|| services.control_broker(&["set_disk_free_limit", "100000GB"]));
                sleep(long).await;
                blocking(|| services.control_broker(&["set_disk_free_limit", "50MB"]));
            }
            Fault::FullDisk => {
                let filler = tokio::task::block_in_place(|| services.fill_disk());
                sleep(short + Duration::from_secs(1)).await;
                std::fs::remove_file(filler).expect("the file exists");
                // PostgreSQL exits when it cannot write its log.
                blocking(|| services.start_database());
            }
            Fault::JumpClock => {
                fleet.seat(idx).await.set_clock(dice.pick::<&str>(&["+1h", "-1h", "+5m", "-5m", "+400d"]));
                sleep(short).await;
                fleet.seat(idx).await.set_clock("+0");
            }
        }
    }
}

fn blocking(work: impl FnOnce()) {
    tokio::task::block_in_place(work);
}
