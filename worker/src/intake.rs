//! The ways by which processes and requests reach a worker: the broker, the database, sites, the quarantine and requests.

pub(crate) mod backoff;
pub(crate) mod broker;
pub(crate) mod claims;
pub(crate) mod control;
pub(crate) mod database;
pub(crate) mod heads;
pub(crate) mod quarantine;
pub(crate) mod sites;
