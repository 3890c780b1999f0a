//! Checks that a program uses the object store of its fleet: a folder of one machine is not visible on another.
//!
//! The first program that uses a store puts a mark there, an empty object, and records its name in the database. A
//! program that does not find the mark in its own store uses another store.

use uuid::Uuid;

use crate::objects::{self, Objects};
use crate::store::{self, Store};

/// Why the check failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An error of the database.
    #[error(transparent)]
    Database(#[from] store::Error),
    /// An error of the object store.
    #[error(transparent)]
    Objects(#[from] objects::Error),
}

/// This program uses another object store than the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// The problem.
    pub text: String,
    /// The remedy.
    pub remedy: String,
}

/// Checks that this store is the fleet's. `objects` is `None` for an absent folder. Every store is accepted while the
/// database has no mark, and with a database in a file, whose store is in the same folder.
///
/// # Errors
/// See [`Error`].
pub async fn look(store: &Store, objects: Option<&Objects>) -> Result<Option<Foreign>, Error> {
    if store.is_embedded() {
        return Ok(None);
    }
    let Some(mark) = store.objects_mark().await? else { return Ok(None) };
    match objects {
        Some(objects) if objects.has_mark(mark).await? => Ok(None),
        _ => Ok(Some(foreign(objects, mark))),
    }
}

/// Checks the store as [`look`] does. If the fleet has no store yet, this store becomes the fleet's.
///
/// # Errors
/// See [`Error`].
pub async fn join(store: &Store, objects: &Objects) -> Result<Option<Foreign>, Error> {
    if !store.is_embedded() && store.objects_mark().await?.is_none() {
        // The mark goes to the store first, since a mark in the database must exist in a store.
        let mark = Uuid::new_v4();
        objects.add_mark(mark).await?;
        if store.set_objects_mark(mark).await? != mark {
            objects.remove_mark(mark).await?;
        }
    }
    look(store, Some(objects)).await
}

fn foreign(objects: Option<&Objects>, mark: Uuid) -> Foreign {
    let location = objects.map_or_else(|| "an absent folder".to_owned(), Objects::location);
    let text = format!("this program's object store, {location}, is not the one that the fleet shares");
    let remedy = "configure the same store for all controllers and workers in BATON_OBJECTS_URL or `objects.url`: a shared \
                  folder, or s3://BUCKET/PREFIX";
    let moved = objects.map(|objects| {
        format!("; if this is the fleet's store, moved or emptied, create the empty object {}", objects.mark_url(mark))
    });
    Foreign { text, remedy: format!("{remedy}{}", moved.unwrap_or_default()) }
}
