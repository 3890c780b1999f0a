//! Shortages on a worker's machine, and their remedies.

use serde::Serialize;

/// A resource of a worker's machine that is exhausted or unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lack {
    /// The file system of the root has no free space, or its user has used up a quota.
    Disk,
    /// The file system of the root has no free inodes.
    Inodes,
    /// The file system of the root is read-only.
    ReadOnlyDisk,
    /// The file system of the root reports errors, or does not answer.
    BrokenDisk,
    /// A write to the file system of the root takes seconds.
    SlowDisk,
    /// The root cannot be created or entered.
    Root,
    /// No memory is left.
    Memory,
    /// The operating system cannot start another process or thread.
    Processes,
    /// The operating system cannot open another file.
    OpenFiles,
    /// Child processes cannot be started, for another reason.
    Children,
    /// The broker is unreachable or rejects the worker.
    Broker,
}

/// A shortage on a worker's machine, with the evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The resource.
    pub lack: Lack,
    /// The failed operation and its error, in one line.
    pub text: String,
}

/// A shortage as in a worker's row and in JSON output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lacks {
    /// The word of the resource: a stable identifier.
    pub what: String,
    /// The failed operation and its error.
    pub text: String,
}

impl Lack {
    const ALL: [Lack; 11] = [
        Lack::Disk,
        Lack::Inodes,
        Lack::ReadOnlyDisk,
        Lack::BrokenDisk,
        Lack::SlowDisk,
        Lack::Root,
        Lack::Memory,
        Lack::Processes,
        Lack::OpenFiles,
        Lack::Children,
        Lack::Broker,
    ];

    /// The word of the resource: a stable identifier, which is stored and printed.
    pub fn word(self) -> &'static str {
        match self {
            Lack::Disk => "disk space",
            Lack::Inodes => "inodes",
            Lack::ReadOnlyDisk => "a writable disk",
            Lack::BrokenDisk => "a working disk",
            Lack::SlowDisk => "a fast disk",
            Lack::Root => "a usable root",
            Lack::Memory => "memory",
            Lack::Processes => "processes",
            Lack::OpenFiles => "open files",
            Lack::Children => "child processes",
            Lack::Broker => "a broker",
        }
    }

    /// The resource of a word; `None` if a newer program has written the word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lack| lack.word() == word)
    }

    /// Whether a worker with this shortage takes no more processes. A slow disk only slows processes down, and without
    /// a broker the worker finds them in the database.
    pub fn stops_taking(self) -> bool {
        !matches!(self, Lack::SlowDisk | Lack::Broker)
    }

    /// Whether a program that ends frees the resource for others of the same worker.
    pub fn is_shared_by_programs(self) -> bool {
        matches!(self, Lack::Memory | Lack::Processes | Lack::OpenFiles | Lack::Children)
    }

    /// What an operator does about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Lack::Disk => "free space on the file system of its `--root`, raise the quota, or name another root",
            Lack::Inodes => "remove files from the file system of its `--root`, or name another root",
            Lack::ReadOnlyDisk => "mount the file system of its `--root` writable, or name another root",
            Lack::BrokenDisk => "check the disk of its `--root` (see `dmesg`), or name another root",
            Lack::SlowDisk => "check what else uses the disk of its `--root`, or name another root",
            Lack::Root => "make its `--root` a folder that the worker's user can write to, or name another root",
            Lack::Memory => "give it fewer `--slots`, or free memory (see `ulimit -v` and the limits of its cgroup)",
            Lack::Processes => "give it fewer `--slots`, or raise its limit of processes (`ulimit -u`, `pids.max`)",
            Lack::OpenFiles => "give it fewer `--slots`, or raise its limit of open files (`ulimit -n`)",
            Lack::Children => "see the worker's log, and whether its user may start the program file of the worker",
            Lack::Broker => {
                "correct its broker URL, user and password, or start the broker; meanwhile it takes from the database"
            }
        }
    }
}

impl std::fmt::Display for Shortage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "its worker lacks {}: {}", self.lack.word(), self.text)
    }
}

impl Lacks {
    /// Whether the worker takes no more processes. An unknown word, from a newer program, counts as one that stops it.
    pub fn stops_taking(&self) -> bool {
        Lack::from_word(&self.what).is_none_or(Lack::stops_taking)
    }

    /// What an operator does about it.
    pub fn remedy(&self) -> &'static str {
        Lack::from_word(&self.what).map_or("see the worker's log", Lack::remedy)
    }
}

impl std::fmt::Display for Lacks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let effect = if self.stops_taking() { "; it takes no processes meanwhile" } else { "" };
        write!(formatter, "lacks {}: {}{effect}", self.what, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_names_one_resource() {
        for lack in Lack::ALL {
            assert_eq!(Lack::from_word(lack.word()), Some(lack));
        }
        let newer = Lacks { what: "a licence".into(), text: "none is left".into() };
        assert!(newer.stops_taking() && newer.to_string().contains("lacks a licence: none is left"));
    }
}
