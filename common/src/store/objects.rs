//! Which object store the fleet shares: the database has its mark, and the store, too.

use uuid::Uuid;

use super::error::Error;
use super::handle::Store;
use crate::id::Incarnation;

impl Store {
    /// The mark of the fleet's object store; `None` if no program has used one yet.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn objects_mark(&self) -> Result<Option<Uuid>, Error> {
        Ok(self.column("SELECT mark FROM objects", vec![]).await?.into_iter().next())
    }

    /// Records the mark of the fleet's object store, unless one is recorded, and gives the one that is.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn set_objects_mark(&self, mark: Uuid) -> Result<Uuid, Error> {
        let sql = "INSERT INTO objects (id, mark) VALUES (1, $1) ON CONFLICT (id) DO NOTHING";
        self.execute(sql, vec![mark.into()]).await?;
        self.objects_mark().await?.ok_or(Error::NoRow)
    }

    /// Records why a worker cannot use the fleet's object store; `None` if it can.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn note_objects(&self, worker: Incarnation, problem: Option<&str>) -> Result<(), Error> {
        let sql = "UPDATE worker SET objects = $2 WHERE id = $1";
        self.execute(sql, vec![Uuid::from(worker).into(), problem.map(str::to_owned).into()]).await?;
        Ok(())
    }

    /// The live workers that cannot use the fleet's object store: their names, and why.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn without_objects(&self) -> Result<Vec<(String, String)>, Error> {
        let sql = "SELECT name, objects FROM worker WHERE gone_at IS NULL AND objects IS NOT NULL ORDER BY name";
        let rows = self.query(sql, vec![]).await?;
        Ok(rows.iter().map(|row| row.try_get_many_by_index()).collect::<Result<_, _>>()?)
    }
}
