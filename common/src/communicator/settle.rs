//! Settles deliveries for workers: acknowledges, dead-letters, gives back.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::delivery::{Settlement, Ticket, Verdict};
use super::envelope::Envelope;
use super::health::HealthState;
use super::ledger::{Ledger, Receipt};
use super::link::ANSWER_LIMIT;
use super::publish::{Job, bury};
use crate::border;

/// Pause before a dead letter is published again.
const BURY_PAUSE: Duration = Duration::from_secs(1);

/// Most settlements in progress. Each only writes a frame; more wait in the channel.
const N_UNDER_WAY_MAX: usize = 1024;

/// How long acknowledgements wait for others of the same channel. Each frame is an entry in the log of a quorum queue.
/// Without this pause a busy broker answers each small acknowledgement with as few deliveries, which are then claimed
/// and acknowledged in as small batches. Only the broker waits for acknowledgements, before it delivers more, so many
/// of them are sent at once.
const ACK_PAUSE: Duration = Duration::from_millis(10);

/// Settles until `stop`, and then settles what still waits.
pub(super) async fn run(
    mut settlements: mpsc::Receiver<Settlement>,
    publish_tx: mpsc::Sender<Job>,
    health: &HealthState,
    stop: CancellationToken,
) {
    let mut running: FuturesUnordered<BoxFuture<'_, Option<Arc<Ledger>>>> = FuturesUnordered::new();
    let mut gathered = Vec::new();
    let mut waiting = Waiting::default();
    loop {
        tokio::select! {
            n_gathered = settlements.recv_many(&mut gathered, N_UNDER_WAY_MAX), if running.len() < N_UNDER_WAY_MAX => {
                if n_gathered == 0 {
                    break;
                }
                waiting.settle(&mut gathered, &publish_tx, health, &running);
            },
            Some(unfinished) = running.next() => if let Some(ledger) = unfinished {
                waiting.add(&ledger);
            },
            () = until(waiting.due) => waiting.acknowledge(health, &running),
            () = stop.cancelled() => break,
        }
    }
    while let Ok(settlement) = settlements.try_recv() {
        gathered.push(settlement);
    }
    waiting.settle(&mut gathered, &publish_tx, health, &running);
    waiting.acknowledge(health, &running);
    let rest = async {
        while let Some(unfinished) = running.next().await {
            // A delivery that was just given back may have been the gap before it.
            if let Some(ledger) = unfinished {
                waiting.add(&ledger);
                sleep(ACK_PAUSE).await;
                waiting.acknowledge(health, &running);
            }
        }
    };
    // A message that is not settled is delivered again.
    let _ = timeout(ANSWER_LIMIT, rest).await;
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// The channels with completed deliveries that are not acknowledged.
#[derive(Default)]
struct Waiting {
    ledgers: Vec<Arc<Ledger>>,
    due: Option<Instant>,
}

impl Waiting {
    /// Adds a channel with a completed delivery.
    fn add(&mut self, ledger: &Arc<Ledger>) {
        if !self.ledgers.iter().any(|known| Arc::ptr_eq(known, ledger)) {
            self.ledgers.push(Arc::clone(ledger));
            self.due.get_or_insert_with(|| Instant::now() + ACK_PAUSE);
        }
    }

    /// Begins to settle all of these. Acknowledgements may wait for others.
    fn settle<'a>(
        &mut self,
        gathered: &mut Vec<Settlement>,
        publish_tx: &'a mpsc::Sender<Job>,
        health: &'a HealthState,
        running: &FuturesUnordered<BoxFuture<'a, Option<Arc<Ledger>>>>,
    ) {
        let mut are_many = false;
        for Settlement { ticket, envelope, origin, verdict } in gathered.drain(..) {
            let Ticket::Amqp(receipt) = ticket else { continue };
            match verdict {
                Verdict::Ack => {
                    are_many |= receipt.ledger().is_due();
                    self.add(receipt.ledger());
                }
                Verdict::Dead(reason) => running.push(Box::pin(async move {
                    dead_letter(receipt, envelope, &reason, &origin, publish_tx).await;
                    None
                })),
                Verdict::GiveBack => running.push(Box::pin(async move {
                    receipt.give_back().await;
                    None
                })),
            }
        }
        if are_many {
            self.acknowledge(health, running);
        }
    }

    fn acknowledge<'a>(
        &mut self,
        health: &'a HealthState,
        running: &FuturesUnordered<BoxFuture<'a, Option<Arc<Ledger>>>>,
    ) {
        self.due = None;
        for ledger in self.ledgers.drain(..) {
            running.push(Box::pin(async move {
                let (n_frames, is_any_left) = ledger.acknowledge_done().await;
                health.meter.ack_frames(n_frames);
                is_any_left.then_some(ledger)
            }));
        }
    }
}

/// Dead-letters a message: publishes it to `baton.dead`, then acknowledges it. While that fails, the message stays
/// unacknowledged and occupies part of the prefetch, so a flood of invalid messages stops. It is not requeued, since it
/// would be delivered again at once.
pub(super) async fn dead_letter(
    receipt: Receipt,
    envelope: Envelope,
    reason: &str,
    origin: &str,
    publish_tx: &mpsc::Sender<Job>,
) {
    let letter = envelope.buried(reason, origin);
    while receipt.is_usable() {
        match bury(publish_tx, letter.clone()).await {
            Ok(()) => {
                border!("letter-published");
                return receipt.ack().await;
            }
            Err(error) => tracing::warn!(origin, "dead letter not accepted, publishing it again: {error}"),
        }
        sleep(BURY_PAUSE).await;
    }
}
