//! How many rows of a selection meet a condition.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::{ConnectionTrait, Statement, Value};
use uuid::Uuid;

use super::condition::{
    Base, FOUND_BY_TIME, PIDS_MAX, label_condition, look, look_but_for, process_condition, spec_condition,
    state_condition,
};
use crate::id::Pid;
use crate::select::Select;
use crate::store::dialect::Batch;
use crate::store::error::Error;
use crate::store::handle::Store;

/// Counts the rows of `process p` that are in a selection and meet a condition, by the code in one of their columns.
/// `values` are the values of the condition.
pub(in crate::store) async fn count(
    store: &Store,
    select: &Select,
    column: &str,
    also: &str,
    mut values: Vec<Value>,
) -> Result<BTreeMap<i16, u64>, Error> {
    if select.is_none() {
        return Ok(BTreeMap::new());
    }
    // One lookup by id per row, as in `look`.
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
            let (code, n): (i16, i64) = row.try_get_many_by_index()?;
            *counts.entry(code).or_default() += n.cast_unsigned();
        }
    }
    Ok(counts)
}
