//! A page of ids that meet several conditions at once. Each condition is a *line*: the ids of the rows that meet it,
//! sorted, as an index has them.
//!
//! Each leap is one index lookup in one line: from the id where the other lines stand to the first id that is not
//! before it. An id at which all lines stand meets all conditions. (This is the leapfrog join of Veldhuizen, "Leapfrog
//! Triejoin", ICDT 2014.) So one leap passes a million rows that meet only one condition; a join would read each of
//! them.
//!
//! Lines that interleave without meeting are slower: one leap takes as long as dozens of steps of a join. After a
//! number of leaps, a join finds the rest of the page.

use sea_orm::Value;

use super::condition::{Order, in_index_of, spec_facts};
use crate::select::Select;

/// The limit of leaps, per requested row and line. Where every row of a line meets all conditions, one leap is enough.
const LEAPS_MAX: usize = 4;

/// The least number of rows for which the limit of leaps is computed.
const ROWS_MIN: u32 = 100;

/// The sorted ids of rows with equal values: the end of an index whose first columns have these values.
#[derive(Clone)]
pub(super) struct Line {
    table: &'static str,
    /// The columns, and their values as SQL.
    columns: Vec<(&'static str, String)>,
    /// The predicate of a partial index, which a comparison of rows does not imply. (PostgreSQL uses any other
    /// condition between the columns of the search key, and then starts far from the right place.)
    condition: String,
}

impl Line {
    /// The processes in a state.
    pub(super) fn of_state(word: &str) -> Self {
        Self { table: "process", columns: vec![("state", format!("{{{word}}}"))], condition: " AND state <> -1".into() }
    }

    /// The lines of the other conditions of a selection. Their values are added to `values`.
    pub(super) fn of(select: &Select, values: &mut Vec<Value>) -> Vec<Self> {
        let mut parameter = |value: &str| {
            values.push(value.into());
            format!("${}", values.len())
        };
        let mut lines = Vec::new();
        for (column, value) in spec_facts(select) {
            let condition = in_index_of("", column);
            lines.push(Self { table: "spec", columns: vec![(column, parameter(value))], condition });
        }
        for (key, value) in select.labels() {
            let columns = vec![("key", parameter(key)), ("value", parameter(value))];
            lines.push(Self { table: "label", columns, condition: String::new() });
        }
        lines
    }

    /// The first id that is not before the current position, as a scalar. It compares rows in the order of the index,
    /// which no other index has, so a planner can use only this one.
    fn look(&self, order: Order, is_met: &str) -> String {
        let (direction, behind) = order.words();
        let list = |part: &dyn Fn(&(&str, String)) -> String, glue: &str| {
            self.columns.iter().map(part).collect::<Vec<_>>().join(glue)
        };
        let names = list(&|(name, _)| (*name).to_owned(), ", ");
        let values = list(&|(_, value)| value.clone(), ", ");
        let sorted = list(&|(name, _)| format!("{name} {direction}"), ", ");
        let is_in_line = list(&|(name, value)| format!("f.{name} = {value}"), " AND ");
        format!(
            "(SELECT CASE WHEN {is_in_line} THEN f.id END
              FROM (SELECT {names}, id FROM {table}
                    WHERE ({names}, id) {behind}= ({values}, leap.at){condition} AND NOT ({is_met} AND id = leap.at)
                    ORDER BY {sorted}, id {direction} LIMIT 1) AS f)",
            table = self.table,
            condition = self.condition
        )
    }
}

/// The SQL of a page of at most `limit` ids after `start` that are in all of two or more lines. Its column `created_at`
/// is meaningless. `join` is the same page for a condition on the ids (`<= …`).
pub(super) fn page_sql(
    lines: &[Line],
    order: Order,
    start: &str,
    limit: u32,
    join: impl FnOnce(&str) -> String,
) -> String {
    let n_lines = lines.len();
    let n_leaps_max = LEAPS_MAX * n_lines * limit.max(ROWS_MIN) as usize;
    // `at` is the result of the last leap, from `prev`, where `n_alike` lines stood. The first row counts as met.
    let is_met = format!("(leap.at = leap.prev AND leap.n_alike = {})", n_lines - 1);
    let looks: String =
        lines.iter().enumerate().map(|(n, line)| format!(" WHEN {n} THEN {}", line.look(order, &is_met))).collect();
    let (direction, behind) = order.words();
    let rest = join(&format!(
        "{behind}= (SELECT leap.at FROM leap WHERE leap.n_leaps >= {n_leaps_max} AND leap.at IS NOT NULL AND NOT {is_met})"
    ));
    format!(
        "WITH RECURSIVE leap(prev, at, n_alike, turn, n_met, n_leaps) AS (
           SELECT {start}, {start}, {n_lines} - 1, 0, -1, 0
           UNION ALL
           SELECT leap.at, CASE leap.turn{looks} END,
                  CASE WHEN leap.at = leap.prev THEN leap.n_alike + 1 ELSE 1 END, (leap.turn + 1) % {n_lines},
                  CASE WHEN {is_met} THEN leap.n_met + 1 ELSE leap.n_met END, leap.n_leaps + 1
           FROM leap
           WHERE leap.at IS NOT NULL AND ({is_met} OR leap.n_leaps < {n_leaps_max})
             AND leap.n_met + (CASE WHEN {is_met} THEN 1 ELSE 0 END) < {limit}
         )
         SELECT id, CAST(0 AS bigint) AS created_at
         FROM (SELECT leap.at AS id FROM leap WHERE {is_met} AND leap.n_leaps > 0
               UNION ALL
               SELECT j.id FROM ({rest}) AS j) AS found
         ORDER BY id {direction} LIMIT {limit}"
    )
}
