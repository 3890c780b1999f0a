//! Processes, their specs, attempts, outputs and events; workers.
//!
//! Times are microseconds since 1970 by the database's clock. SQLite has no type for time, and one representation for
//! both databases can be compared, sent in messages, and read without a time zone.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DatabaseBackend};

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let postgres = connection.get_database_backend() == DatabaseBackend::Postgres;
        let (uuid, bytes, fill) =
            if postgres { ("uuid", "bytea", " WITH (fillfactor = 70)") } else { ("blob", "blob", "") };
        for statement in TABLES.iter().chain(INDEXES) {
            let sql = statement.replace("{uuid}", uuid).replace("{bytes}", bytes).replace("{fill}", fill);
            connection.execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}

const TABLES: &[&str] = &[
    // Hot: updated by claims, checkpoints and control. A checkpoint changes no indexed column, so with free space in
    // the page PostgreSQL writes no index entry for it.
    "CREATE TABLE process (
        id {uuid} PRIMARY KEY,
        place smallint NOT NULL,
        state smallint NOT NULL,
        before smallint NOT NULL,
        epoch bigint NOT NULL,
        owner {uuid},
        claimed_at bigint,
        seq bigint NOT NULL,
        checkpoint {bytes},
        desired smallint NOT NULL,
        urgent boolean NOT NULL,
        control bigint NOT NULL,
        woken boolean NOT NULL,
        wake_at bigint,
        queue text NOT NULL,
        told_at bigint NOT NULL,
        try bigint NOT NULL,
        deaths bigint NOT NULL,
        queue_deadline bigint,
        total_deadline bigint,
        changed_at bigint NOT NULL,
        ended_at bigint,
        outcome {bytes}
    ){fill}",
    // Cold: written once.
    "CREATE TABLE spec (
        id {uuid} PRIMARY KEY,
        name text NOT NULL,
        kind text NOT NULL,
        body {bytes} NOT NULL,
        digest {bytes} NOT NULL,
        labels text NOT NULL,
        session text,
        created_by text NOT NULL,
        created_at bigint NOT NULL,
        traceparent text,
        reply_to {bytes},
        run_key {bytes}
    )",
    "CREATE TABLE attempt (
        pid {uuid} NOT NULL,
        epoch bigint NOT NULL,
        worker {uuid} NOT NULL,
        try bigint NOT NULL,
        started_at bigint NOT NULL,
        ended_at bigint NOT NULL,
        how text NOT NULL,
        reason text,
        PRIMARY KEY (pid, epoch)
    )",
    // Requests of operators. A request to many has its own row, without a pid, to which the rows of the processes
    // refer.
    "CREATE TABLE event (
        id {uuid} PRIMARY KEY,
        pid {uuid},
        request {uuid},
        at bigint NOT NULL,
        what text NOT NULL,
        target text,
        by_whom text NOT NULL,
        login text NOT NULL,
        reason text,
        outcome text,
        settled_at bigint
    )",
    "CREATE TABLE output (
        pid {uuid} NOT NULL,
        epoch bigint NOT NULL,
        stream smallint NOT NULL,
        head {bytes} NOT NULL,
        tail {bytes} NOT NULL,
        total_bytes bigint NOT NULL,
        PRIMARY KEY (pid, epoch, stream)
    )",
    // `beat` is the lease. `beat_at` is the time of its last increment, for people only.
    "CREATE TABLE worker (
        id {uuid} PRIMARY KEY,
        name text NOT NULL,
        host text NOT NULL,
        os_pid bigint NOT NULL,
        version text NOT NULL,
        queues text NOT NULL,
        slots bigint NOT NULL,
        load bigint NOT NULL,
        blocked text,
        drain boolean NOT NULL,
        beat bigint NOT NULL,
        beat_at bigint NOT NULL,
        started_at bigint NOT NULL,
        gone_at bigint
    )",
    // At most one row: the pause of the fleet.
    "CREATE TABLE fleet (
        id smallint PRIMARY KEY,
        paused_at bigint,
        by_whom text NOT NULL,
        login text NOT NULL,
        reason text
    )",
];

const INDEXES: &[&str] = &[
    "CREATE INDEX process_queued ON process (queue, told_at) WHERE place = 0",
    "CREATE INDEX process_held ON process (owner) WHERE place = 1",
    "CREATE INDEX process_wake ON process (wake_at) WHERE place = 2 AND wake_at IS NOT NULL",
    "CREATE INDEX process_queue_deadline ON process (queue_deadline) WHERE place <> 3 AND queue_deadline IS NOT NULL",
    "CREATE INDEX process_total_deadline ON process (total_deadline) WHERE place <> 3 AND total_deadline IS NOT NULL",
    "CREATE INDEX spec_run_key ON spec (run_key) WHERE run_key IS NOT NULL",
    "CREATE INDEX event_pid ON event (pid) WHERE pid IS NOT NULL",
    "CREATE INDEX event_request ON event (request) WHERE request IS NOT NULL",
];
