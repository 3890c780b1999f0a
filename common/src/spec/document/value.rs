//! Readers for the value of a key: one for each type of value, with its bounds.

use std::time::Duration;

use super::super::tree::{Content, Node};
use super::super::{JOB, PROGRAM, Priority, on_site};
use crate::duration;

/// Maximum number of tries. A larger number is a mistake.
const RETRY_MAX: u32 = 1000;
/// Largest growth factor of the pauses.
pub(super) const FACTOR_MAX: f64 = 1000.0;
/// Longest duration in a spec. A longer one is a mistake.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Longest name. Names are in tables, indexes and message headers.
pub(super) const NAME_BYTES_MAX: usize = 128;
/// Longest name of a queue. With prefix and class it stays far below the broker's limit of 255 bytes.
const QUEUE_BYTES_MAX: usize = 64;
/// Longest argument or variable: Linux's `MAX_ARG_STRLEN` without the NUL at the end.
const ARGUMENT_BYTES_MAX: usize = 32 * 4096 - 1;

/// The result of reading a value. The error continues a sentence that starts with the line and the key.
pub(super) type Read<T> = Result<T, String>;

pub(super) fn text(node: Node) -> Read<String> {
    match node.content {
        Content::Text(text) => Ok(text),
        // The text does not repeat the number, since `3.10` was read as 3.1.
        Content::Number(_) => Err("must be text, not a number; put quotes around it".to_owned()),
        Content::Bool(bool) => Err(format!("must be text, not a boolean; put quotes around it: \"{bool}\"")),
        Content::Null | Content::List(_) | Content::Map(_) => Err(format!("must be text, not {}", node.what())),
    }
}

pub(super) fn map(node: Node) -> Read<Vec<(String, Node)>> {
    match node.content {
        Content::Map(entries) => Ok(entries),
        Content::Null | Content::Bool(_) | Content::Number(_) | Content::Text(_) | Content::List(_) => {
            Err(format!("must be a map from text to text, not {}", node.what()))
        }
    }
}

pub(super) fn boolean(node: Node) -> Read<bool> {
    match node.content {
        Content::Bool(bool) => Ok(bool),
        Content::Null | Content::Number(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => {
            Err(format!("must be true or false, not {}", node.what()))
        }
    }
}

/// An integer within the bounds.
pub(super) fn whole(node: &Node, least: i64, most: i64) -> Option<i64> {
    match &node.content {
        Content::Number(number) => number.as_i64().filter(|number| (least..=most).contains(number)),
        Content::Null | Content::Bool(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => None,
    }
}

pub(super) fn within(node: Node, least: f64, most: f64) -> Read<f64> {
    let number = match &node.content {
        Content::Number(number) => number.as_f64().filter(|number| (least..=most).contains(number)),
        Content::Null | Content::Bool(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => None,
    };
    number.ok_or_else(|| format!("must be a number from {least} to {most}"))
}

/// A duration within the bounds of a spec.
pub(super) fn span(node: Node) -> Read<Duration> {
    let span = match &node.content {
        Content::Text(text) => duration::parse(text).map_err(|error| format!("is invalid: {error}"))?,
        Content::Number(number) => return Err(format!("is invalid: {}", no_unit(number))),
        Content::Null | Content::Bool(_) | Content::List(_) | Content::Map(_) => {
            return Err(format!("must be a duration such as `30s`, not {}", node.what()));
        }
    };
    if span.is_zero() || span > DURATION_MAX {
        return Err("must be longer than 0s and at most ten years".to_owned());
    }
    Ok(span)
}

pub(super) fn no_unit(number: &serde_json::Number) -> String {
    match number.as_u64() {
        Some(number) => duration::Error::NoUnit { text: number.to_string() }.to_string(),
        None => duration::Error::Malformed { text: number.to_string() }.to_string(),
    }
}

pub(super) fn argv(node: Node) -> Read<Vec<String>> {
    let Content::List(nodes) = node.content else {
        return Err(format!(
            "must be a list such as [echo, hello], not {}; use `script` for a shell command",
            node.what()
        ));
    };
    let mut argv = Vec::with_capacity(nodes.len());
    for (argument_idx, node) in nodes.into_iter().enumerate() {
        let line = node.line.map(|line| format!(" (line {line})")).unwrap_or_default();
        let argument = text(node)
            .and_then(|argument| no_nul(&argument).and_then(|()| not_too_long(argument.len())).map(|()| argument))
            .map_err(|problem| format!("argument {argument_idx}{line} {problem}"))?;
        argv.push(argument);
    }
    match argv.first().map(String::as_str) {
        None => Err("must not be empty; its first element is the program".to_owned()),
        Some("") => Err("must not start with an empty string; the first element is the program".to_owned()),
        Some(_) => Ok(argv),
    }
}

pub(super) fn script(node: Node) -> Read<String> {
    // Shells and the kernel treat a carriage return at the end of a line as part of its last word.
    let script = text(node)?.replace("\r\n", "\n");
    if script.trim().is_empty() {
        return Err("must not be blank".to_owned());
    }
    no_nul(&script)?;
    Ok(script)
}

pub(super) fn no_nul(text: &str) -> Read<()> {
    if text.contains('\0') {
        return Err("must not contain a NUL byte; programs cannot receive one".to_owned());
    }
    Ok(())
}

/// Checks the value of an environment variable.
pub(super) fn variable(name: &str, value: &str) -> Read<()> {
    no_nul(value)?;
    // Including the `=` between name and value.
    not_too_long(name.len() + 1 + value.len())
}

pub(super) fn not_too_long(bytes: usize) -> Read<()> {
    if bytes > ARGUMENT_BYTES_MAX {
        return Err(format!(
            "has {bytes} bytes, but Linux allows {ARGUMENT_BYTES_MAX} for an argument or variable; use `stdin` or a file"
        ));
    }
    Ok(())
}

pub(super) fn name(node: Node) -> Read<String> {
    let name = text(node)?;
    if name.trim().is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!("must be one line of 1 to {NAME_BYTES_MAX} bytes"));
    }
    Ok(name)
}

pub(super) fn word(node: Node) -> Read<String> {
    let word = text(node)?;
    if !is_made_of(&word, NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        return Err(format!("must have 1 to {NAME_BYTES_MAX} characters of A-Z, a-z, 0-9, `.`, `_` and `-`"));
    }
    Ok(word)
}

pub(super) fn session(node: Node) -> Read<String> {
    let name = word(node)?;
    on_site::check_session(&name).map(|()| name)
}

pub(super) fn process_name(node: Node) -> Read<String> {
    let name = word(node)?;
    if [PROGRAM, JOB].contains(&name.as_str()) {
        return Err(format!("must not be `{name}`, which is reserved for `run` and `script`"));
    }
    Ok(name)
}

pub(super) fn queue(node: Node) -> Read<String> {
    let queue = text(node)?;
    if !is_made_of(&queue, QUEUE_BYTES_MAX, |c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c)) {
        return Err(format!("must have 1 to {QUEUE_BYTES_MAX} characters of a-z, 0-9, `_` and `-`"));
    }
    Ok(queue)
}

pub(super) fn is_made_of(text: &str, bytes_max: usize, allowed: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.len() <= bytes_max && text.chars().all(allowed)
}

pub(super) fn variable_name(name: &str) -> Read<()> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err("is not a variable name; it must not be empty or contain `=` or a NUL byte".to_owned());
    }
    Ok(())
}

pub(super) fn label_part(text: &str) -> Read<()> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(format!("must have 1 to {NAME_BYTES_MAX} bytes, but has {}", text.len()));
    }
    if text.contains('\0') {
        return Err("must not contain a NUL byte; databases cannot store one".to_owned());
    }
    Ok(())
}

pub(super) fn priority(node: Node) -> Read<Priority> {
    let number = whole(&node, -100, 100);
    let word = match &node.content {
        Content::Text(text) => Some(text.as_str()),
        Content::Null | Content::Bool(_) | Content::Number(_) | Content::List(_) | Content::Map(_) => None,
    };
    match (word, number) {
        (Some("high"), _) | (_, Some(1..)) => Ok(Priority::High),
        (Some("normal"), _) | (_, Some(0)) => Ok(Priority::Normal),
        (Some("low"), _) | (_, Some(..0)) => Ok(Priority::Low),
        (_, None) => Err("must be high, normal, low, or an integer from -100 to 100".to_owned()),
    }
}

pub(super) fn tries(node: Node) -> Read<u32> {
    whole(&node, 1, i64::from(RETRY_MAX))
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| format!("must be an integer from 1 to {RETRY_MAX}: the total number of tries"))
}

pub(super) fn exits(node: Node) -> Read<Vec<i32>> {
    let Content::List(nodes) = &node.content else {
        return Err(format!("must be a list of exit codes such as [0, 1], not {}", node.what()));
    };
    let exits = nodes.iter().map(|node| whole(node, 0, 255).and_then(|number| i32::try_from(number).ok()));
    match exits.collect::<Option<Vec<i32>>>() {
        Some(exits) if !exits.is_empty() => Ok(exits),
        Some(_) | None => Err("must be a list of one or more integers from 0 to 255".to_owned()),
    }
}

/// The beginning of a user's text, for an error.
pub(super) fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
