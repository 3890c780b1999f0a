//! Marks in the store: of the databases that keep objects there, and of the fleet that shares it.

use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use uuid::Uuid;

use super::{Error, Objects, error};

/// The folder of the marks of databases, named after the ids of the databases.
const OWNERS: &str = "owners";

/// The folder of the marks of fleets.
const FLEETS: &str = "fleets";

impl Objects {
    /// The URL of the mark of a database.
    pub fn owner_url(&self, database: Uuid) -> String {
        self.url_of(&self.owner_key(database))
    }

    /// Marks a database as an owner of objects in this store.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn add_owner(&self, database: Uuid) -> Result<(), Error> {
        let key = self.owner_key(database);
        match self.store.head(&key).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => {
                self.store.put(&key, PutPayload::new()).await.map(drop).map_err(|error| self.of_store(error))
            }
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// The databases with a mark.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn owners(&self) -> Result<Vec<Uuid>, Error> {
        let mut owners = Vec::new();
        let mut listed = self.store.list(Some(&self.location.prefix().join(OWNERS)));
        while let Some(found) = listed.next().await {
            let meta = found.map_err(|error| self.of_store(error))?;
            owners.extend(meta.location.filename().and_then(|name| name.parse::<Uuid>().ok()));
        }
        Ok(owners)
    }

    /// Puts the mark by which a fleet recognises its shared store.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn add_mark(&self, mark: Uuid) -> Result<(), Error> {
        let put = self.store.put(&self.mark_key(mark), PutPayload::new()).await;
        put.map(drop).map_err(|error| self.of_store(error))
    }

    /// Whether the store has the mark.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn has_mark(&self, mark: Uuid) -> Result<bool, Error> {
        match self.store.head(&self.mark_key(mark)).await {
            Ok(_) => Ok(true),
            Err(error @ object_store::Error::NotFound { .. }) if !error::names_no_bucket(&error) => Ok(false),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// Removes the mark. An absent mark is not an error.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn remove_mark(&self, mark: Uuid) -> Result<(), Error> {
        match self.store.delete(&self.mark_key(mark)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.of_store(error)),
        }
    }

    /// The URL of the mark.
    pub fn mark_url(&self, mark: Uuid) -> String {
        self.url_of(&self.mark_key(mark))
    }

    fn owner_key(&self, database: Uuid) -> Key {
        self.location.prefix().join(OWNERS).join(database.to_string())
    }

    fn mark_key(&self, mark: Uuid) -> Key {
        self.location.prefix().join(FLEETS).join(mark.to_string())
    }
}
