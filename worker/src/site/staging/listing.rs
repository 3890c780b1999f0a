//! The listing of a sandbox after its job, with links followed.
//!
//! A link into the sandbox counts as its target: a file, or a folder with its content. Entries that cannot be kept are
//! listed with the reason.

use std::collections::BTreeMap;

use baton_common::relative::{self, BytePath};
use baton_common::spec::on_site::RESERVED;

use super::{Error, Staging};
use crate::transport::{self, quote};

/// Most entries of a listing. Links to folders can create any number.
const ENTRIES_MAX: usize = 1_000_000;

/// The entry at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    File {
        size: u64,
        executable: bool,
    },
    Folder {
        is_empty: bool,
    },
    /// An entry that cannot be kept, with the reason as the rest of a sentence that starts with its path.
    Refused(&'static str),
    /// A folder, or a link to one, that cannot be kept; its content is unknown.
    RefusedFolder(&'static str),
}

pub(super) type Listing = BTreeMap<BytePath, Found>;

/// The entry at a path, with links not followed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    File {
        size: u64,
        executable: bool,
    },
    Folder,
    Refused(&'static str),
    RefusedFolder(&'static str),
    /// A link to a path in the sandbox, or to the sandbox itself, which is the empty path.
    Link(BytePath),
}

impl Staging<'_> {
    /// Lists the sandbox without Baton's own folder. A link to a folder is followed if `may_hold` says so for its path.
    pub(super) async fn list(&self, may_hold: impl Fn(&[u8]) -> bool) -> Result<Listing, Error> {
        let of_links = quote(
            r#"printf '%s\0' "L $#"
             for link; do
               if [ -d "$link" ]; then what=d; else what=-; fi
               printf '%s\0' "$what ${link#./}"
             done
             readlink -mz -- "$@""#,
        );
        let script = format!(
            "cd {} || exit 1
             printf '%s\\0' \"$(pwd -P)\"
             find . -path ./.baton -prune \
               -o -type d ! \\( -readable -executable \\) -printf 'u %s %m %P\\0' -prune \
               -o -type f ! -readable -printf 'r %s %m %P\\0' \
               -o ! -type l ! -name . -printf '%y %s %m %P\\0' || exit 3
             find . -path ./.baton -prune -o -type d ! \\( -readable -executable \\) -prune \
               -o -type l -exec sh -c {of_links} sh {{}} + || exit 3",
            quote(self.dir)
        );
        let output = match self.visit.session.exec(&script, b"", super::VERIFY_LIMIT).await {
            Err(transport::Error::TooMuchOutput) => {
                return Err(Error::Stage("the sandbox has too many files to be listed; pack them".into()));
            }
            output => output?,
        };
        // A program still writes there; the sandbox is listed again.
        if output.exit == Some(3) {
            return Err(Error::Content(format!("the sandbox cannot be listed: {}", output.complaint())));
        }
        let stdout = output.ok()?;
        let entries = entries(&stdout).ok_or_else(|| Error::Content("`find` printed unexpected output".into()))?;
        let mut walk = Walk { entries: &entries, may_hold: &may_hold, found: Listing::new() };
        for (path, entry) in &entries {
            walk.put(path.clone(), path.as_bytes(), entry, &[parent(path.as_bytes())])?;
        }
        Ok(walk.found)
    }
}

/// Parses the output of the script of [`Staging::list`]; `None` if it is malformed.
fn entries(stdout: &[u8]) -> Option<BTreeMap<BytePath, Entry>> {
    let mut fields = stdout.split(|byte| *byte == 0);
    let sandbox = fields.next()?;
    let mut entries = BTreeMap::new();
    while let Some(field) = fields.next().filter(|field| !field.is_empty()) {
        if let Some(count) = field.strip_prefix(b"L ") {
            let count: usize = std::str::from_utf8(count).ok()?.parse().ok()?;
            let links: Vec<&[u8]> = fields.by_ref().take(count).collect();
            for link in links {
                let target = fields.next().filter(|target| !target.is_empty())?;
                let (is_folder, link) = (link.starts_with(b"d "), link.get(2..)?);
                entries.insert(link.to_vec().into(), target_of(target, sandbox, is_folder));
            }
            continue;
        }
        let mut parts = field.splitn(4, |byte| *byte == b' ');
        let (what, size, mode, path) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let text = |part| std::str::from_utf8(part).ok();
        let entry = match what {
            b"f" => {
                let mode = u32::from_str_radix(text(mode)?, 8).ok()?;
                Entry::File { size: text(size)?.parse().ok()?, executable: mode & 0o100 != 0 }
            }
            b"d" => Entry::Folder,
            b"u" => Entry::RefusedFolder("is a folder that is not readable"),
            b"r" => Entry::Refused("is not readable"),
            b"p" => Entry::Refused("is a pipe"),
            b"s" => Entry::Refused("is a socket"),
            b"b" | b"c" => Entry::Refused("is a device"),
            _ => Entry::Refused("is neither a file nor a folder"),
        };
        entries.insert(path.to_vec().into(), entry);
    }
    Some(entries)
}

/// Classifies a link by its resolved target.
fn target_of(target: &[u8], sandbox: &[u8], is_folder: bool) -> Entry {
    let Some(below) = target.strip_prefix(sandbox).filter(|below| below.is_empty() || below.starts_with(b"/")) else {
        let why = "is a link that leads out of the sandbox";
        return if is_folder { Entry::RefusedFolder(why) } else { Entry::Refused(why) };
    };
    let below = below.strip_prefix(b"/").unwrap_or(below);
    if below.split(|byte| *byte == b'/').next() == Some(RESERVED.as_bytes()) {
        return Entry::Refused("is a link to .baton, which belongs to Baton");
    }
    Entry::Link(below.to_vec().into())
}

/// The parent folder of a path; empty for the sandbox.
fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |slash_idx| &path[..slash_idx])
}

/// Whether a folder is `above` or is below it. The sandbox has the empty path.
fn is_within(folder: &[u8], above: &[u8]) -> bool {
    above.is_empty() || folder.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

/// The walk that follows links.
struct Walk<'a> {
    entries: &'a BTreeMap<BytePath, Entry>,
    may_hold: &'a dyn Fn(&[u8]) -> bool,
    found: Listing,
}

impl<'a> Walk<'a> {
    /// Adds the entry at `entry_path` under a path. `above` are the folders that contain it, on the way through all
    /// links.
    fn put(&mut self, at: BytePath, entry_path: &[u8], entry: &'a Entry, above: &[&[u8]]) -> Result<(), Error> {
        let found = match entry {
            _ if relative::check(&at).is_err() => Found::Refused("has a path that is too long"),
            Entry::File { size, executable } => Found::File { size: *size, executable: *executable },
            Entry::Folder => Found::Folder { is_empty: self.below(entry_path).next().is_none() },
            Entry::Refused(why) => Found::Refused(why),
            Entry::RefusedFolder(why) => Found::RefusedFolder(why),
            Entry::Link(target) => match self.entries.get(target) {
                Some(Entry::Folder) if !above.iter().any(|above| is_within(above, target.as_bytes())) => {
                    return self.put_folder(at, target.as_bytes(), above);
                }
                Some(Entry::Folder) => Found::Refused("is a link that leads back to a folder in which it is"),
                None if target.as_bytes().is_empty() => {
                    Found::Refused("is a link that leads back to a folder in which it is")
                }
                Some(Entry::Link(_)) | None => Found::Refused("is a link that leads nowhere"),
                Some(other) => return self.put(at, target.as_bytes(), other, above),
            },
        };
        self.found.insert(at, found);
        if self.found.len() > ENTRIES_MAX {
            return Err(Error::Stage(format!(
                "the sandbox has more than {ENTRIES_MAX} files when links to folders are followed"
            )));
        }
        Ok(())
    }

    fn put_folder(&mut self, at: BytePath, folder: &'a [u8], above: &[&[u8]]) -> Result<(), Error> {
        self.put(at.clone(), folder, &Entry::Folder, above)?;
        if !(self.may_hold)(at.as_bytes()) {
            return Ok(());
        }
        for (path, entry) in self.below(folder) {
            let below = [at.as_bytes(), &path.as_bytes()[folder.len()..]].concat();
            let above: Vec<&[u8]> = above.iter().copied().chain([parent(path.as_bytes())]).collect();
            self.put(below.into(), path.as_bytes(), entry, &above)?;
        }
        Ok(())
    }

    /// The entries below a folder.
    fn below(&self, folder: &[u8]) -> impl Iterator<Item = (&'a BytePath, &'a Entry)> + use<'a> {
        let first = [folder, b"/"].concat();
        let from: BytePath = first.clone().into();
        self.entries.range(from..).take_while(move |(path, _)| path.as_bytes().starts_with(&first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followed(printed: &str) -> Vec<(String, Found)> {
        let entries = entries(printed.replace('|', "\0").as_bytes()).expect("it is a listing");
        let mut walk = Walk { entries: &entries, may_hold: &|_| true, found: Listing::new() };
        for (path, entry) in &entries {
            walk.put(path.clone(), path.as_bytes(), entry, &[parent(path.as_bytes())]).ok().expect("it is small");
        }
        walk.found.into_iter().map(|(path, found)| (path.to_string(), found)).collect()
    }

    #[test]
    fn links_are_followed_and_cycles_end() {
        let found = followed(
            "/s|d 1 755 lib|f 7 755 lib/a|d 1 755 lib/empty|p 0 644 pipe|d 1 755 way|u 1 0 shut|\
             L 9|d lib64|- one|d way/up|- self|- out|- nowhere|- to-pipe|- own|d far|\
             /s/lib|/s/lib/a|/s|/s/self|/t|/s/x|/s/pipe|/s/.baton/done.json|/u|\
             L 1|d way/lib|/s/lib|",
        );
        let file = Found::File { size: 7, executable: true };
        let (full, empty) = (Found::Folder { is_empty: false }, Found::Folder { is_empty: true });
        let nowhere = Found::Refused("is a link that leads nowhere");
        let expected = [
            ("far", Found::RefusedFolder("is a link that leads out of the sandbox")),
            ("lib", full),
            ("lib/a", file),
            ("lib/empty", empty),
            ("lib64", full),
            ("lib64/a", file),
            ("lib64/empty", empty),
            ("nowhere", nowhere),
            ("one", file),
            ("out", Found::Refused("is a link that leads out of the sandbox")),
            ("own", Found::Refused("is a link to .baton, which belongs to Baton")),
            ("pipe", Found::Refused("is a pipe")),
            ("self", nowhere),
            ("shut", Found::RefusedFolder("is a folder that is not readable")),
            ("to-pipe", Found::Refused("is a pipe")),
            ("way", full),
            ("way/lib", full),
            ("way/lib/a", file),
            ("way/lib/empty", empty),
            ("way/up", Found::Refused("is a link that leads back to a folder in which it is")),
        ];
        assert_eq!(found, expected.map(|(path, found)| (path.to_owned(), found)));
    }

    #[test]
    fn a_cycle_of_two_folders_ends() {
        let found = followed("/s|d 1 755 a|d 1 755 b|L 2|d a/to-b|d b/to-a|/s/b|/s/a|");
        let back = Found::Refused("is a link that leads back to a folder in which it is");
        assert!(found.contains(&("a/to-b/to-a".to_owned(), back)), "{found:?}");
        assert_eq!(found.len(), 6, "{found:?}");
    }
}
