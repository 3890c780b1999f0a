//! What somebody may have meant who has written a word that nobody knows.

/// The known word that is nearest to this one, if any is near enough to have been meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |known: &&str| strsim::damerau_levenshtein(known, word);
    known.into_iter().min_by_key(distance).filter(|known| {
        // Not more than half of a short word may differ, or everything would be near to everything.
        distance(known) <= (known.len().min(word.len()) / 2).min(3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_near_is_offered() {
        for (word, expected) in [("clutser", Some("cluster")), ("fram", Some("farm")), ("x", None), ("daint", None)] {
            assert_eq!(nearest(word, ["cluster", "farm"]), expected, "{word}");
        }
        assert_eq!(nearest("x", []), None);
    }
}
