//! A virtual host for each test on the shared broker, and a private broker for tests that kill it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton_common::communicator::Broker;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::time::{Instant, sleep, timeout};

use crate::{LIMIT, eventually};

/// A virtual host that is deleted when the test ends.
pub(crate) struct Vhost {
    name: String,
    management: String,
    pub(crate) url: String,
}

impl Vhost {
    pub(crate) fn new() -> Self {
        let url = std::env::var("BATON_TEST_AMQP").expect("BATON_TEST_AMQP is the broker's URL");
        let management = std::env::var("BATON_TEST_MANAGEMENT").expect("BATON_TEST_MANAGEMENT is its HTTP address");
        let name = format!("test-{}", uuid::Uuid::now_v7().simple());
        let at = url.find("://").expect("the URL has a scheme") + 3;
        let end = url[at..].find('/').map_or(url.len(), |slash| at + slash);
        let vhost = Vhost { url: format!("{}/{name}", &url[..end]), management, name };
        vhost.http("PUT", &format!("vhosts/{}", vhost.name), None);
        vhost
    }

    pub(crate) fn broker(&self) -> Broker {
        Broker::Amqp(vec![self.url.clone()])
    }

    /// Calls the management API. `{vhost}` in the path stands for this virtual host.
    pub(crate) fn http(&self, method: &str, path: &str, body: Option<&str>) -> serde_json::Value {
        let path = path.replace("{vhost}", &self.name);
        let mut curl = Command::new("curl");
        curl.args(["-sSf", "-u", "guest:guest", "-X", method, "-H", "content-type: application/json"]);
        curl.arg(format!("{}/api/{path}", self.management.trim_end_matches('/')));
        if let Some(body) = body {
            curl.args(["-d", body]);
        }
        let output = curl.output().expect("curl is installed");
        assert!(output.status.success(), "{method} {path}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// A plain AMQP channel, as of another program.
    pub(crate) async fn stranger(&self) -> Stranger {
        Stranger::connect(&self.url).await
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.http("DELETE", &format!("vhosts/{}", self.name), None);
    }
}

/// Another program that speaks AMQP.
pub(crate) struct Stranger {
    pub(crate) channel: Channel,
    _connection: Connection,
}

impl Stranger {
    async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        Stranger { channel, _connection: connection }
    }

    pub(crate) async fn publish(&self, exchange: &str, key: &str, content_type: &str, body: &[u8]) {
        let properties = BasicProperties::default().with_content_type(content_type.into());
        self.publish_with(exchange, key, properties, body).await;
    }

    pub(crate) async fn publish_with(&self, exchange: &str, key: &str, properties: BasicProperties, body: &[u8]) {
        let options = BasicPublishOptions::default();
        let confirm = self.channel.basic_publish(exchange.into(), key.into(), options, body, properties).await.unwrap();
        confirm.await.unwrap();
    }

    pub(crate) async fn consume(&self, queue: &str) -> Consumer {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
    }

    /// Consumes and acknowledges the first messages of a queue. To be called once for each queue.
    pub(crate) async fn take(&self, queue: &str, n_messages: usize) -> Vec<lapin::message::Delivery> {
        let mut consumer = self.consume(queue).await;
        let mut messages = Vec::new();
        while messages.len() < n_messages {
            let message = timeout(LIMIT, consumer.next()).await.unwrap_or_else(|_| {
                panic!("{queue}: only {} of {n_messages} messages arrived", messages.len());
            });
            messages.push(message.unwrap().unwrap());
        }
        messages
    }
}

/// The text of a message's header.
pub(crate) fn header(message: &lapin::message::Delivery, name: &str) -> String {
    let headers = message.properties.headers().as_ref().unwrap();
    headers.inner()[name].as_long_string().unwrap().to_string()
}

/// A private broker that can be killed.
pub(crate) struct OwnBroker {
    folder: tempfile::TempDir,
    port: u16,
    epmd: Child,
    server: Option<Child>,
}

impl OwnBroker {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write("rabbitmq.conf", format!("listeners.tcp.1 = 127.0.0.1:{}\n", ports[0]));
        write("enabled_plugins", "[].\n".to_owned());
        write("environment.conf", String::new());
        write("distribution", format!("{} {}", ports[1], ports[2]));
        let epmd = Command::new("epmd")
            .args(["-address", "127.0.0.1", "-port", &ports[1].to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("epmd is installed");
        let mut broker = OwnBroker { folder, port: ports[0], epmd, server: None };
        broker.start_server().await;
        broker
    }

    pub(crate) fn broker(&self) -> Broker {
        Broker::Amqp(vec![self.url()])
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    pub(crate) async fn start_server(&mut self) {
        use std::os::unix::process::CommandExt as _;
        let distribution = std::fs::read_to_string(self.path("distribution")).unwrap();
        let (_, distribution_port) = distribution.split_once(' ').unwrap();
        let log = std::fs::File::create(self.path("startup.log")).unwrap();
        let server = self
            .command("rabbitmq-server")
            .env("RABBITMQ_DIST_PORT", distribution_port)
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("RabbitMQ is installed");
        self.server = Some(server);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Broker::check(&[self.url()], None).await[0].is_err() {
            assert!(
                Instant::now() < deadline,
                "no broker: {}",
                std::fs::read_to_string(self.path("startup.log")).unwrap_or_default()
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// One of the broker's programs, in its environment.
    fn command(&self, program: &str) -> Command {
        let home = self.folder.path();
        let distribution = std::fs::read_to_string(self.path("distribution")).unwrap();
        let (epmd_port, _) = distribution.split_once(' ').unwrap();
        let mut command = Command::new(format!("/usr/lib/rabbitmq/bin/{program}"));
        command
            .env("HOME", home)
            .env("RABBITMQ_NODENAME", format!("baton-{}@localhost", self.port))
            .env("RABBITMQ_CONF_ENV_FILE", self.path("environment.conf"))
            .env("RABBITMQ_CONFIG_FILE", self.path("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", self.path("advanced.config"))
            .env("RABBITMQ_BASE", home)
            .env("RABBITMQ_MNESIA_BASE", self.path("mnesia"))
            .env("RABBITMQ_LOG_BASE", self.path("log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.path("enabled_plugins"))
            .env("RABBITMQ_PID_FILE", self.path("server.pid"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", self.path("generated"))
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_EPMD_PORT", epmd_port);
        command
    }

    /// Runs `rabbitmqctl`, and returns its output.
    pub(crate) fn control(&self, arguments: &[&str]) -> String {
        let output = self.command("rabbitmqctl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The queues and consumers of the broker, for a failed test.
    pub(crate) fn report(&self) -> String {
        let queues = ["list_queues", "name", "messages_ready", "messages_unacknowledged", "consumers", "leader"];
        let channels = ["list_channels", "name", "prefetch_count", "messages_unacknowledged", "messages_unconfirmed"];
        let name = format!("log/baton-{}@localhost.log", self.port);
        let log = std::fs::read_to_string(self.path(&name)).unwrap_or_default();
        let leaders: Vec<&str> = log.lines().filter(|line| line.contains("leader")).collect();
        format!("{}\n{}\n{}", self.control(&queues), self.control(&channels), leaders.join("\n"))
    }

    /// Waits until the broker's queues survive a SIGKILL. The directory of quorum queues is in tables that are written
    /// to disk some time after a declaration. If RabbitMQ 3.10 is killed before that, it starts such a queue without
    /// its confirmed messages, or without a leader.
    pub(crate) fn save_directory(&self) {
        self.control(&["eval", "[ok = dets:sync(Table) || Table <- dets:all()]."]);
    }

    /// Kills the server and its helpers with SIGKILL, like a power failure.
    pub(crate) fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let group = format!("-{}", server.id());
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            let _ = server.wait();
        }
    }

    pub(crate) async fn stranger(&self) -> Stranger {
        Stranger::connect(&self.url()).await
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        self.kill();
        let _ = self.epmd.kill();
        let _ = self.epmd.wait();
    }
}

/// A port without a listener, which the system does not use for outgoing connections.
fn free_port() -> u16 {
    loop {
        let dice = u16::try_from(uuid::Uuid::new_v4().as_u128() % 12_000).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", 20_000 + dice)).is_ok() {
            return 20_000 + dice;
        }
    }
}

/// Waits until the queue has this number of ready and of unacknowledged messages.
pub(crate) async fn counts(vhost: &Vhost, queue: &str, n_ready: u64, n_unacked: u64) {
    eventually(&format!("{queue} has {n_ready} ready and {n_unacked} unacknowledged messages"), async || {
        let queue = vhost.http("GET", &format!("queues/{{vhost}}/{queue}"), None);
        let seen = (queue["messages_ready"].as_u64(), queue["messages_unacknowledged"].as_u64());
        (seen == (Some(n_ready), Some(n_unacked)), seen)
    })
    .await;
}
