//! The conditions of a selection as SQL, and the order of its pages.

use sea_orm::Value;
use uuid::Uuid;

use crate::select::Select;

/// Explicit ids in one statement.
pub(super) const PIDS_MAX: usize = 1_000;

/// Makes a condition on `spec.created_at` usable for a search of that index. Without it, the condition only checks a
/// row that was found by its id.
pub(super) const FOUND_BY_TIME: &str = " AND s.created_at <> -1";

/// The order of the pages of a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Order {
    NewestFirst,
    OldestFirst,
}

impl Order {
    /// The sort direction, and the comparison of an id with those before it.
    pub(super) fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::NewestFirst => ("DESC", "<"),
            Self::OldestFirst => ("ASC", ">"),
        }
    }

    /// An id before that of any process.
    pub(super) fn before_all(self) -> Uuid {
        match self {
            Self::NewestFirst => Uuid::max(),
            Self::OldestFirst => Uuid::nil(),
        }
    }
}

/// The condition on one row `process p` that was found by its id, without the selection's ids, as ` AND …`. Its values
/// are added to `values`.
///
/// Nothing in it lets a planner start from other rows (`+ 0`, and scalar subqueries). For recently accepted processes a
/// planner expects one row per condition, and with joins it may compare each of them with every other.
pub(in crate::store) fn look(select: &Select, values: &mut Vec<Value>) -> String {
    look_but_for(select, None, values)
}

pub(super) fn look_but_for(select: &Select, base: Option<Base>, values: &mut Vec<Value>) -> String {
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

pub(super) fn process_condition(select: &Select, values: &mut Vec<Value>) -> String {
    let Some(worker) = &select.worker else { return String::new() };
    values.push(worker.clone().into());
    let name = values.len();
    format!(" AND p.place = {{held}} AND p.owner IN (SELECT h.id FROM worker h WHERE h.name = ${name})")
}

pub(super) fn state_condition(column: &str, select: &Select) -> String {
    let states = select.states().map(|word| format!("{{{word}}}")).collect::<Vec<_>>();
    if states.is_empty() {
        return String::new();
    }
    format!(" AND {column} IN ({})", states.join(", "))
}

/// The columns of `spec` that a selection compares, each with its own index, and the values.
pub(super) fn spec_facts(select: &Select) -> impl Iterator<Item = (&'static str, &str)> {
    let facts = [("session", &select.session), ("queue", &select.queue), ("kind", &select.kind)];
    facts.into_iter().filter_map(|(column, wanted)| Some((column, wanted.as_deref()?)))
}

/// Makes a comparison of one of these columns usable for a search of its partial index. It is true of every row, since
/// none of these columns is ever empty.
pub(super) fn in_index_of(alias: &str, column: &str) -> String {
    format!(" AND {alias}{column} <> ''")
}

pub(super) fn spec_condition(select: &Select, values: &mut Vec<Value>) -> String {
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

pub(super) fn label_condition(alias: &str, key: &str, value: &str, values: &mut Vec<Value>) -> String {
    values.extend([key.into(), value.into()]);
    format!(" AND {alias}.key = ${} AND {alias}.value = ${}", values.len() - 1, values.len())
}

/// The table from which a count starts.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Base {
    Spec,
    Label,
}
