//! The kinds of processes that Baton brings along.

pub(crate) mod aids;
pub(crate) mod program;
