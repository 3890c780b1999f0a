//! The witness file of `baton.count`: a line `pid advance epoch worker` for each advance that ran.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Every advance that ran, and the leases under which it ran.
pub struct Witness {
    runs: BTreeMap<(String, u64), Vec<(u64, String)>>,
}

impl Witness {
    /// Reads the file.
    ///
    /// # Panics
    /// If a line is incomplete: lines of several workers must not mix.
    pub fn read(path: &Path) -> Self {
        let mut runs: BTreeMap<(String, u64), Vec<(u64, String)>> = BTreeMap::new();
        for (pid, advance, epoch, worker) in lines(path) {
            let number = |number: i64| u64::try_from(number).expect("not negative");
            runs.entry((pid, number(advance))).or_default().push((number(epoch), worker));
        }
        Self { runs }
    }

    /// Checks the promise for these processes: each advance ran, and no committed advance ran again. An advance may
    /// appear twice only where a holder died (`lost` names those processes), and only one advance of each process may.
    ///
    /// # Panics
    /// If the promise is broken.
    pub fn check(&self, pids: &[String], advances: u64, lost: &BTreeSet<String>) {
        let mut repeated: BTreeMap<&str, u64> = BTreeMap::new();
        for pid in pids {
            for advance in 1..=advances {
                let runs =
                    self.runs.get(&(pid.clone(), advance)).unwrap_or_else(|| panic!("{pid}: no advance {advance}"));
                if runs.len() > 1 {
                    assert!(lost.contains(pid), "{pid}: advance {advance} ran again although no holder died: {runs:?}");
                    *repeated.entry(pid).or_default() += runs.len() as u64 - 1;
                }
            }
        }
        for (pid, count) in repeated {
            assert_eq!(count, 1, "{pid}: more than one advance ran again");
        }
        let known: BTreeSet<&String> = pids.iter().collect();
        for (pid, advance) in self.runs.keys() {
            assert!(known.contains(pid) && *advance <= advances, "nobody asked for {pid} {advance}");
        }
    }

    /// The workers that ran an advance.
    pub fn workers(&self) -> BTreeSet<String> {
        self.runs.values().flatten().map(|(_, worker)| worker.clone()).collect()
    }

    /// The number of lines.
    pub fn lines(&self) -> usize {
        self.runs.values().map(Vec::len).sum()
    }
}

/// The lines of the file, empty if it does not exist: pid, advance, epoch, name of the worker. A line that is being
/// written does not count yet: when it crosses a page boundary, a reader may see only its beginning.
///
/// # Panics
/// If a line is incomplete.
pub(crate) fn lines(path: &Path) -> Vec<(String, i64, i64, String)> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [pid, advance, epoch, worker] = fields[..] else { panic!("not a whole line: {line:?}") };
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("not a number in {line:?}"));
        (pid.to_owned(), number(advance), number(epoch), worker.to_owned())
    };
    let (written, _) = text.rsplit_once('\n').unwrap_or_default();
    written.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness(text: &str) -> Witness {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("witness");
        std::fs::write(&path, text).unwrap();
        Witness::read(&path)
    }

    #[test]
    fn a_good_history_passes() {
        witness("a 1 1 w1\na 2 1 w1\na 2 2 w2\n").check(&["a".into()], 2, &["a".to_owned()].into());
    }

    #[test]
    fn a_line_that_is_being_written_does_not_count() {
        assert_eq!(witness("a 1 1 w1\na 2 1").lines(), 1);
        assert_eq!(witness("a 1").lines(), 0);
    }

    #[test]
    #[should_panic(expected = "not a whole line")]
    fn mixed_lines_are_seen() {
        witness("a 1 1 w1a 2 1 w1\n\na 3 1 w1\n");
    }

    #[test]
    #[should_panic(expected = "no advance 2")]
    fn a_lost_advance_is_seen() {
        witness("a 1 1 w1\n").check(&["a".into()], 2, &BTreeSet::new());
    }

    #[test]
    #[should_panic(expected = "although no holder died")]
    fn a_repeated_advance_is_seen() {
        witness("a 1 1 w1\na 1 2 w2\na 2 2 w2\n").check(&["a".into()], 2, &BTreeSet::new());
    }

    #[test]
    #[should_panic(expected = "more than one advance")]
    fn a_repeated_committed_advance_is_seen() {
        witness("a 1 1 w1\na 2 1 w1\na 1 2 w2\na 2 2 w2\n").check(&["a".into()], 2, &["a".to_owned()].into());
    }

    #[test]
    #[should_panic(expected = "nobody asked")]
    fn an_advance_beyond_the_end_is_seen() {
        witness("a 1 1 w1\na 2 1 w1\n").check(&["a".into()], 1, &BTreeSet::new());
    }
}
