//! Suggestions for unknown words.

/// The known word nearest to this one, if it is near enough to be a plausible suggestion.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |known: &&str| strsim::damerau_levenshtein(known, word);
    known.into_iter().min_by_key(distance).filter(|known| {
        // At most half of a short word may differ, or unrelated words would match.
        distance(known) <= (known.len().min(word.len()) / 2).min(3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_near_word_is_suggested() {
        for (word, expected) in [("clutser", Some("cluster")), ("fram", Some("farm")), ("x", None), ("daint", None)] {
            assert_eq!(nearest(word, ["cluster", "farm"]), expected, "{word}");
        }
        assert_eq!(nearest("x", []), None);
    }
}
