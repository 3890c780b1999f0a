//! Connections and logins, through all machines of a route.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use russh::client::{self, AuthResult, DisconnectReason, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_encoding::Encode as _;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{
    self, Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate,
};
use russh::{AgentAuthError, ChannelOpenFailure, Preferred, cipher};
use tokio::net::{TcpStream, UnixStream};

use super::Error;
use super::config::{Hop, Route};
use super::known_hosts::KnownKeys;
use super::proxy::Proxy;

/// Bytes that the server may send ahead on one channel.
const WINDOW: u32 = 8 << 20;

/// The largest packet that the library supports.
const PACKET: u32 = 65_535;

/// Packets of a channel that wait for its reader. More would only exceed the processor's caches.
const PACKETS_AHEAD: usize = 16;

/// Ciphers, the fastest first on processors with AES instructions, which servers have.
const CIPHERS: [cipher::Name; 5] =
    [cipher::AES_256_GCM, cipher::AES_128_GCM, cipher::CHACHA20_POLY1305, cipher::AES_256_CTR, cipher::AES_128_CTR];

/// The reason for the end of a connection, once it has ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending(Arc<Mutex<Option<End>>>);

#[derive(Clone, Debug)]
enum End {
    /// The server announced the end and the reason.
    Said(String),
    Failed(String),
}

impl Ending {
    pub(super) fn reason(&self) -> String {
        match self.get() {
            Some(End::Said(reason) | End::Failed(reason)) => reason,
            None => "it was closed".to_owned(),
        }
    }

    fn get(&self) -> Option<End> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, end: End) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
    }
}

/// Verifies the host key of one machine.
pub(super) struct Verifier {
    known: KnownKeys,
    ending: Ending,
}

/// Why a connection failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The host's key is not the known one.
    HostKey(Error),
    /// Anything else.
    Connection(russh::Error),
}

impl From<russh::Error> for Failure {
    fn from(error: russh::Error) -> Self {
        Self::Connection(error)
    }
}

impl client::Handler for Verifier {
    type Error = Failure;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, Failure> {
        match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } => {
                self.known.check(key).map(|()| true).map_err(Failure::HostKey)
            }
            PublicKeyOrCertificate::Certificate(certificate) => {
                self.known.check_certificate(certificate).map(|()| true).map_err(Failure::HostKey)
            }
        }
    }

    async fn disconnected(&mut self, reason: DisconnectReason<Failure>) -> Result<(), Failure> {
        self.ending.set(match &reason {
            DisconnectReason::ReceivedDisconnect(info) => End::Said(format!("the server says: {}", info.message)),
            DisconnectReason::Error(Failure::HostKey(error)) => End::Failed(error.to_string()),
            DisconnectReason::Error(Failure::Connection(error)) => End::Failed(text_of(error)),
        });
        Ok(())
    }
}

fn text_of(error: &russh::Error) -> String {
    if matches!(error, russh::Error::HUP | russh::Error::Disconnect) {
        return "the server closed the connection".to_owned();
    }
    error.to_string()
}

/// The connections to all machines of a route.
pub(super) struct LoggedIn {
    /// In the order of the route.
    pub(super) handles: Vec<Handle<Verifier>>,
    /// The reason for the end of the last connection.
    pub(super) ending: Ending,
    /// The program that connects to the first machine.
    pub(super) proxy: Option<Proxy>,
}

/// Connects to every machine of a route through the one before it, and logs in.
pub(super) async fn log_in(route: &Route) -> Result<LoggedIn, Error> {
    let mut handles: Vec<Handle<Verifier>> = Vec::new();
    let mut proxy = None;
    let mut ending = Ending::default();
    for (i, hop) in route.hops.iter().enumerate() {
        let nearer = i.checked_sub(1).and_then(|i| route.hops.get(i));
        let known = known_keys(hop).await?;
        let config = Arc::new(client_config(route.keepalive, &known));
        ending = Ending::default();
        let verifier = Verifier { known, ending: ending.clone() };
        let connected = match (handles.last(), &route.proxy) {
            (None, Some(command)) => {
                let (started, stream) = Proxy::start(command)
                    .map_err(|error| unreachable(hop, &format!("its ProxyCommand cannot be started: {error}")))?;
                proxy = Some(started);
                client::connect_stream(config, stream, verifier).await
            }
            (None, None) => {
                let stream = TcpStream::connect((hop.name.as_str(), hop.port))
                    .await
                    .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
                    .map_err(|error| unreachable(hop, &error.to_string()))?;
                client::connect_stream(config, stream, verifier).await
            }
            (Some(outer), _) => {
                let channel = outer
                    .channel_open_direct_tcpip(hop.name.as_str(), hop.port.into(), "127.0.0.1", 0)
                    .await
                    .map_err(|error| no_passage(nearer, hop, &error))?;
                client::connect_stream(config, channel.into_stream(), verifier).await
            }
        };
        let mut handle = match connected {
            Ok(handle) => handle,
            Err(Failure::HostKey(error)) => return Err(error),
            Err(Failure::Connection(error)) => {
                let complaint = match proxy.take().filter(|_| handles.is_empty()) {
                    Some(proxy) => proxy.complaint().await,
                    None => None,
                };
                return Err(unreachable(hop, &complaint.unwrap_or_else(|| text_of(&error))));
            }
        };
        authenticate(&mut handle, hop, &ending).await?;
        handles.push(handle);
    }
    Ok(LoggedIn { handles, ending, proxy })
}

/// Why a machine does not forward the connection to the next.
fn no_passage(nearer: Option<&Hop>, hop: &Hop, error: &russh::Error) -> Error {
    let nearer = nearer.map_or("", |nearer| nearer.name.as_str());
    let russh::Error::ChannelOpenFailure(reason) = error else { return unreachable(hop, &text_of(error)) };
    if *reason == ChannelOpenFailure::AdministrativelyProhibited {
        return Error::Refused {
            host: nearer.to_owned(),
            reason: format!("it forwards no connections to {}", hop.name),
        };
    }
    unreachable(hop, &format!("{nearer} says {reason:?}"))
}

fn unreachable(hop: &Hop, reason: &str) -> Error {
    Error::Unreachable { host: hop.name.clone(), reason: reason.to_owned() }
}

async fn known_keys(hop: &Hop) -> Result<KnownKeys, Error> {
    let hop = hop.clone();
    let read = tokio::task::spawn_blocking(move || KnownKeys::of(&hop)).await;
    read.map_err(|error| Error::Broken(error.to_string()))
}

fn client_config(keepalive: Duration, known: &KnownKeys) -> client::Config {
    let key = host_key_algorithms(known);
    let keepalive = keepalive.max(Duration::from_secs(1));
    client::Config {
        window_size: WINDOW,
        maximum_packet_size: PACKET,
        channel_buffer_size: PACKETS_AHEAD,
        nodelay: true,
        // The connection counts as dead after two silent intervals.
        keepalive_interval: Some(keepalive),
        keepalive_max: 1,
        // This detects a connection that accepts no data. It must exceed the two keepalive intervals.
        inactivity_timeout: Some(keepalive * 2 + Duration::from_secs(5)),
        preferred: Preferred {
            cipher: Cow::Borrowed(&CIPHERS),
            // A server that presents a certificate does not present its key, which may be the only known one.
            host_key_certificates: if known.has_authorities() { Cow::Owned(key.clone()) } else { Cow::Borrowed(&[]) },
            key: Cow::Owned(key),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}

/// Algorithms of host keys, those of the known keys first.
fn host_key_algorithms(known: &KnownKeys) -> Vec<Algorithm> {
    let known: Vec<_> = known.algorithms().collect();
    // An RSA key is the same with every hash.
    let is_known = |algorithm: &Algorithm| {
        let kind = if algorithm.clone().is_rsa() { &Algorithm::Rsa { hash: None } } else { algorithm };
        known.contains(kind)
    };
    // SHA-1 is insecure.
    let all = Preferred::DEFAULT.key.iter().filter(|algorithm| **algorithm != Algorithm::Rsa { hash: None });
    let (mut first, rest): (Vec<_>, Vec<_>) = all.cloned().partition(is_known);
    first.extend(rest);
    first
}

/// A login and the credentials tried so far.
struct Login<'a> {
    handle: &'a mut Handle<Verifier>,
    hop: &'a Hop,
    ending: &'a Ending,
    /// The hash for signatures by RSA keys, once the server was asked.
    rsa_hash: Option<HashAlg>,
    /// Certificates that were presented to the server.
    shown: Vec<Certificate>,
    /// The credentials that were tried or could not be, with the reason.
    tried: Vec<String>,
}

/// The holder of a private key.
enum Holder<'a> {
    Here(Arc<PrivateKey>),
    Agent(&'a mut AgentClient<UnixStream>, &'a AgentIdentity),
}

impl russh::Signer for Holder<'_> {
    type Error = AgentAuthError;

    /// Appends the signature to the signed data. The presented identity is ignored: the agent may have the key of a
    /// certificate but not the certificate.
    async fn auth_sign(
        &mut self,
        _: &AgentIdentity,
        hash: Option<HashAlg>,
        mut data: Vec<u8>,
    ) -> Result<Vec<u8>, AgentAuthError> {
        let key = match self {
            Self::Here(key) => key,
            Self::Agent(agent, identity) => return Ok(agent.sign_request(identity, hash, data).await?),
        };
        let signature = match key.key_data().rsa() {
            Some(rsa) => (rsa, hash).try_sign(&data),
            None => key.try_sign(&data),
        };
        signature.map_err(keys::Error::from)?.encode_prefixed(&mut data).map_err(keys::Error::from)?;
        Ok(data)
    }
}

async fn authenticate(handle: &mut Handle<Verifier>, hop: &Hop, ending: &Ending) -> Result<(), Error> {
    let mut agent = match &hop.agent {
        Some(socket) => AgentClient::connect_uds(socket).await.ok(),
        None => None,
    };
    let mut held = match &mut agent {
        Some(agent) => agent.request_identities().await.unwrap_or_default(),
        None => Vec::new(),
    };
    // A server limits the number of keys, and one that needs certificates accepts no plain key.
    held.sort_by_key(|one| matches!(one, AgentIdentity::PublicKey { .. }));
    let mut login = Login { handle, hop, ending, rsa_hash: None, shown: Vec::new(), tried: Vec::new() };
    for file in &hop.keys {
        match load(file).await {
            Loaded::Key(key) => {
                if login.with_key(key, file).await? {
                    return Ok(());
                }
            }
            Loaded::ForAgent(public, what) => {
                let (of_it, others) =
                    held.into_iter().partition(|one| public.as_ref().is_some_and(|key| is_of(one, key)));
                held = others;
                match &mut agent {
                    Some(agent) if !of_it.is_empty() => {
                        if login.with_agent(&of_it, agent, Some(file)).await? {
                            return Ok(());
                        }
                    }
                    Some(_) | None => {
                        login.tried.push(format!("{} is {what}, and no agent has it (`ssh-add`)", file.display()))
                    }
                }
            }
            Loaded::Missing if hop.is_key_named => {
                return Err(Error::Config(format!("the key {} does not exist", file.display())));
            }
            Loaded::Missing => {}
            Loaded::Unusable(reason) => login.tried.push(format!("{}: {reason}", file.display())),
        }
    }
    if let Some(agent) = agent.as_mut().filter(|_| !hop.only_these_keys)
        && login.with_agent(&held, agent, None).await?
    {
        return Ok(());
    }
    Err(login.refused())
}

fn is_of(identity: &AgentIdentity, key: &PublicKey) -> bool {
    identity.public_key().key_data() == key.key_data()
}

impl Login<'_> {
    /// The best hash for signatures of a key; only RSA has a choice. With an old server the question takes a second.
    async fn hash(&mut self, algorithm: Algorithm) -> Result<Option<HashAlg>, Error> {
        let is_rsa = algorithm.is_rsa();
        if is_rsa && self.rsa_hash.is_none() {
            let best = self.handle.best_supported_rsa_hash().await;
            let best = best.map_err(|error| unreachable(self.hop, &text_of(&error)))?;
            // Every server since 2016 supports this one; SHA-1 is never used.
            self.rsa_hash = best.flatten().or(Some(HashAlg::Sha256));
        }
        Ok(self.rsa_hash.filter(|_| is_rsa))
    }

    async fn with_key(&mut self, key: Arc<PrivateKey>, file: &Path) -> Result<bool, Error> {
        if self.with_certificates(key.public_key().key_data(), Some(file), Holder::Here(Arc::clone(&key))).await? {
            return Ok(true);
        }
        let hash = self.hash(key.algorithm()).await?;
        let user = self.hop.user.clone();
        let answer = self.handle.authenticate_publickey(user, PrivateKeyWithHashAlg::new(key, hash)).await;
        self.after(answer.map_err(|error| text_of(&error)), &format!("the key {}", file.display()))
    }

    /// Tries identities of the agent, of one key file or of none.
    async fn with_agent(
        &mut self,
        held: &[AgentIdentity],
        agent: &mut AgentClient<UnixStream>,
        file: Option<&Path>,
    ) -> Result<bool, Error> {
        for one in held {
            let is_in = match one {
                AgentIdentity::Certificate { certificate, .. } => {
                    let what = format!("the agent's certificate {:?}", certificate.key_id());
                    self.with_certificate(certificate.clone(), &mut Holder::Agent(agent, one), &what).await?
                }
                AgentIdentity::PublicKey { key, .. } => {
                    self.with_certificates(key.key_data(), file, Holder::Agent(agent, one)).await?
                        || self.with_key_of_agent(key.clone(), agent).await?
                }
            };
            if is_in {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn with_key_of_agent(&mut self, key: PublicKey, agent: &mut AgentClient<UnixStream>) -> Result<bool, Error> {
        let what = format!("the agent's key {}", key.fingerprint(HashAlg::Sha256));
        let hash = self.hash(key.algorithm()).await?;
        let answer = self.handle.authenticate_publickey_with(self.hop.user.clone(), key, hash, agent).await;
        // The error may come from the agent.
        self.after(answer.map_err(|error| error.to_string()), &what)
    }

    /// Tries the certificates of a key: those in the configuration, and the one next to the key, as `ssh-keygen -s` and
    /// the tools of sites write it.
    async fn with_certificates(
        &mut self,
        key: &KeyData,
        file: Option<&Path>,
        mut holder: Holder<'_>,
    ) -> Result<bool, Error> {
        let beside = file.map(|file| beside(file, "-cert.pub"));
        for file in self.hop.certificates.iter().chain(&beside) {
            let Ok(certificate) = keys::load_openssh_certificate(file) else { continue };
            let what = format!("the certificate {}", file.display());
            if certificate.public_key() == key && self.with_certificate(certificate, &mut holder, &what).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Tries a certificate. The library's own method would use SHA-1 for RSA keys.
    async fn with_certificate(
        &mut self,
        certificate: Certificate,
        holder: &mut Holder<'_>,
        what: &str,
    ) -> Result<bool, Error> {
        if self.shown.contains(&certificate) {
            return Ok(false);
        }
        self.shown.push(certificate.clone());
        let hash = self.hash(certificate.algorithm()).await?;
        let user = self.hop.user.clone();
        let answer = self.handle.authenticate_certificate_with(user, certificate, hash, holder).await;
        self.after(answer.map_err(|error| error.to_string()), what)
    }

    fn after(&mut self, answer: Result<AuthResult, String>, what: &str) -> Result<bool, Error> {
        match answer {
            Ok(AuthResult::Success) => Ok(true),
            Ok(AuthResult::Failure { partial_success: true, .. }) => {
                Err(self.refuses(format!("{what} alone is not enough, it requires a second proof")))
            }
            Ok(AuthResult::Failure { remaining_methods, .. }) if !remaining_methods.is_empty() => {
                self.tried.push(format!("{what} is not accepted"));
                Ok(false)
            }
            Err(reason) if !self.handle.is_closed() => {
                self.tried.push(format!("{what}: {reason}"));
                Ok(false)
            }
            // The connection has ended.
            Ok(AuthResult::Failure { .. }) | Err(_) => Err(match self.ending.get() {
                Some(End::Said(reason)) => self.refuses(format!("{what} was the last: {reason}")),
                Some(End::Failed(_)) | None => unreachable(self.hop, &self.ending.reason()),
            }),
        }
    }

    fn refuses(&self, reason: String) -> Error {
        Error::Refused { host: self.hop.name.clone(), reason }
    }

    fn refused(&self) -> Error {
        let tried = if self.tried.is_empty() { "no key was found".to_owned() } else { self.tried.join("; ") };
        self.refuses(format!("{} cannot log in: {tried}", self.hop.user))
    }
}

/// The content of a key file.
enum Loaded {
    Key(Arc<PrivateKey>),
    /// Only an agent can sign with it: its public key, if readable, and the kind of the file's content.
    ForAgent(Option<PublicKey>, &'static str),
    Missing,
    Unusable(String),
}

async fn load(file: &Path) -> Loaded {
    let text = match tokio::fs::read_to_string(file).await {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Loaded::Missing,
        Err(error) => return Loaded::Unusable(error.to_string()),
    };
    match keys::decode_secret_key(&text, None) {
        Ok(key) => Loaded::Key(Arc::new(key)),
        Err(keys::Error::KeyIsEncrypted) => Loaded::ForAgent(public_of(&text, file), "encrypted"),
        Err(error) => match PublicKey::from_openssh(text.trim()) {
            Ok(public) => Loaded::ForAgent(Some(public), "a public key"),
            Err(_) => Loaded::Unusable(error.to_string()),
        },
    }
}

/// The public half of an encrypted key.
fn public_of(text: &str, file: &Path) -> Option<PublicKey> {
    let in_file = PrivateKey::from_openssh(text).ok().map(|key| key.public_key().clone());
    in_file.or_else(|| keys::load_public_key(beside(file, ".pub")).ok())
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
