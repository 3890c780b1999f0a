//! Indexes and tables for selections, lists and pruning in a database with millions of rows.
//!
//! Every claim and end updates `process` and writes each of its indexes, so it gets only one. Facts that never change
//! are indexed in tables that are written once. Every index for a condition ends in the id, so that a page of the
//! newest rows is a short index scan, whether all rows meet the condition or none.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let is_postgres = connection.get_database_backend() == DatabaseBackend::Postgres;
        if is_postgres {
            // Millions of rows take longer than the limit of other statements.
            connection.execute_unprepared("SET LOCAL statement_timeout = 0").await?;
        }
        let (uuid, each, rowid) = if is_postgres {
            ("uuid", "json_each_text(s.labels::json)", "")
        } else {
            ("blob", "json_each(s.labels)", " WITHOUT ROWID")
        };
        for statement in STATEMENTS {
            let sql = statement.replace("{uuid}", uuid).replace("{each_label}", each).replace("{rowid}", rowid);
            connection.execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}

const STATEMENTS: &[&str] = &[
    // A copy of the column of `process`: it does not change, and needs no index there.
    "ALTER TABLE spec ADD COLUMN queue text NOT NULL DEFAULT ''",
    "UPDATE spec SET queue = p.queue FROM process p WHERE p.id = spec.id",
    // One row per label. `spec.labels` stays for display.
    "CREATE TABLE label (
        key text NOT NULL,
        value text NOT NULL,
        id {uuid} NOT NULL,
        PRIMARY KEY (key, value, id)
    ){rowid}",
    "INSERT INTO label (key, value, id)
     SELECT l.key, l.value, s.id FROM spec s, {each_label} l ORDER BY l.key, l.value, s.id",
    // An attempt keeps the name of its worker, so that the rows of gone workers can be deleted.
    "ALTER TABLE attempt ADD COLUMN worker_name text",
    "UPDATE attempt SET worker_name = w.name FROM worker w WHERE w.id = attempt.worker",
    // At most one row. A launch from before this time without a row was pruned.
    "CREATE TABLE pruned (
        id smallint PRIMARY KEY,
        before bigint NOT NULL
    )",
    "CREATE INDEX process_state ON process (state, id)",
    "CREATE INDEX spec_kind ON spec (kind, id)",
    "CREATE INDEX spec_queue ON spec (queue, id)",
    "CREATE INDEX spec_session ON spec (session, id) WHERE session IS NOT NULL",
    "CREATE INDEX spec_created ON spec (created_at, id)",
    // Without processes that were paused while they waited, whose time may have come long ago.
    "DROP INDEX process_wake",
    "CREATE INDEX process_wake ON process (wake_at) WHERE place = 2 AND state = 2 AND wake_at IS NOT NULL",
];
