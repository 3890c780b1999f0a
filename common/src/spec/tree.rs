//! A document as a tree of values with their lines: the common form of YAML, JSON, TOML and messages.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::io;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer};
use serde_json::{Number, Value};
use serde_saphyr::{MessageFormatter, Spanned, UserMessageFormatter};
use toml::de::{DeTable, DeValue};

use super::error::Problem;
use crate::unique_keys::DuplicateKey;

/// Largest text of a document, and largest total size of its values. Each row has a spec, so data belongs in files.
pub(super) const BYTES_MAX: usize = 1024 * 1024;

/// Deepest nesting of a document. The keys of a spec need four levels; the rest is for `with`. The YAML parser
/// determines the limit: it takes 41 KiB of stack per level without optimization (measured), and the runtime's threads
/// have 2 MiB.
pub(super) const DEPTH_MAX: usize = 24;

/// A value and its line: the line of the key in a map, or of the element in a list.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) line: Option<u32>,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    /// The keys are unique.
    Map(Vec<(String, Node)>),
}

/// # Errors
/// The first syntax error, or an exceeded limit.
pub(super) fn from_yaml(text: &str) -> Result<Node, Problem> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_nodes: 100_000,
            max_total_scalar_bytes: BYTES_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
        },
        merge_keys: serde_saphyr::options::MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let Yaml(content) = serde_saphyr::from_str_with_options(text, options).map_err(|error| yaml_problem(&error))?;
    within_limit(Node { line: None, content })
}

/// # Errors
/// The first syntax error, or an exceeded limit.
pub(super) fn from_json(text: &str) -> Result<Node, Problem> {
    let line = Cell::new(1);
    let mut deserializer = serde_json::Deserializer::from_reader(LineCounter { rest: text.as_bytes(), line: &line });
    let node = Seed { json_line: Some(&line) }
        .deserialize(&mut deserializer)
        .and_then(|node| deserializer.end().map(|()| node))
        .map_err(|error| {
            let text = error.to_string();
            let position = format!(" at line {} column {}", error.line(), error.column());
            let text = text.strip_suffix(&position).unwrap_or(&text);
            // At the end of the text the parser counts columns from 0.
            let column = narrow(error.column().max(1));
            Problem { line: narrow(error.line()), column, text: text.to_owned() }
        })?;
    within_limit(node)
}

/// # Errors
/// The first syntax error, or an exceeded limit.
pub(super) fn from_toml(text: &str) -> Result<Node, Problem> {
    let lines = LineStarts::of(text);
    let table = DeTable::parse(text).map_err(|error| {
        let offset = error.span().map(|span| span.start);
        Problem {
            line: offset.and_then(|offset| lines.line(offset)),
            column: offset.and_then(|offset| lines.column(offset, text)),
            text: error.message().replace('\n', ", "),
        }
    })?;
    within_limit(Node { line: None, content: toml_table(table.into_inner(), &lines)? })
}

/// # Errors
/// The value is nested too deeply or too large.
pub(super) fn from_value(value: Value) -> Result<Node, Problem> {
    within_limit(Node { line: None, content: value_content(value) })
}

impl Node {
    /// The type of the value, for errors.
    pub(super) fn what(&self) -> &'static str {
        match &self.content {
            Content::Null => "null",
            Content::Bool(_) => "a boolean",
            Content::Number(_) => "a number",
            Content::Text(_) => "text",
            Content::List(_) => "a list",
            Content::Map(_) => "a map",
        }
    }

    pub(super) fn into_value(self) -> Value {
        match self.content {
            Content::Null => Value::Null,
            Content::Bool(bool) => Value::Bool(bool),
            Content::Number(number) => Value::Number(number),
            Content::Text(text) => Value::String(text),
            Content::List(nodes) => Value::Array(nodes.into_iter().map(Node::into_value).collect()),
            Content::Map(entries) => {
                Value::Object(entries.into_iter().map(|(key, node)| (key, node.into_value())).collect())
            }
        }
    }

    /// The size of the node: the bytes of its texts, and 1 for each value.
    fn weigh(&self, depth_left: usize) -> Result<usize, Problem> {
        let below = || {
            let text = format!("the document is nested more than {DEPTH_MAX} levels deep");
            depth_left.checked_sub(1).ok_or_else(|| Problem::at(self.line, text))
        };
        let mut weight = 1;
        match &self.content {
            Content::Null | Content::Bool(_) | Content::Number(_) => {}
            Content::Text(text) => weight += text.len(),
            Content::List(nodes) => {
                let below = below()?;
                for node in nodes {
                    weight += node.weigh(below)?;
                }
            }
            Content::Map(entries) => {
                let below = below()?;
                for (key, node) in entries {
                    weight += key.len() + node.weigh(below)?;
                }
            }
        }
        Ok(weight)
    }
}

/// Checks depth and size again, since each parser has its own depth limit, aliases make a document larger than its
/// text, and a value from a message has no text.
fn within_limit(node: Node) -> Result<Node, Problem> {
    if node.weigh(DEPTH_MAX)? > BYTES_MAX {
        return Err(Problem::at(None, "the document is larger than 1 MiB; put data into files"));
    }
    Ok(node)
}

fn narrow(count: usize) -> Option<u32> {
    u32::try_from(count).ok()
}

fn yaml_problem(error: &serde_saphyr::Error) -> Problem {
    use serde_saphyr::Error as Yaml;
    // A problem within an aliased value is reported at the alias.
    let location = error.location().filter(|location| location.line() > 0);
    let line = location.and_then(|location| u32::try_from(location.line()).ok());
    let column = location.and_then(|location| u32::try_from(location.column()).ok());
    let cause = if let Yaml::AliasError { error, .. } = error { error } else { error };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum of a hundred variants; the others have suitable texts"
    )]
    let text = match cause {
        Yaml::MultipleDocuments { .. } => {
            "a second document starts here; put each process into a separate file".to_owned()
        }
        Yaml::DuplicateMappingKey { key: Some(key), .. } => DuplicateKey(key.clone()).to_string(),
        Yaml::MergeKeyNotAllowed { .. } => "merge keys (`<<`) are not supported; repeat the keys instead".to_owned(),
        Yaml::RecursiveReferencesRequireWeakTypes { .. } => "an alias contains itself".to_owned(),
        Yaml::NonFiniteFloat { .. } => NOT_FINITE.to_owned(),
        Yaml::Budget { .. } | Yaml::AliasReplayLimitExceeded { .. } | Yaml::AliasReplayStackDepthExceeded { .. } => {
            "the document with its aliases expanded is nested too deeply or larger than the limit of 1 MiB".to_owned()
        }
        other => UserMessageFormatter.format_message(other).into_owned(),
    };
    Problem { line, column, text }
}

const NOT_FINITE: &str = "infinity and NaN are not supported";

/// The content of a YAML node. [`Spanned`] takes types, not seeds.
struct Yaml(Content);

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor { json_line: None }).map(Yaml)
    }
}

/// Reads a node. Its line comes from the counter below the JSON parser, or from the YAML parser.
#[derive(Clone, Copy)]
struct Seed<'a> {
    json_line: Option<&'a Cell<u32>>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        match self.json_line {
            Some(counter) => {
                let line = Some(counter.get());
                let content = deserializer.deserialize_any(ContentVisitor { json_line: self.json_line })?;
                Ok(Node { line, content })
            }
            None => {
                let yaml = Spanned::<Yaml>::deserialize(deserializer)?;
                Ok(Node { line: u32::try_from(yaml.referenced.line()).ok(), content: yaml.value.0 })
            }
        }
    }
}

#[derive(Clone, Copy)]
struct ContentVisitor<'a> {
    json_line: Option<&'a Cell<u32>>,
}

impl<'de> de::Visitor<'de> for ContentVisitor<'_> {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_bool<E: de::Error>(self, bool: bool) -> Result<Content, E> {
        Ok(Content::Bool(bool))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Content, E> {
        Ok(Content::Number(number.into()))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Content, E> {
        Ok(Content::Number(number.into()))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Content, E> {
        Number::from_f64(number).map(Content::Number).ok_or_else(|| E::custom(NOT_FINITE))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.to_owned()))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element_seed(Seed { json_line: self.json_line })? {
            nodes.push(node);
        }
        Ok(Content::List(nodes))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut seen = BTreeSet::new();
        let mut entries = Vec::new();
        loop {
            let (key, line) = match self.json_line {
                Some(counter) => match map.next_key::<String>()? {
                    Some(key) => (key, Some(counter.get())),
                    None => break,
                },
                None => match map.next_key::<Spanned<String>>()? {
                    Some(key) => (key.value, u32::try_from(key.referenced.line()).ok()),
                    None => break,
                },
            };
            if !seen.insert(key.clone()) {
                return Err(de::Error::custom(DuplicateKey(key)));
            }
            let node = map.next_value_seed(Seed { json_line: self.json_line })?;
            entries.push((key, Node { line, content: node.content }));
        }
        Ok(Content::Map(entries))
    }
}

/// Counts the lines that the JSON parser has read. The parser reads single bytes and looks ahead by at most one.
struct LineCounter<'a> {
    rest: &'a [u8],
    line: &'a Cell<u32>,
}

impl io::Read for LineCounter<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n_read = io::Read::read(&mut self.rest, buffer)?;
        let n_breaks = buffer[..n_read].iter().filter(|byte| **byte == b'\n').count();
        self.line.set(self.line.get() + narrow(n_breaks).expect("a document has at most 1 MiB"));
        Ok(n_read)
    }
}

/// The offsets at which lines start, to convert the TOML parser's offsets to lines.
struct LineStarts(Vec<usize>);

impl LineStarts {
    fn of(text: &str) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Self(std::iter::once(0).chain(breaks.map(|(offset, _)| offset + 1)).collect())
    }

    fn line(&self, offset: usize) -> Option<u32> {
        narrow(self.0.partition_point(|start| *start <= offset))
    }

    fn column(&self, offset: usize, text: &str) -> Option<u32> {
        let start = self.0[self.0.partition_point(|start| *start <= offset) - 1];
        narrow(text.get(start..offset)?.chars().count() + 1)
    }
}

fn toml_table(table: DeTable<'_>, lines: &LineStarts) -> Result<Content, Problem> {
    let mut entries = Vec::with_capacity(table.len());
    for (key, value) in table {
        let line = lines.line(key.span().start);
        let content = toml_content(value.into_inner(), line, lines)?;
        entries.push((key.into_inner().into_owned(), Node { line, content }));
    }
    Ok(Content::Map(entries))
}

fn toml_content(value: DeValue<'_>, line: Option<u32>, lines: &LineStarts) -> Result<Content, Problem> {
    match value {
        DeValue::String(text) => Ok(Content::Text(text.into_owned())),
        DeValue::Boolean(bool) => Ok(Content::Bool(bool)),
        DeValue::Integer(integer) => {
            let (digits, radix) = (integer.as_str(), integer.radix());
            let number = match i64::from_str_radix(digits, radix) {
                Ok(number) => Some(Number::from(number)),
                Err(_) => u64::from_str_radix(digits, radix).ok().map(Number::from),
            };
            number.map(Content::Number).ok_or_else(|| Problem::at(line, format!("the number {integer} is too large")))
        }
        DeValue::Float(float) => {
            let number = float.as_str().parse().ok().and_then(Number::from_f64);
            number.map(Content::Number).ok_or_else(|| Problem::at(line, NOT_FINITE))
        }
        DeValue::Datetime(_) => Err(Problem::at(line, "dates must be text; put quotes around it")),
        DeValue::Array(array) => {
            let mut nodes = Vec::with_capacity(array.len());
            for value in array {
                let line = lines.line(value.span().start);
                nodes.push(Node { line, content: toml_content(value.into_inner(), line, lines)? });
            }
            Ok(Content::List(nodes))
        }
        DeValue::Table(table) => toml_table(table, lines),
    }
}

fn value_content(value: Value) -> Content {
    let node = |value| Node { line: None, content: value_content(value) };
    match value {
        Value::Null => Content::Null,
        Value::Bool(bool) => Content::Bool(bool),
        Value::Number(number) => Content::Number(number),
        Value::String(text) => Content::Text(text),
        Value::Array(values) => Content::List(values.into_iter().map(node).collect()),
        Value::Object(map) => Content::Map(map.into_iter().map(|(key, value)| (key, node(value))).collect()),
    }
}
