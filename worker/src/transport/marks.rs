//! Marks that separate the output of a command from that of the login shell.
//!
//! A login shell may print text before and after a command, on both outputs, and may exit with another code. So each
//! output of the command is enclosed in marks that are unique for the connection, and its exit code follows the last mark
//! of its standard output.

use bytes::{Bytes, BytesMut};

/// Most bytes that the start-up files of a login shell may print.
const NOISE_MAX: usize = 256 << 10;

/// Most characters of an exit code, with the blank before and the line end after it.
const EXIT_MAX: usize = 16;

/// The marks of a connection.
#[derive(Debug)]
pub(super) struct Marks(String);

/// One output of a command, read piece by piece.
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
    /// Between the marks, with held-back bytes that may begin the last mark.
    Inside(Bytes),
    /// After the last mark.
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

    /// A script that runs its first argument as a command, prints the marks around its outputs, and exits with its code;
    /// a signal to `$$` ends the script. The marks of the standard output are the inner ones, in case a login merges both
    /// outputs.
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

    /// Takes a piece of output and returns the bytes that the command wrote for certain.
    ///
    /// # Errors
    /// The login shell has printed too much before the command.
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

    /// Whether the command has started.
    pub(super) fn has_begun(&self) -> bool {
        !matches!(self.part, Part::Before(_))
    }

    /// Whether the output is complete.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.part, Part::After(_))
    }

    /// The held-back bytes, once the output has ended; before the first mark, the text of the login shell.
    pub(super) fn rest(&mut self) -> Bytes {
        match &mut self.part {
            Part::Before(noise) => std::mem::take(noise).freeze(),
            Part::Inside(held) => std::mem::take(held),
            Part::After(_) => Bytes::new(),
        }
    }

    /// The exit code after the last mark.
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

/// The number of bytes at the end that may begin a word.
fn begun(bytes: &[u8], word: &[u8]) -> usize {
    (1..word.len()).rev().find(|n_bytes| bytes.ends_with(&word[..*n_bytes])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_a_command_is_found_in_any_pieces() {
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
    fn a_command_without_its_last_mark_has_not_ended() {
        let mut marked = Marks("M".into()).stdout();
        assert_eq!(marked.push(Bytes::from_static(b"why")).unwrap(), None);
        assert!(!marked.has_begun());
        assert_eq!(marked.push(Bytes::from_static(b"M<\nall M")).unwrap(), Some(Bytes::from_static(b"all ")));
        assert!(marked.has_begun() && !marked.has_ended());
        assert_eq!((marked.exit(), marked.rest()), (None, Bytes::from_static(b"M")));
    }

    #[test]
    fn the_wrapper_script_exits_with_the_code_of_its_command() {
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
