//! Dead-letters messages that the AMQP library cannot read.
//!
//! The short strings of a message (its id, its type…) must be UTF-8, which RabbitMQ does not check. The library closes
//! its connection over any other string, and, because of [`super::guard`], over headers that are nested too deeply. The
//! message would then be the first on the next connection, forever. So this module fetches it over a separate
//! connection, frame by frame, dead-letters it and acknowledges it. Other fetched messages are requeued when the
//! connection closes.

use std::io;

use async_rs::TokioRuntime;
use futures_util::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use lapin::protocol::basic::parse_properties;
use lapin::tcp::{AMQPUriTcpExt, OwnedTLSConfig};
use tokio::sync::mpsc;

use super::envelope::Envelope;
use super::link::parse;
use super::nesting::is_too_deep;
use super::publish::{Job, bury};
use crate::message::SIZE_BYTES_MAX;

/// Most messages of one queue that are examined. The message that ended a connection was in its prefetch, which is
/// smaller, and is at the head of the queue again.
const LOOK_MAX: usize = 1024;

/// Largest frame that is read. RabbitMQ negotiates 128 KiB.
const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The frame types, and the end byte of each frame.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const FRAME_END: u8 = 0xce;

/// Class and method ids.
type Method = (u16, u16);
const START: Method = (10, 10);
const START_OK: Method = (10, 11);
const TUNE: Method = (10, 30);
const TUNE_OK: Method = (10, 31);
const OPEN: Method = (10, 40);
const OPEN_OK: Method = (10, 41);
const CLOSE: Method = (10, 50);
const CHANNEL_OPEN: Method = (20, 10);
const CHANNEL_OPEN_OK: Method = (20, 11);
const CHANNEL_CLOSE: Method = (20, 40);
const GET: Method = (60, 70);
const GET_OK: Method = (60, 71);
const GET_EMPTY: Method = (60, 72);
const ACK: Method = (60, 80);

/// Dead-letters the unreadable messages among the first of a queue, and returns their number.
///
/// # Errors
/// The error of the broker or the network. A message that was not acknowledged is still in the queue.
pub(super) async fn bury_unreadable(url: &str, queue: &str, publish_tx: &mpsc::Sender<Job>) -> io::Result<usize> {
    let mut plain = Plain::connect(url).await?;
    let mut n_found = 0;
    for _ in 0..LOOK_MAX {
        let Some(fetched) = plain.get(queue).await? else { break };
        if !fetched.is_readable {
            tracing::warn!(queue, "unreadable message dead-lettered");
            let letter = Envelope { body: fetched.body, ..Envelope::default() };
            let letter = letter
                .buried("a property or the routing key is not UTF-8, or the headers are nested too deeply", queue);
            bury(publish_tx, letter).await.map_err(io::Error::other)?;
            plain.ack(fetched.tag).await?;
            n_found += 1;
        }
    }
    // Without a proper close the broker might not read the last acknowledgement before the socket closes.
    plain.close().await?;
    Ok(n_found)
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection with one channel, without the library.
struct Plain {
    stream: Box<dyn Stream>,
}

struct Fetched {
    tag: u64,
    is_readable: bool,
    body: Vec<u8>,
}

struct Frame {
    kind: u8,
    payload: Vec<u8>,
}

impl Plain {
    async fn connect(url: &str) -> io::Result<Self> {
        let uri = parse(url).map_err(io::Error::other)?;
        let runtime = TokioRuntime::tokio_with_handle(tokio::runtime::Handle::current());
        let stream = uri.connect_with_config_async(OwnedTLSConfig::default().as_ref(), &runtime).await?;
        let mut plain = Plain { stream: Box::new(stream) };
        plain.stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        plain.stream.flush().await?;
        plain.answer(&[START]).await?;
        let user = &uri.authority.userinfo;
        let mut start_ok = vec![0; 4];
        put_short(&mut start_ok, "PLAIN")?;
        put_long(&mut start_ok, format!("\0{}\0{}", user.username, user.password).as_bytes())?;
        put_short(&mut start_ok, "en_US")?;
        plain.method(0, START_OK, &start_ok).await?;
        let (_, tuned) = plain.answer(&[TUNE]).await?;
        // The broker's values without the heartbeat, since the connection is short.
        let mut tune_ok = tuned.get(..6).ok_or_else(cut)?.to_vec();
        tune_ok.extend([0, 0]);
        plain.method(0, TUNE_OK, &tune_ok).await?;
        let mut open = Vec::new();
        put_short(&mut open, &uri.vhost)?;
        open.extend([0, 0]);
        plain.method(0, OPEN, &open).await?;
        plain.answer(&[OPEN_OK]).await?;
        plain.method(1, CHANNEL_OPEN, &[0]).await?;
        plain.answer(&[CHANNEL_OPEN_OK]).await?;
        Ok(plain)
    }

    /// Fetches the next message of the queue; `None` if it is empty.
    async fn get(&mut self, queue: &str) -> io::Result<Option<Fetched>> {
        let mut get = vec![0, 0];
        put_short(&mut get, queue)?;
        get.push(0);
        self.method(1, GET, &get).await?;
        let (method, arguments) = self.answer(&[GET_OK, GET_EMPTY]).await?;
        if method == GET_EMPTY {
            return Ok(None);
        }
        let mut rest = &arguments[..];
        let tag = u64::from_be_bytes(take(&mut rest)?);
        let [_redelivered] = take(&mut rest)?;
        let is_route_readable = is_short_text(&mut rest)? && is_short_text(&mut rest)?;
        let header = self.frame(HEADER).await?;
        let mut rest = &header[..];
        let [_, _, _, _] = take(&mut rest)?;
        let n_bytes = usize::try_from(u64::from_be_bytes(take(&mut rest)?)).unwrap_or(usize::MAX);
        let is_readable = is_route_readable && !is_too_deep(rest) && parse_properties(rest).is_ok();
        let mut body = Vec::new();
        let mut n_read = 0;
        while n_read < n_bytes {
            let part = self.frame(BODY).await?;
            n_read += part.len();
            // Bytes beyond the size limit are only counted.
            if body.len() + part.len() <= SIZE_BYTES_MAX {
                body.extend(part);
            }
        }
        Ok(Some(Fetched { tag, is_readable, body }))
    }

    async fn ack(&mut self, tag: u64) -> io::Result<()> {
        let mut ack = tag.to_be_bytes().to_vec();
        ack.push(0);
        self.method(1, ACK, &ack).await
    }

    async fn close(mut self) -> io::Result<()> {
        let mut close = 200_u16.to_be_bytes().to_vec();
        put_short(&mut close, "OK")?;
        close.extend([0; 4]);
        self.method(0, CLOSE, &close).await?;
        // Reads until close-ok or the end of the stream.
        while self.any_frame().await.is_ok_and(|frame| !frame.payload.starts_with(&[0, 10, 0, 51])) {}
        Ok(())
    }

    async fn method(&mut self, channel: u16, (class, method): Method, arguments: &[u8]) -> io::Result<()> {
        let mut frame = vec![METHOD];
        frame.extend(channel.to_be_bytes());
        frame.extend(u32::try_from(arguments.len() + 4).map_err(io::Error::other)?.to_be_bytes());
        frame.extend(class.to_be_bytes());
        frame.extend(method.to_be_bytes());
        frame.extend(arguments);
        frame.push(FRAME_END);
        self.stream.write_all(&frame).await?;
        self.stream.flush().await
    }

    /// Reads the next method, which must be one of these, with its arguments.
    async fn answer(&mut self, expected: &[Method]) -> io::Result<(Method, Vec<u8>)> {
        let payload = self.frame(METHOD).await?;
        let mut rest = &payload[..];
        let method = (u16::from_be_bytes(take(&mut rest)?), u16::from_be_bytes(take(&mut rest)?));
        if expected.contains(&method) {
            return Ok((method, rest.to_vec()));
        }
        let text = match method {
            CLOSE | CHANNEL_CLOSE => {
                let [_, _, n_bytes] = take(&mut rest)?;
                String::from_utf8_lossy(rest.get(..usize::from(n_bytes)).unwrap_or_default()).into_owned()
            }
            (class, method) => format!("unexpected method {class}.{method}"),
        };
        Err(io::Error::other(text))
    }

    /// Reads the payload of the next frame, which must be of this type.
    async fn frame(&mut self, kind: u8) -> io::Result<Vec<u8>> {
        let frame = self.any_frame().await?;
        if frame.kind == kind { Ok(frame.payload) } else { Err(cut()) }
    }

    async fn any_frame(&mut self) -> io::Result<Frame> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).await?;
        let [kind, _, _, size @ ..] = head;
        let n_bytes = u32::from_be_bytes(size) as usize;
        if n_bytes > FRAME_BYTES_MAX {
            return Err(cut());
        }
        let mut payload = vec![0; n_bytes + 1];
        self.stream.read_exact(&mut payload).await?;
        if payload.pop() != Some(FRAME_END) {
            return Err(cut());
        }
        Ok(Frame { kind, payload })
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not AMQP 0-9-1")
}

fn take<const N: usize>(rest: &mut &[u8]) -> io::Result<[u8; N]> {
    let (head, tail) = rest.split_first_chunk().ok_or_else(cut)?;
    *rest = tail;
    Ok(*head)
}

/// Skips a short string. Returns whether it is UTF-8.
fn is_short_text(rest: &mut &[u8]) -> io::Result<bool> {
    let [n_bytes] = take(rest)?;
    let (text, tail) = rest.split_at_checked(usize::from(n_bytes)).ok_or_else(cut)?;
    *rest = tail;
    Ok(std::str::from_utf8(text).is_ok())
}

fn put_short(buffer: &mut Vec<u8>, text: &str) -> io::Result<()> {
    buffer.push(u8::try_from(text.len()).map_err(io::Error::other)?);
    buffer.extend(text.as_bytes());
    Ok(())
}

fn put_long(buffer: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    buffer.extend(u32::try_from(bytes.len()).map_err(io::Error::other)?.to_be_bytes());
    buffer.extend(bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::super::script::Script;
    use super::*;
    use crate::fuzz;

    /// Fetches messages until the queue is empty or the input is not AMQP. Returns which of them are readable.
    fn fetched(bytes: Vec<u8>) -> Vec<bool> {
        let mut plain = Plain { stream: Box::new(Script(bytes)) };
        let read = async {
            let mut readable = Vec::new();
            while let Ok(Some(fetched)) = plain.get("queue").await {
                assert!(fetched.body.len() <= SIZE_BYTES_MAX);
                readable.push(fetched.is_readable);
            }
            let _ = plain.close().await;
            readable
        };
        read.now_or_never().expect("everything is there")
    }

    #[test]
    fn any_bytes_from_a_broker_are_handled() {
        fuzz::run("poison", |input| drop(fetched(input.to_vec())));
    }

    #[test]
    fn a_message_that_is_not_utf8_or_nested_too_deeply_is_unreadable() {
        let seed = |name: &str| {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/poison");
            std::fs::read(std::path::Path::new(folder).join(name)).unwrap()
        };
        assert_eq!(fetched(seed("good")), [true]);
        assert_eq!(fetched(seed("type-not-utf8")), [false]);
        assert_eq!(fetched(seed("route-not-utf8")), [false, false]);
        assert_eq!(fetched(seed("deep")), [false]);
        assert_eq!(fetched(seed("two-gigabytes-of-headers")), [false]);
        assert!(fetched(seed("two-gigabyte-frame")).is_empty());
        assert!(fetched(seed("body-of-18-exabytes")).is_empty());
    }
}
