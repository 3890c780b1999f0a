//! A selection as SQL: conditions on existing rows, and pages of ids in the order of an index.
//!
//! A page reads only the tables that its conditions name. Each condition has an index that ends in the id, so the first
//! rows of a page are found at once, whether a million rows meet the condition or none. Rows that meet several
//! conditions are found by a leapfrog join.

mod condition;
mod count;
mod leapfrog;

use std::collections::BTreeSet;

use sea_orm::{ConnectionTrait, Statement, Value};
use uuid::Uuid;

use condition::{FOUND_BY_TIME, PIDS_MAX, label_condition, process_condition, spec_condition};
pub(super) use condition::{Order, look};
pub(super) use count::count;
use leapfrog::Line;

use super::dialect::{Batch, Dialect};
use super::error::Error;
use super::row::{Cursor, read};
use crate::id::Pid;
use crate::select::Select;

/// A walk through a selection, page by page.
pub(super) struct Walk {
    select: Select,
    order: Order,
    /// The remaining explicit ids, the next ones last.
    pids: Option<Vec<Pid>>,
    after: Option<Cursor>,
    is_at_end: bool,
}

impl Walk {
    /// A walk that begins after `after`, or at the beginning.
    pub(super) fn new(select: &Select, order: Order, after: Option<Cursor>) -> Self {
        let pids: Option<Vec<Pid>> = select.pids.as_ref().map(|pids| {
            // Sorted and distinct.
            let pids: BTreeSet<Pid> = pids.iter().copied().collect();
            let is_left = |pid: &Pid| match (after, order) {
                (None, Order::NewestFirst | Order::OldestFirst) => true,
                (Some(after), Order::NewestFirst) => *pid < after.pid,
                (Some(after), Order::OldestFirst) => *pid > after.pid,
            };
            let mut pids: Vec<Pid> = pids.into_iter().filter(is_left).collect();
            if order == Order::OldestFirst {
                pids.reverse();
            }
            pids
        });
        let is_at_end = select.is_none() || pids.as_ref().is_some_and(Vec::is_empty);
        Self { select: Select { pids: None, ..select.clone() }, order, pids, after, is_at_end }
    }

    /// The same walk without ended processes, if the selection has no other condition. Other selections do meet ended
    /// rows: one walk per state would take longer than to check each such row.
    pub(super) fn past_ended(mut self) -> Self {
        if self.pids.is_none() && self.select.is_all() {
            self.select.states = Some(["created", "running", "waiting", "paused"].map(str::to_owned).to_vec());
        }
        self
    }

    /// Returns the statement for the next page, which returns at most `limit` rows and possibly none; `None` at the
    /// end. `template` begins with `WITH {page}`, a table with the columns `id` and `created_at`.
    pub(super) fn next(&mut self, dialect: Dialect, template: &str, limit: u32) -> Option<Statement> {
        if self.is_at_end {
            return None;
        }
        let mut values: Vec<Value> = Vec::new();
        let of_pids = self.pids.is_some();
        let sql = self.page_sql(of_pids, limit, &mut values);
        let Some(pids) = &mut self.pids else {
            let page = format!("page AS MATERIALIZED ({sql})");
            return Some(dialect.statement(&template.replace("{page}", &page), values));
        };
        let n_left = pids.len().saturating_sub(PIDS_MAX.min(limit as usize));
        let chunk = pids.split_off(n_left);
        self.is_at_end = n_left == 0;
        let batch = Batch::ids(chunk.into_iter().map(Uuid::from));
        let page = format!("{{rows}}, page AS MATERIALIZED ({sql})");
        Some(dialect.batch(&template.replace("{page}", &page), values, batch))
    }

    /// Records the result of a page, so that the next one begins after it.
    pub(super) fn walked(&mut self, n_rows: usize, last: Option<Cursor>, limit: u32) {
        if self.pids.is_none() {
            self.is_at_end = n_rows < limit as usize;
            self.after = last.or(self.after);
        }
    }

    /// Returns the ids of the next page that is not empty, in the order of the walk; `None` at the end.
    pub(super) async fn next_ids(
        &mut self,
        connection: &impl ConnectionTrait,
        dialect: Dialect,
        limit: u32,
    ) -> Result<Option<Vec<Uuid>>, Error> {
        let by = match (is_by_time(&self.select), self.order) {
            (false, Order::NewestFirst) => "id DESC",
            (false, Order::OldestFirst) => "id",
            (true, Order::NewestFirst) => "created_at DESC, id DESC",
            (true, Order::OldestFirst) => "created_at, id",
        };
        let template = format!("WITH {{page}} SELECT id, created_at FROM page ORDER BY {by}");
        while let Some(statement) = self.next(dialect, &template, limit) {
            let rows = connection.query_all_raw(statement).await?;
            let page: Vec<Cursor> = read(&rows)?;
            self.walked(page.len(), page.last().copied(), limit);
            if !page.is_empty() {
                return Ok(Some(page.into_iter().map(|row| row.pid.into()).collect()));
            }
        }
        Ok(None)
    }

    /// The SQL of a page of ids and times of acceptance, among the processes of table `b` or among all.
    fn page_sql(&self, of_pids: bool, limit: u32, values: &mut Vec<Value>) -> String {
        let select = &self.select;
        let of_process = process_condition(select, values);
        let of_spec = spec_condition(select, values);
        // In the order of ids, processes younger than the age would be read one by one.
        let by_time = !of_pids && is_by_time(select);
        let mut tables = Vec::new();
        if !of_process.is_empty() || select.states.is_some() || of_pids {
            tables.push(("process".to_owned(), "p".to_owned()));
        }
        if !of_spec.is_empty() {
            tables.push(("spec".to_owned(), "s".to_owned()));
        }
        let mut condition = format!("{of_process}{of_spec}{}", if by_time { FOUND_BY_TIME } else { "" });
        for (n, (key, value)) in select.labels().enumerate() {
            condition.push_str(&label_condition(&format!("l{n}"), key, value, values));
            tables.push(("label".to_owned(), format!("l{n}")));
        }
        if tables.is_empty() {
            tables.push(("process".to_owned(), "p".to_owned()));
        }
        if of_pids {
            condition.push_str(" AND p.id IN (SELECT b_id FROM b)");
        }
        // A condition on each table, since the planner infers only equalities from one to the other.
        let of_each =
            |on_id: &str| tables.iter().map(|(_, alias)| format!(" AND {alias}.id {on_id}")).collect::<String>();
        let (direction, behind) = self.order.words();
        let mut start = None;
        let mut past = String::new();
        if let Some(after) = self.after.filter(|_| !of_pids) {
            values.push(Uuid::from(after.pid).into());
            let id = format!("${}", values.len());
            if by_time {
                values.push(after.created_at.into());
                past = format!(" AND (s.created_at, s.id) {behind} (${}, {id})", values.len());
            } else {
                past = of_each(&format!("{behind} {id}"));
            }
            start = Some(id);
        }
        let base = &tables[0].1;
        let joined: String = tables[1..]
            .iter()
            .map(|(table, alias)| format!(" JOIN {table} {alias} ON {alias}.id = {base}.id"))
            .collect();
        let (created_at, sorted, merged) = if by_time {
            let sorted = format!("s.created_at {direction}, s.id {direction}");
            ("s.created_at", sorted, format!("created_at {direction}, id {direction}"))
        } else {
            ("CAST(0 AS bigint)", format!("{base}.id {direction}"), format!("id {direction}"))
        };
        let join = |of_state: &str, past: &str| {
            format!(
                "SELECT {base}.id, {created_at} AS created_at FROM {} {base}{joined} WHERE true{of_state}{condition}{past}
                 ORDER BY {sorted} LIMIT {limit}",
                tables[0].0
            )
        };
        // The processes of a worker are few, and no index sorts them by id.
        let is_in_lines = !of_pids && !by_time && select.worker.is_none();
        let lines = if is_in_lines { Line::of(select, values) } else { vec![] };
        let mut branch = |state: Option<&str>| {
            let of_state = state.map(|word| format!(" AND p.state = {{{word}}}")).unwrap_or_default();
            let lines: Vec<Line> = state.map(Line::of_state).into_iter().chain(lines.clone()).collect();
            if !is_in_lines || lines.len() < 2 {
                return join(&of_state, &past);
            }
            let start = start.get_or_insert_with(|| {
                values.push(self.order.before_all().into());
                format!("${}", values.len())
            });
            leapfrog::page_sql(&lines, self.order, start, limit, |on_id| join(&of_state, &of_each(on_id)))
        };
        let states: BTreeSet<&str> = select.states().collect();
        if states.is_empty() {
            return branch(None);
        }
        // The words are those of the templates; others were refused earlier. Each state is an ordered walk of its own.
        let mut branches: Vec<String> = states.iter().map(|word| branch(Some(word))).collect();
        if branches.len() == 1 {
            return branches.remove(0);
        }
        let parts = branches.iter().enumerate().map(|(n, sql)| format!("SELECT * FROM ({sql}) AS b{n}"));
        format!("{} ORDER BY {merged} LIMIT {limit}", parts.collect::<Vec<_>>().join(" UNION ALL "))
    }
}

/// Whether pages are in the order of acceptance instead of ids.
fn is_by_time(select: &Select) -> bool {
    select.older_than.is_some() && select.pids.is_none()
}
