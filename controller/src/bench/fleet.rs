//! The workers of a run: started by the run, or already running.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use baton_common::id::Incarnation;
use baton_common::message::{Control, Traffic};
use baton_common::store::query::WorkerRow;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::Bench;
use crate::cli::bench::FleetArguments;
use crate::failure::Failure;

/// Time limits for a worker to start, and to stop.
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Pause between two checks whether the workers are ready.
const LOOK: Duration = Duration::from_millis(50);

/// Time limit for a worker to report its traffic.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The workers of a run.
pub(super) struct Fleet {
    own: Vec<Own>,
    rows: Vec<WorkerRow>,
    folder: PathBuf,
}

struct Own {
    child: Child,
    name: String,
}

impl Fleet {
    /// Starts the workers of the run, or finds those that serve its queue.
    pub(super) async fn gather(bench: &Bench, arguments: &FleetArguments) -> Result<Self, Failure> {
        let folder = std::env::temp_dir().join(format!("baton-bench-{}", bench.id));
        std::fs::create_dir_all(&folder)?;
        let mut fleet = Self { own: Vec::new(), rows: Vec::new(), folder };
        for number in 1..=arguments.workers {
            fleet.start(bench, arguments, number)?;
        }
        let started = Instant::now();
        loop {
            fleet.rows = bench.serving().await?;
            let ready = if fleet.own.is_empty() {
                fleet.rows.len()
            } else {
                fleet.own.iter().filter(|own| fleet.rows.iter().any(|row| row.name == own.name)).count()
            };
            if ready > 0 && ready >= fleet.own.len() {
                break;
            }
            if let Some(own) = fleet.own.iter_mut().find_map(|own| match own.child.try_wait() {
                Ok(Some(_)) => Some(own.name.clone()),
                Ok(None) | Err(_) => None,
            }) {
                let log = fleet.folder.join(format!("{own}.log"));
                return Err(Failure::failed(format!(
                    "worker {own} stopped unexpectedly; see its log: {}",
                    log.display()
                )));
            }
            if fleet.own.is_empty() {
                return Err(Failure::failed(format!("no worker serves queue {}", bench.queue))
                    .with_remedy("start one, or use --workers 1 to let the benchmark start one"));
            }
            if started.elapsed() > START_LIMIT {
                return Err(Failure::failed(format!("the workers were not ready within {} s", START_LIMIT.as_secs())));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(fleet)
    }

    fn start(&mut self, bench: &Bench, arguments: &FleetArguments, number: u32) -> Result<(), Failure> {
        let program = match &arguments.worker_program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?.with_file_name("baton-worker"),
        };
        let name = format!("bench-{}-{number}", bench.id);
        let log = std::fs::File::create(self.folder.join(format!("{name}.log")))?;
        let mut command = Command::new(&program);
        command
            .args(["--name", &name, "--queue", &bench.queue])
            .arg("--root")
            .arg(self.folder.join(&name))
            // Every user of the machine can read command lines, so passwords go into the environment.
            .env("BATON_DATABASE_URL", &bench.database_url)
            .env("BATON_BROKER_URL", bench.broker_urls.join(","))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        if let Some(slots) = arguments.slots {
            command.args(["--slots", &slots.to_string()]);
        }
        if let Some(threads) = arguments.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        let child = command.spawn().map_err(|error| {
            Failure::failed(format!("cannot start {}: {error}", program.display()))
                .with_remedy("set its path with --worker-program")
        })?;
        self.own.push(Own { child, name });
        Ok(())
    }

    /// Returns the number of workers.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns whether the run has started the workers.
    pub(super) fn is_own(&self) -> bool {
        !self.own.is_empty()
    }

    /// Returns the operating system's process ids of the workers on this machine.
    pub(super) fn os_pids(&self) -> Vec<u32> {
        let host = baton_worker::cli::host_name();
        let here = self.rows.iter().filter(|row| row.host == host);
        here.filter_map(|row| u32::try_from(row.os_pid).ok()).collect()
    }

    /// Returns the sum of the traffic of all workers; `None` if one does not answer.
    pub(super) async fn traffic(&self, bench: &Bench) -> Option<Traffic> {
        let mut sum = Traffic::default();
        for row in &self.rows {
            let asked = bench.communicator.request(&row.control_queue, Control::Ping, ANSWER_LIMIT);
            let traffic = asked.await.ok()?.traffic?;
            sum.published += traffic.published;
            sum.published_bytes += traffic.published_bytes;
            sum.delivered += traffic.delivered;
            sum.ack_frames += traffic.ack_frames;
            sum.event_messages += traffic.event_messages;
            sum.replies += traffic.replies;
        }
        Some(sum)
    }

    /// Kills the worker that holds the most processes, as a crash would. Returns its incarnation and the number of processes.
    pub(super) async fn crash_busiest(&mut self, bench: &Bench) -> Result<(Incarnation, i64), Failure> {
        let rows = bench.serving().await?;
        let busiest = rows.iter().max_by_key(|row| row.held).ok_or_else(|| Failure::failed("no worker is left"))?;
        let own = self.own.iter_mut().find(|own| own.name == busiest.name);
        own.ok_or_else(|| Failure::failed(format!("worker {} was not started by this benchmark", busiest.name)))?
            .child
            .start_kill()?;
        Ok((busiest.id, busiest.held))
    }

    /// Drains and stops the started workers.
    pub(super) async fn stop(mut self) -> Result<(), Failure> {
        for own in &self.own {
            if let Some(pid) = own.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
                // The worker may have ended already.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for own in &mut self.own {
            if tokio::time::timeout(STOP_LIMIT, own.child.wait()).await.is_err() {
                own.child.kill().await?;
            }
        }
        std::fs::remove_dir_all(&self.folder)?;
        Ok(())
    }
}
