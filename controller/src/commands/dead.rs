//! `baton dead`: lists, shows, replays and drops dead letters. They are on the broker, so no database is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, IsTerminal, Write};

use baton_common::communicator::dead::{Body, DeadLetters, Letter, Replayed};
use baton_common::exit;
use baton_common::id::LetterId;
use chrono::Utc;
use serde_json::{Value, json};

use crate::cli::dead::{DeadCommand, DeadListArguments, DropArguments, LetterIds, WhichLetters};
use crate::cli::{Global, Output};
use crate::client::read_ids;
use crate::failure::{Failure, exit_code_of_many};
use crate::output::{self, clock, one_line, timestamp};

/// Maximum length of a reason in the table, in characters. `show` prints all of it.
const REASON_CHARS_MAX: usize = 100;

/// Maximum length of an outcome, in characters. It contains queue names and errors of the broker.
const OUTCOME_CHARS_MAX: usize = 1000;

/// Maximum length of a name in the table, in characters. AMQP names have at most 255 bytes.
const NAME_CHARS_MAX: usize = 255;

pub(crate) async fn run(global: &Global, command: DeadCommand) -> Result<u8, Failure> {
    let urls = global.connection.resolve()?.broker_urls;
    if urls.is_empty() {
        return Err(Failure::usage(
            "no broker is configured; dead letters are on RabbitMQ, which `baton run` does not use",
        )
        .with_remedy("set BATON_BROKER_URL, `broker.url` in baton.toml or --broker-url"));
    }
    match command {
        DeadCommand::List(arguments) => list(global, urls, arguments).await,
        DeadCommand::Show(arguments) => show(global, urls, arguments).await,
        DeadCommand::Replay(which) => settle(global, urls, Verb::Replay, which).await,
        DeadCommand::Drop(DropArguments { which, yes }) => settle(global, urls, Verb::Drop { yes }, which).await,
    }
}

async fn list(global: &Global, urls: Vec<String>, arguments: DeadListArguments) -> Result<u8, Failure> {
    let mut letters = DeadLetters::open(urls).await?;
    let limit = if arguments.limit == 0 { usize::MAX } else { arguments.limit };
    let now = Utc::now().timestamp_micros();
    // Keeps at most as many letters as are shown, by time. All must be read, because the queue is ordered by when a letter
    // was last read.
    let mut newest = BTreeMap::new();
    let mut n_seen = 0_usize;
    while let Some(letter) = letters.next().await? {
        n_seen += 1;
        newest.insert((letter.at, n_seen), summary(&letter));
        if newest.len() > limit {
            newest.pop_first();
        }
    }
    letters.close().await?;
    let rows: Vec<Row> = newest.into_values().rev().collect();
    match global.output {
        Output::Json => output::print_json(&Value::Array(rows.iter().map(Row::json).collect()))?,
        Output::Ids => rows.iter().try_for_each(|row| output::print(&row.id.to_string()))?,
        Output::Table => {
            let mut table = output::table(&["ID", "AGE", "TYPE", "ORIGIN", "PID", "REASON"]);
            let cell = |text: &Option<String>, n_chars| one_line(text.as_deref().unwrap_or("-"), n_chars);
            for row in &rows {
                table.add_row([
                    row.id.to_string(),
                    row.at.map_or_else(|| "-".to_owned(), |at| output::age(now.saturating_sub(at))),
                    cell(&row.kind, NAME_CHARS_MAX),
                    cell(&row.origin, NAME_CHARS_MAX),
                    cell(&row.about, NAME_CHARS_MAX),
                    cell(&row.reason, REASON_CHARS_MAX),
                ]);
            }
            output::print(&table.trim_fmt())?;
            output::print(&format!("\n{} of {n_seen} dead letters", rows.len()))?;
        }
    }
    Ok(exit::OK)
}

async fn show(global: &Global, urls: Vec<String>, arguments: LetterIds) -> Result<u8, Failure> {
    let ids: BTreeSet<LetterId> = read_ids(&arguments.ids)?.into_iter().collect();
    if ids.is_empty() {
        // `-` with nothing on standard input means none.
        return Ok(exit::OK);
    }
    let mut letters = DeadLetters::open(urls).await?;
    let mut seen = BTreeSet::new();
    let mut values = Vec::new();
    while let Some(letter) = letters.next().await? {
        if !ids.contains(&letter.id) {
            continue;
        }
        seen.insert(letter.id);
        match global.output {
            Output::Json => values.push(json_of(&letter)),
            Output::Ids => output::print(&letter.id.to_string())?,
            Output::Table => output::print(&text_of(&letter))?,
        }
    }
    letters.close().await?;
    if global.output == Output::Json {
        output::print_json(&Value::Array(values))?;
    }
    let absent: Vec<&LetterId> = ids.difference(&seen).collect();
    if let ([first, ..], true) = (&absent[..], seen.is_empty()) {
        return Err(
            Failure::new(exit::NOT_FOUND, format!("there is no dead letter {first}")).with_remedy(ABSENT_REMEDY)
        );
    }
    for id in &absent {
        output::warn(&format!("there is no dead letter {id}"));
    }
    Ok(if absent.is_empty() { exit::OK } else { exit::SOME_FAILED })
}

/// What to do with dead letters.
#[derive(Clone, Copy)]
enum Verb {
    Replay,
    Drop { yes: bool },
}

/// Remedy for a missing letter, even one that was listed a moment ago.
const ABSENT_REMEDY: &str =
    "`baton dead list` shows the existing ones; another `baton dead` command may be processing it";

/// The result for one letter.
struct Done {
    id: LetterId,
    outcome: String,
    code: u8,
}

/// Replays or drops every selected letter, including all letters with the same id.
async fn settle(global: &Global, urls: Vec<String>, verb: Verb, which: WhichLetters) -> Result<u8, Failure> {
    let ids: BTreeSet<LetterId> = read_ids(&which.ids)?.into_iter().collect();
    if ids.is_empty() && !which.all {
        return Ok(exit::OK);
    }
    if which.all && matches!(verb, Verb::Drop { yes: false }) && !std::io::stdin().is_terminal() {
        return Err(Failure::new(
            exit::REFUSED,
            "cannot ask for confirmation to drop all dead letters: standard input is not a terminal",
        )
        .with_remedy("use `--yes` to confirm"));
    }
    let mut letters = DeadLetters::open(urls).await?;
    let mut all = Vec::new();
    let mut seen = BTreeSet::new();
    while let Some(letter) = letters.next().await? {
        if !which.all && !ids.contains(&letter.id) {
            continue;
        }
        if which.all && seen.is_empty() && matches!(verb, Verb::Drop { yes: false }) && !confirm(letters.n_total())? {
            letters.close().await?;
            return Err(Failure::new(exit::REFUSED, "not confirmed; nothing was dropped"));
        }
        seen.insert(letter.id);
        let done = settle_one(&mut letters, verb, letter).await?;
        done.report(global.output)?;
        all.push(done);
    }
    letters.close().await?;
    for id in ids.difference(&seen) {
        let done = Done { id: *id, outcome: "no such dead letter".to_owned(), code: exit::NOT_FOUND };
        done.report(global.output)?;
        all.push(done);
    }
    if global.output == Output::Json {
        let value = |done: &Done| json!({"id": done.id, "outcome": done.outcome, "ok": done.code == exit::OK});
        output::print_json(&Value::Array(all.iter().map(value).collect()))?;
    }
    Ok(exit_code_of_many(all.iter().map(|done| done.code)))
}

async fn settle_one(letters: &mut DeadLetters, verb: Verb, letter: Letter) -> Result<Done, Failure> {
    let id = letter.id;
    let (outcome, code) = match verb {
        Verb::Drop { .. } => {
            letters.discard(letter).await?;
            ("dropped".to_owned(), exit::OK)
        }
        Verb::Replay => match letters.replay(letter).await? {
            Replayed::To(queue) => (format!("replayed to {queue}"), exit::OK),
            Replayed::Kept(why) => (format!("not replayed: {why}"), exit::CONFLICT),
        },
    };
    Ok(Done { id, outcome, code })
}

impl Done {
    /// Prints the result at once, because many letters take a while. JSON is one document, printed at the end.
    fn report(&self, output: Output) -> Result<(), Failure> {
        match output {
            Output::Json => Ok(()),
            Output::Ids if self.code != exit::OK => Ok(()),
            Output::Ids => output::print(&self.id.to_string()),
            Output::Table => output::print(&format!("{}  {}", self.id, one_line(&self.outcome, OUTCOME_CHARS_MAX))),
        }
    }
}

/// Asks for confirmation at the terminal.
fn confirm(n_total: usize) -> Result<bool, Failure> {
    let mut stderr = anstream::stderr();
    write!(stderr, "Drop all {n_total} dead letters permanently? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A letter in the list.
struct Row {
    id: LetterId,
    at: Option<i64>,
    kind: Option<String>,
    origin: Option<String>,
    about: Option<String>,
    reason: Option<String>,
    size_bytes: usize,
}

fn summary(letter: &Letter) -> Row {
    Row {
        id: letter.id,
        at: letter.at,
        kind: letter.kind(),
        origin: letter.origin.clone(),
        about: letter.about(),
        reason: letter.reason.clone(),
        size_bytes: letter.size_bytes(),
    }
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "id": self.id,
            "at": self.at.map(timestamp),
            "type": self.kind,
            "origin": self.origin,
            "pid": self.about,
            "reason": self.reason,
            "body_bytes": self.size_bytes,
        })
    }
}

fn json_of(letter: &Letter) -> Value {
    let mut value = summary(letter).json();
    let body = letter.body();
    value["properties"] = json!(letter.properties());
    value["headers"] = json!(letter.headers());
    value["body_encoding"] = json!(body.word());
    value["body"] = match body {
        Body::Json(value) | Body::MessagePack(value) => value,
        Body::Text(text) | Body::Hex(text) => text.into(),
    };
    value
}

fn text_of(letter: &Letter) -> String {
    let line = |text: &str| text.replace(char::is_control, "·");
    let word = |text: &Option<String>| line(text.as_deref().unwrap_or("-"));
    let body = letter.body();
    let mut lines = vec![
        letter.id.to_string(),
        format!("  reason     {}", word(&letter.reason)),
        format!("  origin     {}", word(&letter.origin)),
        format!("  at         {}", letter.at.map_or_else(|| "-".to_owned(), clock)),
    ];
    for (title, entries) in [("properties", letter.properties()), ("headers", letter.headers())] {
        lines.push(format!("  {title}"));
        lines.extend(entries.iter().map(|(name, value)| format!("    {}", line(&format!("{name}  {value}")))));
    }
    lines.push(format!("  body       {}, {} bytes", body.word(), letter.size_bytes()));
    let (text, is_whole) = match &body {
        Body::Json(value) | Body::MessagePack(value) => {
            (serde_json::to_string_pretty(value).expect("a JSON value is JSON"), true)
        }
        Body::Text(text) => (text.clone(), text.len() == letter.size_bytes()),
        Body::Hex(text) => (text.clone(), text.len() == 2 + 2 * letter.size_bytes()),
    };
    lines.extend(text.lines().map(|text| format!("    {}", line(text))));
    if !is_whole {
        lines.push("    …".to_owned());
    }
    lines.join("\n")
}
