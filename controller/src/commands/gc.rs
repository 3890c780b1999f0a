//! `baton gc`: removes from the object store what no process needs any more.
//!
//! What other databases need is not known, so nothing is removed where another has its mark. A place without marks is this
//! database's if it needs something of it.

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

/// Removals under way at a time: each is a question and an answer.
const REMOVALS_AT_ONCE: usize = 16;

/// What was found and done.
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
            let verb = if dry_run { "would be removed" } else { "are removed" };
            output::print(&format!("{verb}: {}", of(tally.removed)))?;
            output::print(&format!("kept, since processes need them: {}", of(tally.needed)))?;
            output::print(&format!("kept, since they are young: {}", of(tally.young)))?;
        }
    }
    Ok(exit::OK)
}

/// First what there is, then what is needed: whatever a process comes to need later is young by then.
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

/// Another database's objects are there, too.
fn shared(objects: &Objects, other: Uuid) -> Failure {
    let place = objects.location();
    Failure::new(
        exit::REFUSED,
        format!("another database, {other}, keeps objects in {place}, and may need any of them"),
    )
    .with_remedy(format!(
        "give each database an `objects.url` of its own; if that one is gone, remove {}",
        objects.owner_url(other)
    ))
}

/// All of it may be another database's, or what this one needed once.
fn unknown(objects: &Objects, database: Uuid) -> Failure {
    let place = objects.location();
    Failure::new(exit::REFUSED, format!("this database needs nothing in {place}, which may be another one's"))
        .with_remedy(format!(
            "is `objects.url` that of this database? If nobody else keeps anything there, make the empty {}",
            objects.owner_url(database)
        ))
}

/// Whether it was still as old; somebody may have put it again meanwhile.
async fn remove(objects: &Objects, digest: Digest, before: DateTime<Utc>) -> Result<bool, Failure> {
    if objects.put_at(digest).await?.is_some_and(|at| at > before) {
        return Ok(false);
    }
    objects.delete(digest).await?;
    Ok(true)
}

/// Everything that processes need. It is held in memory: 32 bytes for each object.
async fn needed(store: &Store, objects: &Objects) -> Result<HashSet<Digest>, Failure> {
    let mut needed: HashSet<Digest> = HashSet::new();
    let mut manifests: HashSet<Digest> = HashSet::new();
    let mut walking = store.needed();
    while let Some(page) = walking.next().await? {
        needed.extend(page.objects);
        for digest in page.manifests {
            // Many processes may have one manifest.
            if !manifests.insert(digest) {
                continue;
            }
            needed.insert(digest);
            match objects.get_manifest(digest).await {
                Ok(manifest) => needed.extend(manifest.entries().iter().map(|entry| entry.digest)),
                Err(error @ objects::Error::Absent { .. }) => output::warn(&error.to_string()),
                // What it names is not known, so nothing may be removed.
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(needed)
}
