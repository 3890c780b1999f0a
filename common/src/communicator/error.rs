//! Why the broker cannot be used, and why a message was not sent.

use std::time::Duration;

use crate::message::SIZE_BYTES_MAX;

/// The broker is unreachable or blocks publishers; nothing was sent. The text gives the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("broker unavailable: {0}")]
pub struct Down(pub String);

/// Why tasks were not published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Some or all may have arrived. Publish again: a process is claimed once, even if its task is delivered twice.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// Nothing was sent. Publish again when the broker is back.
    #[error(transparent)]
    Down(#[from] Down),
    /// The queue does not exist and could not be declared.
    #[error("queue {queue} accepts no messages: {reason}")]
    Unroutable {
        /// The task queue's name, without the prefix.
        queue: String,
        /// The broker's error.
        reason: String,
    },
    /// A body exceeds the size limit of readers; nothing was sent.
    #[error("a message of {0} bytes exceeds the limit of {SIZE_BYTES_MAX}")]
    TooLarge(usize),
}

/// Why a request has no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The control queue does not exist: the worker has ended or is reconnecting.
    #[error("control queue {0} does not exist")]
    Unroutable(String),
    /// No reply in time; the request may have been obeyed.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// See [`Down`].
    #[error(transparent)]
    Down(#[from] Down),
}

/// Why a broker cannot be used. The text never contains a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Correct the configuration.
    #[error("invalid broker URL {url}: {reason}")]
    BadUrl {
        /// The URL, its password masked.
        url: String,
        /// The problem.
        reason: String,
    },
    /// Start the broker, or correct host and port.
    #[error("cannot reach broker {url}: {reason}")]
    Unreachable {
        /// As above.
        url: String,
        /// The network error.
        reason: String,
    },
    /// Correct user and password.
    #[error("broker {url} rejected the credentials of user {user}")]
    Credentials {
        /// As above.
        url: String,
        /// The rejected user.
        user: String,
    },
    /// Create the virtual host, or grant the user access to it.
    #[error("broker {url} denied access to virtual host {vhost}: {reason}")]
    NoVhost {
        /// As above.
        url: String,
        /// The virtual host.
        vhost: String,
        /// The broker's error.
        reason: String,
    },
    /// Configure a separate virtual host for each database.
    #[error("virtual host {vhost} of broker {url} belongs to another database")]
    OtherDatabase {
        /// As above.
        url: String,
        /// The virtual host.
        vhost: String,
    },
    /// The broker refused the connection for another reason.
    #[error("broker {url} refused the connection: {reason}")]
    Refused {
        /// As above.
        url: String,
        /// The broker's error.
        reason: String,
    },
    /// None of several brokers can be used.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    All(Vec<CheckError>),
}

impl CheckError {
    /// The error if no URL is usable.
    pub(super) fn of_all(mut errors: Vec<CheckError>) -> Self {
        match errors.pop() {
            None => CheckError::BadUrl { url: String::new(), reason: "no URL is configured".to_owned() },
            Some(only) if errors.is_empty() => only,
            Some(last) => {
                errors.push(last);
                CheckError::All(errors)
            }
        }
    }
}
