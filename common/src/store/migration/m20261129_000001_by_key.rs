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
        // What only reads goes on until the old ones go, in a moment.
        for (index, table, column, nobody) in INDEXES {
            let sql = format!("CREATE INDEX {index}_new ON {table} ({column}, id) WHERE {column} <> {nobody}");
            connection.execute_unprepared(&sql).await?;
        }
        for (index, ..) in INDEXES {
            let sql = format!("DROP INDEX {index}; ALTER INDEX {index}_new RENAME TO {index}");
            connection.execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}

/// Each with its table, the column that it begins with, and a value of that which no row has.
const INDEXES: [(&str, &str, &str, &str); 4] = [
    ("process_state", "process", "state", "-1"),
    ("spec_kind", "spec", "kind", "''"),
    ("spec_queue", "spec", "queue", "''"),
    ("spec_created", "spec", "created_at", "-1"),
];
