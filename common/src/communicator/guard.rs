//! Protects the AMQP library from messages that would crash the program.
//!
//! The library's parser recurses for each nested list in a message's headers, on a thread with a stack of 2 MiB. A
//! message of 10 KiB from any publisher overflows it. So the stream from the broker passes through this module, which
//! invalidates a header frame that is nested too deeply. The library then closes the connection as for any unreadable
//! message, and [`super::poison`] dead-letters the message.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio, TokioRuntime};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use super::nesting::is_too_deep;

/// The head of a frame: type, channel and size. Its end is one byte.
const HEAD_BYTES: usize = 7;
const END_BYTES: usize = 1;
/// The type of a frame with a message's properties.
const HEADER: u8 = 2;
/// A type that no frame has.
const INVALID: u8 = 0;
/// The offset of the properties: after class, weight and the size of the body.
const PROPERTIES_AT: usize = HEAD_BYTES + 12;
/// Largest header frame. All properties of a message are in one frame, for which the broker negotiates 128 KiB.
const HEADER_BYTES_MAX: usize = 1024 * 1024;
/// Most bytes that are read at once.
const READ_BYTES: usize = 64 * 1024;

/// Connects as the library does, but through the guard.
///
/// # Errors
/// Those of the library.
pub(super) async fn connect(uri: AMQPUri, properties: ConnectionProperties) -> lapin::Result<Connection> {
    let handle = tokio::runtime::Handle::current();
    let runtime = TokioRuntime::tokio_with_handle(handle.clone());
    let dial = async move |uri: AMQPUri, _: Runtime<Kit>| {
        let stream = uri.connect_with_config_async(OwnedTLSConfig::default().as_ref(), &runtime).await?;
        Ok(AsyncTcpStream::Plain(Guarded::new(stream)))
    };
    let kit = Kit(Tokio::default().with_handle(handle));
    Connection::connector(uri, Runtime::new(kit), dial, properties).await
}

type Unguarded = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// The Tokio runtime with guarded streams.
#[derive(Clone, Debug)]
struct Kit(Tokio);

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, run: F) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(run)
    }
}

impl Reactor for Kit {
    type TcpStream = Guarded<Unguarded>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, span: Duration) -> Self::Sleep {
        self.0.sleep(span)
    }

    fn interval(&self, span: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(span)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Guarded::new(AsyncTcpStream::Plain(connecting.await?))) }
    }
}

/// A connection to a broker that passes on no header that is nested too deeply.
struct Guarded<S> {
    stream: S,
    frames: Frames,
    read: Box<[u8]>,
    /// The bytes that were checked.
    passed: VecDeque<u8>,
}

/// The position within the stream of frames.
#[derive(Default)]
struct Frames {
    /// Remaining bytes of a frame that passes.
    n_passing: usize,
    /// The beginning of a frame that is held back.
    held: Vec<u8>,
}

impl Frames {
    /// Takes bytes from the broker, and appends the checked bytes to `passed`.
    fn pass(&mut self, mut bytes: &[u8], passed: &mut VecDeque<u8>) {
        while !bytes.is_empty() {
            if self.n_passing > 0 {
                let (passing, rest) = bytes.split_at(self.n_passing.min(bytes.len()));
                passed.extend(passing);
                self.n_passing -= passing.len();
                bytes = rest;
                continue;
            }
            let (taken, rest) = bytes.split_at((self.wanted() - self.held.len()).min(bytes.len()));
            self.held.extend(taken);
            bytes = rest;
            if self.held.len() == self.wanted() {
                self.release(passed);
            }
        }
    }

    /// Number of bytes of a frame to hold before any pass: its head, or all of a header frame.
    fn wanted(&self) -> usize {
        match self.held.first_chunk() {
            Some(head) if is_header(head) => HEAD_BYTES + size(head) + END_BYTES,
            Some(_) | None => HEAD_BYTES,
        }
    }

    fn release(&mut self, passed: &mut VecDeque<u8>) {
        let Some(head) = self.held.first_chunk() else { return };
        self.n_passing = HEAD_BYTES + size(head) + END_BYTES - self.held.len();
        let properties = self.held.get(PROPERTIES_AT..).unwrap_or_default();
        let is_invalid = if is_header(head) { is_too_deep(properties) } else { head[0] == HEADER };
        if is_invalid {
            self.held[0] = INVALID;
        }
        passed.extend(self.held.drain(..));
    }
}

/// Whether it is a header frame of a size that can be held.
fn is_header(head: &[u8; HEAD_BYTES]) -> bool {
    head[0] == HEADER && size(head) <= HEADER_BYTES_MAX
}

fn size(head: &[u8; HEAD_BYTES]) -> usize {
    let [_, _, _, size @ ..] = *head;
    u32::from_be_bytes(size) as usize
}

impl<S> Guarded<S> {
    fn new(stream: S) -> Self {
        let read = vec![0; READ_BYTES].into_boxed_slice();
        Guarded { stream, frames: Frames::default(), read, passed: VecDeque::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Guarded { stream, frames, read, passed } = &mut *self;
        while passed.is_empty() {
            let n_bytes = ready!(Pin::new(&mut *stream).poll_read(cx, read))?;
            if n_bytes == 0 {
                return Poll::Ready(Ok(0));
            }
            frames.pass(&read[..n_bytes], passed);
        }
        Poll::Ready(passed.read(buffer))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{AsyncReadExt, FutureExt};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::script::Script;
    use super::*;
    use crate::fuzz;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1][..], &size, payload, &[0xce]].concat()
    }

    fn seed(name: &str) -> Vec<u8> {
        std::fs::read(format!("{}/tests/fuzz/poison/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    proptest! {
        #[test]
        fn frames_that_are_not_too_deep_pass_unchanged_in_chunks_of_any_size(
            frames in vec((prop::sample::select(vec![1_u8, 2, 3, 8]), vec(any::<u8>(), 0..40)), 0..8),
            n_bytes in 1..50_usize,
        ) {
            let frames: Vec<Vec<u8>> = frames.iter().map(|(kind, payload)| frame(*kind, payload)).collect();
            let bytes = frames.concat();
            let (mut frames, mut passed) = (Frames::default(), VecDeque::new());
            for part in bytes.chunks(n_bytes) {
                frames.pass(part, &mut passed);
            }
            prop_assert!(passed == bytes);
        }
    }

    #[test]
    fn only_the_type_of_a_frame_that_is_too_deep_or_too_large_is_changed() {
        let (good, deep) = (seed("good"), seed("deep"));
        let large = frame(HEADER, &vec![0; HEADER_BYTES_MAX + 1]);
        let mut guarded = Guarded::new(Script([&good[..], &deep, &large, &good].concat()));
        let mut passed = Vec::new();
        guarded.read_to_end(&mut passed).now_or_never().expect("everything is there").unwrap();
        let get_ok = HEAD_BYTES + deep[6] as usize + END_BYTES;
        let mut expected = [&good[..], &deep, &large, &good].concat();
        expected[good.len() + get_ok] = INVALID;
        expected[good.len() + deep.len()] = INVALID;
        assert!(passed == expected);
    }

    #[test]
    fn no_byte_is_added_or_lost() {
        fuzz::run("poison", |input| {
            let (mut frames, mut passed) = (Frames::default(), VecDeque::new());
            frames.pass(input, &mut passed);
            assert_eq!(passed.len() + frames.held.len(), input.len());
            assert!(frames.held.len() < HEADER_BYTES_MAX + 2 * HEAD_BYTES);
        });
    }
}
