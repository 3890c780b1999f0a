//! Logs, and the trace context of a process in rows and messages.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use uuid::Uuid;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people, coloured on a terminal.
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to standard error. `filter` has the syntax of `tracing`'s `EnvFilter` (`info`, `baton_worker=debug`).
pub fn init(filter: &str, format: LogFormat) {
    // Baton logs broken connections itself, once, so the libraries need not.
    let filter = format!("{filter},lapin=off,sqlx=off,sea_orm_migration=warn,tcp_stream=off");
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        // These errors also go to standard error, and a failure to write there panics. A full disk must not end a
        // thread.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// A new W3C trace context: <https://www.w3.org/TR/trace-context/#traceparent-header>.
pub fn new_traceparent() -> String {
    let trace = Uuid::new_v4().simple().to_string();
    let span = &Uuid::new_v4().simple().to_string()[..16];
    format!("00-{trace}-{span}-01")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_has_the_four_parts_of_the_standard() {
        let text = new_traceparent();
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [2, 32, 16, 2], "{text}");
    }
}
