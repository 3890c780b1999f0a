//! A selection as a condition of SQL.

use sea_orm::Value;
use uuid::Uuid;

use crate::select::Select;

/// The condition on `process p JOIN spec s`, as ` AND …`; its values are added to `values`.
pub(super) fn condition(select: &Select, values: &mut Vec<Value>) -> String {
    let mut condition = String::new();
    let mut number = |value: Value| {
        values.push(value);
        values.len()
    };
    if !select.pids.is_empty() {
        let ids = select.pids.iter().map(|pid| format!("${}", number(Uuid::from(*pid).into()))).collect::<Vec<_>>();
        condition.push_str(&format!(" AND p.id IN ({})", ids.join(", ")));
    }
    for (key, value) in &select.labels {
        let (key, value) = (number(key.clone().into()), number(value.clone().into()));
        condition.push_str(&format!(" AND (s.labels{{json}} ->> ${key}) = ${value}"));
    }
    if !select.states.is_empty() {
        // Their words are those of the templates; anything else was refused before.
        let states = select.states.iter().map(|word| format!("{{{word}}}")).collect::<Vec<_>>();
        condition.push_str(&format!(" AND p.state IN ({})", states.join(", ")));
    }
    for (column, wanted) in [("s.session", &select.session), ("p.queue", &select.queue), ("s.kind", &select.kind)] {
        if let Some(wanted) = wanted {
            condition.push_str(&format!(" AND {column} = ${}", number(wanted.clone().into())));
        }
    }
    if let Some(worker) = &select.worker {
        let name = number(worker.clone().into());
        condition.push_str(&format!(
            " AND p.place = {{held}} AND p.owner IN (SELECT h.id FROM worker h WHERE h.name = ${name})"
        ));
    }
    if let Some(age) = select.older_than {
        let micros = i64::try_from(age.as_micros()).unwrap_or(i64::MAX / 2);
        condition.push_str(&format!(" AND s.created_at <= {{now}} - ${}", number(micros.into())));
    }
    condition
}
