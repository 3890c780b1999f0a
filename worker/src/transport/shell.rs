//! A persistent shell: many scripts on one channel.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::running::{Item, Running, keep};
use super::{Error, Output, quote};

/// A persistent shell on the site's machine.
#[derive(Debug)]
pub struct Shell {
    /// `None` once it is broken.
    running: Option<Running>,
}

impl Shell {
    pub(super) fn new(running: Running) -> Self {
        Self { running: Some(running) }
    }

    /// Runs a script in its own subshell with empty standard input, and waits for its end. Background programs of the
    /// script must redirect their outputs.
    ///
    /// # Errors
    /// [`Error::TimedOut`], [`Error::TooMuchOutput`] and errors of the transport break the shell: later runs return
    /// [`Error::Broken`]. A script that fails is no error here; see [`Output::ok`].
    ///
    /// # Cancel safety
    /// Dropping the future of a run breaks the shell.
    pub async fn run(&mut self, script: &str, limit: Duration) -> Result<Output, Error> {
        // Put back only after a complete answer, so that output is never taken for the answer to another script.
        let Some(mut running) = self.running.take() else {
            return Err(Error::Broken("an earlier script broke the shell".to_owned()));
        };
        let output = match timeout(limit, Box::pin(converse(&mut running, script))).await {
            Ok(output) => output?,
            Err(_) => return Err(Error::TimedOut { what: "a script".to_owned(), limit }),
        };
        self.running = Some(running);
        Ok(output)
    }
}

async fn converse(running: &mut Running, script: &str) -> Result<Output, Error> {
    let mark = format!("baton-{}", uuid::Uuid::new_v4().simple());
    let (mut input, mut outputs) = running.halves();
    let text = wrapped(script, &mark);
    let writing = input.write(Bytes::from(text));
    tokio::pin!(writing);
    let mut is_written = false;
    let (mut stdout, mut stderr) = (Marked::new(&mark), Marked::new(&mark));
    loop {
        let item = tokio::select! {
            item = outputs.next() => item?,
            written = &mut writing, if !is_written => {
                written?;
                is_written = true;
                continue;
            }
        };
        match item {
            Item::Stdout(piece) => stdout.add(&piece)?,
            Item::Stderr(piece) => stderr.add(&piece)?,
            Item::Ended { .. } => return Err(Error::Broken("the shell has ended".to_owned())),
        }
        if let (Some((stdout, code)), Some((stderr, _))) = (stdout.between(), stderr.between()) {
            let exit = std::str::from_utf8(code).ok().and_then(|code| code.parse().ok());
            let exit = exit.ok_or_else(|| Error::Broken("the shell's answer has no exit code".to_owned()))?;
            return Ok(Output { exit: Some(exit), signal: None, stdout: stdout.to_vec(), stderr: stderr.to_vec() });
        }
    }
}

/// One output. Before the first mark it may contain output of an earlier script.
struct Marked {
    begin: Vec<u8>,
    end: Vec<u8>,
    kept: Vec<u8>,
    /// The end of the first mark.
    from: Option<usize>,
    /// The start of the second mark.
    to: Option<usize>,
    /// No mark starts before this position.
    looked: usize,
}

impl Marked {
    fn new(mark: &str) -> Self {
        let (begin, end) = (format!("{mark}\n").into_bytes(), format!("{mark} ").into_bytes());
        Self { begin, end, kept: Vec::new(), from: None, to: None, looked: 0 }
    }

    fn add(&mut self, piece: &[u8]) -> Result<(), Error> {
        keep(&mut self.kept, piece)?;
        if self.from.is_none() {
            self.from = self.find(&self.begin).map(|at| at + self.begin.len());
            self.looked = self.from.unwrap_or_else(|| self.kept.len().saturating_sub(self.begin.len()));
        }
        if self.from.is_some() && self.to.is_none() {
            self.to = self.find(&self.end);
            self.looked = self.to.unwrap_or_else(|| self.looked.max(self.kept.len().saturating_sub(self.end.len())));
        }
        Ok(())
    }

    fn find(&self, word: &[u8]) -> Option<usize> {
        self.kept[self.looked..].windows(word.len()).position(|window| window == word).map(|at| self.looked + at)
    }

    /// The bytes between the marks and the rest of the second mark's line, once that line is complete.
    fn between(&self) -> Option<(&[u8], &[u8])> {
        let (from, to) = (self.from?, self.to?);
        let after = &self.kept[to + self.end.len()..];
        let line_end = after.iter().position(|byte| *byte == b'\n')?;
        Some((&self.kept[from..to], &after[..line_end]))
    }
}

/// Encloses the script in two marks on both outputs; its exit code follows the second.
fn wrapped(script: &str, mark: &str) -> String {
    let script = quote(script);
    format!(
        "echo {mark}; echo {mark} >&2; ( eval {script} ) </dev/null; printf '{mark} %s\\n' $?; printf '{mark} \\n' >&2\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_in_any_pieces() {
        let whole = b"motd\nM\nline\nno end of lineM 3\n";
        for size in 1..=whole.len() {
            let mut marked = Marked::new("M");
            for piece in whole.chunks(size) {
                assert_eq!(marked.between(), None);
                marked.add(piece).unwrap();
            }
            assert_eq!(marked.between(), Some((&b"line\nno end of line"[..], &b"3"[..])), "{size}");
        }
    }
}
