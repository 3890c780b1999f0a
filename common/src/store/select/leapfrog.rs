//! A page of those that stand in several lines at once: for each condition the ids of those that meet it, in their order,
//! as an index has them.
//!
//! Each leap is one look into one line: from the id where the others stand to the first there that is not before it. When
//! all lines stand at the same id, it is met. (The leapfrog join of Veldhuizen, "Leapfrog Triejoin", ICDT 2014.) So a
//! million that meet one condition are passed in one leap where none of them meets another; a join would go past each of
//! them.
//!
//! Lines that run side by side and hardly meet are another matter: a leap takes as long as dozens of steps of a join. Beyond
//! a number of leaps, a join looks for the rest of the page.

use sea_orm::Value;

use super::condition::{Order, in_index_of, spec_facts};
use crate::select::Select;

/// How many leaps there may be for each row that is asked for and for each line: where every row of a line meets all
/// conditions, it is one.
const LEAPS_MAX: usize = 4;

/// So many rows are leaped for, even if fewer are asked for.
const ROWS_MIN: u32 = 100;

/// The ids of those that have something in common, in their order: the end of an index whose first columns have values.
#[derive(Clone)]
pub(super) struct Line {
    table: &'static str,
    /// The columns, and their values as SQL.
    columns: Vec<(&'static str, String)>,
    /// What only rows of the index meet, if it is not for all; a comparison of rows does not imply it. (Any other condition,
    /// PostgreSQL puts between the values by which it finds the place in the index, and then begins far from it.)
    condition: String,
}

impl Line {
    /// Those in a state.
    pub(super) fn of_state(word: &str) -> Self {
        Self { table: "process", columns: vec![("state", format!("{{{word}}}"))], condition: " AND state <> -1".into() }
    }

    /// The lines of a selection's other conditions, whose values are added to `values`.
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

    /// The first id that is not before where the leaps stand, as a value. Rows and their order are those of the index,
    /// and no other index has them: whatever a planner believes of the tables, it can only look there.
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

/// A page of at most `limit` ids behind `start`, of those that stand in all of two lines or more; its column `created_at` says
/// nothing. `join` gives the same page for a condition on its ids (`<= …`).
pub(super) fn page_sql(
    lines: &[Line],
    order: Order,
    start: &str,
    limit: u32,
    join: impl FnOnce(&str) -> String,
) -> String {
    let n_lines = lines.len();
    let n_leaps_max = LEAPS_MAX * n_lines * limit.max(ROWS_MIN) as usize;
    // Of a row: `at` is where the last look led, from `prev`, where `n_alike` lines stood. The first row is as if it was met.
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
