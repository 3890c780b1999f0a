//! The problems of a document, for its author.

use std::fmt;

use crate::unique_keys::DuplicateKey;

/// The document is not a valid spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    problems: Vec<Problem>,
}

/// One problem, with its remedy. The text is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1; `None` for a problem of the whole document, or if the document has no text.
    pub line: Option<u32>,
    /// The column, from 1; only for syntax errors.
    pub column: Option<u32>,
    /// The problem, with the key.
    pub text: String,
}

impl Error {
    /// All problems in the order of their lines; at least one.
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

impl From<DuplicateKey> for Error {
    fn from(duplicate: DuplicateKey) -> Self {
        Problem::at(None, duplicate.to_string()).into()
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
        // The text quotes the document. It must not contain line breaks or terminal escape sequences.
        let text = self.text.replace(char::is_control, "\u{fffd}");
        match (self.line, self.column) {
            (Some(line), Some(column)) => write!(f, "line {line}, column {column}: {text}"),
            (Some(line), None) => write!(f, "line {line}: {text}"),
            (None, _) => f.write_str(&text),
        }
    }
}
