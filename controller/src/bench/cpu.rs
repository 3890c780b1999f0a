//! Processor time of the programs of a benchmark, if they run on this machine and may be inspected.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;

/// A program of the benchmark: an operating system process and, for a server, its children.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pid: u32,
    with_children: bool,
}

impl Program {
    /// Returns this program.
    pub(super) fn own() -> Self {
        Self { pid: std::process::id(), with_children: false }
    }

    /// Returns the program with this process id.
    pub(super) fn process(pid: u32) -> Self {
        Self { pid, with_children: false }
    }

    /// Returns the program that listens at the address of this URL, if it is on this machine and its name is `name`. A
    /// listener with another name may be a proxy.
    pub(super) fn server(url: &str, default_port: u16, name: &str) -> Option<Self> {
        let (host, port) = host_and_port(url, default_port)?;
        let is_here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let inodes = if is_here { listening(port) } else { return None };
        let pid = processes().find(|&pid| stat(pid).is_some_and(|stat| stat.name == name) && holds(pid, &inodes))?;
        Some(Self { pid, with_children: true })
    }

    /// Returns the seconds of processor time in user and kernel mode since its start; `None` if it has ended.
    pub(super) fn seconds(&self) -> Option<f64> {
        let own = stat(self.pid)?;
        let mut ticks = own.ticks;
        if self.with_children {
            ticks += own.ticks_of_ended_children;
            ticks +=
                processes().filter_map(stat).filter(|stat| stat.parent == self.pid).map(|stat| stat.ticks).sum::<u64>();
        }
        #[expect(clippy::cast_precision_loss, reason = "ticks of some days are far below 2^52")]
        Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// The content of `/proc/PID/stat`.
struct Stat {
    name: String,
    parent: u32,
    ticks: u64,
    ticks_of_ended_children: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may itself contain parentheses.
    let (head, tail) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let number = |idx: usize| fields.get(idx)?.parse::<u64>().ok();
    Some(Stat {
        name,
        parent: u32::try_from(number(1)?).ok()?,
        ticks: number(11)? + number(12)?,
        ticks_of_ended_children: number(13)? + number(14)?,
    })
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Returns the sockets that listen on this port.
fn listening(port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let mut inodes = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { continue };
            let is_port = local.rsplit(':').next().and_then(|hex| u16::from_str_radix(hex, 16).ok()) == Some(port);
            if is_port && state == LISTEN {
                inodes.push(format!("socket:[{inode}]"));
            }
        }
    }
    inodes
}

fn holds(pid: u32, inodes: &[String]) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let mut links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    links.any(|link| inodes.iter().any(|inode| link.as_os_str() == inode.as_str()))
}

fn host_and_port(url: &str, default_port: u16) -> Option<(String, u16)> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split(['/', '?']).next()?;
    let address = authority.rsplit('@').next()?;
    match address.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => Some((unbracketed(host), port.parse().ok()?)),
        Some(_) | None => Some((unbracketed(address), default_port)),
    }
}

fn unbracketed(host: &str) -> String {
    host.trim_start_matches('[').trim_end_matches(']').to_owned()
}

/// Seconds by program; `None` if the program cannot be inspected.
pub(super) type Seconds = BTreeMap<&'static str, Option<f64>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_are_read_from_urls() {
        let cases = [
            ("amqp://guest:guest@127.0.0.1:5673/%2f", "127.0.0.1", 5673),
            ("postgres://postgres@localhost/baton?options=-c%20a", "localhost", 1),
            ("postgres://[::1]:5432/baton", "::1", 5432),
            ("amqp://[::1]/", "::1", 1),
        ];
        for (url, host, port) in cases {
            assert_eq!(host_and_port(url, 1), Some((host.to_owned(), port)), "{url}");
        }
    }

    #[test]
    fn listening_program_is_found_by_port_and_name() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let name = stat(std::process::id()).unwrap().name;
        let program = Program::server(&format!("amqp://127.0.0.1:{port}"), 1, &name).unwrap();
        assert_eq!(program.pid, std::process::id());
        assert!(program.seconds().is_some());
        assert!(Program::server(&format!("amqp://127.0.0.1:{port}"), 1, "another").is_none());
    }
}
