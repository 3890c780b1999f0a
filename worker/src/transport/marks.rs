//! What a command itself writes, told from what a login shell writes before and after it.
//!
//! A login may print a banner before a command and a farewell after it, on both outputs, and may end with another exit.
//! So the command's outputs stand between marks that are made for the connection, and the last mark of its standard output
//! is followed by its exit.

use bytes::{Bytes, BytesMut};

/// Most that start-up files of a login shell may print.
const NOISE_MAX: usize = 256 << 10;

/// Most digits of an exit, with the blank before and the line end after them.
const EXIT_MAX: usize = 16;

/// The marks of a connection.
#[derive(Debug)]
pub(super) struct Marks(String);

/// One output of a command, as it comes.
#[derive(Debug)]
pub(super) struct Marked {
    begin: Vec<u8>,
    end: Vec<u8>,
    part: Part,
}

#[derive(Debug)]
enum Part {
    /// Before the first mark.
    Before(BytesMut),
    /// Between the marks, with bytes that may be the beginning of the last mark.
    Inside(Bytes),
    /// Behind the last mark.
    After(Vec<u8>),
}

/// The login shell prints without end.
#[derive(Debug)]
pub(super) struct Endless;

impl Marks {
    pub(super) fn new() -> Self {
        Self(format!("baton-{}", uuid::Uuid::new_v4().simple()))
    }

    pub(super) fn stdout(&self) -> Marked {
        Marked::new(format!("{}<\n", self.0), format!("{}>", self.0))
    }

    pub(super) fn stderr(&self) -> Marked {
        Marked::new(format!("{}<e\n", self.0), format!("{}>e", self.0))
    }

    /// A script that runs its first argument as a command, with the outputs between marks, and ends as that does; a signal
    /// to `$$` ends the script. The marks of the standard output are the inner ones, should a login send both outputs to one
    /// place.
    pub(super) fn script(&self) -> String {
        let mark = &self.0;
        format!(
            "printf '%s\\n' '{mark}<e' >&2; printf '%s\\n' '{mark}<'
             ( eval \"shift
             $1\" )
             set -- $?; printf '%s %d\\n' '{mark}>' $1; printf '%s\\n' '{mark}>e' >&2; exit $1"
        )
    }
}

impl Marked {
    fn new(begin: String, end: String) -> Self {
        Self { begin: begin.into_bytes(), end: end.into_bytes(), part: Part::Before(BytesMut::new()) }
    }

    /// Takes what has come, and gives back what of it the command is known to have written.
    ///
    /// # Errors
    /// No command has begun for long.
    pub(super) fn push(&mut self, data: Bytes) -> Result<Option<Bytes>, Endless> {
        let data = match &mut self.part {
            Part::Before(noise) => {
                noise.extend_from_slice(&data);
                let Some(at) = find(noise, &self.begin) else {
                    return if noise.len() > NOISE_MAX { Err(Endless) } else { Ok(None) };
                };
                noise.split_off(at + self.begin.len()).freeze()
            }
            Part::Inside(held) if held.is_empty() => data,
            Part::Inside(held) => [&held[..], &data[..]].concat().into(),
            Part::After(tail) => {
                tail.extend(data.iter().take(EXIT_MAX.saturating_sub(tail.len())));
                return Ok(None);
            }
        };
        let written = match find(&data, &self.end) {
            Some(at) => {
                let tail = &data[at + self.end.len()..];
                self.part = Part::After(tail[..tail.len().min(EXIT_MAX)].to_vec());
                data.slice(..at)
            }
            None => {
                let mut written = data;
                self.part = Part::Inside(written.split_off(written.len() - begun(&written, &self.end)));
                written
            }
        };
        Ok(Some(written).filter(|written| !written.is_empty()))
    }

    /// Whether the command has begun to run.
    pub(super) fn has_begun(&self) -> bool {
        !matches!(self.part, Part::Before(_))
    }

    /// Whether everything that the command has written is there.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.part, Part::After(_))
    }

    /// What is left when nothing more comes: without a mark it may be anything.
    pub(super) fn rest(&mut self) -> Bytes {
        match &mut self.part {
            Part::Before(noise) => std::mem::take(noise).freeze(),
            Part::Inside(held) => std::mem::take(held),
            Part::After(_) => Bytes::new(),
        }
    }

    /// The exit that follows the last mark.
    pub(super) fn exit(&self) -> Option<i32> {
        let Part::After(tail) = &self.part else { return None };
        std::str::from_utf8(tail).ok()?.strip_prefix(' ')?.split_once('\n')?.0.parse().ok()
    }
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let first = *word.first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|byte| *byte == first).map(|at| from + at) {
        if bytes[at..].starts_with(word) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// How many bytes at the end are the beginning of a word.
fn begun(bytes: &[u8], word: &[u8]) -> usize {
    (1..word.len()).rev().find(|n_bytes| bytes.ends_with(&word[..*n_bytes])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_writes_is_found_however_it_is_cut() {
        let marks = Marks("M".into());
        for (content, exit) in [("", 0), ("text\nM\nno end of line", 3), ("M M> almost", 255), ("M", 1), ("a\nM", 0)] {
            let content = content.replace("M>", "M-");
            let whole = format!("banner M\nM<\n{content}M> {exit}\nbye M< M> 7\n");
            for size in 1..=whole.len() {
                let mut marked = marks.stdout();
                let mut written = Vec::new();
                for piece in whole.as_bytes().chunks(size) {
                    written.extend(marked.push(Bytes::copy_from_slice(piece)).unwrap().unwrap_or_default());
                }
                assert_eq!(String::from_utf8(written).unwrap(), content, "{size}");
                assert_eq!((marked.exit(), marked.has_ended()), (Some(exit), true), "{size}");
            }
        }
    }

    #[test]
    fn without_its_last_mark_a_command_has_not_ended() {
        let mut marked = Marks("M".into()).stdout();
        assert_eq!(marked.push(Bytes::from_static(b"why")).unwrap(), None);
        assert!(!marked.has_begun());
        assert_eq!(marked.push(Bytes::from_static(b"M<\nall M")).unwrap(), Some(Bytes::from_static(b"all ")));
        assert!(marked.has_begun() && !marked.has_ended());
        assert_eq!((marked.exit(), marked.rest()), (None, Bytes::from_static(b"M")));
    }

    #[test]
    fn the_script_around_a_command_ends_as_it_does() {
        let marks = Marks("M".into());
        for (command, stdout, exit) in [
            ("echo a; exit 3", "M<\na\nM> 3\n", 3),
            ("printf x # a word", "M<\nxM> 0\n", 0),
            ("cat <<X\n$0 it's\nX", "M<\n/bin/sh it's\nM> 0\n", 0),
            ("exec sh -c 'exit 7'", "M<\nM> 7\n", 7),
            ("(exit 2)", "M<\nM> 2\n", 2),
            ("set -e; false; echo no", "M<\nM> 1\n", 1),
            ("", "M<\nM> 0\n", 0),
            ("echo $# $1", "M<\n0\nM> 0\n", 0),
            ("if", "M<\nM> 2\n", 2),
            ("sh -c 'kill -TERM $$'", "M<\nM> 143\n", 143),
        ] {
            let ran = std::process::Command::new("/bin/sh")
                .args(["-c", &marks.script(), "/bin/sh", command])
                .output()
                .unwrap();
            assert_eq!((String::from_utf8_lossy(&ran.stdout).as_ref(), ran.status.code()), (stdout, Some(exit)));
            let stderr = String::from_utf8_lossy(&ran.stderr);
            assert!(stderr.starts_with("M<e\n") && stderr.ends_with("M>e\n"), "{command}: {stderr}");
        }
    }
}
