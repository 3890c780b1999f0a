//! Logins to a real OpenSSH server, and which host keys Baton trusts.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton_common::config::Ssh;
use baton_tests::eventually;
use baton_tests::sshd::Sshd;
use baton_worker::transport::{Error, connect};

const LIMIT: Duration = Duration::from_secs(20);

async fn works(section: &Ssh) {
    let session = connect(section).await.unwrap();
    assert_eq!(session.exec("echo here", b"", LIMIT).await.unwrap().ok().unwrap(), b"here\n");
}

fn key_gen(arguments: &[&str]) -> String {
    let output = Command::new("ssh-keygen").args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fingerprint(file: &Path) -> String {
    key_gen(&["-lf", file.to_str().unwrap()]).split(' ').nth(1).unwrap().to_owned()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_unknown_host_is_an_error_with_its_fingerprint_and_what_to_do() {
    let sshd = Sshd::start();
    let section = sshd.section();
    let known = std::fs::read_to_string(sshd.file("known_hosts")).unwrap();
    std::fs::write(sshd.file("known_hosts"), "").unwrap();
    let error = connect(&section).await.unwrap_err();
    assert!(
        matches!(&error, Error::UnknownHostKey { fingerprint: shown, remedy, .. }
        if *shown == fingerprint(&sshd.file("host_ed25519.pub")) && remedy.contains("ssh-keyscan -p ")),
        "{error}"
    );
    assert!(!error.is_of_transport());
    assert_eq!(std::fs::read(sshd.file("known_hosts")).unwrap(), b"", "no host key is added");
    assert_eq!(sshd.logged("Accepted"), 0, "no login to an unknown host");

    std::fs::write(sshd.file("known_hosts"), known).unwrap();
    key_gen(&["-qHf", sshd.file("known_hosts").to_str().unwrap()]);
    assert!(std::fs::read_to_string(sshd.file("known_hosts")).unwrap().starts_with("|1|"));
    works(&section).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn another_host_key_is_an_error_that_names_the_line() {
    let sshd = Sshd::start();
    let section = sshd.section();
    let host = format!("[127.0.0.1]:{}", section.port.unwrap());
    std::fs::write(sshd.file("known_hosts"), "# ours\n").unwrap();
    sshd.know(&host, "id_stranger.pub");
    let error = connect(&section).await.unwrap_err();
    assert!(
        matches!(&error, Error::HostKeyChanged { file, line: 2, .. } if *file == sshd.file("known_hosts")),
        "{error}"
    );
    assert!(!error.is_of_transport());
    assert_eq!(sshd.logged("Accepted"), 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_authority_that_is_known_vouches_for_a_host() {
    let sshd = Sshd::start();
    let section = sshd.section();
    let (authority, other) = (sshd.file("authority"), sshd.file("other"));
    for file in [&authority, &other] {
        key_gen(&["-qt", "ed25519", "-N", "", "-f", file.to_str().unwrap()]);
    }
    let certificate = sshd.file("host_ed25519-cert.pub");
    // The server presents its key with a certificate by this authority, made with these options.
    let show = |by: &Path, options: &[&str]| {
        let public = sshd.file("host_ed25519.pub");
        let always = ["-qs", by.to_str().unwrap(), "-I", "login"];
        key_gen(&[&always, options, &[public.to_str().unwrap()]].concat());
        sshd.kill();
        sshd.start_again(&format!("HostCertificate {}", certificate.display()));
    };
    let known = std::fs::read_to_string(sshd.file("known_hosts")).unwrap();
    let know = |lines: &[&str]| {
        std::fs::write(sshd.file("known_hosts"), "").unwrap();
        for line in lines {
            sshd.know(line, "authority.pub");
        }
    };
    let host = format!("[127.0.0.1]:{}", section.port.unwrap());
    show(&authority, &["-h", "-n", "login.example,127.0.0.1", "-V", "-1h:+1h"]);
    for hosts in ["@cert-authority 127.0.0.*", "@cert-authority *", &format!("@cert-authority other,{host}")] {
        know(&[hosts]);
        works(&section).await;
    }
    know(&["@cert-authority *,!127.0.0.1"]);
    assert!(matches!(connect(&section).await, Err(Error::UnknownHostKey { .. })));
    know(&["@cert-authority *", "@revoked *"]);
    assert!(matches!(connect(&section).await, Err(Error::UnknownHostKey { remedy, .. }) if remedy.contains("line 2")));
    know(&["@cert-authority *"]);
    sshd.know("@revoked *", "host_ed25519.pub");
    assert!(matches!(connect(&section).await, Err(Error::UnknownHostKey { remedy, .. }) if remedy.contains("line 2")));

    know(&["@cert-authority *"]);
    for (options, reason) in [
        (&["-h", "-n", "login.example"][..], "is for [\"login.example\"]"),
        (&["-h"], "is for []"),
        (&["-n", "127.0.0.1"], "is one for users"),
        (&["-h", "-n", "127.0.0.1", "-V", "-2h:-1h"], "is not valid now"),
        (&["-h", "-n", "127.0.0.1", "-V", "+1h:+2h"], "is not valid now"),
        (&["-h", "-n", "127.0.0.1", "-O", "critical:x@y=z"], "x@y"),
    ] {
        show(&authority, options);
        let error = connect(&section).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::UnknownHostKey { .. }) && text.contains(reason), "{options:?}: {text}");
        assert!(text.contains(&fingerprint(&sshd.file("host_ed25519.pub"))) && text.contains("line 1"), "{text}");
    }

    // With a certificate of another authority, the host's key is checked.
    show(&other, &["-h", "-n", "127.0.0.1"]);
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(&error, Error::UnknownHostKey { remedy, .. } if remedy.contains("ssh-keyscan")), "{error}");
    std::fs::write(sshd.file("known_hosts"), known).unwrap();
    sshd.know("@cert-authority *", "authority.pub");
    works(&section).await;
    // A server without a certificate presents its key.
    sshd.kill();
    sshd.start_again("");
    works(&section).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_server_is_asked_for_the_kind_of_key_that_is_known() {
    let sshd = Sshd::start();
    let section = sshd.section();
    let host = format!("[127.0.0.1]:{}", section.port.unwrap());
    std::fs::write(sshd.file("known_hosts"), "").unwrap();
    sshd.know(&host, "host_ecdsa.pub");
    works(&section).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn keys_of_every_kind_are_let_in_and_others_are_not() {
    let sshd = Sshd::start();
    let mut section = sshd.section();
    for name in ["id_ed25519", "id_rsa"] {
        section.key = Some(sshd.file(name));
        works(&section).await;
    }
    assert_eq!(sshd.logged("Accepted publickey"), 2);
    section.key = Some(sshd.file("id_stranger"));
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && !error.is_of_transport(), "{error}");
    assert!(error.to_string().contains("id_stranger is not accepted"), "{error}");
    section.key = Some(sshd.file("missing"));
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Config(_)) && error.to_string().contains("missing"), "{error}");
    section.key = Some(sshd.file("id_ed25519"));
    section.user = Some("nobody-of-that-name".to_owned());
    assert!(matches!(connect(&section).await, Err(Error::Refused { .. })));
}

/// A server that accepts only certificates of an authority.
struct CertifiedOnly {
    sshd: Sshd,
    authority: PathBuf,
}

impl CertifiedOnly {
    fn start(extra: &str) -> Self {
        let sshd = Sshd::start();
        let authority = sshd.file("authority");
        key_gen(&["-qt", "ed25519", "-N", "", "-f", authority.to_str().unwrap()]);
        sshd.kill();
        sshd.start_again(&format!("AuthorizedKeysFile none;TrustedUserCAKeys {}.pub;{extra}", authority.display()));
        Self { sshd, authority }
    }

    /// Writes a certificate of a user's key next to the key.
    fn certify(&self, key: &str) -> PathBuf {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        let public = self.sshd.file(&format!("{key}.pub"));
        let authority = self.authority.to_str().unwrap();
        key_gen(&["-qs", authority, "-I", "us", "-n", user.trim(), public.to_str().unwrap()]);
        self.sshd.file(&format!("{key}-cert.pub"))
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_certificate_beside_the_key_is_shown() {
    let server = CertifiedOnly::start("");
    let mut section = server.sshd.section();
    for key in ["id_stranger", "id_rsa"] {
        section.key = Some(server.sshd.file(key));
        assert!(matches!(connect(&section).await, Err(Error::Refused { .. })));
        server.certify(key);
        works(&section).await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_certificate_that_openssh_names_is_shown_with_its_key() {
    let server = CertifiedOnly::start("MaxAuthTries 1");
    let mut section = server.sshd.section();
    let (config, elsewhere) = (server.sshd.file("config"), server.sshd.file("certificate"));
    std::fs::rename(server.certify("id_rsa"), &elsewhere).unwrap();
    std::fs::write(&config, format!("CertificateFile {}\n", elsewhere.display())).unwrap();
    section.config = Some(config);
    section.key = Some(server.sshd.file("id_rsa"));
    works(&section).await;
    section.key = Some(server.sshd.file("id_ed25519"));
    let error = connect(&section).await.unwrap_err();
    assert!(!error.to_string().contains("certificate"), "the certificate is for another key: {error}");
}

/// A private agent for the test.
struct Agent {
    process: Child,
    socket: PathBuf,
}

impl Agent {
    async fn start(sshd: &Sshd) -> Self {
        let socket = sshd.file("agent");
        let mut agent = Command::new("ssh-agent");
        let process = agent.args(["-D", "-a"]).arg(&socket).stdout(Stdio::null()).spawn().unwrap();
        eventually("the agent listens", LIMIT, async || if socket.exists() { Ok(()) } else { Err("no") }).await;
        Self { process, socket }
    }

    fn add(&self, key: &Path) {
        let mut add = Command::new("ssh-add");
        assert!(add.arg("-q").arg(key).env("SSH_AUTH_SOCK", &self.socket).status().unwrap().success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_encrypted_key_needs_an_agent_that_has_it() {
    let sshd = Sshd::start();
    let mut section = sshd.section();
    section.key = Some(sshd.file("id_locked"));
    section.config = Some(sshd.file("config"));
    std::fs::write(sshd.file("config"), "IdentityAgent none\n").unwrap();
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(error.to_string().contains("id_locked is encrypted, and no agent has it"), "{error}");

    let agent = Agent::start(&sshd).await;
    std::fs::write(sshd.file("config"), format!("IdentityAgent {}\n", agent.socket.display())).unwrap();
    agent.add(&sshd.file("id_stranger"));
    let error = connect(&section).await.unwrap_err();
    assert!(error.to_string().contains("no agent has it"), "{error}");
    let open = sshd.file("id_open");
    std::fs::copy(sshd.file("id_locked"), &open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o600)).unwrap();
    key_gen(&["-qpP", "sesame", "-N", "", "-f", open.to_str().unwrap()]);
    agent.add(&open);
    works(&section).await;
    assert_eq!(sshd.logged("Accepted publickey"), 1);
    assert_eq!(sshd.logged("Failed publickey"), 0, "no other key was offered");

    section.key = Some(sshd.file("id_locked.pub"));
    works(&section).await;

    // Without a named key, the agent offers all its keys.
    section.key = None;
    works(&section).await;
    agent.add(&sshd.file("id_rsa"));
    Command::new("ssh-add").arg("-qd").arg(&open).env("SSH_AUTH_SOCK", &agent.socket).status().unwrap();
    works(&section).await;
    assert_eq!(sshd.logged("Accepted publickey"), 4);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_certificate_of_the_agent_is_shown_before_its_key() {
    // After one rejected key, the server accepts no other.
    let server = CertifiedOnly::start("MaxAuthTries 1");
    let sshd = &server.sshd;
    let mut section = sshd.section();
    let agent = Agent::start(sshd).await;
    std::fs::write(sshd.file("config"), format!("IdentityAgent {}\nIdentityFile none\n", agent.socket.display()))
        .unwrap();
    section.config = Some(sshd.file("config"));
    agent.add(&sshd.file("id_ed25519"));
    let certificate = server.certify("id_rsa");
    agent.add(&sshd.file("id_rsa"));
    std::fs::remove_file(&certificate).unwrap();
    for key in [None, Some("id_rsa.pub")] {
        section.key = key.map(|key| sshd.file(key));
        works(&section).await;
    }

    // The agent has only the key; its certificate is next to the key file.
    Command::new("ssh-add").arg("-qD").env("SSH_AUTH_SOCK", &agent.socket).status().unwrap();
    agent.add(&sshd.file("id_rsa"));
    server.certify("id_rsa");
    let key = sshd.file("id_rsa");
    key_gen(&["-qpP", "", "-N", "sesame", "-f", key.to_str().unwrap()]);
    section.key = Some(key);
    works(&section).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_server_that_has_heard_enough_refuses() {
    let sshd = Sshd::with("MaxAuthTries 1");
    let mut section = sshd.section();
    section.key = Some(sshd.file("id_stranger"));
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains("Too many"), "{error}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_key_that_is_only_the_first_of_two_proofs_is_told_so() {
    let sshd = Sshd::with("AuthenticationMethods publickey,publickey");
    let error = connect(&sshd.section()).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains("second proof"), "{error}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_not_said_is_what_openssh_does() {
    let sshd = Sshd::start();
    let mut section = sshd.section();
    let config = sshd.file("ssh_config");
    section.config = Some(config.clone());
    section.host = "login".to_owned();
    (section.port, section.key, section.known_hosts) = (None, None, None);
    works(&section).await;

    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}  HostKeyAlias other\n")).unwrap();
    assert!(matches!(connect(&section).await, Err(Error::UnknownHostKey { host, .. }) if host == "other"));
    sshd.know("other", "host_ed25519.pub");
    works(&section).await;

    std::fs::write(&config, "Nonsense yes\n").unwrap();
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Config(_)) && error.to_string().contains("nonsense"), "{error}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn machines_on_the_way_lead_there_and_are_checked_as_well() {
    let (first, second, target) = (Sshd::start(), Sshd::start(), Sshd::start());
    let mut section = target.section();
    for sshd in [&first, &second] {
        sshd.let_in(&target.file("id_ed25519.pub"));
    }
    section.jump = Some(format!("{},{}", first.address(), second.address()));
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::UnknownHostKey { .. }), "{error}");
    let bracketed = |sshd: &Sshd| format!("[127.0.0.1]:{}", sshd.section().port.unwrap());
    for (name, sshd) in [("first.pub", &first), ("second.pub", &second)] {
        assert!(matches!(connect(&section).await, Err(Error::UnknownHostKey { host, .. }) if host == bracketed(sshd)));
        std::fs::copy(sshd.file("host_ed25519.pub"), target.file(name)).unwrap();
        target.know(&bracketed(sshd), name);
    }
    works(&section).await;
    assert_eq!(target.logged("Accepted publickey"), 1);

    // With OpenSSH's configuration: the first host is the jump host of the second.
    let config = target.file("config");
    let host = |name: &str, sshd: &Sshd, jump: &str| {
        let port = sshd.section().port.unwrap();
        format!("Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  ProxyJump {jump}\n")
    };
    let text = host("one", &first, "none") + &host("two", &second, "one") + &host("three", &target, "two");
    std::fs::write(&config, text).unwrap();
    section.config = Some(config);
    (section.host, section.port, section.jump) = ("three".to_owned(), None, None);
    let session = connect(&section).await.unwrap();
    session.exec("true", b"", LIMIT).await.unwrap().ok().unwrap();
    // The first host accepted a login before the second was known, too.
    assert_eq!([&first, &second, &target].map(|sshd| sshd.logged("Accepted publickey")), [3, 2, 2]);
    first.kill();
    assert!(matches!(session.exec("true", b"", LIMIT).await, Err(Error::Broken(_))));
    first.start_again("AllowTcpForwarding no");
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    first.kill();
    first.start_again("");
    target.kill();
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }) && error.is_of_transport(), "{error}");
}

/// An OpenSSH configuration of a host `target` with a `ProxyCommand`.
struct ProxyConfig {
    file: PathBuf,
    /// A program that connects to a host: the arguments are host, port, and the seconds that it stays after the end.
    relay: String,
    /// The file with its pid.
    pid: PathBuf,
}

impl ProxyConfig {
    fn beside(sshd: &Sshd) -> Self {
        let (pid, relay) = (sshd.file("pid"), sshd.file("relay"));
        let script = format!(
            "#!/bin/bash\ntrap '' HUP PIPE\necho $$ > {}\nexec 3<>\"/dev/tcp/$1/$2\" || exit 1\ncat <&3 &\ncat >&3\nsleep $3\n",
            pid.display()
        );
        std::fs::write(&relay, script).unwrap();
        std::fs::set_permissions(&relay, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { file: sshd.file("proxied"), relay: relay.display().to_string(), pid }
    }

    fn write(&self, sshd: &Sshd, command: &str) {
        let port = sshd.section().port.unwrap();
        let text = format!("Host target\n  HostName 127.0.0.1\n  Port {port}\n  ProxyCommand {command}\n");
        std::fs::write(&self.file, text).unwrap();
    }

    /// Whether the program whose pid was written last is running.
    fn is_running(&self) -> bool {
        let pid = std::fs::read_to_string(&self.pid).unwrap();
        std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn section(&self, sshd: &Sshd) -> Ssh {
        Ssh { host: "target".to_owned(), port: None, config: Some(self.file.clone()), ..sshd.section() }
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_proxy_command_leads_there_and_ends_with_the_session() {
    let (gate, target) = (Sshd::start(), Sshd::start());
    gate.let_in(&target.file("id_ed25519.pub"));
    let config = ProxyConfig::beside(&target);
    let section = config.section(&target);
    let through_gate = format!("exec ssh -F {} -W %h:%p login", gate.file("ssh_config").display());
    for command in [
        format!("sh -c 'echo $$ > {}; {through_gate}'", config.pid.display()),
        // This program stays after its connection has ended.
        format!("{} %h %p 60", config.relay),
    ] {
        config.write(&target, &command);
        let session = connect(&section).await.unwrap();
        let output = session.exec("head -c 3000000 /dev/zero", b"", LIMIT).await.unwrap();
        assert_eq!(output.ok().unwrap().len(), 3_000_000);
        assert!(config.is_running());
        drop(session);
        eventually("the command has ended", LIMIT, async || if config.is_running() { Err(&command) } else { Ok(()) })
            .await;
    }
    assert_eq!((gate.logged("Accepted publickey"), target.logged("Accepted publickey")), (1, 2));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_proxy_command_that_leads_nowhere_says_why() {
    let target = Sshd::start();
    let config = ProxyConfig::beside(&target);
    let section = config.section(&target);
    for (command, expected) in [
        ("sh -c 'echo no way to %h, %n >&2; exit 3'", "has ended: no way to 127.0.0.1, target"),
        ("sh -c 'sleep 5 > /dev/null & exit 4'", "has ended: exit code 4"),
        ("sh -c 'yes >&2 & sleep 1; kill -KILL $$'", "has ended: y"),
        ("sh -c 'kill -KILL $$'", "has ended: signal KILL"),
        ("/there/is/none", "not found"),
        ("echo HTTP/1.1 400 Bad Request", "has ended: exit code 0"),
    ] {
        config.write(&target, command);
        let error = connect(&section).await.unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }) && error.is_of_transport(), "{command}: {error}");
        let text = error.to_string();
        assert!(text.contains("ProxyCommand") && text.contains(expected), "{command}: {text}");
    }
    config.write(&target, "false\n  ProxyUseFdpass yes");
    assert!(matches!(connect(&section).await, Err(Error::Config(text)) if text.contains("ProxyUseFdpass")));
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_proxy_command_leads_to_the_nearest_machine_only() {
    let (gate, target) = (Sshd::start(), Sshd::start());
    gate.let_in(&target.file("id_ed25519.pub"));
    let config = ProxyConfig::beside(&target);
    let mut section = config.section(&target);
    config.write(&target, "false");
    assert!(connect(&section).await.is_err());
    // The section's own setting has precedence.
    section.jump = Some("none".to_owned());
    works(&section).await;

    let port = gate.section().port.unwrap();
    std::fs::copy(gate.file("host_ed25519.pub"), target.file("gate.pub")).unwrap();
    target.know(&format!("[127.0.0.1]:{port}"), "gate.pub");
    let host = format!("Host gate\n  HostName 127.0.0.1\n  Port {port}\n  ProxyCommand {} %h %p 60\n", config.relay);
    std::fs::write(&config.file, std::fs::read_to_string(&config.file).unwrap() + &host).unwrap();
    section.jump = Some("gate".to_owned());
    works(&section).await;
    assert_eq!((gate.logged("Accepted publickey"), target.logged("Accepted publickey")), (1, 2));
    gate.kill();
    let error = connect(&section).await.unwrap_err();
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_server_that_takes_no_more_connections_is_tried_again_later() {
    let sshd = Sshd::with("MaxStartups 1");
    let section = sshd.section();
    let waiting = tokio::net::TcpStream::connect(sshd.address()).await.unwrap();
    eventually("the server has seen it", LIMIT, async || match sshd.logged("Connection from") {
        0 => Err("nothing"),
        _ => Ok(()),
    })
    .await;
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }) && error.is_of_transport(), "{error}");
    drop(waiting);
    eventually("the server accepts connections", LIMIT, async || connect(&section).await.map(drop)).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_no_ssh_server_is_unreachable() {
    let sshd = Sshd::start();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let section = sshd.section_by("127.0.0.1", listener.local_addr().unwrap().port());
    let answer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    };
    let (connected, ()) = tokio::join!(connect(&section), answer);
    let error = connected.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    drop(listener);
    let error = connect(&section).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { reason, .. } if reason.contains("refused")), "{error}");
    let section = sshd.section_by("no-such-host.invalid", 22);
    assert!(matches!(connect(&section).await, Err(Error::Unreachable { .. })));
}
