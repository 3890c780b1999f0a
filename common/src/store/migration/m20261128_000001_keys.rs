//! The primary keys are the youngest indexes of their tables.
//!
//! Every row of the hot path is found by its id, and several indexes end in the id. PostgreSQL takes the youngest of those
//! that seem to cost the same, and all seem to cost the same in a table that a vacuum has found empty: until it is
//! analyzed, the planner takes it for empty, however many rows have come. An older key would lose to an index that begins
//! with another column, of which every claim then reads all entries.
//!
//! Whoever adds an index with the id of a process behind another column makes the key anew after it.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        if connection.get_database_backend() != DatabaseBackend::Postgres {
            return Ok(());
        }
        // Millions of rows take longer than any other statement may.
        connection.execute_unprepared("SET LOCAL statement_timeout = 0").await?;
        for table in ["process", "spec"] {
            let sql = format!(
                "ALTER TABLE {table} DROP CONSTRAINT {table}_pkey, ADD CONSTRAINT {table}_pkey PRIMARY KEY (id)"
            );
            connection.execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}
