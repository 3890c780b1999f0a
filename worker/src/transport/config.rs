//! The route to a site: its jump hosts and their credentials, from the configuration's section and from `ssh -G`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use baton_common::config::Ssh;
use tokio::process::Command;
use tokio::time::timeout;

use super::Error;

/// Time limit of `ssh -G`, which may run commands of the configuration (`Match exec`) and use the network.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// Most machines on a route.
const HOPS_MAX: usize = 8;

/// The default port of SSH.
pub(super) const PORT: u16 = 22;

/// The machines on the way to a site.
#[derive(Debug)]
pub(super) struct Route {
    /// The nearest first, the site's own last.
    pub(super) hops: Vec<Hop>,
    /// The command that connects to the nearest machine, if it is not reached by its address.
    pub(super) proxy: Option<String>,
    /// The interval of keepalives on a silent connection.
    pub(super) keepalive: Duration,
}

impl Route {
    pub(super) fn target(&self) -> &Hop {
        self.hops.last().expect("a route ends with its target")
    }
}

/// One machine and the credentials for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    /// The host to connect to.
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) user: String,
    /// The name of its key in the files of known hosts, if it is another one.
    pub(super) alias: Option<String>,
    /// Files of known hosts; they need not exist.
    pub(super) known_hosts: Vec<PathBuf>,
    /// Files of private keys; only a named one must exist.
    pub(super) keys: Vec<PathBuf>,
    /// Files of certificates, in addition to those next to their keys; they need not exist.
    pub(super) certificates: Vec<PathBuf>,
    /// Whether the configuration names the only key.
    pub(super) is_key_named: bool,
    /// Whether other keys of the agent are excluded.
    pub(super) only_these_keys: bool,
    /// The agent's socket, if there is one.
    pub(super) agent: Option<PathBuf>,
}

/// A destination as the user wrote it, `USER@HOST:PORT`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Destination {
    host: String,
    user: Option<String>,
    port: Option<u16>,
}

/// Resolves the route to a machine.
pub(super) async fn resolve(section: &Ssh) -> Result<Route, Error> {
    let destination = Destination { host: section.host.clone(), user: section.user.clone(), port: section.port };
    let (target, answer) = hop(section, &destination).await?;
    let mut proxy = if section.jump.is_none() { answer.proxy(&destination, &target)? } else { None };
    let mut via = section.jump.clone().or_else(|| answer.one("proxyjump").map(str::to_owned));
    let mut hops = vec![target];
    // The nearest machine may itself have jump hosts.
    while let Some(text) = via.take() {
        let mut nearer = Vec::new();
        for destination in jumps(&text)? {
            let (hop, answer) = hop(section, &destination).await?;
            if nearer.is_empty() {
                via = answer.one("proxyjump").map(str::to_owned);
                proxy = answer.proxy(&destination, &hop)?;
            }
            nearer.push(hop);
        }
        hops.splice(0..0, nearer);
        if hops.len() > HOPS_MAX {
            return Err(Error::Config(format!("the route to {} has more than {HOPS_MAX} machines", section.host)));
        }
    }
    Ok(Route { hops, proxy, keepalive: section.keepalive })
}

fn jumps(text: &str) -> Result<Vec<Destination>, Error> {
    if text == "none" {
        return Ok(Vec::new());
    }
    text.split(',').map(|jump| destination(jump.trim())).collect()
}

/// Parses `USER@HOST:PORT`; an IPv6 address with a port is in brackets.
fn destination(text: &str) -> Result<Destination, Error> {
    let wrong = || Error::Config(format!("{text:?} is not USER@HOST:PORT"));
    let text = text.strip_prefix("ssh://").unwrap_or(text);
    let (user, rest) = match text.rsplit_once('@') {
        Some((user, rest)) => (Some(user.to_owned()), rest),
        None => (None, text),
    };
    let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':')),
        None if rest.matches(':').count() == 1 => {
            rest.split_once(':').map(|(host, port)| (host, Some(port))).ok_or_else(wrong)?
        }
        None => (rest, None),
    };
    let port = port.map(str::parse).transpose().map_err(|_| wrong())?;
    if host.is_empty() || host.contains(['[', ']']) || user.as_deref() == Some("") {
        return Err(wrong());
    }
    Ok(Destination { host: host.to_owned(), user, port })
}

async fn hop(section: &Ssh, destination: &Destination) -> Result<(Hop, Answer), Error> {
    let config = section.config.as_deref().map(at_home);
    let answer = ask(destination, config.as_deref()).await?;
    let name = answer.one("hostname").unwrap_or(&destination.host).to_owned();
    let user = destination.user.clone().or_else(|| answer.one("user").map(str::to_owned)).or_else(own_name);
    let user = user.ok_or_else(|| Error::Config(format!("no user for {}; set `user`", destination.host)))?;
    let port = destination.port.or_else(|| answer.one("port").and_then(|port| port.parse().ok())).unwrap_or(PORT);
    let known_hosts = match &section.known_hosts {
        Some(file) => vec![at_home(file)],
        None => answer.known_hosts(),
    };
    let keys = match &section.key {
        Some(file) => vec![at_home(file)],
        None => answer.identities(&name, &user),
    };
    let certificates = answer.files("certificatefile", &name, &user);
    let is_key_named = section.key.is_some();
    let only_these_keys = is_key_named || answer.one("identitiesonly") == Some("yes");
    let alias = answer.one("hostkeyalias").map(str::to_owned);
    let agent = answer.agent(&name, &user);
    let hop = Hop { name, port, user, alias, known_hosts, keys, certificates, is_key_named, only_these_keys, agent };
    Ok((hop, answer))
}

fn own_name() -> Option<String> {
    ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok()).filter(|name| !name.is_empty())
}

/// Expands `~/` to the home folder, as in OpenSSH's files.
fn at_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        (Ok(_) | Err(_), _) => path.to_owned(),
    }
}

/// The answer of `ssh -G`; empty without OpenSSH.
#[derive(Debug, Default)]
struct Answer(Vec<(String, String)>);

impl Answer {
    fn one(&self, key: &'static str) -> Option<&str> {
        self.all(key).next().filter(|value| *value != "none")
    }

    fn all(&self, key: &'static str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The command that connects to a machine.
    fn proxy(&self, destination: &Destination, hop: &Hop) -> Result<Option<String>, Error> {
        let Some(command) = self.one("proxycommand") else { return Ok(None) };
        if self.one("proxyusefdpass") == Some("yes") {
            return Err(Error::Config(format!(
                "the ProxyCommand for {} uses ProxyUseFdpass, which Baton does not support",
                destination.host
            )));
        }
        let port = hop.port.to_string();
        let tokens = [('h', hop.name.as_str()), ('n', &destination.host), ('p', &port), ('r', &hop.user), ('%', "%")];
        Ok(Some(with_tokens(command, &tokens)))
    }

    fn known_hosts(&self) -> Vec<PathBuf> {
        let files: Vec<_> = self
            .all("userknownhostsfile")
            .chain(self.all("globalknownhostsfile"))
            .flat_map(|names| files_of(names, Path::is_file))
            .filter(|file| file != Path::new("none"))
            .collect();
        if files.is_empty() {
            ["~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts"].map(|file| at_home(Path::new(file))).to_vec()
        } else {
            files
        }
    }

    fn agent(&self, host: &str, user: &str) -> Option<PathBuf> {
        let variable =
            |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty());
        match self.all("identityagent").next() {
            None | Some("SSH_AUTH_SOCK") => variable("SSH_AUTH_SOCK"),
            Some("none") => None,
            Some(name) if name.starts_with('$') => variable(name.trim_start_matches('$')),
            Some(path) => Some(file_with_tokens(path, host, user)),
        }
    }

    fn identities(&self, host: &str, user: &str) -> Vec<PathBuf> {
        if self.0.is_empty() {
            return ["id_ed25519", "id_ecdsa", "id_rsa"].map(|name| at_home(&Path::new("~/.ssh").join(name))).to_vec();
        }
        self.files("identityfile", host, user)
    }

    fn files(&self, key: &'static str, host: &str, user: &str) -> Vec<PathBuf> {
        self.all(key).filter(|file| *file != "none").map(|file| file_with_tokens(file, host, user)).collect()
    }
}

/// Splits a line of OpenSSH's answer into files. OpenSSH removes the quotes around names with blanks, so the longest
/// prefix that names a file counts as one.
fn files_of(names: &str, is_file: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let words: Vec<&str> = names.split(' ').collect();
    let mut files = Vec::new();
    let mut from = 0;
    while from < words.len() {
        let joined = |to: usize| at_home(Path::new(&words[from..to].join(" ")));
        let to = (from + 2..=words.len()).rev().find(|to| is_file(&joined(*to))).unwrap_or(from + 1);
        files.extend(Some(joined(to)).filter(|file| !file.as_os_str().is_empty()));
        from = to;
    }
    files
}

/// Expands the tokens of `ssh_config` that are valid in the name of a file.
fn file_with_tokens(text: &str, host: &str, user: &str) -> PathBuf {
    let home = std::env::home_dir().unwrap_or_default();
    let own = own_name().unwrap_or_default();
    let tokens = [('d', home.to_string_lossy().into_owned()), ('u', own)];
    let tokens = tokens.iter().map(|(token, value)| (*token, value.as_str()));
    let tokens: Vec<_> = tokens.chain([('h', host), ('r', user), ('%', "%")]).collect();
    at_home(Path::new(&with_tokens(text, &tokens)))
}

/// Expands `%` tokens in a text; unknown ones stay.
fn with_tokens(text: &str, tokens: &[(char, &str)]) -> String {
    let mut parts = text.split('%');
    let mut whole = parts.next().unwrap_or_default().to_owned();
    while let Some(part) = parts.next() {
        // `%%` has an empty part between its two signs.
        let letter = part.chars().next().unwrap_or('%');
        match tokens.iter().find(|(token, _)| *token == letter) {
            Some((_, value)) if part.is_empty() => whole.extend([*value, parts.next().unwrap_or_default()]),
            Some((_, value)) => whole.extend([*value, &part[letter.len_utf8()..]]),
            None => whole.extend(["%", part]),
        }
    }
    whole
}

/// Asks OpenSSH how it would reach a destination.
async fn ask(destination: &Destination, config: Option<&Path>) -> Result<Answer, Error> {
    let mut ssh = Command::new("ssh");
    ssh.arg("-G");
    if let Some(config) = config {
        ssh.arg("-F").arg(config);
    }
    if let Some(user) = &destination.user {
        ssh.arg("-l").arg(user);
    }
    if let Some(port) = destination.port {
        ssh.arg("-p").arg(port.to_string());
    }
    ssh.arg("--").arg(&destination.host).stdin(Stdio::null()).kill_on_drop(true);
    let failed = |reason: String| Error::Config(format!("`ssh -G {}` failed: {reason}", destination.host));
    let output = match timeout(ASK_LIMIT, ssh.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound && config.is_none() => {
            return Ok(Answer::default());
        }
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("no answer within {} s", ASK_LIMIT.as_secs()))),
    };
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

fn parse(text: &str) -> Answer {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    Answer(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_has_a_host_and_may_have_a_user_and_a_port() {
        let is = |text: &str, user: Option<&str>, host: &str, port| {
            let expected = Destination { host: host.to_owned(), user: user.map(str::to_owned), port };
            assert_eq!(destination(text).unwrap(), expected, "{text}");
        };
        is("a.example", None, "a.example", None);
        is("me@a.example:2222", Some("me"), "a.example", Some(2222));
        is("me@site@a.example", Some("me@site"), "a.example", None);
        is("ssh://me@[::1]:22", Some("me"), "::1", Some(22));
        is("fe80::1", None, "fe80::1", None);
        for wrong in ["", "me@", "@a", "a:b", "a:70000", "[::1"] {
            assert!(matches!(destination(wrong), Err(Error::Config(_))), "{wrong}");
        }
        assert_eq!(jumps("a, b:1").unwrap().len(), 2);
        assert!(jumps("none").unwrap().is_empty());
    }

    #[test]
    fn the_answer_of_openssh_is_used() {
        let answer = parse(
            "user me\nproxyjump none\nidentityfile /k/%r@%h\nidentityfile ~/.ssh/b\nuserknownhostsfile /a /b\ncertificatefile /k/%r-cert.pub\n",
        );
        assert_eq!((answer.one("user"), answer.one("proxyjump")), (Some("me"), None));
        let home = std::env::home_dir().unwrap();
        assert_eq!(answer.identities("h", "me"), [PathBuf::from("/k/me@h"), home.join(".ssh/b")]);
        assert_eq!(answer.files("certificatefile", "h", "me"), [PathBuf::from("/k/me-cert.pub")]);
        assert_eq!(answer.known_hosts(), [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(answer.proxy(&Destination::default(), &target()).unwrap(), None);
        assert_eq!(Answer::default().known_hosts()[1], PathBuf::from("/etc/ssh/ssh_known_hosts"));
    }

    #[test]
    fn the_name_of_a_known_hosts_file_may_have_blanks() {
        let there = ["/a b/known hosts", "/d", "/two  blanks"].map(Path::new);
        for (names, expected) in [
            ("/a b/known hosts /d", vec!["/a b/known hosts", "/d"]),
            ("/d /a b/known hosts", vec!["/d", "/a b/known hosts"]),
            ("/two  blanks", vec!["/two  blanks"]),
            ("/x /y", vec!["/x", "/y"]),
            ("", vec![]),
        ] {
            let expected: Vec<PathBuf> = expected.into_iter().map(PathBuf::from).collect();
            assert_eq!(files_of(names, |file| there.contains(&file)), expected, "{names}");
        }
    }

    #[test]
    fn tokens_are_expanded_once() {
        let tokens = [('h', "%p"), ('p', "22"), ('%', "%")];
        for (text, expected) in [
            ("nc %h %p", "nc %p 22"),
            ("%%h %%%p", "%h %22"),
            ("%%", "%"),
            ("100%", "100%"),
            ("%x%", "%x%"),
            ("", ""),
            ("%é%p", "%é22"),
        ] {
            assert_eq!(with_tokens(text, &tokens), expected, "{text}");
        }
    }

    #[test]
    fn a_proxy_command_gets_the_destination() {
        let destination = Destination { host: "alias".into(), ..Destination::default() };
        let proxy = |text: &str| parse(text).proxy(&destination, &target());
        let command = proxy("proxyusefdpass no\nproxycommand ssh -W %h:%p -l %r gate-of-%n\n").unwrap();
        assert_eq!(command.as_deref(), Some("ssh -W h.example:2222 -l me gate-of-alias"));
        let error = proxy("proxycommand x\nproxyusefdpass yes\n").unwrap_err();
        assert!(error.to_string().contains("ProxyUseFdpass"), "{error}");
    }

    fn target() -> Hop {
        Hop {
            name: "h.example".into(),
            port: 2222,
            user: "me".into(),
            alias: None,
            known_hosts: vec![],
            keys: vec![],
            certificates: vec![],
            is_key_named: false,
            only_these_keys: false,
            agent: None,
        }
    }
}
