//! A private OpenSSH server, which a test may break.

use std::path::{Path, PathBuf};
use std::process::Command;

use baton_common::config::Ssh;

use crate::services::folder;

/// A private server, killed on drop.
#[derive(Debug)]
pub struct Sshd {
    folder: tempfile::TempDir,
    port: u16,
}

impl Sshd {
    /// Starts a server.
    ///
    /// # Panics
    /// If OpenSSH is not installed.
    pub fn start() -> Self {
        Self::with("")
    }

    /// Starts a server with additional lines of its configuration, separated by semicolons.
    ///
    /// # Panics
    /// If OpenSSH is not installed.
    pub fn with(extra: &str) -> Self {
        let folder = folder("baton-sshd-");
        run(folder.path(), &["start"], extra);
        let port = std::fs::read_to_string(folder.path().join("port")).expect("the script has written it");
        Self { port: port.trim().parse().expect("a port"), folder }
    }

    /// Returns a file of its folder; see `tests/services/sshd.sh`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns `host:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the settings for a connection, without the machine's own configuration.
    pub fn section(&self) -> Ssh {
        self.section_by("127.0.0.1", self.port)
    }

    /// Returns the settings for another address, such as that of a proxy.
    pub fn section_by(&self, host: &str, port: u16) -> Ssh {
        let quoted = |name: &str| format!("'{}'", self.file(name).display());
        self.know(&format!("[{host}]:{port}"), "host_ed25519.pub");
        let text = format!(
            "ssh.it = {{host = '{host}', port = {port}, key = {}, known_hosts = {}, config = '/dev/null'}}",
            quoted("id_ed25519"),
            quoted("known_hosts")
        );
        let path = self.file("baton.toml");
        std::fs::write(&path, text).expect("own folder");
        let mut config = baton_common::config::Config::load(Some(&path)).expect("the configuration is valid");
        config.ssh.remove("it").expect("the section exists")
    }

    /// Adds a key to the known hosts.
    pub fn know(&self, host: &str, key: &str) {
        let known = std::fs::read_to_string(self.file("known_hosts")).unwrap_or_default();
        let key = std::fs::read_to_string(self.file(key)).expect("a public key");
        std::fs::write(self.file("known_hosts"), format!("{known}{host} {key}")).expect("own folder");
    }

    /// Counts the occurrences of this text in its log.
    pub fn logged(&self, text: &str) -> usize {
        std::fs::read_to_string(self.file("sshd.log")).unwrap_or_default().matches(text).count()
    }

    /// Kills it with all its connections.
    pub fn kill(&self) {
        run(self.folder.path(), &["kill"], "");
    }

    /// Starts it again with the same keys and port, and other lines of its configuration.
    pub fn start_again(&self, extra: &str) {
        run(self.folder.path(), &["start"], extra);
    }

    /// Creates a disk of one megabyte; needs root.
    pub fn small_disk(&self) -> PathBuf {
        run(self.folder.path(), &["disk", "1"], "");
        self.file("disk")
    }

    /// Authorizes another user key.
    pub fn let_in(&self, key: &Path) {
        let known = std::fs::read_to_string(self.file("authorized_keys")).expect("the script has written it");
        let key = std::fs::read_to_string(key).expect("a public key");
        std::fs::write(self.file("authorized_keys"), known + &key).expect("own folder");
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        run(self.folder.path(), &["end"], "");
    }
}

fn run(folder: &Path, arguments: &[&str], extra: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("services/sshd.sh");
    let mut command = Command::new(script);
    command.arg(arguments[0]).arg(folder).args(&arguments[1..]).env("SSHD_EXTRA", extra);
    assert!(command.status().expect("the script exists").success(), "sshd.sh {arguments:?}");
}
