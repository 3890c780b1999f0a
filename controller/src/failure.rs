//! What a command says when it cannot do what it was asked for: one clear line, the remedy, the exit code.

use std::io::Write;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use baton_common::{config, store};
use baton_worker::cli::{chain, exit, exit_code};

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
    remedy: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: None }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(exit::FAILED, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, message)
    }

    pub(crate) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Writes it to standard error.
    pub(crate) fn report(&self) -> ExitCode {
        if self.code == exit::OK {
            return ExitCode::from(exit::OK);
        }
        let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let mut stderr = anstream::stderr();
        // Nobody can be told that standard error is closed.
        let _ = writeln!(stderr, "{red}error{red:#}: {}", self.message);
        if let Some(remedy) = &self.remedy {
            let _ = writeln!(stderr, "  {remedy}");
        }
        ExitCode::from(self.code)
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        let code = exit_code(&error);
        let remedy = match &error {
            store::Error::Unreachable(_) => {
                Some("is it running, and is BATON_DATABASE_URL right? `baton doctor` checks")
            }
            store::Error::Refused(_) => Some("check user, password and database name in BATON_DATABASE_URL"),
            store::Error::Url
            | store::Error::Folder { .. }
            | store::Error::Retry(_)
            | store::Error::SchemaNewer { .. }
            | store::Error::Unreadable(_)
            | store::Error::NoRow
            | store::Error::Stopped
            | store::Error::Database(_) => None,
        };
        Self { code, message: chain(&error), remedy: remedy.map(str::to_owned) }
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::usage(chain(&error))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        // Whoever reads our output has seen enough, as `head` does; that is no failure, and there is nothing to say.
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::new(exit::OK, String::new());
        }
        Self::failed(error.to_string())
    }
}
