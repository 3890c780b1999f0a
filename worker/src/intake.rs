//! How work and orders come to a worker: from the broker, from the database, from sites, out of quarantine, by requests.

pub(crate) mod broker;
pub(crate) mod claims;
pub(crate) mod control;
pub(crate) mod database;
pub(crate) mod heads;
pub(crate) mod quarantine;
pub(crate) mod setbacks;
pub(crate) mod sites;
