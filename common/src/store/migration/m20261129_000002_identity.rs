//! The id of the database, which tells it from others that keep objects in the same object store.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let is_postgres = connection.get_database_backend() == DatabaseBackend::Postgres;
        let id = if is_postgres { "gen_random_uuid()" } else { "randomblob(16)" };
        // One row, which never changes.
        connection.execute_unprepared(&format!("CREATE TABLE identity AS SELECT {id} AS id")).await?;
        Ok(())
    }
}
