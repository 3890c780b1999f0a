//! What selections, lists and pruning need of a database with millions of rows.
//!
//! `process` is rewritten by every claim and end, and each of its indexes is written each time, so it gets one; facts that
//! never change are found by indexes of the tables that are written once. Every index of a condition ends in the id, so
//! that a page of the newest is a short walk through it, whether everything meets the condition or nothing does.

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
            // Millions of rows take longer than any other statement may.
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
    // A copy of what `process` has: it does not change, and is found here without an index there.
    "ALTER TABLE spec ADD COLUMN queue text NOT NULL DEFAULT ''",
    "UPDATE spec SET queue = p.queue FROM process p WHERE p.id = spec.id",
    // One row a label. `spec.labels` stays what people are shown.
    "CREATE TABLE label (
        key text NOT NULL,
        value text NOT NULL,
        id {uuid} NOT NULL,
        PRIMARY KEY (key, value, id)
    ){rowid}",
    "INSERT INTO label (key, value, id)
     SELECT l.key, l.value, s.id FROM spec s, {each_label} l ORDER BY l.key, l.value, s.id",
    // An attempt says who made it for as long as it is kept, so that rows of workers that are gone need not be.
    "ALTER TABLE attempt ADD COLUMN worker_name text",
    "UPDATE attempt SET worker_name = w.name FROM worker w WHERE w.id = attempt.worker",
    // One row at most. What was launched before this time and has no row has been pruned.
    "CREATE TABLE pruned (
        id smallint PRIMARY KEY,
        before bigint NOT NULL
    )",
    "CREATE INDEX process_state ON process (state, id)",
    "CREATE INDEX spec_kind ON spec (kind, id)",
    "CREATE INDEX spec_queue ON spec (queue, id)",
    "CREATE INDEX spec_session ON spec (session, id) WHERE session IS NOT NULL",
    "CREATE INDEX spec_created ON spec (created_at, id)",
    // Without those that are paused in their sleep, whose time may have come long ago.
    "DROP INDEX process_wake",
    "CREATE INDEX process_wake ON process (wake_at) WHERE place = 2 AND state = 2 AND wake_at IS NOT NULL",
];
