//! Opens connections and says in one line why one could not be opened.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind, Event};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::CheckError;
use super::health::{HealthState, Link};
use super::{guard, ownership};

/// Longest wait for any one answer of the broker. A loaded quorum queue answers within a second or two.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Asked of the broker when the URL says nothing: a dead peer is found within twice that, and a stall of a few seconds
/// ends no connection.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Pause before the first new attempt, and the longest. A broker that restarts takes seconds; a fleet of hundreds that
/// asks every 5 s is no load.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How long one host of several may keep the next one waiting. A healthy one answers within some milliseconds; one that is
/// only slow may still come first.
const HEAD_START: Duration = Duration::from_secs(2);

/// How often a connection is asked whether it still lives, besides what it says itself.
const WATCHDOG_INTERVAL: Duration = Duration::from_secs(1);

/// Why a connection ended over which something came that cannot be read.
pub(super) const UNREADABLE: &str = "the broker sent what cannot be read";

/// What the keepers of the three connections have in common.
pub(super) struct Dial {
    pub(super) urls: Vec<String>,
    pub(super) name: String,
    pub(super) heartbeat: Option<Duration>,
    /// The database to which the virtual host has to belong.
    pub(super) database: Option<Uuid>,
    pub(super) health: Arc<HealthState>,
    pub(super) close: CancellationToken,
    /// For each connection: how many URLs it has been at, so that the next one has its turn.
    turns: [AtomicUsize; 3],
}

/// Grows from attempt to attempt, with jitter so that a fleet does not come back in one moment.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff { next: BACKOFF_MIN }
    }

    /// The next pause: between half of it and all of it.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        // The random end of an id serves as the dice.
        let dice = u32::try_from(uuid::Uuid::now_v7().as_u128() & 0xffff).expect("16 bits fit");
        pause / 2 + pause / 2 * dice / 0x1_0000
    }

    /// After a connection that has lasted, the next one is tried quickly; one that ends at once is no success.
    pub(super) fn lasted(&mut self, since: Instant) {
        if since.elapsed() > BACKOFF_MAX {
            self.next = BACKOFF_MIN;
        }
    }
}

impl Dial {
    pub(super) fn new(
        urls: Vec<String>,
        name: String,
        heartbeat: Option<Duration>,
        database: Option<Uuid>,
        health: Arc<HealthState>,
    ) -> Self {
        let close = CancellationToken::new();
        Self { urls, name, heartbeat, database, health, close, turns: Default::default() }
    }

    /// Why a connection has ended; with the host, if there are several.
    pub(super) fn ended(&self, link: Link, error: String) -> String {
        let turn = self.turns[link as usize].load(Ordering::Relaxed);
        match self.urls.get(turn.saturating_sub(1) % self.urls.len().max(1)).map(|url| parse(url)) {
            Some(Ok(uri)) if self.has_others() => format!("{}: {error}", masked(&uri)),
            Some(Ok(_) | Err(_)) | None => error,
        }
    }

    /// Whether another host may serve what this one does not.
    pub(super) fn has_others(&self) -> bool {
        self.urls.len() > 1
    }

    /// One attempt at every URL; the first that can be used is taken, and the next call begins with the one after it: a
    /// host that accepts connections and then is of no use keeps nobody for long.
    ///
    /// # Errors
    /// What each of them said.
    pub(super) async fn connect(&self, link: Link) -> Result<Connection, CheckError> {
        let name = format!("{} {}", self.name, link.word());
        let turn = &self.turns[link as usize];
        let first = turn.load(Ordering::Relaxed);
        let mut waiting = (first..first + self.urls.len()).map(|idx| (idx, &self.urls[idx % self.urls.len()]));
        let mut attempts = FuturesUnordered::new();
        let mut errors = Vec::new();
        loop {
            let next = waiting.next();
            let is_last = next.is_none();
            if let Some((idx, url)) = next {
                let open = open_for(url, &name, self.heartbeat, self.database);
                attempts.push(async move { (idx, open.await) });
            }
            let patience = async {
                if is_last {
                    std::future::pending::<()>().await;
                }
                sleep(HEAD_START).await;
            };
            tokio::select! {
                attempt = attempts.next() => match attempt {
                    Some((idx, Ok(connection))) => {
                        turn.store(idx + 1, Ordering::Relaxed);
                        return Ok(connection);
                    }
                    Some((_, Err(error))) => errors.push(error),
                    None => return Err(CheckError::of_all(errors)),
                },
                () = patience => {}
            }
        }
    }

    /// Waits until the connection is gone, and says why; writes down meanwhile whether the broker blocks it.
    pub(super) async fn watch(&self, link: Link, connection: &Connection, events: impl Stream<Item = Event>) -> String {
        let mut events = std::pin::pin!(events);
        let mut watchdog = tokio::time::interval(WATCHDOG_INTERVAL);
        loop {
            tokio::select! {
                biased;
                event = events.next() => match event {
                    Some(Event::ConnectionBlocked(reason)) => self.health.block(link, Some(reason)),
                    Some(Event::ConnectionUnblocked) => self.health.block(link, None),
                    Some(Event::Error(error)) if is_unreadable(&error) => return UNREADABLE.to_owned(),
                    Some(Event::Error(error)) if !connection.status().connected() => return reason(&error),
                    Some(_) => {}
                    None => return "connection ended".to_owned(),
                },
                _ = watchdog.tick() => if !connection.status().connected() {
                    return "connection lost".to_owned();
                },
            }
        }
    }
}

/// One attempt at one URL whose virtual host has to belong to a database.
pub(super) async fn open_for(
    url: &str,
    name: &str,
    heartbeat: Option<Duration>,
    database: Option<Uuid>,
) -> Result<Connection, CheckError> {
    let connection = open(url, name, heartbeat).await?;
    if let Some(database) = database {
        ownership::take(&connection, url, database).await?;
    }
    Ok(connection)
}

/// One attempt at one URL.
pub(super) async fn open(url: &str, name: &str, heartbeat: Option<Duration>) -> Result<Connection, CheckError> {
    install_tls_provider();
    let mut uri = parse(url)?;
    if uri.query.heartbeat.is_none() {
        let seconds = heartbeat.unwrap_or(HEARTBEAT).as_secs().max(1);
        uri.query.heartbeat = Some(u16::try_from(seconds).unwrap_or(u16::MAX));
    }
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let masked = masked(&uri);
    match timeout(ANSWER_LIMIT, guard::connect(uri.clone(), properties)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(classify(&uri, masked, &error)),
        Err(_) => Err(CheckError::Unreachable {
            url: masked,
            reason: format!("no answer within {} s", ANSWER_LIMIT.as_secs()),
        }),
    }
}

/// Closes without waiting for a broker that does not answer.
pub(super) async fn close(connection: &Connection) {
    let _ = timeout(Duration::from_secs(2), connection.close(200, "OK".into())).await;
}

/// Reads a URL. An empty path means the default virtual host, as people expect who end a URL with a slash.
pub(super) fn parse(url: &str) -> Result<AMQPUri, CheckError> {
    let mut uri: AMQPUri = url.parse().map_err(|reason: String| {
        let hidden = masked_text(url);
        CheckError::BadUrl { reason: reason.replace(url, &hidden), url: hidden }
    })?;
    if uri.vhost.is_empty() {
        uri.vhost = "/".to_owned();
    }
    Ok(uri)
}

/// The URL without its password.
pub(super) fn masked(uri: &AMQPUri) -> String {
    let scheme = match uri.scheme {
        AMQPScheme::AMQP => "amqp",
        AMQPScheme::AMQPS => "amqps",
    };
    let AMQPUri { authority, vhost, .. } = uri;
    let vhost = if vhost == "/" { "%2f" } else { vhost };
    format!("{scheme}://{}@{}:{}/{vhost}", authority.userinfo.username, authority.host, authority.port)
}

/// A text that is no URL, without what may be a password.
fn masked_text(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}***{}", &text[..scheme + 3], &text[at..]),
        (None, Some(at)) => format!("***{}", &text[at..]),
        (_, None) | (Some(_), Some(_)) => text.to_owned(),
    }
}

/// Something came that the library cannot read, and it has ended the connection over it.
fn is_unreadable(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ParsingError(_))
}

/// What an error says, in one line.
pub(super) fn reason(error: &lapin::Error) -> String {
    if let ErrorKind::ProtocolError(error) = error.kind() {
        error.get_message().to_string()
    } else if let ErrorKind::IOError(error) = error.kind() {
        error.to_string()
    } else {
        error.to_string()
    }
}

/// The broker has an entity of that name with other properties.
pub(super) fn is_other_kind(error: &lapin::Error) -> bool {
    is_soft(error, AMQPSoftError::PRECONDITIONFAILED)
}

/// There is no entity of that name.
pub(super) fn is_absent(error: &lapin::Error) -> bool {
    is_soft(error, AMQPSoftError::NOTFOUND)
}

fn is_soft(error: &lapin::Error, soft: AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if *error.kind() == AMQPErrorKind::Soft(soft))
}

fn classify(uri: &AMQPUri, url: String, error: &lapin::Error) -> CheckError {
    let text = reason(error);
    let ErrorKind::ProtocolError(protocol) = error.kind() else {
        return if error.is_io_error() {
            CheckError::Unreachable { url, reason: text }
        } else {
            CheckError::Refused { url, reason: text }
        };
    };
    match protocol.get_id() {
        403 => CheckError::Credentials { url, user: uri.authority.userinfo.username.clone() },
        402 | 530 => CheckError::NoVhost { url, vhost: uri.vhost.clone(), reason: text },
        _ => CheckError::Refused { url, reason: text },
    }
}

/// Several TLS providers may be compiled in, and rustls takes none by itself then.
fn install_tls_provider() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // Another part of the program may have been first; then its choice stands.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_about_a_url_contains_its_password() {
        let uri = parse("amqp://ann:s3cret@host:5671/vh").unwrap();
        assert_eq!(masked(&uri), "amqp://ann@host:5671/vh");
        for url in ["amqp:ann:s3cret@host", "http://ann:s3cret@host", "amqp://ann:s3cret@host:port/", "ann:s3cret@host"]
        {
            let text = parse(url).unwrap_err().to_string();
            assert!(!text.contains("s3cret"), "{text}");
            assert!(text.contains("host"), "{text}");
        }
    }

    #[test]
    fn an_empty_path_is_the_default_virtual_host() {
        for url in ["amqp://h", "amqp://h/", "amqp://h/%2f"] {
            assert_eq!(parse(url).unwrap().vhost, "/", "{url}");
        }
    }

    #[test]
    fn pauses_grow_to_the_limit_and_have_jitter() {
        let mut backoff = Backoff::new();
        let pauses: Vec<Duration> = (0..10).map(|_| backoff.pause()).collect();
        assert!(pauses[0] <= BACKOFF_MIN && pauses[0] >= BACKOFF_MIN / 2);
        assert!(pauses[9] <= BACKOFF_MAX && pauses[9] >= BACKOFF_MAX / 2);
    }
}
