//! The result of a command, and excerpts of it for people.

use super::Error;
use super::error::end_text;

/// Most bytes that a command may write to one of its outputs if they are kept in memory.
pub(super) const OUTPUT_MAX: usize = 16 << 20;

/// Lines of a command's standard error that go into an error: the first contain the cause, the last the outcome.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 2;

/// Most characters of each of these lines, not counting the mark for an omitted middle.
const LINE_MAX: usize = 400;

/// The result of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; `None` if a signal ended it.
    pub exit: Option<i32>,
    /// The signal that ended it, without `SIG`.
    pub signal: Option<String>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Why a command failed, for people: the last line of its standard error, or its exit.
    pub(crate) fn complaint(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned());
        last.unwrap_or_else(|| end_text(self.exit, self.signal.as_deref()))
    }

    /// The standard error of a failed command, shortened to one line, or its exit. If some lines mention an error, the
    /// others are omitted.
    pub(crate) fn complaints(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let errors: Vec<&str> = stderr.lines().filter(|line| line.to_lowercase().contains("error")).collect();
        let excerpt =
            excerpt(&if errors.is_empty() { stderr.into_owned() } else { errors.join("\n") }).replace('\n', "; ");
        if excerpt.is_empty() { end_text(self.exit, self.signal.as_deref()) } else { excerpt }
    }

    /// The system's message about a file: the text after the last colon.
    pub(super) fn reason(&self) -> Option<String> {
        let stderr = String::from_utf8_lossy(&self.stderr);
        stderr.trim_end().rsplit(": ").next().filter(|reason| !reason.is_empty()).map(str::to_owned)
    }

    /// Returns the standard output of a command that ended with exit code 0.
    ///
    /// # Errors
    /// [`Error::Command`] with its standard error, shortened.
    pub fn ok(self) -> Result<Vec<u8>, Error> {
        if self.exit == Some(0) {
            return Ok(self.stdout);
        }
        let stderr = excerpt(&String::from_utf8_lossy(&self.stderr));
        Err(Error::Command { exit: self.exit, signal: self.signal, stderr })
    }
}

/// Returns the first and the last lines of a text.
fn excerpt(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let is_omitted = |idx: usize| idx >= FIRST_LINES && idx + LAST_LINES < lines.len();
    let n_omitted = lines.len().saturating_sub(FIRST_LINES + LAST_LINES);
    let mut excerpt = Vec::new();
    for (idx, line) in lines.iter().enumerate().filter(|(idx, _)| !is_omitted(*idx)) {
        if n_omitted > 0 && idx + LAST_LINES == lines.len() {
            excerpt.push(format!("[{n_omitted} lines omitted]"));
        }
        excerpt.push(shortened(line));
    }
    excerpt.join("\n")
}

/// Removes the middle of a long line; its end often has the cause.
pub(crate) fn shortened(line: &str) -> String {
    let n_chars = line.chars().count();
    if n_chars <= LINE_MAX {
        return line.to_owned();
    }
    let begin: String = line.chars().take(LINE_MAX / 2).collect();
    let end: String = line.chars().skip(n_chars - LINE_MAX / 2).collect();
    format!("{begin} [...] {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_keeps_the_first_and_last_lines() {
        assert_eq!((excerpt(""), excerpt("a\n"), excerpt("a\n\nb\r\n")), ("".into(), "a".into(), "a\nb".into()));
        assert_eq!(excerpt("1\n2\n3\n4\n5"), "1\n2\n3\n4\n5");
        assert_eq!(excerpt("1\n2\n3\n4\n5\n6\n7"), "1\n2\n3\n[2 lines omitted]\n6\n7");
        let long = format!("cp: {}: No space left", "x".repeat(LINE_MAX));
        assert!(excerpt(&long).starts_with("cp: x") && excerpt(&long).ends_with("x: No space left"));
    }
}
