//! The results of a job that could not be kept.

use std::collections::BTreeSet;

/// Results that are listed; further ones are only counted.
const NAMED_MAX: usize = 20;

/// Most characters of each.
const CHARS_MAX: usize = 300;

/// The results that are not kept, each with its reason.
#[derive(Debug, Default)]
pub(crate) struct Missing(BTreeSet<String>);

impl Missing {
    pub(super) fn add(&mut self, what: String) {
        self.0.insert(what);
    }

    /// The reason for the process; `None` if nothing is missing.
    pub(crate) fn reason(&self) -> Option<String> {
        if self.0.is_empty() {
            return None;
        }
        let short = |what: &String| match what.char_indices().nth(CHARS_MAX) {
            // The reason is at the end.
            Some((head, _)) => {
                let tail = what.char_indices().rev().nth(CHARS_MAX / 2).map_or(0, |(tail, _)| tail);
                format!("{}…{}", &what[..head], &what[tail.max(head)..])
            }
            None => what.clone(),
        };
        let mut named: Vec<String> = self.0.iter().take(NAMED_MAX).map(short).collect();
        let n_more = self.0.len() - named.len();
        if n_more > 0 {
            named.push(format!("and {n_more} more"));
        }
        Some(format!("output: {}", named.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_results_are_listed_up_to_a_limit() {
        let mut missing = Missing::default();
        assert_eq!(missing.reason(), None);
        missing.add(format!("{} is a pipe", "x".repeat(4000)));
        let reason = missing.reason().unwrap_or_default();
        assert!(reason.len() < 500 && reason.ends_with("xx is a pipe"), "{reason}");
        (10..35).for_each(|number| missing.add(format!("a{number} is a pipe")));
        let reason = missing.reason().unwrap_or_default();
        assert!(reason.starts_with("output: a10 is a pipe; a11") && reason.ends_with("; and 6 more"), "{reason}");
    }
}
