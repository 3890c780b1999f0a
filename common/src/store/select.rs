//! A selection as SQL: a condition on rows that are there, and pages of ids in an order that an index has.
//!
//! A page reads only the tables that its conditions are about. Each condition has an index that ends in the id, so the
//! first of a page are found at once, whether a million rows meet it or none; those that meet several, by leaps.

mod leapfrog;

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::{ConnectionTrait, Statement, Value};
use uuid::Uuid;

use leapfrog::Line;

use super::dialect::{Batch, Dialect};
use super::query::Cursor;
use super::{Error, Store};
use crate::id::Pid;
use crate::select::Select;

/// Explicit ids that one statement asks for.
const PIDS_MAX: usize = 1_000;

/// What makes a condition on `spec.created_at` one by which rows are found, in the index of those times. One without it
/// only judges a row that was found by its id.
const FOUND_BY_TIME: &str = " AND s.created_at <> -1";

/// Which way a selection is paged through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    NewestFirst,
    OldestFirst,
}

impl Order {
    /// The direction in which it is sorted, and how an id compares with those before it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::NewestFirst => ("DESC", "<"),
            Self::OldestFirst => ("ASC", ">"),
        }
    }

    /// An id that no process has.
    fn before_all(self) -> Uuid {
        match self {
            Self::NewestFirst => Uuid::max(),
            Self::OldestFirst => Uuid::nil(),
        }
    }
}

/// A walk through a selection, page by page.
pub(super) struct Walk {
    select: Select,
    order: Order,
    /// Explicit ids that are still to come, the next ones last.
    pids: Option<Vec<Pid>>,
    after: Option<Cursor>,
    is_at_end: bool,
}

impl Walk {
    /// A walk that begins behind `after`, or at the beginning.
    pub(super) fn new(select: &Select, order: Order, after: Option<Cursor>) -> Self {
        let pids: Option<Vec<Pid>> = select.pids.as_ref().map(|pids| {
            // Sorted, and each once.
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

    /// The same walk past what has ended, where nothing narrower leads to what is asked for. A selection by facts still
    /// meets what has ended: a page by states is a walk for each of them, which takes longer than to look at each such row.
    pub(super) fn past_ended(mut self) -> Self {
        if self.pids.is_none() && self.select.is_all() {
            self.select.states = Some(["created", "running", "waiting", "paused"].map(str::to_owned).to_vec());
        }
        self
    }

    /// The statement for the next page, which gives at most `limit` rows and may give none; `None` at the end.
    /// `template` begins with `WITH {page}`, a table with the columns `id` and `created_at`.
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

    /// Says what the page had, so that the next one begins behind it.
    pub(super) fn walked(&mut self, n_rows: usize, last: Option<Cursor>, limit: u32) {
        if self.pids.is_none() {
            self.is_at_end = n_rows < limit as usize;
            self.after = last.or(self.after);
        }
    }

    /// The ids of the next page that has any, in the order of the walk; `None` at the end.
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
            let ids = rows.iter().map(|row| row.try_get("", "id")).collect::<Result<Vec<Uuid>, _>>()?;
            let last = rows.last().map(|row| {
                let pid = row.try_get::<Uuid>("", "id")?.into();
                Ok::<_, Error>(Cursor { pid, created_at: row.try_get("", "created_at")? })
            });
            self.walked(rows.len(), last.transpose()?, limit);
            if !ids.is_empty() {
                return Ok(Some(ids));
            }
        }
        Ok(None)
    }

    /// A page's ids with the times of their acceptance, of the processes of table `b` or of all.
    fn page_sql(&self, of_pids: bool, limit: u32, values: &mut Vec<Value>) -> String {
        let select = &self.select;
        let of_process = process_condition(select, values);
        let of_spec = spec_condition(select, values);
        // What is newer than an age would be walked through one by one in the order of ids.
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
        // Of each table, since the planner carries only equalities from one to the other.
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
        // A worker's processes are in no order of ids, and few.
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
        // Their words are those of the templates; anything else was refused before. Each state is an ordered walk of its own.
        let mut branches: Vec<String> = states.iter().map(|word| branch(Some(word))).collect();
        if branches.len() == 1 {
            return branches.remove(0);
        }
        let parts = branches.iter().enumerate().map(|(n, sql)| format!("SELECT * FROM ({sql}) AS b{n}"));
        format!("{} ORDER BY {merged} LIMIT {limit}", parts.collect::<Vec<_>>().join(" UNION ALL "))
    }
}

/// Whether pages of a selection are in the order of acceptance and not of ids.
fn is_by_time(select: &Select) -> bool {
    select.older_than.is_some() && select.pids.is_none()
}

/// The condition on one row `process p` that has been found by its id, but for the selection's ids, as ` AND …`; its values are
/// added to `values`.
///
/// Nothing in it leads a planner to other rows (`+ 0`, and sub-selects that give a value): of processes that were accepted
/// just now it believes that one row meets each condition, and with joins it may compare each of them with each other.
pub(super) fn look(select: &Select, values: &mut Vec<Value>) -> String {
    look_but_for(select, None, values)
}

fn look_but_for(select: &Select, base: Option<Base>, values: &mut Vec<Value>) -> String {
    let mut condition = String::new();
    if let Some(worker) = &select.worker {
        values.push(worker.clone().into());
        let name = values.len();
        condition.push_str(&format!(
            " AND p.place + 0 = {{held}} AND (SELECT h.name FROM worker h WHERE h.id = p.owner) = ${name}"
        ));
    }
    condition.push_str(&state_condition("p.state + 0", select));
    if base != Some(Base::Spec) {
        let of_spec = spec_condition(select, values);
        if !of_spec.is_empty() {
            condition.push_str(&format!(" AND (SELECT true{of_spec} FROM spec s WHERE s.id = p.id)"));
        }
    }
    for (key, value) in select.labels().skip(usize::from(base == Some(Base::Label))) {
        let label = label_condition("l", key, value, values);
        condition.push_str(&format!(" AND (SELECT COUNT(*) FROM label l WHERE l.id = p.id{label}) = 1"));
    }
    condition
}

fn process_condition(select: &Select, values: &mut Vec<Value>) -> String {
    let Some(worker) = &select.worker else { return String::new() };
    values.push(worker.clone().into());
    let name = values.len();
    format!(" AND p.place = {{held}} AND p.owner IN (SELECT h.id FROM worker h WHERE h.name = ${name})")
}

fn state_condition(column: &str, select: &Select) -> String {
    let states = select.states().map(|word| format!("{{{word}}}")).collect::<Vec<_>>();
    if states.is_empty() {
        return String::new();
    }
    format!(" AND {column} IN ({})", states.join(", "))
}

/// The columns of `spec` that a selection gives a value to, each with an index of its own, and these values.
fn spec_facts(select: &Select) -> impl Iterator<Item = (&'static str, &str)> {
    let facts = [("session", &select.session), ("queue", &select.queue), ("kind", &select.kind)];
    facts.into_iter().filter_map(|(column, wanted)| Some((column, wanted.as_deref()?)))
}

/// What a search says beside the value of one of these columns, so that it may use the index of the rows for which this
/// holds: of all of them, since none of these facts is ever empty.
fn in_index_of(alias: &str, column: &str) -> String {
    format!(" AND {alias}{column} <> ''")
}

fn spec_condition(select: &Select, values: &mut Vec<Value>) -> String {
    let mut condition = String::new();
    for (column, wanted) in spec_facts(select) {
        values.push(wanted.into());
        condition.push_str(&format!(" AND s.{column} = ${}{}", values.len(), in_index_of("s.", column)));
    }
    if let Some(age) = select.older_than {
        values.push(i64::try_from(age.as_micros()).unwrap_or(i64::MAX / 2).into());
        condition.push_str(&format!(" AND s.created_at <= {{now}} - ${}", values.len()));
    }
    condition
}

fn label_condition(alias: &str, key: &str, value: &str, values: &mut Vec<Value>) -> String {
    values.extend([key.into(), value.into()]);
    format!(" AND {alias}.key = ${} AND {alias}.value = ${}", values.len() - 1, values.len())
}

/// The table by which a selection's rows are found when they are counted.
#[derive(Clone, Copy, PartialEq)]
enum Base {
    Spec,
    Label,
}

/// How many rows of `process p` are in a selection and meet a condition, by the code in one of their columns. `values`
/// are the condition's.
pub(super) async fn count(
    store: &Store,
    select: &Select,
    column: &str,
    also: &str,
    mut values: Vec<Value>,
) -> Result<BTreeMap<i16, u64>, Error> {
    if select.is_none() {
        return Ok(BTreeMap::new());
    }
    // Each row is one look by its id, as for `look`.
    let by_id = |base: &str, id: &str, found_by: &str, look: &str| {
        format!(
            "SELECT code, COUNT(*) AS n
             FROM (SELECT (SELECT CASE WHEN {also}{look} THEN p.{column} END FROM process p WHERE p.id = {id}) AS code
                   FROM {base} WHERE true{found_by}) AS c
             WHERE code IS NOT NULL GROUP BY code"
        )
    };
    let statements: Vec<Statement> = if let Some(pids) = &select.pids {
        let sql = format!("WITH {{rows}} {}", by_id("b", "b_id", "", &look(select, &mut values)));
        let pids: BTreeSet<Pid> = pids.iter().copied().collect();
        let pids: Vec<Uuid> = pids.into_iter().map(Uuid::from).collect();
        let of = |chunk: &[Uuid]| store.dialect.batch(&sql, values.clone(), Batch::ids(chunk.iter().copied()));
        pids.chunks(PIDS_MAX).map(of).collect()
    } else {
        let of_spec = spec_condition(select, &mut values);
        let sql = if !of_spec.is_empty() {
            let found_by = format!("{of_spec}{}", if select.older_than.is_some() { FOUND_BY_TIME } else { "" });
            by_id("spec s", "s.id", &found_by, &look_but_for(select, Some(Base::Spec), &mut values))
        } else if let Some((key, value)) = select.labels().next() {
            let of_label = label_condition("f", key, value, &mut values);
            by_id("label f", "f.id", &of_label, &look_but_for(select, Some(Base::Label), &mut values))
        } else {
            let condition =
                format!("{also}{}{}", process_condition(select, &mut values), state_condition("p.state", select));
            format!("SELECT p.{column} AS code, COUNT(*) AS n FROM process p WHERE {condition} GROUP BY p.{column}")
        };
        vec![store.dialect.statement(&sql, values)]
    };
    let mut counts = BTreeMap::new();
    for statement in statements {
        for row in store.db.query_all_raw(statement).await? {
            *counts.entry(row.try_get("", "code")?).or_default() += row.try_get::<i64>("", "n")?.cast_unsigned();
        }
    }
    Ok(counts)
}
