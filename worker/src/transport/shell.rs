//! A shell that stays open: many scripts on one channel.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::running::{Event, Running, keep};
use super::{Error, Output, quote};

/// A shell of the site's machine that stays open.
#[derive(Debug)]
pub struct Shell {
    /// None when it is broken.
    running: Option<Running>,
}

impl Shell {
    pub(super) fn new(running: Running) -> Self {
        Self { running: Some(running) }
    }

    /// Runs a script in a subshell of its own, with nothing as its standard input, and waits for its end. Programs that it
    /// leaves in the background must have their outputs elsewhere.
    ///
    /// # Errors
    /// [`Error::TimedOut`], [`Error::TooMuchOutput`] and those of the transport break the shell: later runs are
    /// [`Error::Broken`]. That the script fails is no error here; see [`Output::ok`].
    ///
    /// # Cancel safety
    /// A run whose future is dropped breaks the shell.
    pub async fn run(&mut self, script: &str, limit: Duration) -> Result<Output, Error> {
        // Put back only after an answer that is whole, so that nothing is ever taken for the answer to another script.
        let Some(mut running) = self.running.take() else {
            return Err(Error::Broken("an earlier script has broken the shell".to_owned()));
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
    let (mut input, mut events) = running.halves();
    let text = wrapped(script, &mark);
    let writing = input.write(Bytes::from(text));
    tokio::pin!(writing);
    let mut is_written = false;
    let (mut stdout, mut stderr) = (Marked::new(&mark), Marked::new(&mark));
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            written = &mut writing, if !is_written => {
                written?;
                is_written = true;
                continue;
            }
        };
        match event {
            Event::Stdout(piece) => stdout.add(&piece)?,
            Event::Stderr(piece) => stderr.add(&piece)?,
            Event::Ended { .. } => return Err(Error::Broken("the shell has ended".to_owned())),
        }
        if let (Some((stdout, code)), Some((stderr, _))) = (stdout.between(), stderr.between()) {
            let exit = std::str::from_utf8(code).ok().and_then(|code| code.parse().ok());
            let exit = exit.ok_or_else(|| Error::Broken("the shell's answer has no exit code".to_owned()))?;
            return Ok(Output { exit: Some(exit), signal: None, stdout: stdout.to_vec(), stderr: stderr.to_vec() });
        }
    }
}

/// One output, with what an earlier script has left to it before the first mark.
struct Marked {
    begin: Vec<u8>,
    end: Vec<u8>,
    kept: Vec<u8>,
    /// Behind the first mark.
    from: Option<usize>,
    /// Before the second mark.
    to: Option<usize>,
    /// There is no mark before this.
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

    /// What is between the marks, and what follows the second in its line; once that line is whole.
    fn between(&self) -> Option<(&[u8], &[u8])> {
        let (from, to) = (self.from?, self.to?);
        let after = &self.kept[to + self.end.len()..];
        let line_end = after.iter().position(|byte| *byte == b'\n')?;
        Some((&self.kept[from..to], &after[..line_end]))
    }
}

/// The script between two marks on both outputs, the second with its exit code.
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
    fn marks_are_found_however_the_output_is_cut() {
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
