//! Measures the limits of broker and database with plain loops over the same messages and the same rows.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use baton_common::communicator::TaskMessage;
use baton_common::id::Pid;
use baton_common::message::Task;
use baton_common::store::submit::NewProcess;
use baton_common::store::writer::{Claimed, Fence};
use baton_common::telemetry::new_traceparent;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::baseline::broker::{BaselineConsumer, BaselineDelivery, BaselineMessage, BaselinePublisher, BaselineQueue};
use super::baseline::database::{BaselineLane, BaselineTables};
use super::{Bench, median_ms, per_second, rounded};
use crate::failure::Failure;
use crate::output;

/// Measured points: number of publishers (and of consumers), and size of the publishing window.
const MESSAGE_POINTS: [(usize, usize); 4] = [(1, 500), (1, 2_000), (2, 500), (2, 2_000)];

/// Measured points: number of connections, and rows per batch.
const ROW_POINTS: [(usize, usize); 6] = [(1, 256), (1, 1_024), (2, 256), (2, 1_024), (4, 64), (4, 256)];

/// Measured points for messages and rows together: number of consumers, each with a database connection, and batch size.
const COMBINED_POINTS: [(usize, usize); 3] = [(1, 256), (2, 128), (2, 256)];

/// Number of processes that are accepted and published together.
const PAGE: usize = 1_000;

/// Pause of a consumer to collect deliveries: each acknowledgement is an entry in the log of a quorum queue.
const GATHER: Duration = Duration::from_millis(8);

/// Number of held rows while updates are measured.
const HELD_ROWS: usize = 8_192;

/// The measured limits.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Limits {
    /// Messages per second that are published, confirmed, delivered and acknowledged.
    pub(super) messages_per_s: f64,
    /// The point with this rate.
    messages_by: String,
    /// Rows per second that fenced updates change, with one commit per batch.
    pub(super) rows_per_s: f64,
    /// The point with this rate.
    rows_by: String,
    /// Commits of one row per second, one after another.
    commits_per_s: f64,
    /// Median of one such commit, in milliseconds.
    commit_ms: f64,
    #[serde(flatten)]
    pub(super) path: PathTimes,
    /// Processes per second with messages and rows together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) combined_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    combined_by: Option<String>,
    /// Number of advances of each of these processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    combined_steps: Option<u32>,
}

/// Median times, in milliseconds, of the steps of a single process of one advance.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct PathTimes {
    /// The commit by which it is accepted.
    accept_ms: f64,
    /// The publish of its message and the confirm.
    confirm_ms: f64,
    /// The commit by which it is claimed.
    claim_ms: f64,
    /// The commit by which it ends, with the row of its attempt.
    end_ms: f64,
}

impl PathTimes {
    /// Returns the sum of all steps.
    pub(super) fn sum_ms(self) -> f64 {
        self.accept_ms + self.confirm_ms + self.claim_ms + self.end_ms
    }
}

/// Measures the steps of a single process with plain loops.
pub(super) struct Path<'a> {
    tables: &'a BaselineTables,
    lane: BaselineLane,
    queue: BaselineQueue,
    publisher: BaselinePublisher,
    accepts: Vec<Duration>,
    confirms: Vec<Duration>,
    claims: Vec<Duration>,
    ends: Vec<Duration>,
}

/// The processes of a combined measurement.
#[derive(Clone, Copy)]
pub(super) struct Combined {
    /// Number of processes at each point.
    pub(super) count: u32,
    /// Number of advances of each process.
    pub(super) steps: u32,
}

/// Measures all limits; each point takes `each`.
pub(super) async fn measure(bench: &Bench, each: Duration, combined: Option<Combined>) -> Result<Limits, Failure> {
    output::note("measuring the limits of broker and database");
    let tables = bench.baseline_tables().await?;
    let measured = async {
        let messages = messages(bench, each).await?;
        let (commits, rows) = rows(&tables, each).await?;
        let mut path = Path::open(bench, &tables).await?;
        path.measure(each).await?;
        let path = path.close().await?;
        let together = match combined {
            Some(combined) => Some(best(combined_points(bench, &tables, combined).await?)),
            None => None,
        };
        let (combined_per_s, combined_by) = together.unzip();
        let (messages_per_s, messages_by) = best(messages);
        let (rows_per_s, rows_by) = best(rows);
        Ok(Limits {
            messages_per_s,
            messages_by,
            rows_per_s,
            rows_by,
            commits_per_s: per_second(commits.len() as u64, commits.iter().sum()),
            commit_ms: median_ms(commits),
            path,
            combined_per_s,
            combined_by,
            combined_steps: combined.map(|combined| combined.steps),
        })
    }
    .await;
    tables.remove().await?;
    measured
}

fn best(points: Vec<(f64, String)>) -> (f64, String) {
    points.into_iter().max_by(|one, other| one.0.total_cmp(&other.0)).unwrap_or_default()
}

/// Returns a launch as Baton publishes it.
fn launch() -> BaselineMessage {
    let task =
        Task::Launch { pid: Pid::generate(), spec: None, wait: false, announced_at: Some(1_000_000_000_000_000) };
    TaskMessage { task, traceparent: Some(new_traceparent()) }.into()
}

/// Measures the message rate of each point.
async fn messages(bench: &Bench, each: Duration) -> Result<Vec<(f64, String)>, Failure> {
    let mut points = Vec::new();
    for (lanes, window) in MESSAGE_POINTS {
        let queue = bench.baseline_queue().await?;
        let rate = message_rate(&queue, lanes, window, each).await;
        queue.delete().await?;
        points.push((rate?, format!("{lanes} × window {window}")));
    }
    Ok(points)
}

async fn message_rate(queue: &BaselineQueue, lanes: usize, window: usize, each: Duration) -> Result<f64, Failure> {
    let mut publishing = JoinSet::new();
    let mut consuming = JoinSet::new();
    let (taken_tx, mut taken) = watch::channel(0);
    let started = Instant::now();
    for _ in 0..lanes {
        let publisher = queue.publisher(window).await?;
        let mut consumer = queue.consumer(u16::try_from(window).unwrap_or(u16::MAX)).await?;
        let taken_tx = taken_tx.clone();
        // Encoding is not part of the broker's limit, so messages are encoded before.
        let launches = std::iter::repeat_with(launch).take(PAGE).collect::<Vec<_>>();
        publishing.spawn(async move {
            let mut count = 0_u64;
            let mut launches = launches.iter().cycle();
            let due = std::iter::from_fn(|| {
                let launch = launches.next().filter(|_| started.elapsed() < each)?;
                count += 1;
                Some(launch.clone())
            });
            publisher.publish(due).await.map(|()| count)
        });
        consuming.spawn(async move {
            loop {
                let count = consumer.take(window / 2).await?.len() as u64;
                consumer.acknowledge().await?;
                taken_tx.send_modify(|taken| *taken += count);
                tokio::time::sleep(GATHER).await;
            }
        });
    }
    let mut published = 0;
    while let Some(count) = publishing.join_next().await {
        published += count.map_err(|failure| Failure::failed(failure.to_string()))??;
    }
    all_reached(&mut taken, published, &mut consuming).await?;
    Ok(rounded(per_second(published, started.elapsed())))
}

/// Measures the times of single commits, and the row rate of each point.
async fn rows(tables: &BaselineTables, each: Duration) -> Result<(Vec<Duration>, Vec<(f64, String)>), Failure> {
    let first = tables.lane().await?;
    let fences = hold(tables, &first).await?;
    let mut commits = Vec::new();
    let started = Instant::now();
    while started.elapsed() < each {
        let one = Instant::now();
        first.checkpoint(&fences[..1], 1).await?;
        commits.push(one.elapsed());
    }
    let mut points = Vec::new();
    for (lanes, batch) in ROW_POINTS {
        let mut updating = JoinSet::new();
        let started = Instant::now();
        for part in fences.chunks(fences.len() / lanes) {
            let (lane, part) = (tables.lane().await?, part.to_vec());
            updating.spawn(async move {
                let mut changed = 0_u64;
                for batch in part.chunks(batch).cycle() {
                    if started.elapsed() >= each {
                        break;
                    }
                    lane.checkpoint(batch, 1).await?;
                    changed += batch.len() as u64;
                }
                Ok::<_, Failure>(changed)
            });
        }
        let mut changed = 0;
        while let Some(count) = updating.join_next().await {
            changed += count.map_err(|failure| Failure::failed(failure.to_string()))??;
        }
        points.push((rounded(per_second(changed, started.elapsed())), format!("{lanes} × batch {batch}")));
    }
    Ok((commits, points))
}

impl<'a> Path<'a> {
    pub(super) async fn open(bench: &Bench, tables: &'a BaselineTables) -> Result<Self, Failure> {
        let (lane, queue) = (tables.lane().await?, bench.baseline_queue().await?);
        let publisher = queue.publisher(1).await?;
        let [accepts, confirms, claims, ends] = Default::default();
        Ok(Self { tables, lane, queue, publisher, accepts, confirms, claims, ends })
    }

    /// Repeats the steps of one process, in order, for `each`. The order matters: a server process that was idle answers later.
    pub(super) async fn measure(&mut self, each: Duration) -> Result<(), Failure> {
        let started = Instant::now();
        while started.elapsed() < each {
            let accepting = Instant::now();
            let tasks = accept(self.tables, 1).await?;
            let publishing = Instant::now();
            let pids = tasks.iter().map(|message| message.task.pid()).collect();
            self.publisher.publish(tasks.into_iter().map(BaselineMessage::from)).await?;
            let claiming = Instant::now();
            let claimed = self.lane.turn(pids, &[], 1).await?;
            let ending = Instant::now();
            self.lane.turn(vec![], &claimed, 1).await?;
            self.ends.push(ending.elapsed());
            self.claims.push(ending - claiming);
            self.confirms.push(claiming - publishing);
            self.accepts.push(publishing - accepting);
        }
        Ok(())
    }

    /// Deletes the queue and returns the medians.
    pub(super) async fn close(self) -> Result<PathTimes, Failure> {
        self.queue.delete().await?;
        Ok(PathTimes {
            accept_ms: median_ms(self.accepts),
            confirm_ms: median_ms(self.confirms),
            claim_ms: median_ms(self.claims),
            end_ms: median_ms(self.ends),
        })
    }
}

/// Claims [`HELD_ROWS`] rows and returns their fences.
async fn hold(tables: &BaselineTables, lane: &BaselineLane) -> Result<Vec<Fence>, Failure> {
    let mut fences = Vec::new();
    while fences.len() < HELD_ROWS {
        let pids =
            accept(tables, PAGE.min(HELD_ROWS - fences.len())).await?.into_iter().map(|message| message.task.pid());
        let claimed = lane.turn(pids.collect(), &[], 1).await?;
        fences.extend(claimed.into_iter().map(|claimed| claimed.fence));
    }
    Ok(fences)
}

/// Commits new processes and returns their messages.
async fn accept(tables: &BaselineTables, count: usize) -> Result<Vec<TaskMessage>, Failure> {
    let processes: Vec<NewProcess> = (0..count).map(|_| super::noop("default", "bench")).collect();
    let accepted = tables.store().submit(&processes).await?;
    let messages = accepted.queued.into_values().flatten().map(|row| {
        let task = Task::Launch { pid: row.pid, spec: None, wait: false, announced_at: Some(row.announced_at) };
        TaskMessage { task, traceparent: row.traceparent }
    });
    Ok(messages.collect())
}

/// Measures the rate of processes with messages and rows together at each point. Processes are accepted and published in
/// pages, and claimed and acknowledged in batches. A batch is checkpointed after each advance except the last. It ends, with
/// the rows of its attempts, in the commit that claims the next batch.
async fn combined_points(
    bench: &Bench,
    tables: &BaselineTables,
    combined: Combined,
) -> Result<Vec<(f64, String)>, Failure> {
    let mut points = Vec::new();
    for (lanes, batch) in COMBINED_POINTS {
        let queue = bench.baseline_queue().await?;
        let rate = combined_rate(&queue, tables, lanes, batch, combined).await;
        queue.delete().await?;
        points.push((rate?, format!("{lanes} × batch {batch}")));
    }
    Ok(points)
}

async fn combined_rate(
    queue: &BaselineQueue,
    tables: &BaselineTables,
    lanes: usize,
    batch: usize,
    combined: Combined,
) -> Result<f64, Failure> {
    let Combined { count, steps } = combined;
    let publisher = queue.publisher(PAGE).await?;
    let (ended_tx, mut ended) = watch::channel(0);
    let mut working = JoinSet::new();
    for _ in 0..lanes {
        let (consumer, lane) =
            (queue.consumer(u16::try_from(2 * batch).unwrap_or(u16::MAX)).await?, tables.lane().await?);
        working.spawn(work(consumer, lane, batch, u64::from(steps), ended_tx.clone()));
    }
    let started = Instant::now();
    let launching = launch_all(tables, &publisher, count as usize);
    let finishing = all_reached(&mut ended, u64::from(count), &mut working);
    tokio::try_join!(launching, finishing)?;
    Ok(rounded(per_second(u64::from(count), started.elapsed())))
}

/// Waits until the count is reached, or until one of the counting tasks fails.
async fn all_reached(
    count: &mut watch::Receiver<u64>,
    goal: u64,
    counting: &mut JoinSet<Result<Infallible, Failure>>,
) -> Result<(), Failure> {
    tokio::select! {
        // The counting tasks keep the sender alive.
        _ = count.wait_for(|count| *count >= goal) => Ok(()),
        Some(failed) = counting.join_next() => match failed {
            Ok(Ok(never)) => match never {},
            Ok(Err(failure)) => Err(failure),
            Err(failure) => Err(Failure::failed(failure.to_string())),
        },
    }
}

/// Submits all processes; a page is committed while the previous one is being published.
async fn launch_all(tables: &BaselineTables, publisher: &BaselinePublisher, count: usize) -> Result<(), Failure> {
    let (pages_tx, mut pages) = mpsc::channel::<Vec<TaskMessage>>(1);
    let accepting = async {
        let mut rest = count;
        while rest > 0 {
            let page = accept(tables, rest.min(PAGE)).await?;
            rest -= page.len();
            let _ = pages_tx.send(page).await;
        }
        drop(pages_tx);
        Ok::<_, Failure>(())
    };
    let publishing = async {
        while let Some(page) = pages.recv().await {
            publisher.publish(page.into_iter().map(BaselineMessage::from)).await?;
        }
        Ok(())
    };
    tokio::try_join!(accepting, publishing).map(drop)
}

async fn work(
    mut consumer: BaselineConsumer,
    lane: BaselineLane,
    batch: usize,
    steps: u64,
    ended: watch::Sender<u64>,
) -> Result<Infallible, Failure> {
    let mut held: HashMap<Pid, Claimed> = HashMap::new();
    loop {
        // While it holds processes, it does not wait for more.
        let taken = if held.is_empty() {
            consumer.take(batch).await?
        } else {
            tokio::time::timeout(Duration::ZERO, consumer.take(batch)).await.unwrap_or(Ok(Vec::new()))?
        };
        let taken = taken.into_iter().map(BaselineDelivery::pid).collect::<Result<Vec<_>, _>>()?;
        let ends: Vec<Claimed> = held.drain().map(|(_, claimed)| claimed).collect();
        let claimed = lane.turn(taken, &ends, steps).await?;
        consumer.acknowledge().await?;
        let mut fences = claimed.iter().map(|claimed| claimed.fence).collect::<Vec<_>>();
        fences.sort_unstable_by_key(|fence| fence.pid);
        for advances in 1..steps {
            lane.checkpoint(&fences, advances).await?;
        }
        held = claimed.into_iter().map(|claimed| (claimed.fence.pid, claimed)).collect();
        ended.send_modify(|ended| *ended += ends.len() as u64);
    }
}
