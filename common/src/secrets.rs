//! Environment variables with passwords. A program removes them from its environment at its start, and keeps them here.

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The variables of the URLs of broker, database and object store, each with its option.
pub const URLS: [(&str, &str); 3] = [
    ("BATON_BROKER_URL", "--broker-url"),
    ("BATON_DATABASE_URL", "--database-url"),
    ("BATON_OBJECTS_URL", "--objects-url"),
];

/// The variables of the keys of an S3 server.
pub const KEYS: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

static TAKEN: OnceLock<BTreeMap<String, String>> = OnceLock::new();

/// Keeps the removed variables. Only the first call has an effect.
pub fn keep(variables: BTreeMap<String, String>) {
    let _ = TAKEN.set(variables);
}

/// The kept keys of an S3 server.
pub fn keys() -> impl Iterator<Item = (&'static str, &'static str)> {
    KEYS.into_iter().filter_map(|name| Some((name, TAKEN.get()?.get(name)?.as_str())))
}
