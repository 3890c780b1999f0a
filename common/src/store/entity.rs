//! Entities of the tables that plain statements read and write. Each has the columns that such a statement names; the
//! migrations have the whole tables.

pub(super) mod attempt;
pub(super) mod event;
pub(super) mod objects;
pub(super) mod site;
pub(super) mod worker;
