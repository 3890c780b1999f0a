//! How results are printed: tables for people, JSON for programs, ids for other commands.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use baton_common::exit;
use baton_common::state::{Desired, Place, State};
use baton_common::store::query::{COUNT_MAX, Summary};
use baton_common::store::site::{Job, NEVER, SiteFacts};
use chrono::{DateTime, Local, SecondsFormat, Utc};
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::failure::Failure;

/// Returns a progress bar for `total_bytes`, hidden unless standard error is a terminal.
pub(crate) fn progress_bar(total_bytes: u64, done: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = format!("{{bar:40}} {{bytes}}/{{total_bytes}} {done}, {{bytes_per_sec}}, {{elapsed}}");
    let style = ProgressStyle::with_template(&template).expect("the template is right");
    ProgressBar::new(total_bytes).with_style(style)
}

/// Prints lines to standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = anstream::stdout();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

/// Prints a part of a line, or lines whose end is still to come.
pub(crate) fn print_part(text: &str) -> Result<(), Failure> {
    let mut stdout = anstream::stdout();
    write!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

/// Formats a count that may have stopped at [`COUNT_MAX`].
pub(crate) fn count(n: i64) -> String {
    if n < COUNT_MAX { n.to_string() } else { format!("{n}+") }
}

/// Formats a number of processes.
pub(crate) fn processes(n: u64) -> String {
    if n == 1 { "1 process".to_owned() } else { format!("{n} processes") }
}

/// Prints a value as indented JSON.
pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
    print(&serde_json::to_string_pretty(value).expect("a JSON value is JSON"))
}

/// Prints a note to standard error.
pub(crate) fn note(text: &str) {
    // If standard error is closed, there is no place to report that.
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// Prints a warning to standard error. The command itself succeeds.
pub(crate) fn warn(text: &str) {
    note(&warning(text));
}

/// Formats a warning.
pub(crate) fn warning(text: &str) -> String {
    let yellow = Style::new().bold().fg_color(Some(AnsiColor::Yellow.into()));
    format!("{yellow}warning{yellow:#}: {text}")
}

/// Asks for confirmation at the terminal. Without a terminal, `--yes` is required.
pub(crate) fn confirm(verb: &str, total: u64) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        let error =
            format!("cannot ask for confirmation to {verb} {}: standard input is not a terminal", processes(total));
        return Err(Failure::new(exit::REFUSED, error)
            .with_remedy("use `--yes` to confirm, or `--dry-run` to only print the number of matches"));
    }
    note(&format!("{verb} {}? [y/N]", processes(total)));
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::new(exit::REFUSED, "not confirmed; nothing was changed"))
    }
}

/// Returns a table without borders, whose cells are never truncated.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = headless_table();
    table.set_header(header.to_vec());
    table
}

/// Returns a table without a header, to continue one that was already printed.
pub(crate) fn headless_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// Formats the state of a process with its symbol and color.
pub(crate) fn state_text(summary: &Summary) -> String {
    let state = summary.state;
    let (sign, color) = match state {
        State::Created => ("○", AnsiColor::Blue),
        State::Running => ("▶", AnsiColor::Cyan),
        State::Waiting => ("◌", AnsiColor::Blue),
        State::Paused(_) => ("‖", AnsiColor::Yellow),
        State::Finished if summary.outcome.as_ref().is_some_and(|outcome| outcome.ok) => ("✔", AnsiColor::Green),
        State::Finished => ("✘", AnsiColor::Red),
        State::Excepted => ("✘", AnsiColor::Red),
        State::Killed => ("■", AnsiColor::Magenta),
    };
    let color = Style::new().fg_color(Some(color.into()));
    format!("{color}{sign} {}{color:#}", status_word(summary))
}

/// Returns the word of the state, or of the pending change.
pub(crate) fn status_word(summary: &Summary) -> String {
    match (summary.place, summary.desired, summary.state) {
        (Place::Held, Desired::Pause, _) => "pausing".into(),
        (Place::Held | Place::Queued, Desired::Kill, _) => "killing".into(),
        (Place::Queued, _, State::Running) => "queued".into(),
        (_, _, State::Finished) => match summary.outcome.as_ref().and_then(|outcome| outcome.exit) {
            Some(exit) => format!("finished [{exit}]"),
            None => "finished".into(),
        },
        (_, _, state) => state.word().into(),
    }
}

/// Returns the most useful detail besides the state.
pub(crate) fn detail(summary: &Summary) -> String {
    match summary.place {
        Place::Ended => {
            let reason = summary.outcome.as_ref().and_then(|outcome| outcome.reason.clone());
            reason.or_else(|| summary.last_error.clone()).unwrap_or_default()
        }
        Place::Held => summary.worker.as_ref().map(|worker| format!("on {worker}")).unwrap_or_default(),
        Place::Queued => format!("in queue {}", summary.queue),
        Place::Parked => match (summary.state, summary.wake_at) {
            (State::Paused(_), _) => paused(summary),
            (_, Some(wake_at)) => waits(summary, wake_at),
            (_, None) => String::new(),
        },
    }
}

fn paused(summary: &Summary) -> String {
    match &summary.paused {
        Some(paused) => {
            format!("paused by {} {} ago{}", paused.by, age(summary.now - paused.at), because(paused.reason.as_deref()))
        }
        None => "on hold since it was accepted".into(),
    }
}

fn waits(summary: &Summary, wake_at: i64) -> String {
    let pause = age(wake_at - summary.now);
    if let Some(refusal) = &summary.refusal {
        return format!("needs another worker, next claim in {pause}: {}", refusal.reason);
    }
    if let Some((what, site)) = summary.waits_for.as_deref().and_then(|waits_for| waits_for.split_once('/')) {
        let (site, reason) = site.split_once('/').unwrap_or((site, ""));
        return match what {
            "refused" => format!("refused by {site}, next submission in {pause}: {reason}"),
            "slot" => format!("waits for a session at {site}"),
            "room" => format!("waits for the job limit of {site}"),
            _ => format!("waits for a file at {site}"),
        };
    }
    if summary.has_outside {
        return "its job is pending or running".to_owned();
    }
    match &summary.last_error {
        Some(error) if summary.waits_for_retry => format!("try {} in {pause}, after: {error}", summary.try_number),
        Some(_) | None => format!("wakes in {pause}"),
    }
}

/// Formats a reason as the end of a sentence.
pub(crate) fn because(reason: Option<&str>) -> String {
    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
}

/// Returns a process as JSON.
pub(crate) fn summary_json(summary: &Summary) -> Value {
    let outcome = summary.outcome.as_ref();
    json!({
        "pid": summary.pid,
        "name": summary.name,
        "kind": summary.kind,
        "state": summary.state.word(),
        "place": summary.place.word(),
        "status": status_word(summary),
        "desired": summary.desired.verb(),
        "queue": summary.queue,
        "worker": summary.worker,
        "epoch": summary.epoch,
        "try": summary.try_number,
        "advances": summary.advances,
        "created_at": timestamp(summary.created_at),
        "changed_at": timestamp(summary.changed_at),
        "ended_at": summary.ended_at.map(timestamp),
        "wake_at": summary.wake_at.map(timestamp),
        "exit": outcome.and_then(|outcome| outcome.exit),
        "signal": outcome.and_then(|outcome| outcome.signal),
        "ok": outcome.map(|outcome| outcome.ok),
        "values": outcome.map(|outcome| &outcome.values),
        "reason": outcome.and_then(|outcome| outcome.reason.as_ref()),
        "sandbox": outcome.and_then(|outcome| outcome.sandbox.as_ref()),
        "results": outcome.and_then(|outcome| outcome.results),
        "last_error": summary.last_error,
        "retries": summary.try_number - 1,
        "refused_since": summary.refusal.as_ref().map(|refusal| timestamp(refusal.since)),
        "refusal": summary.refusal.as_ref().map(|refusal| &refusal.reason),
        "paused_by": summary.paused.as_ref().map(|paused| &paused.by),
        "paused_at": summary.paused.as_ref().map(|paused| timestamp(paused.at)),
        "paused_reason": summary.paused.as_ref().and_then(|paused| paused.reason.as_ref()),
    })
}

/// Returns the word of a site's state: `unserved` if no live worker serves it, `down` between a failed connection and the
/// next one, otherwise `up`.
pub(crate) fn site_state(site: &SiteFacts) -> &'static str {
    match (site.is_served, site.retry_in) {
        (false, _) => "unserved",
        (true, Some(_)) => "down",
        (true, None) => "up",
    }
}

/// Describes a job at a site.
pub(crate) fn job_text(job: &Job, now: i64) -> String {
    if job.look.status == NEVER {
        return "it was never submitted".to_owned();
    }
    let mut text = job
        .external_id
        .as_deref()
        .map_or_else(|| "it is not known yet whether the job was submitted".to_owned(), |id| format!("job {id}"));
    if !job.look.status.is_empty() {
        text.push_str(&format!(", {}", job.look.status));
    }
    if !job.look.reason.is_empty() {
        text.push_str(&format!(" ({})", job.look.reason));
    }
    if job.ended_at.is_none() {
        if let Some(position) = job.look.position {
            text.push_str(&format!(", position {position} in the queue"));
        }
        if let Some(starts_at) = job.look.starts_at.filter(|starts_at| *starts_at > now) {
            text.push_str(&format!(", expected to start in {}", span(starts_at - now)));
        }
    }
    text
}

/// Returns a job at a site as JSON.
pub(crate) fn job_json(job: &Job) -> Value {
    json!({
        "token": job.token(),
        "try": job.try_number,
        "external_id": job.external_id,
        "status": job.look.status,
        "reason": job.look.reason,
        "position": job.look.position,
        "starts_at": job.look.starts_at.map(timestamp),
        "intended_at": timestamp(job.intent_at),
        "ended_at": job.ended_at.map(timestamp),
    })
}

/// Formats a time span: one unit below a minute, two units above.
pub(crate) fn age(micros: i64) -> String {
    let seconds = micros.max(0) / 1_000_000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Formats a time span with tenths of a second below ten seconds.
pub(crate) fn span(micros: i64) -> String {
    if micros < 10_000_000 { seconds(Duration::from_micros(micros.max(0).cast_unsigned())) } else { age(micros) }
}

/// Formats a time for programs: RFC 3339 in UTC, with microseconds.
pub(crate) fn timestamp(micros: i64) -> String {
    DateTime::<Utc>::from_timestamp_micros(micros).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// Formats a time for people, in the local time zone.
pub(crate) fn clock(micros: i64) -> String {
    let time = DateTime::<Utc>::from_timestamp_micros(micros).unwrap_or_default();
    time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S%.3f").to_string()
}

/// Returns the beginning of an untrusted text on one line, without control characters.
pub(crate) fn one_line(text: &str, n_chars_max: usize) -> String {
    let words =
        text.split(|letter: char| letter.is_whitespace() || letter.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(n_chars_max) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Formats a duration in seconds, with tenths.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_has_one_or_two_units() {
        for (seconds, text) in [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m00s"), (3_661, "1h01m"), (90_000, "1d01h")]
        {
            assert_eq!(age(seconds * 1_000_000), text);
        }
    }

    #[test]
    fn untrusted_text_becomes_one_line_without_control_characters() {
        assert_eq!(one_line("a\n  b\u{1b}[31m\tc", 20), "a b [31m c");
        assert_eq!(one_line(&"ä".repeat(30), 5), "äääää…");
    }

    #[test]
    fn short_spans_have_tenths() {
        for (milliseconds, text) in
            [(-5, "0.0 s"), (340, "0.3 s"), (9_999, "10.0 s"), (10_000, "10s"), (61_000, "1m01s")]
        {
            assert_eq!(span(milliseconds * 1_000), text);
        }
    }

    #[test]
    fn timestamps_have_microseconds() {
        assert_eq!(timestamp(1_700_000_000_123_456), "2023-11-14T22:13:20.123456Z");
    }
}
