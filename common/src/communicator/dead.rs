//! Dead letters: what nobody could use lies in `baton.dead` until a person looks at it, sends it again or throws it away.
//!
//! Looking takes letters one after the other without acknowledging them, over a connection of its own. Whatever is
//! neither replayed nor discarded goes back to the queue when that ends, however it ends. A replayed letter
//! is published first and acknowledged once the broker has confirmed it, so that a crash in between leaves a copy in
//! both queues and loses none; a copy more is harmless, since a process is claimed once.

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

/// Letters that one consumer brings, which are in memory at once: some 64 MiB if each is as large as a message may be.
///
/// RabbitMQ (measured with 3.10) gives back in order what was out at up to 32 consumers of a channel, of which the first
/// get is one; so a thousand letters keep their order, and of more the pages may change places. With a get for each
/// letter that would end after 32 letters, and it takes ten times as long.
const PAGE: usize = 32;

/// A letter that was given back so often is published anew, so that its count begins again. RabbitMQ 4 drops a message
/// after 20 times where no policy says otherwise; the rest is for looks that were interrupted.
const N_RETURNS_MAX: u64 = 15;

/// Silence after which it is asked whether there is anything left. Letters follow each other within milliseconds; only
/// those that someone else has in hand do not come.
const SILENCE: Duration = Duration::from_millis(500);

/// Pause before the first look is taken again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The letters that were there at the first look, one after the other, the oldest first.
///
/// Nothing is acknowledged but by [`DeadLetters::replay`] and [`DeadLetters::discard`]. Letters that another program has
/// in hand at that time are not seen.
pub struct DeadLetters {
    dial: Dial,
    connection: Connection,
    wait: Wait,
    channel: Channel,
    /// A channel for what is replayed, so that a refusal ends no other than that.
    lane: Option<Channel>,
    page: Option<Page>,
    n_pages: usize,
    /// The one that the first look brought, until it is asked for.
    first: Option<Letter>,
    /// Letters that were there at the first look, and those of them that are still to come.
    n_total: usize,
    n_left: usize,
}

struct Page {
    consumer: Consumer,
    /// Letters of this page that are neither replayed nor discarded; when it is full of them, nothing more comes.
    n_out: usize,
}

/// What became of a letter that was to be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replayed {
    /// The broker has it in this queue, and it is no dead letter any more.
    To(String),
    /// It is where it was.
    Kept(Kept),
}

/// Why a letter cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Kept {
    /// Somebody has published it to `baton.dead` by hand.
    #[error("it does not say which queue it came from")]
    NoOrigin,
    /// The queue has gone and is none that Baton declares, or it refuses messages.
    #[error("queue {queue} does not take it: {reason}")]
    NotTaken {
        /// The queue that it came from.
        queue: String,
        /// What the broker said.
        reason: String,
    },
}

/// Why dead letters cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No broker can be used.
    #[error(transparent)]
    Connect(#[from] CheckError),
    /// It does not permit this; correct the user's rights or the queue.
    #[error("the broker refuses it: {0}")]
    Refused(String),
    /// What came is no AMQP that this program can read, and the library ends the connection for it. All letters are
    /// where they were; the management UI can take the one away that is to blame.
    #[error("a letter's properties cannot be read; its texts are not UTF-8")]
    Unreadable,
    /// The connection has ended, or an answer did not come. All letters are where they were, but for those that were
    /// reported before; the one that was being replayed may be in both queues. Do it again.
    #[error("the broker has gone: {0}")]
    Lost(String),
}

impl DeadLetters {
    /// Connects to the first of these URLs that can be used, and has a first look.
    ///
    /// # Errors
    /// [`Error::Connect`] when there is none, [`Error::Refused`] when there can be no `baton.dead`, and those of
    /// [`DeadLetters::next`].
    pub async fn open(urls: Vec<String>) -> Result<Self, Error> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            match Self::look(urls.clone()).await {
                // A queue that has no leader for a moment makes the broker end the connection.
                Err(Error::Lost(reason)) if Instant::now() < deadline => {
                    debug!(reason, "the first look at the dead letters is taken again");
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

    /// How many letters there were at the first look.
    pub fn n_total(&self) -> usize {
        self.n_total
    }

    /// The next letter, or none when all have been seen that were there at the first look and are still to be had.
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
            // It comes again, from the end of the queue.
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

    /// Publishes a letter to the queue that it came from, and then acknowledges it. A task queue that has gone is
    /// declared.
    ///
    /// # Errors
    /// [`Error::Lost`]: it may be in both queues; replaying it again is harmless.
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
            // The broker has ended the lane, and nothing else.
            Ok(Err(PublishError::Unknown(reason))) if self.connection.status().connected() => {
                return Ok(Replayed::Kept(Kept::NotTaken { queue, reason }));
            }
            Ok(Err(error)) => return Err(Error::Lost(error.to_string())),
            Err(_) => {
                return Err(Error::Lost(format!("it did not confirm a message within {} s", ANSWER_LIMIT.as_secs())));
            }
        }
        self.discard(letter).await?;
        Ok(Replayed::To(queue))
    }

    /// Throws a letter away for good.
    ///
    /// # Errors
    /// [`Error::Lost`]: it is still there.
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

    /// Gives back what is in hand, and waits until the broker has dealt with everything that was acknowledged.
    ///
    /// # Errors
    /// [`Error::Lost`]: what was replayed or discarded last may still be there.
    pub async fn close(mut self) -> Result<(), Error> {
        drop(self.page);
        self.wait.answer(self.channel.close(200, "OK".into())).await?;
        close(&self.connection).await;
        Ok(())
    }

    /// Publishes a copy to `baton.dead`; false if the broker does not take it.
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

    /// One letter at the head, if there is any, and how many more there are. The broker says both at the same time, and
    /// exactly.
    async fn get(&mut self) -> Result<Option<(Letter, usize)>, Error> {
        let get = self.channel.basic_get(DEAD_QUEUE.into(), BasicGetOptions::default());
        let message = self.wait.answer(get).await?;
        Ok(message.map(|message| {
            let delivery: Delivery = message.delivery;
            (Letter::read(delivery, None), message.message_count as usize)
        }))
    }

    /// Goes on with a new consumer; the former one keeps what it has brought.
    async fn turn_page(&mut self) -> Result<&mut Page, Error> {
        self.n_pages += 1;
        // The tags sort as the pages do, since that is the order in which letters are given back.
        let tag = short(&format!("baton dead {:08}", self.n_pages));
        let consume =
            self.channel.basic_consume(DEAD_QUEUE.into(), tag, BasicConsumeOptions::default(), FieldTable::default());
        let consumer = self.wait.answer(consume).await?;
        Ok(self.page.insert(Page { consumer, n_out: 0 }))
    }
}

/// Waits for answers, and for the end of the connection: an answer that came in half is never given.
struct Wait {
    events: BoxStream<'static, Event>,
}

impl Wait {
    async fn answer<T>(&mut self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
        let events = &mut self.events;
        let end = async {
            while let Some(event) = events.next().await {
                // A refusal ends a channel, and is the answer of whoever asked on that.
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

/// What ends a channel alone is a refusal; everything else has to do with the connection.
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
