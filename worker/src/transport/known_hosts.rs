//! Verification of host keys: by the files of known hosts, or by certificates of the authorities in them. Nothing is ever
//! added to the files. The reader of the library is not used, since it rejects a whole file for one malformed line.

use std::path::PathBuf;

use hmac::{Hmac, KeyInit, Mac};
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::known_hosts::HostPatterns;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, HashAlg, PublicKey, parse_public_key_base64};
use sha1::Sha1;

use super::Error;
use super::config::{Hop, PORT};

/// The marker of a revoked key in files of known hosts. It overrides every other line.
const REVOKED: &str = "@revoked";

/// The marker of an authority, whose host certificates are trusted.
const AUTHORITY: &str = "@cert-authority";

/// A key in a file.
struct Known {
    key: PublicKey,
    file: PathBuf,
    line: usize,
}

/// The known keys of a host.
pub(super) struct KnownKeys {
    /// Its name in the files.
    host: String,
    /// Its name in certificates.
    name: String,
    files: Vec<PathBuf>,
    keys: Vec<Known>,
    authorities: Vec<Known>,
    /// Revoked keys of all hosts.
    revoked: Vec<Known>,
}

impl KnownKeys {
    /// Reads the files. Missing files and malformed lines are skipped.
    pub(super) fn of(hop: &Hop) -> Self {
        // OpenSSH looks up an alias without a port.
        let (name, port) = match &hop.alias {
            Some(alias) => (alias.as_str(), PORT),
            None => (hop.name.as_str(), hop.port),
        };
        let host = if port == PORT { name.to_owned() } else { format!("[{name}]:{port}") };
        let (mut keys, mut authorities, mut revoked) = (Vec::new(), Vec::new(), Vec::new());
        for file in &hop.known_hosts {
            let text = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
            for (i, line) in text.lines().enumerate() {
                let known = |key| Known { key, file: file.clone(), line: i + 1 };
                match line.split_whitespace().collect::<Vec<_>>()[..] {
                    [REVOKED, _, _, key, ..] => revoked.extend(parse_public_key_base64(key).ok().map(known)),
                    // As in OpenSSH, an authority for the host's name covers all its ports.
                    [AUTHORITY, hosts, _, key, ..] if is_named(hosts, &[&host, name]) => {
                        authorities.extend(parse_public_key_base64(key).ok().map(known));
                    }
                    // A comment or an unknown marker.
                    [first, ..] if first.starts_with(['#', '@']) => {}
                    [hosts, _, key, ..] if is_named(hosts, &[&host]) => {
                        keys.extend(parse_public_key_base64(key).ok().map(known));
                    }
                    _ => {}
                }
            }
        }
        Self { host, name: name.to_owned(), files: hop.known_hosts.clone(), keys, authorities, revoked }
    }

    /// The algorithms of the known keys, to request from the server.
    pub(super) fn algorithms(&self) -> impl Iterator<Item = russh::keys::Algorithm> {
        self.keys.iter().map(|known| known.key.algorithm())
    }

    /// Whether a certificate could be trusted, and so is worth requesting from the server.
    pub(super) fn has_authorities(&self) -> bool {
        !self.authorities.is_empty()
    }

    /// Verifies the key that a host presented.
    pub(super) fn check(&self, shown: &PublicKey) -> Result<(), Error> {
        let key = shown.key_data();
        self.check_revoked(key)?;
        if find(&self.keys, key).is_some() {
            return Ok(());
        }
        let (host, fingerprint) = (self.host.clone(), fingerprint(key));
        // A host of several machines has several keys of one algorithm, and keys of other algorithms may have been added.
        match self.keys.iter().find(|known| known.key.algorithm() == shown.algorithm()) {
            Some(known) => Err(Error::HostKeyChanged { host, fingerprint, file: known.file.clone(), line: known.line }),
            None => Err(Error::UnknownHostKey { remedy: self.remedy(), host, fingerprint }),
        }
    }

    /// Verifies a certificate. If its authority is unknown, only the key in it counts.
    pub(super) fn check_certificate(&self, shown: &Certificate) -> Result<(), Error> {
        self.check_revoked(shown.signature_key())?;
        let Some(authority) = find(&self.authorities, shown.signature_key()) else {
            return self.check(&PublicKey::new(shown.public_key().clone(), ""));
        };
        self.check_revoked(shown.public_key())?;
        let Err(reason) = self.is_vouched_for(shown) else { return Ok(()) };
        let remedy = format!(
            "its certificate by the authority in {}, line {}, {reason}; ask the site to renew it",
            authority.file.display(),
            authority.line
        );
        Err(Error::UnknownHostKey { host: self.host.clone(), fingerprint: fingerprint(shown.public_key()), remedy })
    }

    /// Checks a certificate by the rules of OpenSSH's PROTOCOL.certkeys. Unlike there, one without principals, which is
    /// valid for every host, is not trusted.
    fn is_vouched_for(&self, shown: &Certificate) -> Result<(), String> {
        if shown.cert_type() != CertType::Host {
            return Err("is one for users".to_owned());
        }
        let names = shown.valid_principals();
        if !names.iter().any(|pattern| matches(pattern.as_bytes(), self.name.as_bytes())) {
            return Err(format!("is for {names:?}"));
        }
        if let Some((option, _)) = shown.critical_options().iter().next() {
            return Err(format!("has the unknown option {option:?}"));
        }
        let authority = shown.signature_key().fingerprint(HashAlg::Sha256);
        // This checks the validity period and the signature.
        shown.validate([&authority]).map_err(|_| "is not valid now".to_owned())
    }

    fn check_revoked(&self, key: &KeyData) -> Result<(), Error> {
        let Some(known) = find(&self.revoked, key) else { return Ok(()) };
        let remedy = format!("it is revoked in {}, line {}", known.file.display(), known.line);
        Err(Error::UnknownHostKey { host: self.host.clone(), fingerprint: fingerprint(key), remedy })
    }

    fn remedy(&self) -> String {
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        let scan = match self.host.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
            Some((name, port)) => format!("ssh-keyscan -p {port} {name}"),
            None => format!("ssh-keyscan {}", self.host),
        };
        let file = files.first().map_or("~/.ssh/known_hosts", String::as_str);
        format!(
            "compare it with the fingerprint that the site publishes, then log in once by `ssh`, or add the line that `{scan}` \
             prints to {file}"
        )
    }
}

fn find<'a>(known: &'a [Known], key: &KeyData) -> Option<&'a Known> {
    known.iter().find(|known| known.key.key_data() == key)
}

fn fingerprint(key: &KeyData) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Whether the first word of a line, patterns with `*` and `?` or a hashed name, matches one of a host's names. A
/// matching pattern with `!` excludes the host.
fn is_named(hosts: &str, names: &[&str]) -> bool {
    if hosts.starts_with('|') {
        return names.iter().any(|name| is_hash_of(hosts, name));
    }
    let is_one = |pattern: &str| names.iter().any(|name| matches(pattern.as_bytes(), name.as_bytes()));
    let mut is_named = false;
    for pattern in hosts.split(',') {
        match pattern.strip_prefix('!') {
            Some(pattern) if is_one(pattern) => return false,
            Some(_) => {}
            None => is_named |= is_one(pattern),
        }
    }
    is_named
}

/// Whether this is `|1|SALT|HASH` of a name, as `ssh-keygen -H` writes it: an HMAC-SHA1 with the salt as its key.
fn is_hash_of(hashed: &str, name: &str) -> bool {
    let Ok(HostPatterns::HashedName { salt, hash }) = hashed.parse() else { return false };
    let Ok(hmac) = Hmac::<Sha1>::new_from_slice(&salt) else { return false };
    hmac.chain_update(name.to_ascii_lowercase()).verify_slice(&hash).is_ok()
}

fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| matches(rest, &name[skipped..])),
        ([b'?', rest @ ..], [_, name @ ..]) => matches(rest, name),
        ([one, rest @ ..], [other, name @ ..]) => one.eq_ignore_ascii_case(other) && matches(rest, name),
        ([], [_, ..]) | ([_, ..], []) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
    const OTHER: &str = "AAAAC3NzaC1lZDI1NTE5AAAAILIG2T/B0l0gaqj3puu510tu9N1OkQ4znY3LYuEm5zCF";

    /// OpenSSH's hash of `[a.example]:2222`.
    const HASHED: &str = "|1|c2FsdHNhbHRzYWx0c2FsdHNhbHQ=|qK+Vxm2lQXGOxWmIsoVxUZCGSPg=";

    fn check(text: impl AsRef<[u8]>, name: &str, port: u16) -> Result<(), Error> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("known_hosts");
        std::fs::write(&file, text).unwrap();
        let hop = Hop {
            name: name.to_owned(),
            port,
            user: String::new(),
            alias: None,
            known_hosts: vec![folder.path().join("missing"), file],
            keys: Vec::new(),
            certificates: Vec::new(),
            is_key_named: false,
            only_these_keys: false,
            agent: None,
        };
        KnownKeys::of(&hop).check(&parse_public_key_base64(KEY).unwrap())
    }

    #[test]
    fn a_key_is_known_only_for_its_host() {
        let line = |hosts: &str| format!("{hosts} ssh-ed25519 {KEY}\n");
        assert!(check(line("a.example"), "a.example", 22).is_ok());
        assert!(check(line("A.example,10.0.0.1"), "10.0.0.1", 22).is_ok());
        assert!(check(line("[a.example]:2222"), "a.example", 2222).is_ok());
        assert!(check(line("*.example,!b.example"), "a.example", 22).is_ok());
        assert!(check(line("a.example").replace(' ', "\t"), "a.example", 22).is_ok());
        assert!(check(line("a.example").replace(' ', "  "), "a.example", 22).is_ok());
        assert!(check(line(HASHED), "A.example", 2222).is_ok());
        for (hosts, name, port) in [
            ("a.example", "a.example", 2222),
            ("[a.example]:2222", "a.example", 22),
            ("*.example,!b.example", "b.example", 22),
            ("@cert-authority *", "a.example", 22),
            ("#a.example", "a.example", 22),
            ("#b.example,a.example", "a.example", 22),
            ("@other,a.example", "a.example", 22),
            ("a.example,!a.example", "a.example", 22),
            (HASHED, "a.example", 22),
            (&HASHED.replace("|1|", "|2|"), "a.example", 2222),
            (&HASHED[..40], "a.example", 2222),
            ("|1||", "a.example", 2222),
        ] {
            let error = check(line(hosts), name, port).unwrap_err();
            assert!(matches!(error, Error::UnknownHostKey { .. }), "{hosts}: {error}");
        }
    }

    #[test]
    fn a_malformed_line_is_skipped() {
        let good = format!("a ssh-ed25519 {KEY}\n").into_bytes();
        for line in [
            &b"# caf\xe9\n"[..],
            b"caf\xe9 ssh-ed25519 AAAA\n",
            b"a 1024 35 1234567890\n",
            b"a ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLW\n",
            b"a ssh-ed25519 %%%\n",
            b"a ssh-other AAAACXNzaC1vdGhlcg==\n",
            b"a ssh-ed25519\n",
            b"@cert-authority a ssh-ed25519\n",
            b"@revoked a ssh-ed25519 %%%\n",
            b"|1|AA=|AA= ssh-ed25519 AAAA\n",
            b"\0\n",
            b" \n",
        ] {
            for text in [[line, &good].concat(), [&good, line].concat()] {
                assert!(check(&text, "a", 22).is_ok(), "{}", String::from_utf8_lossy(line));
            }
        }
    }

    #[test]
    fn a_host_of_several_machines_has_several_keys() {
        let text = format!("a ssh-ed25519 {OTHER}\na ssh-ed25519 {KEY}\n");
        assert!(check(&text, "a", 22).is_ok());
    }

    #[test]
    fn a_changed_key_is_reported_with_its_line() {
        // The last is the hash of "example.com".
        let hashed = "|1|O33ESRMWPVkMYIwJ1Uw+n877jTo=|nuuC5vEqXlEZ/8BXQR7m619W6Ak=";
        for (host, name) in [("a", "a"), (hashed, "example.com")] {
            let text = format!("# ours\n\nb ssh-ed25519 {KEY}\n# more\n{host} ssh-ed25519 {OTHER}\n");
            let error = check(&text, name, 22).unwrap_err();
            assert!(matches!(error, Error::HostKeyChanged { line: 5, .. }), "{error}");
            assert!(check(text.replace(OTHER, KEY), name, 22).is_ok());
        }
    }

    #[test]
    fn a_revoked_key_is_rejected_even_if_known() {
        let text = format!("a ssh-ed25519 {KEY}\n@revoked * ssh-ed25519 {KEY}\n");
        let error = check(&text, "a", 22).unwrap_err().to_string();
        assert!(error.contains("revoked in") && error.contains("line 2"), "{error}");
    }
}
