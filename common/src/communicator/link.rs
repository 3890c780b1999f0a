//! Opens connections, and describes failures in one line.

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

/// Time limit for each answer of the broker. A loaded quorum queue answers within a second or two.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Default heartbeat. A dead peer is detected within twice this time, and a stall of a few seconds closes no
/// connection.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// First and longest pause before the next try to connect. A broker restarts within seconds, and a fleet of hundreds
/// that tries every 5 s is no load.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How long one of several nodes is tried before the next is tried as well. A healthy node answers within milliseconds;
/// a slow one may still be the first to answer.
const HEAD_START: Duration = Duration::from_secs(2);

/// How often the status of a connection is checked, in addition to its events.
const WATCHDOG_INTERVAL: Duration = Duration::from_secs(1);

/// The reason of a connection that ended because of an unreadable message.
pub(super) const UNREADABLE: &str = "the broker sent an unreadable message";

/// The common data of the three connections.
pub(super) struct Dial {
    pub(super) urls: Vec<String>,
    pub(super) name: String,
    pub(super) heartbeat: Option<Duration>,
    /// The database to which the virtual host must belong.
    pub(super) database: Option<Uuid>,
    pub(super) health: Arc<HealthState>,
    pub(super) close: CancellationToken,
    /// For each connection, the index of the URL to try next.
    turns: [AtomicUsize; 3],
}

/// The growing pause between tries to connect, with jitter, so that a fleet does not reconnect in the same moment.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff { next: BACKOFF_MIN }
    }

    /// The next pause, of which up to half is random.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        // The end of a UUIDv7 is random.
        let random = u32::try_from(uuid::Uuid::now_v7().as_u128() & 0xffff).expect("16 bits fit");
        pause / 2 + pause / 2 * random / 0x1_0000
    }

    /// Resets the pause after a connection that has lasted. A connection that ends at once is not a success.
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

    /// The reason why a connection has ended, with the node if there are several.
    pub(super) fn ended(&self, link: Link, error: String) -> String {
        let turn = self.turns[link as usize].load(Ordering::Relaxed);
        match self.urls.get(turn.saturating_sub(1) % self.urls.len().max(1)).map(|url| parse(url)) {
            Some(Ok(uri)) if self.has_others() => format!("{}: {error}", masked(&uri)),
            Some(Ok(_) | Err(_)) | None => error,
        }
    }

    /// Whether there are other nodes.
    pub(super) fn has_others(&self) -> bool {
        self.urls.len() > 1
    }

    /// Tries each URL once, and returns the first connection. The next call starts with the next URL, so that a node
    /// that accepts connections but does not work is left soon.
    ///
    /// # Errors
    /// The errors of all URLs.
    pub(super) async fn connect(&self, link: Link) -> Result<Connection, CheckError> {
        let name = format!("{} {}", self.name, link.word());
        let turn = &self.turns[link as usize];
        let first = turn.load(Ordering::Relaxed);
        let mut waiting = (first..first + self.urls.len()).map(|idx| (idx, &self.urls[idx % self.urls.len()]));
        let mut openings = FuturesUnordered::new();
        let mut errors = Vec::new();
        loop {
            let next = waiting.next();
            let is_last = next.is_none();
            if let Some((idx, url)) = next {
                let open = open_for(url, &name, self.heartbeat, self.database);
                openings.push(async move { (idx, open.await) });
            }
            let patience = async {
                if is_last {
                    std::future::pending::<()>().await;
                }
                sleep(HEAD_START).await;
            };
            tokio::select! {
                opened = openings.next() => match opened {
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

    /// Waits until the connection is lost, and returns the reason. Meanwhile records in the health whether the broker
    /// blocks it.
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

/// Tries one URL once. Its virtual host must belong to the database.
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

/// Tries one URL once.
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

/// Closes a connection. Does not wait long for the answer.
pub(super) async fn close(connection: &Connection) {
    let _ = timeout(Duration::from_secs(2), connection.close(200, "OK".into())).await;
}

/// Parses a URL. An empty path is the default virtual host, as users expect of a URL that ends with a slash.
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

/// Masks what may be a password in a text that is not a URL.
fn masked_text(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}***{}", &text[..scheme + 3], &text[at..]),
        (None, Some(at)) => format!("***{}", &text[at..]),
        (_, None) | (Some(_), Some(_)) => text.to_owned(),
    }
}

/// Whether the library has ended the connection because of an unreadable message.
fn is_unreadable(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ParsingError(_))
}

/// The text of an error, in one line.
pub(super) fn reason(error: &lapin::Error) -> String {
    if let ErrorKind::ProtocolError(error) = error.kind() {
        error.get_message().to_string()
    } else if let ErrorKind::IOError(error) = error.kind() {
        error.to_string()
    } else {
        error.to_string()
    }
}

/// Whether the broker has an entity of that name with other properties.
pub(super) fn is_other_kind(error: &lapin::Error) -> bool {
    is_soft(error, AMQPSoftError::PRECONDITIONFAILED)
}

/// Whether there is no entity of that name.
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

/// Selects the TLS provider: if several are compiled in, rustls does not choose one.
fn install_tls_provider() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // If another part of the program was first, its choice is kept.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_about_a_url_contains_its_password() {
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
