//! Settles deliveries on behalf of workers: acknowledges, puts aside, gives back.

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use lapin::Acker;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::mpsc;
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::delivery::{Settlement, Ticket, Verdict};
use super::envelope::Envelope;
use super::link::ANSWER_LIMIT;
use super::publish::{Job, bury};

/// Pause before a dead letter is tried again.
const BURY_PAUSE: Duration = Duration::from_secs(1);

/// Settlements under way at once. Each only writes a frame; more wait in the channel.
const N_UNDER_WAY_MAX: usize = 1024;

/// Settles until told to stop, and then what had been asked before.
pub(super) async fn run(
    mut settlements: mpsc::Receiver<Settlement>,
    publish_tx: mpsc::Sender<Job>,
    stop: CancellationToken,
) {
    let mut running: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
    loop {
        tokio::select! {
            settlement = settlements.recv(), if running.len() < N_UNDER_WAY_MAX => match settlement {
                Some(settlement) => running.push(Box::pin(settle(settlement, &publish_tx))),
                None => break,
            },
            Some(()) = running.next() => {}
            () = stop.cancelled() => break,
        }
    }
    while let Ok(settlement) = settlements.try_recv() {
        running.push(Box::pin(settle(settlement, &publish_tx)));
    }
    // What cannot be settled now comes again to another worker.
    let _ = timeout(ANSWER_LIMIT, async { while running.next().await.is_some() {} }).await;
}

async fn settle(settlement: Settlement, publish_tx: &mpsc::Sender<Job>) {
    let Settlement { ticket, envelope, origin, verdict } = settlement;
    let Ticket::Amqp(acker) = ticket else { return };
    match verdict {
        Verdict::Ack => ack(&acker).await,
        Verdict::Dead(reason) => put_aside(&acker, envelope, &reason, &origin, publish_tx).await,
        Verdict::GiveBack => give_back(&acker).await,
    }
}

/// Publishes to `baton.dead`, then acknowledges. While that fails the message stays unacknowledged and takes up its
/// part of the prefetch, so a flood of garbage stops coming in; it is not requeued, as it would be back at once.
pub(super) async fn put_aside(
    acker: &Acker,
    envelope: Envelope,
    reason: &str,
    origin: &str,
    publish_tx: &mpsc::Sender<Job>,
) {
    let letter = envelope.buried(reason, origin);
    while acker.usable() {
        match bury(publish_tx, letter.clone()).await {
            Ok(()) => return ack(acker).await,
            Err(error) => tracing::warn!(origin, "a dead letter was not accepted, it is tried again: {error}"),
        }
        sleep(BURY_PAUSE).await;
    }
}

/// A delivery of a channel that has ended is someone else's by now, so a failure here means nothing.
async fn ack(acker: &Acker) {
    let _ = timeout(ANSWER_LIMIT, acker.ack(BasicAckOptions::default())).await;
}

pub(super) async fn give_back(acker: &Acker) {
    let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
    let _ = timeout(ANSWER_LIMIT, acker.nack(options)).await;
}
