//! The processes below a process, as /proc shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A process, as far as signals are concerned.
#[derive(Clone, Copy, Debug)]
struct Entry {
    parent: i32,
    group: i32,
}

/// Sends TERM once to every process below `root`, since programs may take a second TERM for "at once". Sends CONT too,
/// since a stopped process cannot handle TERM. `main` leads a process group, which one call reaches.
pub(super) fn terminate(root: u32, main: u32) {
    let group = to_raw(main);
    if signal_group(group, Signal::TERM).is_none() {
        // The group does not exist yet: the program has just started and has not forked.
        let _ = signal_process(group, Signal::TERM);
    }
    let _ = signal_group(group, Signal::CONT);
    for (pid, entry) in below(root) {
        if entry.group != group && pid != group {
            let _ = signal_process(pid, Signal::TERM);
            let _ = signal_process(pid, Signal::CONT);
        }
    }
}

/// Sends KILL to every process below `root` and to their groups: a signal to a group also reaches a child that a member
/// is forking at this moment. Returns the number of processes; call it until none is left.
pub(super) fn kill(root: u32) -> usize {
    let found = below(root);
    let own_group = read_entry(to_raw(root)).map(|entry| entry.group);
    let groups: BTreeSet<i32> = found.values().map(|entry| entry.group).filter(|&g| Some(g) != own_group).collect();
    for group in groups {
        let _ = signal_group(group, Signal::KILL);
    }
    for &pid in found.keys() {
        let _ = signal_process(pid, Signal::KILL);
    }
    found.len()
}

/// Sends KILL to every process of this user whose environment has the variable. Returns the number of processes. Nothing
/// else identifies the processes of a shim that was killed.
pub(crate) fn kill_marked(name: &str, value: &str) -> usize {
    let wanted = format!("{name}={value}");
    let is_marked = |pid: &i32| {
        // An environment is readable only for its user, and only until the process ends.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let marked: Vec<i32> = all_pids().filter(is_marked).collect();
    for &pid in &marked {
        let _ = signal_process(pid, Signal::KILL);
    }
    marked.len()
}

/// The resident memory of every process below `root`, in bytes. Shared memory counts for each process. The walk goes from
/// parent to child, so its cost does not grow with the machine.
pub(crate) fn memory_bytes(root: u32) -> u64 {
    let mut total = 0;
    let mut parents = vec![to_raw(root)];
    while let Some(parent) = parents.pop() {
        for child in children(parent) {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kib = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            total += kib.unwrap_or(0) * 1024;
            parents.push(child);
        }
    }
    total
}

/// Processor time of all children that the calling process has waited for, and of their waited-for children, in
/// milliseconds: in user mode and in the kernel.
pub(super) fn children_times_ms() -> (u64, u64) {
    // The unit of these fields is 1/100 s on every Linux, whatever the kernel's own tick is.
    const MS_PER_TICK: u64 = 10;
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let field = |idx: usize| stat_fields(&stat).nth(idx).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    (field(13) * MS_PER_TICK, field(14) * MS_PER_TICK)
}

/// Every process below `root` that has not ended.
fn below(root: u32) -> BTreeMap<i32, Entry> {
    let root = to_raw(root);
    let all: BTreeMap<i32, Entry> = all_pids().filter_map(|pid| Some((pid, read_entry(pid)?))).collect();
    let is_below = |pid: i32| {
        let mut ancestor = pid;
        // The bound guards against a cycle in a table that changed while it was read.
        for _ in 0..all.len() {
            match all.get(&ancestor) {
                Some(entry) if entry.parent == root => return true,
                Some(entry) => ancestor = entry.parent,
                None => return false,
            }
        }
        false
    };
    all.iter().filter(|&(&pid, _)| is_below(pid)).map(|(&pid, &entry)| (pid, entry)).collect()
}

fn all_pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Reads a process; `None` if it has ended, also as a zombie.
fn read_entry(pid: i32) -> Option<Entry> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat_fields(&stat);
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    Some(Entry { parent: fields.next()?.parse().ok()?, group: fields.next()?.parse().ok()? })
}

/// The fields of a stat line that follow the program's name, which may itself hold spaces and brackets: state, parent,
/// group and so on.
fn stat_fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace()
}

fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .collect()
}

fn to_raw(pid: u32) -> i32 {
    i32::try_from(pid).expect("the kernel's process ids are below 2^22")
}

fn signal_process(pid: i32, signal: Signal) -> Option<()> {
    kill_process(Pid::from_raw(pid)?, signal).ok()
}

fn signal_group(group: i32, signal: Signal) -> Option<()> {
    // Group 1 would address every process of the machine.
    let group = Pid::from_raw(group).filter(|group| !group.is_init())?;
    kill_process_group(group, signal).ok()
}
