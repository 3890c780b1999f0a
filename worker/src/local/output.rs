//! The output of a program so far. Everything here reads files and belongs on a blocking pool.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Bytes of a stream's beginning that are kept with a process's result: enough for a banner and settings.
pub(crate) const HEAD_BYTES: u64 = 32 * 1024;
/// Bytes of a stream's end that are kept with a process's result: enough for a stack trace.
pub(crate) const TAIL_BYTES: u64 = 32 * 1024;

/// Most characters of [`Capture::last_line`]: a line of a table or of a progress display.
const LINE_CHARS_MAX: usize = 200;

/// The beginning and the end of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// The first `HEAD_BYTES`, or all if there are fewer.
    pub head: Vec<u8>,
    /// The last `TAIL_BYTES` of what follows the head.
    pub tail: Vec<u8>,
    /// The length of the stream.
    pub total_bytes: u64,
}

impl Capture {
    /// Reads a stream as it is now. A missing file counts as empty: its program has not started.
    ///
    /// # Errors
    /// The file exists but cannot be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        let Some(mut file) = open(path)? else { return Ok(Self::default()) };
        let total_bytes = file.metadata()?.len();
        let mut head = Vec::new();
        file.by_ref().take(HEAD_BYTES.min(total_bytes)).read_to_end(&mut head)?;
        let tail_at = total_bytes.saturating_sub(TAIL_BYTES).max(HEAD_BYTES.min(total_bytes));
        file.seek(SeekFrom::Start(tail_at))?;
        let mut tail = Vec::new();
        file.take(total_bytes - tail_at).read_to_end(&mut tail)?;
        Ok(Self { head, tail, total_bytes })
    }

    /// The number of bytes omitted between head and tail.
    pub fn omitted_bytes(&self) -> u64 {
        self.total_bytes - self.head.len() as u64 - self.tail.len() as u64
    }

    /// The last line that is not blank, trimmed, at most 200 characters. A carriage return starts a line too, since
    /// progress displays use it.
    pub fn last_line(&self) -> Option<String> {
        // The head's end is the line before the tail only if no bytes are omitted.
        let text = if self.omitted_bytes() == 0 { [&*self.head, &*self.tail].concat() } else { self.tail.clone() };
        let text = String::from_utf8_lossy(&text);
        let line = text.rsplit(['\n', '\r']).map(str::trim).find(|line| !line.is_empty())?;
        Some(line.chars().take(LINE_CHARS_MAX).collect())
    }
}

/// Reads at most `max_bytes` from an offset, to follow a growing stream; empty if there is nothing new.
///
/// # Errors
/// The file exists but cannot be read.
pub(crate) fn read_from(path: &Path, offset: u64, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut file) = open(path)? {
        file.seek(SeekFrom::Start(offset))?;
        file.take(max_bytes).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Opens an output file. A program may replace it, so links and pipes are not opened, and files of another user are
/// ignored.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    match File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Ok(file) => {
            let metadata = file.metadata()?;
            let sandbox = path.parent().and_then(Path::parent).and_then(|sandbox| sandbox.metadata().ok());
            let is_own = sandbox.is_none_or(|sandbox| sandbox.uid() == metadata.uid());
            if metadata.is_file() && is_own { Ok(Some(file)) } else { Ok(None) }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture_of(bytes: &[u8]) -> Capture {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Capture::read(file.path()).unwrap()
    }

    #[test]
    fn head_and_tail_never_overlap_and_count_the_omitted_bytes() {
        for n_bytes in [0, 1, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 64 * 1024, 64 * 1024 + 1, 200_000] {
            let bytes: Vec<u8> = (0..n_bytes).map(|idx: usize| u8::try_from(idx % 251).unwrap()).collect();
            let capture = capture_of(&bytes);
            assert_eq!(capture.total_bytes, n_bytes as u64);
            assert!(bytes.starts_with(&capture.head) && bytes.ends_with(&capture.tail), "{n_bytes}");
            assert_eq!(capture.omitted_bytes(), (n_bytes as u64).saturating_sub(64 * 1024), "{n_bytes}");
        }
    }

    #[test]
    fn the_last_line_is_short_valid_text() {
        assert_eq!(capture_of(b"one\ntwo  \n\n  \n").last_line().as_deref(), Some("two"));
        assert_eq!(capture_of(b"10 %\r20 %\r").last_line().as_deref(), Some("20 %"));
        assert_eq!(capture_of(b"a\xff\n").last_line().as_deref(), Some("a\u{fffd}"));
        assert_eq!(capture_of("é".repeat(300).as_bytes()).last_line(), Some("é".repeat(200)));
        assert_eq!(capture_of(b"\n").last_line(), None);
    }

    #[test]
    fn a_stream_is_read_from_an_offset() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hello world").unwrap();
        assert_eq!(read_from(file.path(), 0, 5).unwrap(), b"hello");
        assert_eq!(read_from(file.path(), 6, 100).unwrap(), b"world");
        assert_eq!(read_from(file.path(), 11, 100).unwrap(), b"");
        assert_eq!(read_from(Path::new("/nonexistent/stdout"), 0, 100).unwrap(), b"");
    }
}
