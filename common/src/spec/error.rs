//! What is wrong with a document: lines for the person who wrote it.

use std::fmt;

/// The document is not a spec. Nothing but another document helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    problems: Vec<Problem>,
}

/// One thing that is wrong, with what to write instead. Its text is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1; `None` for what concerns the whole document or did not come from a text.
    pub line: Option<u32>,
    /// The column, from 1; only for what the parser could not read.
    pub column: Option<u32>,
    /// What is wrong, with the key.
    pub text: String,
}

impl Error {
    /// Everything that is wrong, in the order of the lines; at least one.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    pub(super) fn new(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| problem.line);
        Self { problems }
    }
}

impl Problem {
    pub(super) fn at(line: Option<u32>, text: impl Into<String>) -> Self {
        Self { line, column: None, text: text.into() }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem] }
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (problem_idx, problem) in self.problems.iter().enumerate() {
            if problem_idx > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What users wrote stands in the text: it must not break the line nor reach a terminal as a command.
        let text = self.text.replace(char::is_control, "\u{fffd}");
        match (self.line, self.column) {
            (Some(line), Some(column)) => write!(f, "line {line}, column {column}: {text}"),
            (Some(line), None) => write!(f, "line {line}: {text}"),
            (None, _) => f.write_str(&text),
        }
    }
}
