//! Converts the tree of a document to a [`Spec`]: the keys of each map, and every problem with its line.

mod site;
mod value;

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::{Error, Problem};
use super::tree::{Content, Node};
use super::{Retry, Spec, Timeout, Wait, Work};
use crate::duration;
use crate::nearest::nearest;
use value::{
    FACTOR_MAX, Read, argv, boolean, exits, label_part, map, name, priority, process_name, queue, script, session,
    shortened, span, text, tries, variable, variable_name, within,
};

/// The keys of one map of the document.
struct Keys {
    /// The path of the map; empty for the document itself.
    path: &'static str,
    /// The keys that this version supports.
    known: &'static [&'static str],
    /// The keys that later versions may support; they are rejected by name.
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

/// Keys that do not apply to a Rust process.
const OF_PROGRAMS: [&str; 9] = ["vars", "stdin", "needs", "ok", "native", "pre", "in", "out", "values"];

/// Reads a document.
///
/// # Errors
/// All problems of the document.
pub(super) fn read(node: Node) -> Result<Spec, Error> {
    let mut reader = Reader { problems: Vec::new() };
    match reader.spec(node) {
        Some(spec) if reader.problems.is_empty() => Ok(spec),
        Some(_) | None => Err(Error::new(reader.problems)),
    }
}

/// Collects the problems, so that all are reported at once.
struct Reader {
    problems: Vec<Problem>,
}

/// A map of the document with checked keys. Entries are removed as they are read.
struct Section {
    path: &'static str,
    entries: BTreeMap<String, Node>,
    /// Whether a key was rejected. It may be a misspelling of a key that is missing now.
    has_rejected: bool,
}

impl Reader {
    /// Returns `None` only after reporting a problem.
    fn spec(&mut self, node: Node) -> Option<Spec> {
        let mut document = match node.content {
            Content::Map(entries) => self.section(&DOCUMENT, entries),
            Content::Null => {
                self.report(None, "the document is empty; add one of `run`, `script` and `call`");
                return None;
            }
            Content::Bool(_) | Content::Number(_) | Content::Text(_) | Content::List(_) => {
                self.report(None, format!("the document is {}; it must be a map of keys", node.what()));
                return None;
            }
        };
        self.reject_inapplicable_keys(&document);
        let (is_call, has_session) = (document.has("call"), document.has("session"));
        let what = self.work(&mut document);
        // With a placeholder the other keys are still checked. The missing work is reported already.
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

    /// Reads `run`, `script` or `call`. Exactly one of them must be present.
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
                if !document.has_rejected {
                    self.report(None, "the document has none of `run`, `script` and `call`; add one");
                }
                None
            }
            several => {
                let second = document.entries.get(several[1]).and_then(|node| node.line);
                let list = quoted(several, " and ");
                self.report(second, format!("the document has {list}; keep exactly one of `run`, `script` and `call`"));
                None
            }
        }
    }

    /// Rejects keys that do not apply to this kind of work.
    fn reject_inapplicable_keys(&mut self, document: &Section) {
        let is_program = document.has("run") || document.has("script");
        let (keys, owners) = match (is_program, document.has("call")) {
            (true, false) => (["with"].as_slice(), "`call`"),
            (false, true) => (OF_PROGRAMS.as_slice(), "`run` and `script`"),
            (true, true) | (false, false) => return,
        };
        for key in keys {
            if let Some(node) = document.entries.get(*key) {
                self.report(node.line, format!("`{key}` applies only to {owners}"));
            }
        }
    }

    /// Reads `retry.wait`: a text is a constant pause, a map describes growing pauses.
    fn wait(&mut self, retry: &mut Section) -> Wait {
        // A number is read as a duration too, for the error about its missing unit.
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
            self.report(line, format!("`retry.wait.first` ({first}) is longer than `retry.wait.max` ({max})"));
        }
        let first = first.unwrap_or(max.map_or(default.first, |max| max.min(default.first)));
        Wait {
            first,
            factor: self.take(&mut section, "factor", |node| within(node, 1.0, FACTOR_MAX)).unwrap_or(default.factor),
            max: max.unwrap_or(default.max.max(first)),
            jitter: self.take(&mut section, "jitter", |node| within(node, 0.0, 1.0)).unwrap_or(default.jitter),
        }
    }

    /// Checks the keys of a map, and that each has a value.
    fn section(&mut self, keys: &Keys, entries: Vec<(String, Node)>) -> Section {
        let mut section = Section { path: keys.path, entries: BTreeMap::new(), has_rejected: false };
        for (key, node) in entries {
            let shown = joined(keys.path, &key);
            if keys.later.contains(&key.as_str()) {
                self.report(node.line, format!("`{shown}` is not supported by this version"));
            } else if !keys.known.contains(&key.as_str()) {
                let shown = shortened(&shown);
                self.report(node.line, format!("unknown key `{shown}`; {}", suggestion(keys, &key)));
            } else if matches!(node.content, Content::Null) {
                self.report(node.line, format!("`{shown}` has no value; add a value or remove the key"));
            } else {
                section.entries.insert(key, node);
                continue;
            }
            section.has_rejected = true;
        }
        section
    }

    /// Takes the map of a key; an empty one if the key is absent.
    fn take_section(&mut self, parent: &mut Section, keys: &Keys) -> Section {
        let key = keys.path.rsplit('.').next().unwrap_or(keys.path);
        let entries = match parent.entries.remove(key) {
            None => Vec::new(),
            Some(Node { content: Content::Map(entries), .. }) => entries,
            Some(node) => {
                let known = keys.known.join(", ");
                let text = format!("`{}` must be a map with the keys {known}, not {}", keys.path, node.what());
                self.report(node.line, text);
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
                self.report(line, format!("`{}` {text}", joined(section.path, key)));
                None
            }
        }
    }

    /// Takes a map from text to text. Reports a problem for each invalid entry.
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
                self.report(line, format!("the key `{shown}` {problem}"));
                continue;
            }
            match text(node).and_then(|value| check_value(&entry, &value).map(|()| value)) {
                Ok(value) => drop(texts.insert(entry, value)),
                Err(problem) => self.report(line, format!("`{shown}` {problem}")),
            }
        }
        texts
    }

    fn report(&mut self, line: Option<u32>, text: impl Into<String>) {
        self.problems.push(Problem::at(line, text));
    }
}

impl Section {
    fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }
}

/// Suggests the key of the same name in another map, else the nearest key of this map, else all keys of this map.
fn suggestion(keys: &Keys, key: &str) -> String {
    if let Some(elsewhere) = MAPS.iter().find(|map| map.known.contains(&key)) {
        return format!("did you mean `{}`?", joined(elsewhere.path, key));
    }
    if let Some(nearest) = nearest(key, keys.known.iter().copied()) {
        return format!("did you mean `{}`?", joined(keys.path, nearest));
    }
    let map = if keys.path.is_empty() { "a document".to_owned() } else { format!("`{}`", keys.path) };
    format!("the known keys of {map}: {}", keys.known.join(", "))
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn quoted(keys: &[&str], between: &str) -> String {
    keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(between)
}
