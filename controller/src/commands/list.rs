//! `baton list`: reads and prints processes page by page, so that any number fits into memory.

use baton_common::exit;
use baton_common::id::Pid;
use baton_common::select::Select;
use baton_common::store::query::{Cursor, Listing, Summary};
use baton_worker::cli;
use comfy_table::{ColumnConstraint, Width};

use crate::cli::{Global, ListArguments, Output};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;
use crate::output;
use crate::overview::{Overview, total};

/// Number of rows that are read and printed together.
const PAGE: u32 = 2_000;

pub(crate) async fn run(global: &Global, arguments: ListArguments) -> Result<u8, Failure> {
    let pids = read_ids(&arguments.pids)?;
    if pids.is_empty() && !arguments.pids.is_empty() {
        // `-` with nothing on standard input means none, not all.
        return Ok(exit::OK);
    }
    let client = Client::open(global).await?;
    let pids = (!arguments.pids.is_empty()).then_some(pids);
    let select = Select { pids, ..arguments.selection.select()? };
    let after = match arguments.after {
        Some(pid) => Some(cursor(&client, &select, pid).await?),
        None => None,
    };
    let mut listing = Listing::new(&select, after);
    let mut printer = Printer::new(global.output);
    let mut n_left = if arguments.limit > 0 { arguments.limit } else { u32::MAX };
    let mut last = None;
    while n_left > 0 {
        let rows = listing.next(&client.store, n_left.min(PAGE)).await?;
        let Some(row) = rows.last() else { break };
        last = Some(row.pid);
        n_left -= u32::try_from(rows.len()).expect("a page");
        printer.page(&rows)?;
    }
    printer.end()?;
    if global.output == Output::Table {
        output::print(&format!("\n{}", footer(&client).await?))?;
        if n_left == 0
            && let Some(last) = last
            && !listing.next(&client.store, 1).await?.is_empty()
        {
            output::note(&format!("next page: {}", next_command(cli::arguments().into_iter().skip(1), last)));
        }
    }
    Ok(exit::OK)
}

/// Returns where a page begins. In the order of acceptance, the process before it must still exist.
async fn cursor(client: &Client, select: &Select, pid: Pid) -> Result<Cursor, Failure> {
    match client.store.cursor(pid).await? {
        Some(cursor) => Ok(cursor),
        None if select.older_than.is_some() => Err(absent(pid)),
        None => Ok(Cursor { pid, created_at: 0 }),
    }
}

/// Returns the command for the next page: this command with `--after` the last process.
fn next_command(arguments: impl Iterator<Item = String>, last: Pid) -> String {
    let mut words = vec!["baton".to_owned()];
    let mut arguments = arguments;
    while let Some(word) = arguments.next() {
        if word == "--after" {
            arguments.next();
        } else if word.contains("://") && word.contains('@') {
            // The URL may contain a password.
            words.push("URL".into());
        } else if !word.starts_with("--after=") {
            words.push(quoted(word));
        }
    }
    words.extend(["--after".to_owned(), last.to_string()]);
    words.join(" ")
}

/// Quotes a word for the shell.
fn quoted(word: String) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-=,./:@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Prints pages as one table, one JSON document, or one list of ids.
struct Printer {
    how: Output,
    n_pages: usize,
    /// Column widths of the earlier pages, so that later ones are not narrower.
    widths: Vec<u16>,
}

impl Printer {
    fn new(how: Output) -> Self {
        Self { how, n_pages: 0, widths: Vec::new() }
    }

    fn page(&mut self, rows: &[Summary]) -> Result<(), Failure> {
        match self.how {
            Output::Json => {
                let values = rows.iter().map(|row| {
                    let text = serde_json::to_string_pretty(&output::summary_json(row)).expect("a JSON value is JSON");
                    format!("  {}", text.replace('\n', "\n  "))
                });
                let begin = if self.n_pages == 0 { "[\n" } else { ",\n" };
                output::print_part(&format!("{begin}{}", values.collect::<Vec<_>>().join(",\n")))?;
            }
            Output::Ids => {
                let lines: String = rows.iter().map(|row| format!("{}\n", row.pid)).collect();
                output::print_part(&lines)?;
            }
            Output::Table => self.table(rows)?,
        }
        self.n_pages += 1;
        Ok(())
    }

    fn table(&mut self, rows: &[Summary]) -> Result<(), Failure> {
        let header = ["PID", "NAME", "STATE", "AGE", "CHANGED", "TRIES", "ADVANCES", "DETAIL"];
        let mut table = if self.n_pages == 0 { output::table(&header) } else { output::headless_table() };
        for row in rows {
            table.add_row([
                row.pid.to_string(),
                row.name.clone(),
                output::state_text(row),
                output::age(row.now - row.created_at),
                format!("{} ago", output::age(row.now - row.changed_at)),
                row.try_number.to_string(),
                row.advances.to_string(),
                output::detail(row),
            ]);
        }
        self.widths.resize(header.len(), 0);
        for (width, content) in self.widths.iter_mut().zip(table.column_max_content_widths()) {
            *width = content.max(*width);
        }
        for (column, width) in table.column_iter_mut().zip(&self.widths) {
            let width = width.saturating_add(column.padding_width());
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
        }
        output::print(&table.trim_fmt())
    }

    /// Prints the end of the document.
    fn end(&mut self) -> Result<(), Failure> {
        match self.how {
            Output::Json => output::print(if self.n_pages == 0 { "[]" } else { "\n]" }),
            Output::Table if self.n_pages == 0 => self.table(&[]),
            Output::Table | Output::Ids => Ok(()),
        }
    }
}

/// Returns the totals and the summary of the fleet below the table.
async fn footer(client: &Client) -> Result<String, Failure> {
    let counts = async { Ok(client.store.count_by_state().await?) };
    let (counts, overview) = tokio::try_join!(counts, Overview::look(&client.store))?;
    let parts: Vec<String> = counts.iter().map(|(word, n)| format!("{} {word}", output::count(*n))).collect();
    let colon = if counts.is_empty() { "" } else { ": " };
    let mut lines = vec![format!("{} in total{colon}{}", total(counts.values().copied()), parts.join(", "))];
    lines.extend(overview.load());
    lines.extend(overview.remarks());
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_command_repeats_the_options_without_passwords() {
        let last: Pid = "01940000-0000-7000-8000-000000000000".parse().unwrap();
        let command = |words: &[&str]| next_command(words.iter().map(|word| (*word).to_owned()), last);
        assert_eq!(command(&["list"]), format!("baton list --after {last}"));
        let first = ["list", "--label", "campaign=si 2", "--after", "x", "--after=y", "-n", "7"];
        assert_eq!(command(&first), format!("baton list --label 'campaign=si 2' -n 7 --after {last}"));
        let secret = ["list", "--database", "postgres://u:s3cret@h/d", "--session", "it's"];
        assert_eq!(command(&secret), format!(r"baton list --database URL --session 'it'\''s' --after {last}"));
    }
}
