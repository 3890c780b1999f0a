//! Variables that hold passwords. A program takes them out of its environment when it starts, and looks them up here.

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The URLs of broker, database and objects, each with the option that it stands for.
pub const URLS: [(&str, &str); 3] = [
    ("BATON_BROKER_URL", "--broker-url"),
    ("BATON_DATABASE_URL", "--database-url"),
    ("BATON_OBJECTS_URL", "--objects-url"),
];

/// The keys of an S3 server.
pub const KEYS: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

static TAKEN: OnceLock<BTreeMap<String, String>> = OnceLock::new();

/// Keeps what was taken out of the environment. The first call counts.
pub fn keep(variables: BTreeMap<String, String>) {
    let _ = TAKEN.set(variables);
}

/// The keys of an S3 server that were taken out of the environment.
pub fn keys() -> impl Iterator<Item = (&'static str, &'static str)> {
    KEYS.into_iter().filter_map(|name| Some((name, TAKEN.get()?.get(name)?.as_str())))
}
