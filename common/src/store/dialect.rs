//! The differences between PostgreSQL and SQLite, so that each statement is written once.
//!
//! A statement is a template with words in braces: `{held}` is a code of [`crate::state`], `{now}` the database's time,
//! `{for_update}` a row lock. Rows are bound as one array parameter per column and read by `unnest` on PostgreSQL (the
//! text does not depend on the number of rows), and as `VALUES` on SQLite.

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use sea_orm::sea_query::ArrayType;
use sea_orm::{DatabaseBackend, Statement, Value};
use uuid::Uuid;

use crate::state::{Desired, Place, State};

/// The SQL dialect of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Postgres,
    Sqlite,
}

/// The type of a [`Batch`] column. No column may be null: PostgreSQL's arrays are bound without nulls.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Uuid,
    SmallInt,
    BigInt,
    Text,
    Bytes,
}

/// Rows that a statement reads as its table `b`.
#[derive(Clone)]
pub(crate) struct Batch {
    columns: &'static [(&'static str, Kind)],
    /// One list per column.
    values: Vec<Vec<Value>>,
}

impl Dialect {
    pub(crate) fn backend(self) -> DatabaseBackend {
        match self {
            Dialect::Postgres => DatabaseBackend::Postgres,
            Dialect::Sqlite => DatabaseBackend::Sqlite,
        }
    }

    /// Renders a template as a statement.
    pub(crate) fn statement(self, template: &str, values: Vec<Value>) -> Statement {
        Statement::from_sql_and_values(self.backend(), self.render(template), values)
    }

    /// Renders a template over the rows of `batch`, which it reads as the table `b` in its first common table
    /// expression (`WITH {rows} …`). `scalars` are `$1`, `$2`…
    pub(crate) fn batch(self, template: &str, scalars: Vec<Value>, batch: Batch) -> Statement {
        let sql = self.batch_text(template, batch.columns, scalars.len() + 1, batch.len());
        self.bound(sql, scalars, batch)
    }

    /// Like [`Dialect::batch`], for a template of the hot path. Its text for PostgreSQL does not depend on the rows and
    /// is cached.
    pub(crate) fn hot_batch(self, template: &'static str, scalars: Vec<Value>, batch: Batch) -> Statement {
        let text = || self.batch_text(template, batch.columns, scalars.len() + 1, batch.len());
        let sql = match self {
            Dialect::Postgres => kept_text(template, text),
            Dialect::Sqlite => text(),
        };
        self.bound(sql, scalars, batch)
    }

    fn bound(self, sql: String, mut scalars: Vec<Value>, batch: Batch) -> Statement {
        match self {
            Dialect::Postgres => {
                let arrays = batch.columns.iter().zip(batch.values);
                scalars
                    .extend(arrays.map(|((_, kind), column)| Value::Array(kind.array_type(), Some(Box::new(column)))));
            }
            Dialect::Sqlite => {
                let mut columns = batch.values.into_iter().map(Vec::into_iter).collect::<Vec<_>>();
                while let Some(first) = columns.first_mut().and_then(Iterator::next) {
                    scalars.push(first);
                    scalars.extend(columns[1..].iter_mut().filter_map(Iterator::next));
                }
            }
        }
        Statement::from_sql_and_values(self.backend(), sql, scalars)
    }

    /// Renders a statement over rows, whose first parameter has the number `first`.
    fn batch_text(self, template: &str, columns: &[(&str, Kind)], first: usize, n_rows: usize) -> String {
        let join = |parts: &mut dyn Iterator<Item = String>| parts.collect::<Vec<_>>().join(", ");
        let width = columns.len();
        let source = match self {
            Dialect::Postgres => {
                let arrays = columns.iter().enumerate();
                let arrays =
                    join(&mut arrays.map(|(idx, (_, kind))| format!("${}::{}[]", first + idx, kind.postgres())));
                format!("SELECT * FROM unnest({arrays})")
            }
            Dialect::Sqlite => {
                let row =
                    |row_idx: usize| join(&mut (0..width).map(|idx| format!("${}", first + row_idx * width + idx)));
                format!("VALUES {}", join(&mut (0..n_rows).map(|row_idx| format!("({})", row(row_idx)))))
            }
        };
        let names = join(&mut columns.iter().map(|(name, _)| (*name).to_owned()));
        self.render(&template.replace("{rows}", &format!("b({names}) AS ({source})")))
    }

    fn render(self, template: &str) -> String {
        let mut sql = template.to_owned();
        for place in [Place::Queued, Place::Held, Place::Parked, Place::Ended] {
            sql = sql.replace(&format!("{{{}}}", place.word()), &place.code().to_string());
        }
        for state in [State::Created, State::Running, State::Waiting, State::Finished, State::Excepted, State::Killed] {
            sql = sql.replace(&format!("{{{}}}", state.word()), &state.code().to_string());
        }
        let paused = State::Paused(crate::state::Live::Running).code().to_string();
        sql = sql.replace("{paused}", &paused);
        for desired in [Desired::Run, Desired::Pause, Desired::Kill] {
            sql = sql.replace(&format!("{{{}}}", desired.verb()), &desired.code().to_string());
        }
        let words: [(&str, &str, &str); 10] = [
            // The row with the batch's id. PostgreSQL can reverse a join by equality, and would scan the whole table
            // for each batch while it believes the table to be empty. With a range it can only look up each id in an
            // index.
            ("{id_of_b}", "id BETWEEN b_id AND b_id", "id = b_id"),
            (
                "{now}",
                "(extract(epoch from now()) * 1000000)::bigint",
                "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
            ),
            // The time at this moment, for history: a transaction that began earlier may have waited for a row until
            // another one committed. No index can be searched by it.
            (
                "{clock}",
                "(extract(epoch from clock_timestamp()) * 1000000)::bigint",
                "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
            ),
            ("{for_update}", "FOR UPDATE", ""),
            ("{skip_locked}", "FOR UPDATE SKIP LOCKED", ""),
            ("{of_p_skip_locked}", "FOR UPDATE OF p SKIP LOCKED", ""),
            ("{of_p}", "FOR UPDATE OF p", ""),
            ("{login}", "('postgresql:' || session_user)", "'sqlite'"),
            ("{json}", "::jsonb", ""),
            ("{json_array}", "json_build_array", "json_array"),
        ];
        for (word, postgres, sqlite) in words {
            sql = sql.replace(word, if self == Dialect::Postgres { postgres } else { sqlite });
        }
        debug_assert!(!sql.contains('{'), "a word that no dialect knows: {sql}");
        sql
    }
}

/// Returns the cached text of a template, or renders and caches it.
fn kept_text(template: &'static str, make: impl FnOnce() -> String) -> String {
    static TEXTS: LazyLock<RwLock<HashMap<&'static str, String>>> = LazyLock::new(RwLock::default);
    if let Some(text) = TEXTS.read().unwrap_or_else(PoisonError::into_inner).get(template) {
        return text.clone();
    }
    let text = make();
    TEXTS.write().unwrap_or_else(PoisonError::into_inner).insert(template, text.clone());
    text
}

impl Batch {
    pub(crate) fn new(columns: &'static [(&'static str, Kind)]) -> Self {
        Self { columns, values: vec![Vec::new(); columns.len()] }
    }

    /// Adds a row with a value for each column. Texts are made [`storable`].
    pub(crate) fn push<const N: usize>(&mut self, row: [Value; N]) {
        debug_assert_eq!(N, self.columns.len());
        for (column, value) in self.values.iter_mut().zip(row) {
            column.push(if let Value::String(Some(text)) = value { storable(text).into() } else { value });
        }
    }

    fn len(&self) -> usize {
        self.values.first().map_or(0, Vec::len)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A batch of ids in the column `b_id`.
    pub(crate) fn ids(ids: impl IntoIterator<Item = Uuid>) -> Self {
        let mut batch = Self::new(&[("b_id", Kind::Uuid)]);
        for id in ids {
            batch.push([id.into()]);
        }
        batch
    }
}

/// Replaces NUL bytes, which PostgreSQL does not store, by the replacement character. Such texts come from machines (an
/// error, the name of a job); names that users choose are checked earlier.
pub(crate) fn storable(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

impl Kind {
    fn postgres(self) -> &'static str {
        match self {
            Kind::Uuid => "uuid",
            Kind::SmallInt => "smallint",
            Kind::BigInt => "bigint",
            Kind::Text => "text",
            Kind::Bytes => "bytea",
        }
    }

    fn array_type(self) -> ArrayType {
        match self {
            Kind::Uuid => ArrayType::Uuid,
            Kind::SmallInt => ArrayType::SmallInt,
            Kind::BigInt => ArrayType::BigInt,
            Kind::Text => ArrayType::String,
            Kind::Bytes => ArrayType::Bytes,
        }
    }
}
