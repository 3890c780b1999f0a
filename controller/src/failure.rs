//! The failure of a command: one line that says what happened, a remedy, and the exit code.

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
        Self::new(exit::UNREACHABLE, reason).with_remedy("check that RabbitMQ is running, or run `baton doctor`")
    }

    pub(crate) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Returns the message without the remedy.
    pub(crate) fn text(&self) -> &str {
        &self.message
    }

    /// Writes the failure to standard error and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if self.code == exit::OK {
            return ExitCode::from(exit::OK);
        }
        let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let mut stderr = anstream::stderr();
        // If standard error is closed, the error cannot be reported.
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
                Some("check that the server is running and that BATON_DATABASE_URL is correct, or run `baton doctor`")
            }
            store::Error::Full(_) => {
                Some("raise max_connections of the server, or stop programs that use its connections")
            }
            store::Error::Refused(_) => Some("correct the user, password or database name in BATON_DATABASE_URL"),
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

/// Returns the exit code for an error of the object store.
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
        // The reader of our output has closed it, as `head` does. That is not a failure.
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
            dead::Error::Refused(_) => (exit::REFUSED, "grant the permission to the user, or see the log of RabbitMQ"),
            dead::Error::Unreadable => (
                exit::FAILED,
                "nothing is lost; remove the message in the management UI of RabbitMQ (Get messages, automatic ack)",
            ),
            dead::Error::Lost(_) => {
                (exit::UNREACHABLE, "nothing is lost; run the command again when the broker is reachable")
            }
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

/// Remedy for a virtual host that belongs to another database.
const OTHER_DATABASE: &str = "use a separate virtual host for each database (BATON_BROKER_URL); if the other database no longer \
                              exists, delete the queue `baton.database` in this virtual host";

/// Returns the exit code and the remedy for a broker that cannot be used.
pub(crate) fn broker_remedy(error: &CheckError) -> (u8, &'static str) {
    match error {
        CheckError::BadUrl { .. } => {
            (exit::USAGE, "use amqp://USER:PASSWORD@HOST:PORT/VHOST, with %2f for the virtual host \"/\"")
        }
        CheckError::Unreachable { .. } => (exit::UNREACHABLE, "start RabbitMQ, or correct the host and port"),
        CheckError::Credentials { .. } => {
            (exit::REFUSED, "correct the user and password; the user guest can log in only from the broker's host")
        }
        CheckError::NoVhost { .. } => (exit::REFUSED, "run `rabbitmqctl add_vhost` and `rabbitmqctl set_permissions`"),
        CheckError::OtherDatabase { .. } => (exit::CONFLICT, OTHER_DATABASE),
        CheckError::Refused { .. } => (exit::REFUSED, "see the log of RabbitMQ"),
        CheckError::All(_) => (exit::UNREACHABLE, "run `baton doctor`, which checks each broker"),
    }
}

/// Returns the exit code of a command from the exit codes of its items.
pub(crate) fn exit_code_of_many(codes: impl ExactSizeIterator<Item = u8>) -> u8 {
    let n_all = codes.len();
    let failed: Vec<u8> = codes.filter(|code| *code != exit::OK).collect();
    match failed[..] {
        [] => exit::OK,
        [code, ..] if failed.len() == n_all => code,
        [..] => exit::SOME_FAILED,
    }
}
