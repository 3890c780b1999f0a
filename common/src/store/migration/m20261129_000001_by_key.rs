//! Lookups by id alone can use only the primary key.
//!
//! If a planner believes a table to be empty, a search of any index that contains the id seems as cheap as one of the
//! primary key, or cheaper: for one row, the whole index is one page. If the table grows before its statistics do,
//! every lookup scans that whole index. So each full index other than the primary key becomes a partial index with a
//! condition that every row meets. A query that states or implies the condition can use the index; a query by id alone
//! cannot. (`IS NOT NULL` does not work as a condition: expressions such as `state + 0 = 4` imply it, and PostgreSQL 17
//! removes it from queries if the column is never null.)

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        if connection.get_database_backend() != DatabaseBackend::Postgres {
            // SQLite has no such statistics and uses the primary key.
            return Ok(());
        }
        // Millions of rows take longer than the limit of other statements.
        connection.execute_unprepared("SET LOCAL statement_timeout = 0").await?;
        // Readers continue until the old indexes are dropped, which takes a moment.
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

/// Each index with its table, its first column, and a value that no row has in this column.
const INDEXES: [(&str, &str, &str, &str); 4] = [
    ("process_state", "process", "state", "-1"),
    ("spec_kind", "spec", "kind", "''"),
    ("spec_queue", "spec", "queue", "''"),
    ("spec_created", "spec", "created_at", "-1"),
];
