//! A TCP proxy on loopback that fails on demand.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The number of bytes moved at once.
const PIECE_LEN: usize = 16 * 1024;

/// The timeout of a connect. The target is on this machine: it answers at once or is down.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What the proxy does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Moves everything.
    Pass,
    /// Moves nothing, but accepts new connections: the peer looks dead without an error.
    Blackhole,
    /// Resets new connections; open ones stay.
    Refuse,
    /// Resets a connection after this many bytes, counted in both directions together.
    CutAfter(usize),
}

/// A proxy in front of one address. Dropping it closes its connections.
///
/// It runs in the test's runtime: do not block the runtime.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    order: watch::Sender<Order>,
    open: Arc<AtomicUsize>,
    _listening: JoinSet<()>,
}

/// The instruction to all connections.
#[derive(Clone, Copy, Debug)]
struct Order {
    fault: Fault,
    /// A connection that began under a lower number is reset.
    resets: u64,
}

impl Proxy {
    /// Listens on a free port in front of `target`, the `host:port` of any URL such as a scene's.
    ///
    /// # Panics
    /// If the target has no address.
    pub async fn start(target: &str) -> Self {
        let target = authority(target).to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (order, orders) = watch::channel(Order { fault: Fault::Pass, resets: 0 });
        let open = Arc::new(AtomicUsize::new(0));
        let mut listening = JoinSet::new();
        listening.spawn(listen(listener, target, orders, open.clone()));
        Self { address, order, open, _listening: listening }
    }

    /// The address on which it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the URL with the proxy as its host.
    #[must_use]
    pub fn through(&self, url: &str) -> String {
        url.replacen(authority(url), &self.address.to_string(), 1)
    }

    /// Sets the fault, for open connections as well.
    pub fn set(&self, fault: Fault) {
        self.order.send_modify(|order| order.fault = fault);
    }

    /// Resets all open connections.
    pub fn reset(&self) {
        self.order.send_modify(|order| order.resets += 1);
    }

    /// The number of open connections.
    #[must_use]
    pub fn n_open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// The `host:port` of a URL.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.split(['/', '?']).next().unwrap_or(rest);
    rest.rsplit_once('@').map_or(rest, |(_, host)| host)
}

async fn listen(listener: TcpListener, target: String, orders: watch::Receiver<Order>, open: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let orders = orders.clone();
        if orders.borrow().fault == Fault::Refuse {
            reset(client);
            continue;
        }
        let (target, open) = (target.clone(), open.clone());
        connections.spawn(async move {
            open.fetch_add(1, Ordering::Relaxed);
            serve(client, &target, orders).await;
            open.fetch_sub(1, Ordering::Relaxed);
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Serves one connection until a side closes it or it must be reset.
async fn serve(mut client: TcpStream, target: &str, orders: watch::Receiver<Order>) {
    let first = orders.borrow().resets;
    let Ok(Ok(mut server)) = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(target)).await else {
        return reset(client);
    };
    let moved = AtomicUsize::new(0);
    let clean = {
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let mut told = orders.clone();
        tokio::select! {
            whole = async {
                tokio::try_join!(
                    pump(client_read, server_write, orders.clone(), &moved),
                    pump(server_read, client_write, orders.clone(), &moved),
                )
            } => whole.is_ok(),
            () = cut(&mut told, first) => false,
        }
    };
    if !clean {
        reset(client);
        reset(server);
    }
}

/// Returns when the connection must be reset at once.
async fn cut(orders: &mut watch::Receiver<Order>, first: u64) {
    // An error means that the proxy is being dropped, which closes its connections as well.
    orders.wait_for(|order| order.resets > first).await.ok();
}

/// The connection is broken or must be cut, in both directions.
struct Broken;

/// Moves bytes in one direction until the sender closes it.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut orders: watch::Receiver<Order>,
    moved: &AtomicUsize,
) -> Result<(), Broken> {
    let mut piece = vec![0; PIECE_LEN];
    loop {
        let Ok(len) = from.read(&mut piece).await else { return Err(Broken) };
        // A black hole swallows the end of a connection as well as its bytes.
        if orders.wait_for(|order| order.fault != Fault::Blackhole).await.is_err() {
            return Err(Broken);
        }
        if len == 0 {
            // The other direction may still be open. If it is closed as well, there is nothing to close.
            to.shutdown().await.ok();
            return Ok(());
        }
        let total = moved.fetch_add(len, Ordering::Relaxed) + len;
        let fault = orders.borrow().fault;
        if matches!(fault, Fault::CutAfter(limit) if total > limit) || to.write_all(&piece[..len]).await.is_err() {
            return Err(Broken);
        }
    }
}

/// Ends a connection with a reset instead of a close.
fn reset(stream: TcpStream) {
    stream.set_zero_linger().ok();
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    /// How long to wait for an answer that does not come.
    const SHORT: Duration = Duration::from_millis(300);

    #[test]
    fn url_is_led_through_without_touching_the_rest() {
        assert_eq!(authority("amqp://guest:guest@127.0.0.1:5672/%2f"), "127.0.0.1:5672");
        assert_eq!(authority("postgres://baton@127.0.0.1:5432/baton?options=-c%3D"), "127.0.0.1:5432");
        assert_eq!(authority("127.0.0.1:80"), "127.0.0.1:80");
    }

    /// A server that echoes its input.
    async fn echo(servers: &mut JoinSet<()>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        servers.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                open.spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await.ok();
                });
            }
        });
        address
    }

    async fn answer(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
        stream.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        tokio::time::timeout(SHORT, stream.read_exact(&mut answer)).await??;
        Ok(answer)
    }

    #[tokio::test]
    async fn proxy_passes_swallows_and_goes_on() {
        let mut servers = JoinSet::new();
        let proxy = Proxy::start(&echo(&mut servers).await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"one").await.unwrap(), b"one");
        proxy.set(Fault::Blackhole);
        assert_eq!(answer(&mut stream, b"two").await.unwrap_err().kind(), ErrorKind::TimedOut);
        let mut other = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut other, b"new").await.unwrap_err().kind(), ErrorKind::TimedOut);
        proxy.set(Fault::Pass);
        let mut swallowed = [0; 3];
        stream.read_exact(&mut swallowed).await.unwrap();
        assert_eq!(&swallowed, b"two", "nothing is lost after the black hole ends");
        drop((stream, other));
        crate::eventually("no connection is open", Duration::from_secs(10), async || match proxy.n_open() {
            0 => Ok(()),
            open => Err(open),
        })
        .await;
    }

    #[tokio::test]
    async fn proxy_resets_refuses_and_cuts() {
        let mut servers = JoinSet::new();
        let proxy = Proxy::start(&echo(&mut servers).await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"one").await.unwrap(), b"one");
        proxy.reset();
        let mut rest = Vec::new();
        assert_eq!(stream.read_to_end(&mut rest).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

        proxy.set(Fault::Refuse);
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(stream.read_u8().await.is_err());

        proxy.set(Fault::CutAfter(10));
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"four").await.unwrap(), b"four");
        assert!(answer(&mut stream, b"more").await.is_err());
    }
}
