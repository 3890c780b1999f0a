//! Errors of the store, by what the caller does next.

use std::path::PathBuf;

use sea_orm::sqlx;
use sea_orm::{ConnAcquireErr, DbErr, RuntimeErr};

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL has an unknown scheme.
    #[error("the database URL must begin with postgres:// or sqlite:")]
    Url,
    /// The URL cannot be parsed. The text quotes none of it, since any part may belong to a password.
    #[error(
        "the database URL cannot be parsed: {0}; it is postgres://USER:PASSWORD@HOST:PORT/NAME, and in user, password and \
         name `/`, `#`, `?`, `@`, `:` and `%` are written as %2F, %23, %3F, %40, %3A and %25"
    )]
    UrlParts(&'static str),
    /// The folder of a SQLite file cannot be created.
    #[error("cannot create the folder {}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The database did not answer. Retry; the outcome of a write is unknown.
    #[error("the database does not answer: {0}")]
    Unreachable(String),
    /// The server accepts no more connections (`max_connections`, or a limit of the role or the database). Retry.
    #[error("the database has no connection left (max_connections): {0}")]
    Full(String),
    /// The server rejected the credentials or the database name.
    #[error("the database refused the connection: {0}")]
    Refused(String),
    /// A conflict between two transactions. Nothing was written; retry.
    #[error("the database reports a conflict or a lack of resources: {0}")]
    Retry(String),
    /// A newer Baton has migrated this database in a way that excludes older programs.
    #[error("the database's schema is newer than this program (it has migration `{migration}`); update this program")]
    SchemaNewer {
        /// The unknown migration.
        migration: String,
    },
    /// A newer Baton wrote this value; a newer program can read it.
    #[error("version {found} is newer than this program reads ({known})")]
    Newer {
        /// The version of the value.
        found: u8,
        /// The newest version that this program reads.
        known: u8,
    },
    /// A row that no version of Baton writes.
    #[error("unreadable row: {0}")]
    Unreadable(String),
    /// A statement that always returns a row returned none.
    #[error("the database returned no row")]
    NoRow,
    /// The writer has stopped together with the worker.
    #[error("the writer has stopped")]
    Stopped,
    /// The database can never store a value: a NUL byte in a text, or a value too long for an index. The same call
    /// fails again, so report it to the sender.
    #[error("the database can never store this: {0}")]
    Rejected(String),
    /// Any other error of the database: a missing privilege, a damaged table.
    #[error("the database failed: {0}")]
    Database(String),
}

impl Error {
    /// Whether the same call can succeed later without intervention.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable(_) | Error::Full(_) | Error::Retry(_) => true,
            Error::Url
            | Error::UrlParts(_)
            | Error::Folder { .. }
            | Error::Refused(_)
            | Error::SchemaNewer { .. }
            | Error::Newer { .. }
            | Error::Unreadable(_)
            | Error::NoRow
            | Error::Stopped
            | Error::Rejected(_)
            | Error::Database(_) => false,
        }
    }
}

impl From<DbErr> for Error {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum; what is not named here has no remedy of its own"
    )]
    fn from(error: DbErr) -> Self {
        match &error {
            DbErr::ConnectionAcquire(ConnAcquireErr::Timeout | ConnAcquireErr::ConnectionClosed) => {
                Error::Unreachable("no connection within the time limit".into())
            }
            DbErr::Conn(RuntimeErr::SqlxError(cause))
            | DbErr::Exec(RuntimeErr::SqlxError(cause))
            | DbErr::Query(RuntimeErr::SqlxError(cause)) => classify(cause),
            DbErr::Conn(RuntimeErr::Internal(text)) => Error::Unreachable(text.clone()),
            // A null value, or a code that no version writes.
            DbErr::Type(text) => Error::Unreadable(text.clone()),
            _ => Error::Database(error.to_string()),
        }
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum; what is not named here has no remedy of its own")]
fn classify(cause: &sqlx::Error) -> Error {
    match cause {
        sqlx::Error::Database(database) => {
            let text = database.message().to_owned();
            let code = database.code().unwrap_or_default().into_owned();
            // PostgreSQL: https://www.postgresql.org/docs/15/errcodes-appendix.html; SQLite: 5 busy, 6 locked, 517 busy
            // with a stale snapshot.
            match code.as_str() {
                "28000" | "28P01" | "3D000" => Error::Refused(text),
                "40001" | "40P01" | "55P03" | "5" | "6" | "517" => Error::Retry(text),
                // Out of resources, most often a full disk: the write can succeed later.
                "13" => Error::Retry(text),
                "53300" => Error::Full(text),
                // A standby that has not been promoted yet.
                "25006" => Error::Retry(text),
                _ if code.starts_with("53") => Error::Retry(text),
                // Data exceptions and program limits; SQLite: 18 too big, 20 mismatch.
                "18" | "20" => Error::Rejected(text),
                _ if code.len() == 5 && (code.starts_with("22") || code.starts_with("54")) => Error::Rejected(text),
                _ if code.starts_with("08") || code.starts_with("57P") => Error::Unreachable(text),
                _ => Error::Database(text),
            }
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Error::Unreachable(cause.to_string()),
        sqlx::Error::Configuration(cause) => Error::UrlParts(url_part(&cause.to_string())),
        other => Error::Database(other.to_string()),
    }
}

/// Names the part of a URL that cannot be parsed, from the parser's message.
fn url_part(said: &str) -> &'static str {
    let parts = [
        ("port", "its port is not a number"),
        ("ssl", "its `sslmode` or another TLS option is unknown"),
        ("host", "its host is missing or has invalid characters"),
        ("percent", "its percent-encoding is invalid"),
    ];
    let said = said.to_lowercase();
    parts.iter().find(|(word, _)| said.contains(word)).map_or("a part of it is malformed", |(_, what)| what)
}
