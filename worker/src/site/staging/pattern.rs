//! The patterns of `out`, and the files of a sandbox that they match.

use baton_common::relative::BytePath;
use baton_common::spec::on_site::{self, Output};
use globset::GlobMatcher;

use super::Error;
use super::listing::{Found, Listing};
use super::missing::Missing;

/// A pattern of `out`.
pub(super) struct Pattern {
    matcher: GlobMatcher,
    /// The folder, if the pattern is one; it stands for its content.
    folder: Option<String>,
    /// The folder that contains every match.
    base: String,
    /// The greatest depth of a match; `None` if unlimited.
    parts_max: Option<usize>,
}

impl Pattern {
    pub(super) fn new(from: &str) -> Result<Self, Error> {
        // A folder stands for its content.
        let folder = from.strip_suffix('/').map(str::to_owned);
        let pattern = if folder.is_some() { format!("{from}**") } else { from.to_owned() };
        let glob = on_site::glob(&pattern).map_err(|error| Error::Stage(format!("`out`: {error}")))?;
        let parts_max = (!pattern.contains("**")).then(|| pattern.split('/').count());
        Ok(Self { matcher: glob.compile_matcher(), folder, base: base(&pattern).to_owned(), parts_max })
    }

    fn is_match(&self, path: &BytePath) -> bool {
        self.matcher.is_match(path.as_path())
            || self.folder.as_ref().is_some_and(|folder| folder.as_bytes() == path.as_bytes())
    }

    /// Whether a path below a folder may match.
    pub(super) fn may_match_below(&self, folder: &[u8]) -> bool {
        let n_parts = folder.iter().filter(|byte| **byte == b'/').count() + 1;
        let (folder, base) = ([folder, b"/"].concat(), self.base.as_bytes());
        self.parts_max.is_none_or(|most| n_parts < most) && (folder.starts_with(base) || base.starts_with(&folder))
    }
}

/// The folder that contains every match of a pattern.
pub(super) fn base(pattern: &str) -> &str {
    let plain = pattern.find(['*', '?', '[', '{', '\\']).map_or(pattern, |end| &pattern[..end]);
    plain.rfind('/').map_or("", |end| &plain[..=end])
}

/// Returns the files and folders that an output matches and that can be kept. `linked` are the inputs that were linked
/// into the sandbox; they are outputs only if they are named.
pub(super) fn matched<'a>(
    output: &Output,
    pattern: &Pattern,
    found: &'a Listing,
    linked: &[&str],
    is_ok: bool,
    missing: &mut Missing,
) -> Vec<(&'a BytePath, Found)> {
    let mut matched = Vec::new();
    let mut is_any = false;
    for (path, kind) in found {
        let is_match = pattern.is_match(path);
        let is_input = || output.is_glob() && path.as_str().is_some_and(|path| linked.contains(&path));
        if matches!(kind, Found::Refused(_) | Found::RefusedFolder(_)) && is_input() {
            continue;
        }
        if let Found::RefusedFolder(why) = kind
            && !is_match
            && pattern.may_match_below(path.as_bytes())
        {
            missing.add(format!("what `{}` matches in {path}, which {why}", output.from));
            is_any = true;
        }
        if !is_match {
            continue;
        }
        let is_named = pattern.folder.as_ref().is_some_and(|folder| folder.as_bytes() == path.as_bytes());
        match kind {
            Found::Refused(why) | Found::RefusedFolder(why) => missing.add(format!("{path} {why}")),
            Found::File { .. } if is_named => {
                missing.add(format!("`{}` is a file; name it without the `/`", output.from))
            }
            Found::Folder { .. } if !output.is_glob() && output.from.as_bytes() == path.as_bytes() => {
                missing.add(format!("`{0}` is a folder; name it `{0}/`", output.from));
            }
            // A folder stands for its content.
            Found::Folder { is_empty: false } if is_named => {}
            Found::Folder { is_empty: false } => continue,
            Found::File { .. } | Found::Folder { is_empty: true } => matched.push((path, *kind)),
        }
        is_any = true;
    }
    if !is_any && !output.optional && is_ok {
        missing.add(format!("nothing in the sandbox matches `{}`", output.from));
    }
    matched
}

#[cfg(test)]
mod tests {
    use baton_common::spec;

    use super::*;

    #[test]
    fn every_match_of_a_pattern_is_below_its_folder() {
        let patterns = ["a", "a/b", "a/", "a/b/*.c", "*", "**/c", "a/b*/c", "a/[bc]/d", "a/{b,c}"];
        let bases = ["", "a/", "a/", "a/b/", "", "", "a/", "a/", "a/"];
        assert_eq!(patterns.map(base), bases);
    }

    #[test]
    fn only_folders_that_may_contain_a_match_are_followed() {
        let pattern = |from: &str| Pattern::new(from).ok().expect("it is a pattern");
        for (from, folder, expected) in [
            ("*", "a", false),
            ("*/*", "a", true),
            ("*/*", "a/b", false),
            ("**", "a/b/c", true),
            ("a/", "a", true),
            ("a/", "a/b", true),
            ("a/", "b", false),
            ("a/b/c", "a/b", true),
            ("a/b/c", "a/x", false),
        ] {
            assert_eq!(pattern(from).may_match_below(folder.as_bytes()), expected, "{from} {folder}");
        }
    }

    #[test]
    fn patterns_match_bytes_and_report_what_cannot_be_kept() {
        let file = Found::File { size: 1, executable: false };
        let found: Listing = [
            (b"d".as_slice(), Found::Folder { is_empty: false }),
            (b"d/\xff\n", file),
            (b"d/pipe", Found::Refused("is a pipe")),
            (b"e", Found::Folder { is_empty: true }),
            (b"l", Found::RefusedFolder("is not for you")),
            (b"res", Found::RefusedFolder("leads out")),
            (b"\xfe.txt", file),
        ]
        .into_iter()
        .map(|(path, found)| (BytePath::from(path.to_vec()), found))
        .collect();
        let of = |from: &str| {
            let mut missing = Missing::default();
            let spec = format!("{{run: [x], at: a, out: ['{from}']}}");
            let spec = spec::parse(&spec, spec::Format::Yaml).expect("it is a spec");
            let output = &spec.on_site.expect("it has a site").outputs[0];
            let pattern = Pattern::new(from).ok().expect("it is a pattern");
            let matched = matched(output, &pattern, &found, &["res"], true, &mut missing);
            let paths: Vec<String> = matched.iter().map(|(path, _)| path.to_string()).collect();
            (paths, missing.reason().unwrap_or_default())
        };
        let some = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
        assert_eq!(of("*.txt"), (some(&["\\xfe.txt"]), String::new()));
        assert_eq!(of("d/"), (some(&["d/\\xff\\n"]), "output: d/pipe is a pipe".to_owned()));
        assert_eq!(of("e/"), (some(&["e"]), String::new()));
        assert_eq!(of("e"), (vec![], "output: `e` is a folder; name it `e/`".to_owned()));
        assert_eq!(of("x"), (vec![], "output: nothing in the sandbox matches `x`".to_owned()));
        let hidden = "output: what `*/x.dat` matches in l, which is not for you".to_owned();
        assert_eq!(of("*/x.dat"), (vec![], hidden));
        assert_eq!(of("l/").1, "output: l is not for you");
        assert_eq!(of("res/").1, "output: res leads out");
        assert_eq!(of("**").1, "output: d/pipe is a pipe; l is not for you");
        assert_eq!(of("**").0, some(&["d/\\xff\\n", "e", "\\xfe.txt"]));
    }
}
