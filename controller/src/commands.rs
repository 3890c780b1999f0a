//! The commands, one file each.

pub(crate) mod broadcast;
pub(crate) mod completion;
pub(crate) mod control;
pub(crate) mod dead;
pub(crate) mod doctor;
pub(crate) mod drain;
pub(crate) mod explain;
pub(crate) mod gc;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod open;
pub(crate) mod prune;
pub(crate) mod results;
pub(crate) mod run;
pub(crate) mod show;
pub(crate) mod site;
pub(crate) mod sites;
pub(crate) mod status;
pub(crate) mod submit;
pub(crate) mod watch;
pub(crate) mod workers;
