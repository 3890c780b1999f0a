//! The mark of the fleet's object store, which is kept in the database and in the object store.

use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set};
use uuid::Uuid;

use super::entity::{objects, worker};
use super::error::Error;
use super::handle::Store;
use crate::id::Incarnation;

impl Store {
    /// Returns the mark of the fleet's object store; `None` if none is recorded.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn objects_mark(&self) -> Result<Option<Uuid>, Error> {
        let row = objects::Entity::find().one(&self.db).await?;
        Ok(row.map(|row| row.mark))
    }

    /// Records the mark of the fleet's object store unless one is recorded, and returns the recorded one.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn set_objects_mark(&self, mark: Uuid) -> Result<Uuid, Error> {
        let row = objects::ActiveModel { id: Set(1), mark: Set(mark) };
        objects::Entity::insert(row).on_conflict_do_nothing().exec_without_returning(&self.db).await?;
        self.objects_mark().await?.ok_or(Error::NoRow)
    }

    /// Records why a worker cannot use the fleet's object store, or that it can (`None`).
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn note_objects(&self, worker: Incarnation, problem: Option<&str>) -> Result<(), Error> {
        worker::Entity::update_many()
            .col_expr(worker::Column::Objects, Expr::value(problem))
            .filter(worker::Column::Id.eq(Uuid::from(worker)))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Returns the live workers that cannot use the fleet's object store, with the reasons.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn without_objects(&self) -> Result<Vec<(String, String)>, Error> {
        let select = worker::Entity::find().select_only().columns([worker::Column::Name, worker::Column::Objects]);
        let select = select.filter(worker::Column::GoneAt.is_null()).filter(worker::Column::Objects.is_not_null());
        Ok(select.order_by_asc(worker::Column::Name).into_tuple().all(&self.db).await?)
    }
}
