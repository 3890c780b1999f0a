//! The baseline: plain loops over broker and database, without Baton in between. Baton's rates are compared with theirs.

pub(super) mod broker;
pub(super) mod database;
