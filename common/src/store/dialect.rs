//! What PostgreSQL and SQLite do not share, so that every statement stands once.
//!
//! A statement is written with words in braces: `{held}` is a code of [`crate::state`], `{now}` the database's time,
//! `{for_update}` a row lock. Rows go in as one parameter a column: `unnest` on PostgreSQL (one text whatever the number
//! of rows), `VALUES` on SQLite.

use sea_orm::sea_query::ArrayType;
use sea_orm::{DatabaseBackend, Statement, Value};
use uuid::Uuid;

use crate::state::{Desired, Place, State};

/// Which database speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Postgres,
    Sqlite,
}

/// A column of a [`Batch`]. No column may be null: PostgreSQL's arrays are bound without nulls.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Uuid,
    SmallInt,
    BigInt,
    Text,
    Bytes,
}

/// Rows that go into one statement as its table `b`.
pub(crate) struct Batch {
    columns: &'static [(&'static str, Kind)],
    rows: Vec<Vec<Value>>,
}

impl Dialect {
    pub(crate) fn backend(self) -> DatabaseBackend {
        match self {
            Dialect::Postgres => DatabaseBackend::Postgres,
            Dialect::Sqlite => DatabaseBackend::Sqlite,
        }
    }

    /// The statement that `template` stands for.
    pub(crate) fn statement(self, template: &str, values: Vec<Value>) -> Statement {
        Statement::from_sql_and_values(self.backend(), self.render(template), values)
    }

    /// `template` over the rows of `batch`, which it reads as the table `b` in its first common table expression
    /// (`WITH {rows} …`). `scalars` are `$1`, `$2`…
    pub(crate) fn batch(self, template: &str, mut scalars: Vec<Value>, batch: Batch) -> Statement {
        let names = batch.columns.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let first = scalars.len() + 1;
        let source = match self {
            Dialect::Postgres => {
                let arrays = batch.columns.iter().enumerate().map(|(idx, (_, kind))| {
                    let column = batch.rows.iter().map(|row| row[idx].clone()).collect();
                    scalars.push(Value::Array(kind.array_type(), Some(Box::new(column))));
                    format!("${}::{}[]", first + idx, kind.postgres())
                });
                format!("SELECT * FROM unnest({})", arrays.collect::<Vec<_>>().join(", "))
            }
            Dialect::Sqlite => {
                let width = batch.columns.len();
                let rows = batch.rows.into_iter().enumerate().map(|(row_idx, row)| {
                    scalars.extend(row);
                    let places = (0..width).map(|idx| format!("${}", first + row_idx * width + idx));
                    format!("({})", places.collect::<Vec<_>>().join(", "))
                });
                format!("VALUES {}", rows.collect::<Vec<_>>().join(", "))
            }
        };
        let template = template.replace("{rows}", &format!("b({names}) AS ({source})"));
        self.statement(&template, scalars)
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
        let words: [(&str, &str, &str); 9] = [
            (
                "{now}",
                "(extract(epoch from now()) * 1000000)::bigint",
                "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
            ),
            // The time of this very moment, for what history says: a transaction that began first may have waited for a
            // row until another had committed. No index can be searched by it.
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

impl Batch {
    pub(crate) fn new(columns: &'static [(&'static str, Kind)]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: Vec<Value>) {
        debug_assert_eq!(row.len(), self.columns.len());
        self.rows.push(row);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// A batch of ids only, as the column `b_id`.
    pub(crate) fn ids(ids: impl IntoIterator<Item = Uuid>) -> Self {
        let mut batch = Self::new(&[("b_id", Kind::Uuid)]);
        for id in ids {
            batch.push(vec![id.into()]);
        }
        batch
    }
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
