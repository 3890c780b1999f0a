//! The kinds of processes that Baton brings along.

pub(crate) mod aids;
pub(crate) mod job;
pub(crate) mod program;
