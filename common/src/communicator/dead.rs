//! Dead letters: unusable messages stay in `baton.dead` until an operator inspects, replays or discards them.
//!
//! Letters are fetched one after the other over a separate connection, without acknowledging them. A letter that is
//! neither replayed nor discarded is requeued when the connection ends. A replayed letter is published first, and
//! acknowledged once the broker has confirmed it. A crash in between leaves a copy in both queues and loses none. A
//! second copy is harmless, since a process is claimed once.

mod body;
mod letter;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions};
use lapin::protocol::{AMQPError, AMQPErrorKind};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer, ErrorKind, Event};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::debug;

use super::envelope::{DEAD_QUEUE, TASK_EXCHANGE, short};
use super::health::{HealthState, Link};
use super::link::{ANSWER_LIMIT, Dial, close, reason};
use super::publish::{Target, job_on_lane, open_lane};
use super::topology::{Item, ensure};
use super::{CheckError, PublishError};

pub use self::body::Body;
pub use self::letter::Letter;

/// Letters per consumer, which are in memory at once: some 64 MiB of letters of the largest size.
///
/// RabbitMQ (measured with 3.10) requeues the deliveries of up to 32 consumers of a channel in order; the first get
/// counts as one consumer. So a thousand letters keep their order, and the pages of more letters may change their
/// order. With a get for each letter, only 32 letters would keep their order, and it takes ten times as long.
const PAGE: usize = 32;

/// A letter that was requeued this often is published again, so that its count restarts. By default RabbitMQ 4 drops a
/// message after 20 times; the difference is for interrupted inspections.
const N_RETURNS_MAX: u64 = 15;

/// Time without a delivery after which a get checks whether letters are left. Letters arrive within milliseconds,
/// except those that another program has fetched.
const SILENCE: Duration = Duration::from_millis(500);

/// Pause before the first look is repeated.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The letters that were in the queue at the first look, the oldest first.
///
/// Only [`DeadLetters::replay`] and [`DeadLetters::discard`] acknowledge letters. Letters that another program has
/// fetched are not seen.
pub struct DeadLetters {
    dial: Dial,
    connection: Connection,
    wait: Wait,
    channel: Channel,
    /// A separate channel for replays, since a refusal closes its channel.
    lane: Option<Channel>,
    page: Option<Page>,
    n_pages: usize,
    /// The letter of the first look, until it is returned.
    first: Option<Letter>,
    /// Number of letters at the first look, and of those still to come.
    n_total: usize,
    n_left: usize,
}

struct Page {
    consumer: Consumer,
    /// Number of letters of this page that are neither replayed nor discarded. A full page delivers no more.
    n_out: usize,
}

/// The outcome of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replayed {
    /// The letter is in this queue, and no longer a dead letter.
    To(String),
    /// The letter is still a dead letter.
    Kept(Kept),
}

/// Why a letter cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Kept {
    /// It names no queue: it was published to `baton.dead` by hand.
    #[error("it does not name the queue that it came from")]
    NoOrigin,
    /// The queue is absent and Baton does not declare it, or it rejects messages.
    #[error("queue {queue} does not accept it: {reason}")]
    NotTaken {
        /// The queue that it came from.
        queue: String,
        /// The broker's error.
        reason: String,
    },
}

/// Why dead letters cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No broker can be used.
    #[error(transparent)]
    Connect(#[from] CheckError),
    /// The broker refuses access. Correct the user's permissions or the queue.
    #[error("the broker refused access: {0}")]
    Refused(String),
    /// The library cannot read a letter, and has closed the connection. All letters are still in the queue. Remove the
    /// unreadable letter with the management UI.
    #[error("a letter is unreadable: a property is not UTF-8")]
    Unreadable,
    /// The connection was lost, or an answer did not arrive. Letters are still in the queue, except those already
    /// reported as replayed or discarded; the letter of the current replay may be in both queues. Try again.
    #[error("connection to the broker lost: {0}")]
    Lost(String),
}

impl DeadLetters {
    /// Connects to the first usable URL, and takes a first look.
    ///
    /// # Errors
    /// [`Error::Connect`] if no URL is usable, [`Error::Refused`] if `baton.dead` cannot be declared, and those of
    /// [`DeadLetters::next`].
    pub async fn open(urls: Vec<String>) -> Result<Self, Error> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            match Self::look(urls.clone()).await {
                // The broker closes the connection if the queue has no leader for a moment.
                Err(Error::Lost(reason)) if Instant::now() < deadline => {
                    debug!(reason, "the first look at the dead letters is repeated");
                    sleep(LOOK_AGAIN).await;
                }
                looked => return looked,
            }
        }
    }

    async fn look(urls: Vec<String>) -> Result<Self, Error> {
        let dial = Dial::new(urls, "baton dead".to_owned(), None, None, Arc::new(HealthState::new()));
        let connection = dial.connect(Link::Publish).await?;
        dial.health.up(Link::Publish);
        ensure(&connection, &dial.health, &[Item::DeadQueue]).await.map_err(Error::Refused)?;
        let mut wait = Wait { events: connection.events_listener().boxed() };
        let channel = wait.answer(connection.create_channel()).await?;
        let prefetch = u16::try_from(PAGE).expect("a page is small");
        wait.answer(channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let mut letters = DeadLetters {
            dial,
            connection,
            wait,
            channel,
            lane: None,
            page: None,
            n_pages: 0,
            first: None,
            n_total: 0,
            n_left: 0,
        };
        if let Some((first, n_more)) = letters.get().await? {
            letters.first = Some(first);
            letters.n_left = n_more;
            letters.n_total = n_more + 1;
        }
        Ok(letters)
    }

    /// Number of letters at the first look.
    pub fn n_total(&self) -> usize {
        self.n_total
    }

    /// Returns the next letter; `None` after the last one that was there at the first look.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Refused`], [`Error::Unreadable`].
    pub async fn next(&mut self) -> Result<Option<Letter>, Error> {
        loop {
            let Some(letter) = self.take().await? else { return Ok(None) };
            if letter.n_returns() < N_RETURNS_MAX || !self.renew(&letter).await? {
                return Ok(Some(letter));
            }
            self.discard(letter).await?;
            // The copy arrives again, from the end of the queue.
            self.n_left += 1;
        }
    }

    async fn take(&mut self) -> Result<Option<Letter>, Error> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        if self.n_left == 0 {
            return Ok(None);
        }
        let page = match &mut self.page {
            Some(page) if page.n_out < PAGE => page,
            Some(_) | None => self.turn_page().await?,
        };
        match timeout(SILENCE, page.consumer.next()).await {
            Ok(Some(Ok(delivery))) => {
                page.n_out += 1;
                self.n_left -= 1;
                Ok(Some(Letter::read(delivery, Some(self.n_pages))))
            }
            Ok(Some(Err(error))) => Err(failure(&error)),
            Ok(None) => Err(Error::Lost("queue baton.dead was deleted".to_owned())),
            Err(_) => {
                let letter = self.get().await?.map(|(letter, _)| letter);
                self.n_left = if letter.is_some() { self.n_left - 1 } else { 0 };
                Ok(letter)
            }
        }
    }

    /// Publishes a letter to the queue that it came from, then acknowledges it. Declares an absent task queue.
    ///
    /// # Errors
    /// [`Error::Lost`]: the letter may be in both queues; another replay is harmless.
    pub async fn replay(&mut self, letter: Letter) -> Result<Replayed, Error> {
        let Some(queue) = letter.origin.clone().filter(|queue| queue != DEAD_QUEUE) else {
            return Ok(Replayed::Kept(Kept::NoOrigin));
        };
        let task_queue = queue.strip_prefix(TASK_EXCHANGE).and_then(|rest| rest.strip_prefix('.'));
        let target = task_queue.map_or_else(|| Target::Queue(queue.clone()), |name| Target::Task(name.to_owned()));
        let messages = std::slice::from_ref(&letter.envelope);
        let deadline = Instant::now() + ANSWER_LIMIT;
        let lane = self.lane.take();
        let publish = job_on_lane(&self.dial, &self.connection, lane.as_ref(), deadline, &target, messages);
        match timeout_at(deadline, publish).await {
            Ok(Ok(lane)) => self.lane = Some(lane),
            Ok(Err(PublishError::Unroutable { reason, .. })) => {
                return Ok(Replayed::Kept(Kept::NotTaken { queue, reason }));
            }
            // The broker has closed only the lane.
            Ok(Err(PublishError::Unknown(reason))) if self.connection.status().connected() => {
                return Ok(Replayed::Kept(Kept::NotTaken { queue, reason }));
            }
            Ok(Err(error)) => return Err(Error::Lost(error.to_string())),
            Err(_) => {
                return Err(Error::Lost(format!("no confirm within {} s", ANSWER_LIMIT.as_secs())));
            }
        }
        self.discard(letter).await?;
        Ok(Replayed::To(queue))
    }

    /// Removes a letter.
    ///
    /// # Errors
    /// [`Error::Lost`]: the letter is still in the queue.
    pub async fn discard(&mut self, letter: Letter) -> Result<(), Error> {
        let was_there = self.wait.answer(letter.acker.ack(BasicAckOptions::default())).await?;
        if !was_there {
            return Err(Error::Lost("the channel has ended".to_owned()));
        }
        if let Some(page) = self.page.as_mut().filter(|_| letter.page_idx == Some(self.n_pages)) {
            page.n_out -= 1;
        }
        Ok(())
    }

    /// Requeues the remaining letters, and waits until the broker has processed all acknowledgements.
    ///
    /// # Errors
    /// [`Error::Lost`]: the letters that were replayed or discarded last may still be in the queue.
    pub async fn close(mut self) -> Result<(), Error> {
        drop(self.page);
        self.wait.answer(self.channel.close(200, "OK".into())).await?;
        close(&self.connection).await;
        Ok(())
    }

    /// Publishes a copy to `baton.dead`. Returns false if the broker rejects it.
    async fn renew(&mut self, letter: &Letter) -> Result<bool, Error> {
        let lane = match self.lane.take().filter(|lane| lane.status().connected()) {
            Some(lane) => lane,
            None => open_lane(&self.dial, &self.connection).await.map_err(|down| Error::Lost(down.0))?,
        };
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let publish = lane.basic_publish("".into(), DEAD_QUEUE.into(), options, letter.bytes(), letter.fresh());
        match self.wait.answer(async { publish.await?.await }).await {
            Ok(confirmation) => {
                let is_there = confirmation.is_ack() && confirmation.take_message().is_none();
                self.lane = Some(lane);
                Ok(is_there)
            }
            Err(Error::Refused(_)) => Ok(false),
            Err(error @ (Error::Connect(_) | Error::Lost(_) | Error::Unreadable)) => Err(error),
        }
    }

    /// Gets the letter at the head, if any, and the number of further letters. The broker reports both in one answer.
    async fn get(&mut self) -> Result<Option<(Letter, usize)>, Error> {
        let get = self.channel.basic_get(DEAD_QUEUE.into(), BasicGetOptions::default());
        let message = self.wait.answer(get).await?;
        Ok(message.map(|message| {
            let delivery: Delivery = message.delivery;
            (Letter::read(delivery, None), message.message_count as usize)
        }))
    }

    /// Starts a new consumer. The previous one keeps its deliveries.
    async fn turn_page(&mut self) -> Result<&mut Page, Error> {
        self.n_pages += 1;
        // The tags sort like the pages, since letters are requeued in the order of the tags.
        let tag = short(&format!("baton dead {:08}", self.n_pages));
        let consume =
            self.channel.basic_consume(DEAD_QUEUE.into(), tag, BasicConsumeOptions::default(), FieldTable::default());
        let consumer = self.wait.answer(consume).await?;
        Ok(self.page.insert(Page { consumer, n_out: 0 }))
    }
}

/// Waits for answers, or for the end of the connection: the library never completes an answer that arrived in part.
struct Wait {
    events: BoxStream<'static, Event>,
}

impl Wait {
    async fn answer<T>(&mut self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
        let events = &mut self.events;
        let end = async {
            while let Some(event) = events.next().await {
                // A refusal closes a channel, and is the answer to the request on that channel.
                if let Event::Error(error) = event
                    && let error @ (Error::Lost(_) | Error::Unreadable) = failure(&error)
                {
                    return error;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            answer = timeout(ANSWER_LIMIT, answer) => match answer {
                Ok(answer) => answer.map_err(|error| failure(&error)),
                Err(_) => Err(Error::Lost(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))),
            },
            error = end => Err(error),
        }
    }
}

/// Classifies an error: one that closes only a channel is a refusal, any other concerns the connection.
fn failure(error: &lapin::Error) -> Error {
    let text = reason(error);
    let is_refusal = |error: &AMQPError| matches!(error.kind(), AMQPErrorKind::Soft(_));
    if matches!(error.kind(), ErrorKind::ProtocolError(error) if is_refusal(error)) {
        Error::Refused(text)
    } else if matches!(error.kind(), ErrorKind::ParsingError(_)) {
        Error::Unreadable
    } else {
        Error::Lost(text)
    }
}

/// Bytes in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("0x");
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
