//! What a command says when it cannot do what it was asked for: one clear line, the remedy, the exit code.

use std::io::Write;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use baton_common::communicator::{CheckError, Down, dead};
use baton_common::exit;
use baton_common::sharing::{self, Foreign};
use baton_common::{config, objects, store};
use baton_worker::cli::chain;
use baton_worker::transport;

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

    /// The broker cannot be reached.
    pub(crate) fn unreachable(reason: String) -> Self {
        Self::new(exit::UNREACHABLE, reason).with_remedy("is RabbitMQ running? `baton doctor` checks")
    }

    pub(crate) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// What went wrong, without the remedy.
    pub(crate) fn text(&self) -> &str {
        &self.message
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
        let code = exit::of_store(&error);
        let remedy = match &error {
            store::Error::Unreachable(_) => {
                Some("is it running, and is BATON_DATABASE_URL right? `baton doctor` checks")
            }
            store::Error::Full(_) => Some("raise the server's max_connections, or stop what uses its connections"),
            store::Error::Refused(_) => Some("check user, password and database name in BATON_DATABASE_URL"),
            store::Error::Url
            | store::Error::UrlParts(_)
            | store::Error::Folder { .. }
            | store::Error::Retry(_)
            | store::Error::SchemaNewer { .. }
            | store::Error::Newer { .. }
            | store::Error::Unreadable(_)
            | store::Error::NoRow
            | store::Error::Stopped
            | store::Error::Rejected(_)
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

/// The exit code of what the object store answered.
pub(crate) fn objects_code(error: &objects::Error) -> u8 {
    match error {
        objects::Error::Config { .. } | objects::Error::NoBucket { .. } => exit::USAGE,
        objects::Error::Absent { .. } => exit::NOT_FOUND,
        objects::Error::Refused { .. } => exit::REFUSED,
        objects::Error::Changed { .. } => exit::CONFLICT,
        objects::Error::Unreachable { .. } => exit::UNREACHABLE,
        objects::Error::Folder { .. }
        | objects::Error::File { .. }
        | objects::Error::Damaged { .. }
        | objects::Error::TooLarge { .. }
        | objects::Error::Manifest { .. } => exit::FAILED,
    }
}

impl From<objects::Error> for Failure {
    fn from(error: objects::Error) -> Self {
        let code = objects_code(&error);
        Self::new(code, chain(&error))
    }
}

impl From<Foreign> for Failure {
    fn from(foreign: Foreign) -> Self {
        Self::new(exit::REFUSED, foreign.text).with_remedy(foreign.remedy)
    }
}

impl From<sharing::Error> for Failure {
    fn from(error: sharing::Error) -> Self {
        match error {
            sharing::Error::Database(error) => error.into(),
            sharing::Error::Objects(error) => error.into(),
        }
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

impl From<dead::Error> for Failure {
    fn from(error: dead::Error) -> Self {
        let (code, remedy) = match &error {
            dead::Error::Connect(error) => broker_remedy(error),
            dead::Error::Refused(_) => (exit::REFUSED, "grant the right to the user, or see RabbitMQ's log"),
            dead::Error::Unreadable => (
                exit::FAILED,
                "nothing is lost; take the letter away in RabbitMQ's management UI (Get messages, automatic ack)",
            ),
            dead::Error::Lost(_) => (exit::UNREACHABLE, "nothing is lost; do it again when the broker is back"),
        };
        Self::new(code, error.to_string()).with_remedy(remedy)
    }
}

impl From<transport::Error> for Failure {
    fn from(error: transport::Error) -> Self {
        use transport::Error;
        let code = match &error {
            Error::UnknownHostKey { .. } | Error::HostKeyChanged { .. } | Error::Refused { .. } => exit::REFUSED,
            Error::Unreachable { .. } | Error::NoChannel(_) | Error::Broken(_) => exit::UNREACHABLE,
            Error::TimedOut { .. } => exit::WAIT_TIMED_OUT,
            Error::Command { .. } | Error::File { .. } | Error::TooMuchOutput => exit::FAILED,
            Error::Config(_) => exit::USAGE,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Down> for Failure {
    fn from(error: Down) -> Self {
        Self::unreachable(error.to_string())
    }
}

impl From<CheckError> for Failure {
    fn from(error: CheckError) -> Self {
        let (code, remedy) = broker_remedy(&error);
        Self::new(code, error.to_string()).with_remedy(remedy)
    }
}

/// What to do about a virtual host of another database.
const OTHER_DATABASE: &str = "name a virtual host of its own for each database in BATON_BROKER_URL; if the other database is \
                              gone, delete the queue `baton.database` of this virtual host";

/// The exit code of a broker that cannot be used, and what to do about it.
pub(crate) fn broker_remedy(error: &CheckError) -> (u8, &'static str) {
    match error {
        CheckError::BadUrl { .. } => (exit::USAGE, "amqp://USER:PASSWORD@HOST:PORT/VHOST, %2f for the vhost \"/\""),
        CheckError::Unreachable { .. } => (exit::UNREACHABLE, "start RabbitMQ, or correct host and port"),
        CheckError::Credentials { .. } => {
            (exit::REFUSED, "correct user and password; guest may log in from its own host only")
        }
        CheckError::NoVhost { .. } => {
            (exit::REFUSED, "rabbitmqctl add_vhost, and rabbitmqctl set_permissions for the user")
        }
        CheckError::OtherDatabase { .. } => (exit::CONFLICT, OTHER_DATABASE),
        CheckError::Refused { .. } => (exit::REFUSED, "see RabbitMQ's log"),
        CheckError::All(_) => (exit::UNREACHABLE, "`baton doctor` checks each of them"),
    }
}

/// The exit code of a command that did the same for many.
pub(crate) fn exit_code_of_many(codes: impl ExactSizeIterator<Item = u8>) -> u8 {
    let n_all = codes.len();
    let failed: Vec<u8> = codes.filter(|code| *code != exit::OK).collect();
    match failed[..] {
        [] => exit::OK,
        [code, ..] if failed.len() == n_all => code,
        [..] => exit::SOME_FAILED,
    }
}
