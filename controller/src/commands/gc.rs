//! `baton gc`: removes objects that no process needs.
//!
//! Nothing is removed from a store that carries the owner mark of another database, because the needs of that database are
//! unknown. A store without marks belongs to this database if it needs one of the objects.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use baton_common::digest::Digest;
use baton_common::exit;
use baton_common::objects::{self, Objects};
use baton_common::store::Store;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use indicatif::HumanBytes;
use serde_json::json;
use uuid::Uuid;

use crate::cli::{GcArguments, Global, Output};
use crate::client::Client;
use crate::failure::Failure;
use crate::output;

/// Number of concurrent removals: each is one round trip.
const REMOVALS_AT_ONCE: usize = 16;

/// Counts of objects by what was done with them.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    removed: Count,
    needed: Count,
    young: Count,
    leftovers: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    objects: u64,
    bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

pub(crate) async fn run(global: &Global, arguments: GcArguments) -> Result<u8, Failure> {
    let GcArguments { older_than, dry_run } = arguments;
    let client = Client::open(global).await?;
    let tally = match Objects::open_existing(&client.objects)? {
        Some(objects) => collect(&client.store, &objects, older_than, dry_run).await?,
        None => Tally::default(),
    };
    let of = |count: Count| json!({"objects": count.objects, "bytes": count.bytes});
    match global.output {
        Output::Json => output::print_json(&json!({
            "dry_run": dry_run,
            "removed": of(tally.removed),
            "needed": of(tally.needed),
            "young": of(tally.young),
            "leftovers": tally.leftovers,
        }))?,
        Output::Ids => {}
        Output::Table => {
            let of = |count: Count| format!("{} objects, {}", count.objects, HumanBytes(count.bytes));
            let verb = if dry_run { "would be removed" } else { "removed" };
            output::print(&format!("{verb}: {}", of(tally.removed)))?;
            output::print(&format!("kept, needed by processes: {}", of(tally.needed)))?;
            output::print(&format!("kept, too young: {}", of(tally.young)))?;
        }
    }
    Ok(exit::OK)
}

/// Lists the objects first and then the needed ones: an object that a process begins to need meanwhile is young.
async fn collect(store: &Store, objects: &Objects, age: Duration, dry_run: bool) -> Result<Tally, Failure> {
    let age_of = chrono::Duration::from_std(age).ok();
    let before = age_of.and_then(|age| Utc::now().checked_sub_signed(age)).unwrap_or(DateTime::<Utc>::MIN_UTC);
    let database = store.identity().await?;
    let owners = objects.owners().await?;
    if let Some(other) = owners.iter().find(|owner| **owner != database) {
        return Err(shared(objects, *other));
    }
    let mut tally = Tally::default();
    let mut candidates: HashMap<Digest, u64> = HashMap::new();
    let mut young: HashSet<Digest> = HashSet::new();
    let mut listed = objects.list();
    while let Some(object) = listed.try_next().await? {
        if object.at > before {
            tally.young.add(object.size);
            young.insert(object.digest);
        } else {
            candidates.insert(object.digest, object.size);
        }
    }
    if !candidates.is_empty() {
        let mut is_own = owners.contains(&database);
        for digest in needed(store, objects).await? {
            is_own |= young.contains(&digest);
            if let Some(bytes) = candidates.remove(&digest) {
                tally.needed.add(bytes);
                is_own = true;
            }
        }
        if !is_own {
            return Err(unknown(objects, database));
        }
        if !dry_run {
            objects.add_owner(database).await?;
        }
    }
    if dry_run {
        candidates.values().for_each(|bytes| tally.removed.add(*bytes));
        return Ok(tally);
    }
    let mut removals = futures_util::stream::iter(candidates)
        .map(|(digest, bytes)| async move { Ok::<_, Failure>((remove(objects, digest, before).await?, bytes)) })
        .buffer_unordered(REMOVALS_AT_ONCE);
    while let Some((is_removed, bytes)) = removals.try_next().await? {
        if is_removed { tally.removed.add(bytes) } else { tally.young.add(bytes) }
    }
    tally.leftovers = objects.remove_leftovers(age).await?;
    Ok(tally)
}

/// The store contains objects of another database.
fn shared(objects: &Objects, other: Uuid) -> Failure {
    let place = objects.location();
    Failure::new(exit::REFUSED, format!("another database, {other}, uses {place} and may need any object there"))
        .with_remedy(format!(
            "use a separate `objects.url` for each database; if the other database no longer exists, remove {}",
            objects.owner_url(other)
        ))
}

/// The objects may belong to another database, or to this one in the past.
fn unknown(objects: &Objects, database: Uuid) -> Failure {
    let place = objects.location();
    Failure::new(
        exit::REFUSED,
        format!("this database needs no object in {place}, which may belong to another database"),
    )
    .with_remedy(format!(
        "check `objects.url`; if no other database uses this location, create the empty object {}",
        objects.owner_url(database)
    ))
}

/// Removes an object unless it was stored again meanwhile. Returns whether it was removed.
async fn remove(objects: &Objects, digest: Digest, before: DateTime<Utc>) -> Result<bool, Failure> {
    if objects.put_at(digest).await?.is_some_and(|at| at > before) {
        return Ok(false);
    }
    objects.delete(digest).await?;
    Ok(true)
}

/// Returns all objects that processes need. Takes 32 bytes of memory per object.
async fn needed(store: &Store, objects: &Objects) -> Result<HashSet<Digest>, Failure> {
    let mut needed: HashSet<Digest> = HashSet::new();
    let mut manifests: HashSet<Digest> = HashSet::new();
    let mut walking = store.needed();
    while let Some(page) = walking.next().await? {
        needed.extend(page.objects);
        for digest in page.manifests {
            // Many processes may share a manifest.
            if !manifests.insert(digest) {
                continue;
            }
            needed.insert(digest);
            match objects.get_manifest(digest).await {
                Ok(manifest) => needed.extend(manifest.entries().iter().map(|entry| entry.digest)),
                Err(error @ objects::Error::Absent { .. }) => output::warn(&error.to_string()),
                // The objects that the manifest names are unknown, so nothing may be removed.
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(needed)
}
