//! Whether a program uses the object store of its fleet. Files in a folder of one machine are not found on another.
//!
//! The first program that uses a store puts a mark there, an empty object, and records its name in the database. A program
//! that does not find the mark in its own store uses another store.

use uuid::Uuid;

use crate::objects::{self, Objects};
use crate::store::{self, Store};

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database does not answer.
    #[error(transparent)]
    Database(#[from] store::Error),
    /// The object store does not answer.
    #[error(transparent)]
    Objects(#[from] objects::Error),
}

/// The store of this program is not that of the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// What is wrong.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

/// Whether this store is the fleet's; `objects` is `None` for a folder that does not exist. Any store is right while the
/// database knows no mark. A database in a file has its store beside it.
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

/// The same, and the store becomes the fleet's if that has none.
///
/// # Errors
/// See [`Error`].
pub async fn join(store: &Store, objects: &Objects) -> Result<Option<Foreign>, Error> {
    if !store.is_embedded() && store.objects_mark().await?.is_none() {
        // In the store first: a mark that the database has must be somewhere.
        let mark = Uuid::new_v4();
        objects.add_mark(mark).await?;
        if store.set_objects_mark(mark).await? != mark {
            objects.remove_mark(mark).await?;
        }
    }
    look(store, Some(objects)).await
}

fn foreign(objects: Option<&Objects>, mark: Uuid) -> Foreign {
    let place = objects.map_or_else(|| "a folder that is not there".to_owned(), Objects::location);
    let text = format!("the object store here, {place}, is not the one that the fleet shares");
    let remedy = "name the same one for all controllers and workers in BATON_OBJECTS_URL or `objects.url`: a folder that \
                  they share, or s3://BUCKET/PREFIX";
    let moved = objects.map(|objects| {
        format!("; if this is the fleet's, moved or emptied, make the empty {}", objects.mark_url(mark))
    });
    Foreign { text, remedy: format!("{remedy}{}", moved.unwrap_or_default()) }
}
