//! Looks by the id alone are left to the key.
//!
//! A planner that takes a table for empty finds a search of any index that has the id as cheap as the key's, or cheaper: for
//! one row, the whole of such an index is one page. If the table grows before its statistics do, every such look goes
//! through all of the index. So each index that every row was in, but for the key, has a condition that every row meets. A
//! search that implies it, or says it, may use the index; one that names the id alone may not. (`IS NOT NULL` would be
//! implied by too much, such as `state + 0 = 4`, and said by nothing: of a column that is never null, PostgreSQL 17
//! forgets it.)

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        if connection.get_database_backend() != DatabaseBackend::Postgres {
            // SQLite keeps no such statistics: it looks by the key.
            return Ok(());
        }
        // Millions of rows take longer than any other statement may.
        connection.execute_unprepared("SET LOCAL statement_timeout = 0").await?;
        for statement in STATEMENTS {
            connection.execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const STATEMENTS: [&str; 8] = [
    "DROP INDEX process_state",
    "CREATE INDEX process_state ON process (state, id) WHERE state <> -1",
    "DROP INDEX spec_kind",
    "CREATE INDEX spec_kind ON spec (kind, id) WHERE kind <> ''",
    "DROP INDEX spec_queue",
    "CREATE INDEX spec_queue ON spec (queue, id) WHERE queue <> ''",
    "DROP INDEX spec_created",
    "CREATE INDEX spec_created ON spec (created_at, id) WHERE created_at <> -1",
];
