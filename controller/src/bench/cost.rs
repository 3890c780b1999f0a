//! Measures the cost of a run from counters before and after it.

use baton_common::message::Traffic;
use baton_common::store::measure::Meters;
use serde::Serialize;

use super::Bench;
use super::cpu::{Program, Seconds};
use super::fleet::Fleet;
use crate::failure::Failure;

/// Counters at one moment.
pub(super) struct Reading {
    meters: Meters,
    client: Traffic,
    workers: Option<Traffic>,
    cpu: Seconds,
}

/// Average cost of a process. A count that is not available is absent.
#[derive(Debug, Default, Serialize)]
pub(super) struct PerProcess {
    /// Transactions that wrote something, on the whole server.
    commits: f64,
    /// Bytes of the write-ahead log of the whole server.
    wal_bytes: f64,
    /// Rows inserted, changed and removed in this database. Available only if the run started its workers: the server's
    /// count is complete only after their connections have ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rows: Option<f64>,
    /// Task messages, each published persistent and confirmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    confirms: Option<f64>,
    /// Bytes of the bodies of these messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    message_bytes: Option<f64>,
    /// Frames that acknowledged these messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    ack_frames: Option<f64>,
    /// Event messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    event_messages: Option<f64>,
}

/// The cost of a run.
pub(super) struct Cost {
    count: u64,
    pub(super) per_process: PerProcess,
    pub(super) cpu: Seconds,
}

impl Cost {
    /// Returns the cost of a run from its parts.
    pub(super) fn of_parts(parts: &[Cost]) -> Self {
        let count = parts.iter().map(|part| part.count).sum();
        let mean_of = |of: fn(&PerProcess) -> Option<f64>| {
            let sums = parts.iter().map(|part| of(&part.per_process).map(|each| each * float(part.count)));
            sums.sum::<Option<f64>>().map(|sum| super::rounded(sum / float(count).max(1.0)))
        };
        let per_process = PerProcess {
            commits: mean_of(|each| Some(each.commits)).unwrap_or_default(),
            wal_bytes: mean_of(|each| Some(each.wal_bytes)).unwrap_or_default(),
            rows: mean_of(|each| each.rows),
            confirms: mean_of(|each| each.confirms),
            message_bytes: mean_of(|each| each.message_bytes),
            ack_frames: mean_of(|each| each.ack_frames),
            event_messages: mean_of(|each| each.event_messages),
        };
        let cpu = parts.iter().flat_map(|part| part.cpu.keys()).map(|name| {
            let sum = parts.iter().map(|part| part.cpu.get(name).copied().flatten()).sum::<Option<f64>>();
            (*name, sum.map(super::rounded))
        });
        Self { count, per_process, cpu: cpu.collect() }
    }
}

impl Reading {
    pub(super) async fn take(bench: &Bench, fleet: &Fleet) -> Result<Self, Failure> {
        let workers = fleet.os_pids();
        let worker_seconds = workers.iter().map(|pid| Program::process(*pid).seconds()).sum::<Option<f64>>();
        let server = |url: Option<&String>, port, name| Program::server(url?, port, name)?.seconds();
        let cpu = Seconds::from([
            ("client", Program::own().seconds()),
            ("workers", worker_seconds.filter(|_| workers.len() == fleet.len())),
            ("broker", server(bench.broker_urls.first(), 5672, "beam.smp")),
            ("database", server(Some(&bench.database_url), 5432, "postgres")),
        ]);
        Ok(Self {
            meters: bench.store.meters().await?,
            client: bench.communicator.traffic(),
            workers: fleet.traffic(bench).await,
            cpu,
        })
    }

    /// Returns the cost between `self` and `after`, during which `count` processes ran.
    pub(super) fn until(&self, after: &Reading, count: u64) -> Cost {
        let each = |before: u64, after: u64| ratio(after.saturating_sub(before), count);
        let workers = self.workers.zip(after.workers);
        let sent = |of: fn(&Traffic) -> u64| {
            workers.map(|(before, now)| each(of(&self.client) + of(&before), of(&after.client) + of(&now)))
        };
        let cpu = after.cpu.iter().map(|(name, seconds)| {
            let before = self.cpu.get(name).copied().flatten();
            (*name, seconds.zip(before).map(|(after, before)| super::rounded(after - before)))
        });
        Cost {
            count,
            per_process: PerProcess {
                commits: each(self.meters.commits, after.meters.commits),
                wal_bytes: each(self.meters.wal_bytes, after.meters.wal_bytes),
                rows: None,
                confirms: sent(|traffic| traffic.published),
                message_bytes: sent(|traffic| traffic.published_bytes),
                ack_frames: sent(|traffic| traffic.ack_frames),
                event_messages: sent(|traffic| traffic.event_messages),
            },
            cpu: cpu.collect(),
        }
    }
}

/// Returns `part` per one of `count`.
pub(super) fn ratio(part: u64, count: u64) -> f64 {
    super::rounded(float(part) / float(count).max(1.0))
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}
