//! Baton from the outside: real programs on real services.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod bad_input;
mod book;
mod busy;
mod cluster;
mod connections;
mod control;
mod cost;
mod crashes;
mod dead;
mod embedded;
mod faults;
mod files;
mod fleet;
mod kept;
mod launchers;
mod network;
mod outages;
mod outside;
mod prune;
mod races;
mod readme;
mod secrets;
mod shortages;
mod site;
mod site_edges;
mod sites;
mod ssh_login;
mod staging;
mod transport;
mod tree;
mod versions;
mod why;
