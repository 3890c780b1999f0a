//! The mark of the fleet's object store, and the workers that cannot use it.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let is_postgres = connection.get_database_backend() == DatabaseBackend::Postgres;
        let id = if is_postgres { "uuid" } else { "blob" };
        // At most one row: the first program that uses an object store writes its mark.
        let sql = format!("CREATE TABLE objects (id integer PRIMARY KEY, mark {id} NOT NULL)");
        connection.execute_unprepared(&sql).await?;
        connection.execute_unprepared("ALTER TABLE worker ADD COLUMN objects text").await?;
        Ok(())
    }
}
