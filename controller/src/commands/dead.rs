//! `baton dead`: what nobody could use. It lies on the broker, so no database is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, IsTerminal, Write};

use baton_common::communicator::dead::{Body, DeadLetters, Letter, Replayed};
use baton_common::exit;
use baton_common::id::LetterId;
use chrono::Utc;
use serde_json::{Value, json};

use crate::cli::{DeadCommand, DeadListArguments, DropArguments, Global, LetterIds, Output, WhichLetters};
use crate::client::read_ids;
use crate::failure::{Failure, exit_code_of_many};
use crate::output::{self, clock, one_line, timestamp};

/// How much of a reason the table shows; `show` has it all.
const REASON_CHARS_MAX: usize = 100;

/// How much is said of what became of a letter: the names of queues are in it, and what the broker said.
const OUTCOME_CHARS_MAX: usize = 1000;

/// How much of a name the table shows: no name on a broker has more bytes.
const NAME_CHARS_MAX: usize = 255;

pub(crate) async fn run(global: &Global, command: DeadCommand) -> Result<u8, Failure> {
    let urls = global.connection.resolve()?.broker_urls;
    if urls.is_empty() {
        return Err(Failure::usage("no broker is named; dead letters lie on RabbitMQ, and `baton run` has none")
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
    // By their time, and not more at once than shall be shown. All are looked at, since the queue has no other order
    // than the one in which somebody has looked at them last.
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
            output::print(&format!("\n{} of {n_seen}", rows.len()))?;
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

/// What may be done to letters.
#[derive(Clone, Copy)]
enum Verb {
    Replay,
    Drop { yes: bool },
}

/// Also for a letter that was listed a moment ago.
const ABSENT_REMEDY: &str = "`baton dead list` shows those that are there; another `baton dead` may have it in hand";

/// What became of one letter.
struct Done {
    id: LetterId,
    outcome: String,
    code: u8,
}

/// Deals with every letter that is meant: of those with the same id, with all.
async fn settle(global: &Global, urls: Vec<String>, verb: Verb, which: WhichLetters) -> Result<u8, Failure> {
    let ids: BTreeSet<LetterId> = read_ids(&which.ids)?.into_iter().collect();
    if ids.is_empty() && !which.all {
        return Ok(exit::OK);
    }
    if which.all && matches!(verb, Verb::Drop { yes: false }) && !std::io::stdin().is_terminal() {
        return Err(Failure::new(exit::REFUSED, "dropping all dead letters has to be confirmed")
            .with_remedy("say --yes where nobody can be asked"));
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
            return Err(Failure::new(exit::REFUSED, "nothing was dropped"));
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
    /// Says it at once, since many letters take a while; JSON is one document and comes at the end.
    fn report(&self, output: Output) -> Result<(), Failure> {
        match output {
            Output::Json => Ok(()),
            Output::Ids if self.code != exit::OK => Ok(()),
            Output::Ids => output::print(&self.id.to_string()),
            Output::Table => output::print(&format!("{}  {}", self.id, one_line(&self.outcome, OUTCOME_CHARS_MAX))),
        }
    }
}

/// Asks the person at the terminal.
fn confirm(n_total: usize) -> Result<bool, Failure> {
    let mut stderr = anstream::stderr();
    write!(stderr, "Drop all dead letters ({n_total}) for good? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// What a list says about a letter.
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
