//! From the tree of a document to a [`Spec`]: which keys there are, what each takes, and every complaint with its line.

mod site;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::error::{Error, Problem};
use super::tree::{Content, Node};
use super::{Priority, Retry, Spec, Timeout, Wait, Work};
use crate::duration;
use crate::nearest::nearest;

/// The keys of one map of the document.
struct Keys {
    /// Where the map stands; empty for the document itself.
    path: &'static str,
    /// What this version implements.
    known: &'static [&'static str],
    /// What the documents of later versions have; refused by name.
    later: &'static [&'static str],
}

const DOCUMENT: Keys = Keys {
    path: "",
    known: &[
        "name", "run", "script", "call", "with", "vars", "stdin", "needs", "ok", "retry", "timeout", "priority",
        "queue", "hold", "labels", "session", "at", "native", "pre", "in", "out", "values",
    ],
    later: &["envs", "defaults", "steps", "env", "resume", "on_failure", "keep", "notify", "after", "each"],
};
const NEEDS: Keys =
    Keys { path: "needs", known: &["time", "nodes", "ranks", "cpus", "mem", "gpus"], later: &["disk", "variants"] };
const IN: Keys = Keys { path: "in", known: &["from", "to", "how", "optional"], later: &[] };
const OUT: Keys = Keys { path: "out", known: &["from", "to", "how", "when", "optional"], later: &[] };
const OK: Keys = Keys { path: "ok", known: &["exit"], later: &["files"] };
const RETRY: Keys = Keys { path: "retry", known: &["max", "wait"], later: &["rules", "avoid"] };
const WAIT: Keys = Keys { path: "retry.wait", known: &["first", "factor", "max", "jitter"], later: &[] };
const TIMEOUT: Keys = Keys { path: "timeout", known: &["total", "queue"], later: &[] };
const MAPS: [Keys; 8] = [DOCUMENT, NEEDS, IN, OUT, OK, RETRY, WAIT, TIMEOUT];

/// What a Rust process has not.
const OF_PROGRAMS: [&str; 9] = ["vars", "stdin", "needs", "ok", "native", "pre", "in", "out", "values"];

/// Most attempts. More is a loop that somebody forgot.
const RETRY_MAX: u32 = 1000;
/// Steepest growth of the pauses.
const FACTOR_MAX: f64 = 1000.0;
/// Longest duration that a spec may ask for: what lies further away is a slip of the pen.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Longest name of anything: names stand in tables, indexes and messages' headers.
const NAME_BYTES_MAX: usize = 128;
/// Longest name of a queue, so that the broker's name with prefix and class stays far below its 255 bytes.
const QUEUE_BYTES_MAX: usize = 64;
/// Linux's `MAX_ARG_STRLEN`, less the NUL at the end.
const ARGUMENT_BYTES_MAX: usize = 32 * 4096 - 1;

/// # Errors
/// Every problem of the document at once.
pub(super) fn read(node: Node) -> Result<Spec, Error> {
    let mut reader = Reader { problems: Vec::new() };
    match reader.spec(node) {
        Some(spec) if reader.problems.is_empty() => Ok(spec),
        Some(_) | None => Err(Error::new(reader.problems)),
    }
}

/// Collects the problems, so that all of them are told at once.
struct Reader {
    problems: Vec<Problem>,
}

/// One map of the document, whose keys are checked; what was read is taken out.
struct Section {
    path: &'static str,
    entries: BTreeMap<String, Node>,
    /// Whether a key was refused: it may have been meant as one that is missing now.
    has_refused: bool,
}

/// What a key's value must be instead. The reader puts the line and the key before it.
type Read<T> = Result<T, String>;

impl Reader {
    /// `None` only together with a problem.
    fn spec(&mut self, node: Node) -> Option<Spec> {
        let mut document = match node.content {
            Content::Map(entries) => self.section(&DOCUMENT, entries),
            Content::Null => {
                self.complain(None, "the document is empty; it needs one of `run`, `script` and `call`");
                return None;
            }
            Content::Bool(_) | Content::Number(_) | Content::Text(_) | Content::List(_) => {
                self.complain(None, format!("the document is {}; it must be a map of keys", node.what()));
                return None;
            }
        };
        self.refuse_what_does_not_apply(&document);
        let (is_call, has_session) = (document.has("call"), document.has("session"));
        let what = self.work(&mut document);
        // A placeholder lets the other keys be checked; the missing work is a problem already.
        let mut spec = Spec::new(what.unwrap_or(Work::Script { text: String::new() }));

        spec.name = self.take(&mut document, "name", name);
        spec.session = self.take(&mut document, "session", session);
        spec.stdin = self.take(&mut document, "stdin", text);
        spec.vars = self.take_texts(&mut document, "vars", variable_name, variable);
        spec.labels = self.take_texts(&mut document, "labels", label_part, |_, value| label_part(value));
        spec.queue = self.take(&mut document, "queue", queue).unwrap_or(spec.queue);
        spec.priority = self.take(&mut document, "priority", priority).unwrap_or_default();
        spec.hold = self.take(&mut document, "hold", boolean).unwrap_or_default();

        let mut needs = self.take_section(&mut document, &NEEDS);
        spec.time = self.take(&mut needs, "time", span);
        spec.on_site = self.on_site(&mut document, &mut needs, is_call, has_session);
        let mut ok = self.take_section(&mut document, &OK);
        spec.ok_exit = self.take(&mut ok, "exit", exits).unwrap_or(spec.ok_exit);
        let mut timeout = self.take_section(&mut document, &TIMEOUT);
        spec.timeout =
            Timeout { total: self.take(&mut timeout, "total", span), queue: self.take(&mut timeout, "queue", span) };
        let mut retry = self.take_section(&mut document, &RETRY);
        let tries = self.take(&mut retry, "max", tries).unwrap_or(spec.retry.max);
        spec.retry = Retry { max: tries, wait: self.wait(&mut retry) };
        Some(spec)
    }

    /// Exactly one of the three.
    fn work(&mut self, document: &mut Section) -> Option<Work> {
        let given: Vec<&str> = ["run", "script", "call"].into_iter().filter(|key| document.has(key)).collect();
        match given.as_slice() {
            ["run"] => self.take(document, "run", argv).map(|argv| Work::Run { argv }),
            ["script"] => self.take(document, "script", script).map(|text| Work::Script { text }),
            ["call"] => {
                let name = self.take(document, "call", process_name);
                let with = self.take(document, "with", |node| Ok(node.into_value()));
                name.map(|name| Work::Call {
                    name,
                    with: with.unwrap_or_else(|| Value::Object(serde_json::Map::new())),
                })
            }
            [] => {
                if !document.has_refused {
                    self.complain(None, "one of `run`, `script` and `call` is needed; the document has none of them");
                }
                None
            }
            several => {
                let second = document.entries.get(several[1]).and_then(|node| node.line);
                let list = quoted(several, " and ");
                self.complain(second, format!("exactly one of `run`, `script` and `call` is needed, not {list}"));
                None
            }
        }
    }

    fn refuse_what_does_not_apply(&mut self, document: &Section) {
        let is_program = document.has("run") || document.has("script");
        let (keys, owners) = match (is_program, document.has("call")) {
            (true, false) => (["with"].as_slice(), "`call` only"),
            (false, true) => (OF_PROGRAMS.as_slice(), "`run` and `script` only"),
            (true, true) | (false, false) => return,
        };
        for key in keys {
            if let Some(node) = document.entries.get(*key) {
                self.complain(node.line, format!("`{key}` applies to {owners}"));
            }
        }
    }

    /// A text is a constant pause; a map says how it grows.
    fn wait(&mut self, retry: &mut Section) -> Wait {
        // A number goes the same way, to be told its unit.
        let is_span = |node: &Node| matches!(node.content, Content::Text(_) | Content::Number(_));
        if retry.entries.get("wait").is_some_and(is_span) {
            return self.take(retry, "wait", span).map_or_else(Wait::default, Wait::constant);
        }
        let line = retry.entries.get("wait").and_then(|node| node.line);
        let mut section = self.take_section(retry, &WAIT);
        let default = Wait::default();
        let first = self.take(&mut section, "first", span);
        let max = self.take(&mut section, "max", span);
        if let (Some(first), Some(max)) = (first, max)
            && first > max
        {
            let (first, max) = (duration::format(first), duration::format(max));
            self.complain(line, format!("`retry.wait.first` is longer than `retry.wait.max` ({first}, {max})"));
        }
        let first = first.unwrap_or(max.map_or(default.first, |max| max.min(default.first)));
        Wait {
            first,
            factor: self.take(&mut section, "factor", |node| within(node, 1.0, FACTOR_MAX)).unwrap_or(default.factor),
            max: max.unwrap_or(default.max.max(first)),
            jitter: self.take(&mut section, "jitter", |node| within(node, 0.0, 1.0)).unwrap_or(default.jitter),
        }
    }

    /// Checks the keys of a map, and that none is without a value.
    fn section(&mut self, keys: &Keys, entries: Vec<(String, Node)>) -> Section {
        let mut section = Section { path: keys.path, entries: BTreeMap::new(), has_refused: false };
        for (key, node) in entries {
            let shown = joined(keys.path, &key);
            if keys.later.contains(&key.as_str()) {
                self.complain(node.line, format!("`{shown}` is not supported by this version"));
            } else if !keys.known.contains(&key.as_str()) {
                let shown = shortened(&shown);
                self.complain(node.line, format!("unknown key `{shown}`; {}", suggestion(keys, &key)));
            } else if matches!(node.content, Content::Null) {
                self.complain(node.line, format!("`{shown}` has no value; give one or remove the key"));
            } else {
                section.entries.insert(key, node);
                continue;
            }
            section.has_refused = true;
        }
        section
    }

    /// The map under the key; an empty one if there is none.
    fn take_section(&mut self, parent: &mut Section, keys: &Keys) -> Section {
        let key = keys.path.rsplit('.').next().unwrap_or(keys.path);
        let entries = match parent.entries.remove(key) {
            None => Vec::new(),
            Some(Node { content: Content::Map(entries), .. }) => entries,
            Some(node) => {
                let known = keys.known.join(", ");
                let text = format!("`{}` must be a map (with {known}), not {}", keys.path, node.what());
                self.complain(node.line, text);
                Vec::new()
            }
        };
        self.section(keys, entries)
    }

    fn take<T>(&mut self, section: &mut Section, key: &str, read: impl FnOnce(Node) -> Read<T>) -> Option<T> {
        let node = section.entries.remove(key)?;
        let line = node.line;
        match read(node) {
            Ok(value) => Some(value),
            Err(text) => {
                self.complain(line, format!("`{}` {text}", joined(section.path, key)));
                None
            }
        }
    }

    /// A map from texts to texts; each entry complains for itself.
    fn take_texts(
        &mut self,
        section: &mut Section,
        key: &str,
        check_key: impl Fn(&str) -> Read<()>,
        check_value: impl Fn(&str, &str) -> Read<()>,
    ) -> BTreeMap<String, String> {
        let mut texts = BTreeMap::new();
        let Some(entries) = self.take(section, key, map) else { return texts };
        for (entry, node) in entries {
            let line = node.line;
            let shown = shortened(&joined(key, &entry));
            if let Err(problem) = check_key(&entry) {
                self.complain(line, format!("the key `{shown}` {problem}"));
                continue;
            }
            match text(node).and_then(|value| check_value(&entry, &value).map(|()| value)) {
                Ok(value) => drop(texts.insert(entry, value)),
                Err(problem) => self.complain(line, format!("`{shown}` {problem}")),
            }
        }
        texts
    }

    fn complain(&mut self, line: Option<u32>, text: impl Into<String>) {
        self.problems.push(Problem::at(line, text));
    }
}

impl Section {
    fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }
}

fn text(node: Node) -> Read<String> {
    match node.content {
        Content::Text(text) => Ok(text),
        // The number is not repeated: `3.10` has been read as 3.1.
        Content::Number(_) => Err("must be text, not a number; put quotes around it".to_owned()),
        Content::Bool(bool) => Err(format!("must be text, not a boolean; put quotes around it: \"{bool}\"")),
        Content::Null | Content::List(_) | Content::Map(_) => Err(format!("must be text, not {}", node.what())),
    }
}

fn map(node: Node) -> Read<Vec<(String, Node)>> {
    match node.content {
        Content::Map(entries) => Ok(entries),
        Content::Null | Content::Bool(_) | Content::Number(_) | Content::Text(_) | Content::List(_) => {
            Err(format!("must be a map from text to text, not {}", node.what()))
        }
    }
}

fn boolean(node: Node) -> Read<bool> {
    match node.content {
        Content::Bool(bool) => Ok(bool),
        Content::Null | Content::Number(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => {
            Err(format!("must be true or false, not {}", node.what()))
        }
    }
}

/// A whole number within the bounds.
fn whole(node: &Node, least: i64, most: i64) -> Option<i64> {
    match &node.content {
        Content::Number(number) => number.as_i64().filter(|number| (least..=most).contains(number)),
        Content::Null | Content::Bool(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => None,
    }
}

fn within(node: Node, least: f64, most: f64) -> Read<f64> {
    let number = match &node.content {
        Content::Number(number) => number.as_f64().filter(|number| (least..=most).contains(number)),
        Content::Null | Content::Bool(_) | Content::Text(_) | Content::List(_) | Content::Map(_) => None,
    };
    number.ok_or_else(|| format!("must be a number from {least} to {most}"))
}

/// A duration that a spec may ask for.
fn span(node: Node) -> Read<Duration> {
    let span = match &node.content {
        Content::Text(text) => duration::parse(text).map_err(|error| format!("is wrong: {error}"))?,
        Content::Number(number) => return Err(format!("is wrong: {}", no_unit(number))),
        Content::Null | Content::Bool(_) | Content::List(_) | Content::Map(_) => {
            return Err(format!("must be a duration such as `30s`, not {}", node.what()));
        }
    };
    if span.is_zero() || span > DURATION_MAX {
        return Err("must be longer than nothing and at most ten years".to_owned());
    }
    Ok(span)
}

fn no_unit(number: &serde_json::Number) -> String {
    match number.as_u64() {
        Some(number) => duration::Error::NoUnit { text: number.to_string() }.to_string(),
        None => duration::Error::Malformed { text: number.to_string() }.to_string(),
    }
}

fn argv(node: Node) -> Read<Vec<String>> {
    let Content::List(nodes) = node.content else {
        return Err(format!(
            "must be a list of texts such as [echo, hello], not {}; text for the shell goes into `script`",
            node.what()
        ));
    };
    let mut argv = Vec::with_capacity(nodes.len());
    for (argument_idx, node) in nodes.into_iter().enumerate() {
        let line = node.line.map(|line| format!(" (line {line})")).unwrap_or_default();
        let argument = text(node)
            .and_then(|argument| no_nul(&argument).and_then(|()| not_too_long(argument.len())).map(|()| argument))
            .map_err(|problem| format!("has an argument {argument_idx}{line} that {problem}"))?;
        argv.push(argument);
    }
    match argv.first().map(String::as_str) {
        None => Err("must not be empty; its first text is the program".to_owned()),
        Some("") => Err("must not begin with an empty text; the first is the program".to_owned()),
        Some(_) => Ok(argv),
    }
}

fn script(node: Node) -> Read<String> {
    // Shells and the system take a carriage return at the end of a line for a part of its last word.
    let script = text(node)?.replace("\r\n", "\n");
    if script.trim().is_empty() {
        return Err("must not be blank".to_owned());
    }
    no_nul(&script)?;
    Ok(script)
}

fn no_nul(text: &str) -> Read<()> {
    if text.contains('\0') {
        return Err("must not contain a NUL byte; no program can be given one".to_owned());
    }
    Ok(())
}

/// The value of a variable.
fn variable(name: &str, value: &str) -> Read<()> {
    no_nul(value)?;
    // With the sign between name and value.
    not_too_long(name.len() + 1 + value.len())
}

fn not_too_long(bytes: usize) -> Read<()> {
    if bytes > ARGUMENT_BYTES_MAX {
        return Err(format!(
            "has {bytes} bytes; Linux gives a program at most {ARGUMENT_BYTES_MAX} in one argument or variable, so put it \
             into `stdin` or a file"
        ));
    }
    Ok(())
}

fn name(node: Node) -> Read<String> {
    let name = text(node)?;
    if name.trim().is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!("must be 1 to {NAME_BYTES_MAX} bytes of text on one line"));
    }
    Ok(name)
}

fn word(node: Node) -> Read<String> {
    let word = text(node)?;
    if !is_made_of(&word, NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        return Err(format!("must be 1 to {NAME_BYTES_MAX} of A-Z, a-z, 0-9, `.`, `_` and `-`"));
    }
    Ok(word)
}

fn session(node: Node) -> Read<String> {
    let name = word(node)?;
    super::on_site::check_session(&name).map(|()| name)
}

fn process_name(node: Node) -> Read<String> {
    let name = word(node)?;
    if [super::PROGRAM, super::JOB].contains(&name.as_str()) {
        return Err(format!("must not be `{name}`, which is the kind of `run` and `script`"));
    }
    Ok(name)
}

fn queue(node: Node) -> Read<String> {
    let queue = text(node)?;
    if !is_made_of(&queue, QUEUE_BYTES_MAX, |c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c)) {
        return Err(format!("must be 1 to {QUEUE_BYTES_MAX} of a-z, 0-9, `_` and `-`"));
    }
    Ok(queue)
}

fn is_made_of(text: &str, bytes_max: usize, allowed: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.len() <= bytes_max && text.chars().all(allowed)
}

fn variable_name(name: &str) -> Read<()> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err("is not the name of a variable; it must not be empty nor contain `=` or a NUL byte".to_owned());
    }
    Ok(())
}

fn label_part(text: &str) -> Read<()> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(format!("must have 1 to {NAME_BYTES_MAX} bytes; it has {}", text.len()));
    }
    if text.contains('\0') {
        return Err("must not contain a NUL byte; no database can store one in a text".to_owned());
    }
    Ok(())
}

fn priority(node: Node) -> Read<Priority> {
    let number = whole(&node, -100, 100);
    let word = match &node.content {
        Content::Text(text) => Some(text.as_str()),
        Content::Null | Content::Bool(_) | Content::Number(_) | Content::List(_) | Content::Map(_) => None,
    };
    match (word, number) {
        (Some("high"), _) | (_, Some(1..)) => Ok(Priority::High),
        (Some("normal"), _) | (_, Some(0)) => Ok(Priority::Normal),
        (Some("low"), _) | (_, Some(..0)) => Ok(Priority::Low),
        (_, None) => {
            Err("must be high, normal or low, or a whole number from -100 to 100, of which the sign counts".to_owned())
        }
    }
}

fn tries(node: Node) -> Read<u32> {
    whole(&node, 1, i64::from(RETRY_MAX))
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| format!("must be a whole number from 1 to {RETRY_MAX}: the total number of tries"))
}

fn exits(node: Node) -> Read<Vec<i32>> {
    let Content::List(nodes) = &node.content else {
        return Err(format!("must be a list of exit codes such as [0, 1], not {}", node.what()));
    };
    let exits = nodes.iter().map(|node| whole(node, 0, 255).and_then(|number| i32::try_from(number).ok()));
    match exits.collect::<Option<Vec<i32>>>() {
        Some(exits) if !exits.is_empty() => Ok(exits),
        Some(_) | None => Err("must be a list of at least one whole number from 0 to 255".to_owned()),
    }
}

/// A known key of that very name in another map, else the nearest of this map, else all of this map.
fn suggestion(keys: &Keys, key: &str) -> String {
    if let Some(elsewhere) = MAPS.iter().find(|map| map.known.contains(&key)) {
        return format!("did you mean `{}`?", joined(elsewhere.path, key));
    }
    if let Some(nearest) = nearest(key, keys.known.iter().copied()) {
        return format!("did you mean `{}`?", joined(keys.path, nearest));
    }
    let place = if keys.path.is_empty() { "a document".to_owned() } else { format!("`{}`", keys.path) };
    format!("{place} has {}", keys.known.join(", "))
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn quoted(keys: &[&str], between: &str) -> String {
    keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(between)
}

/// What users write, short enough for an error.
fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
