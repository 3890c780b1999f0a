//! Jobs at sites, and limits that the whole fleet keeps there.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::ConnectionTrait;

#[derive(DeriveMigrationName)]
pub(super) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in STATEMENTS {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const STATEMENTS: [&str; 9] = [
    // Whether it has, or may have, a job at a site: a kill must end that job first.
    "ALTER TABLE process ADD COLUMN outside boolean NOT NULL DEFAULT false",
    // The limited resource of a site that it waits for.
    "ALTER TABLE process ADD COLUMN waits_for text",
    "CREATE INDEX process_waits_for ON process (waits_for, wake_at) WHERE waits_for IS NOT NULL AND place = 2",
    // The row exists before the job may exist, and is open until the job is known to be gone.
    "CREATE TABLE job (
        token text PRIMARY KEY,
        pid uuid NOT NULL,
        try bigint NOT NULL,
        site text NOT NULL,
        intent_at bigint NOT NULL,
        external_id text,
        submitted_at bigint,
        status text NOT NULL DEFAULT '',
        reason text NOT NULL DEFAULT '',
        position bigint,
        starts_at bigint,
        absent bigint NOT NULL DEFAULT 0,
        ended_at bigint
    )",
    "CREATE INDEX job_open ON job (site, intent_at) WHERE ended_at IS NULL",
    "CREATE INDEX job_recent ON job (site, intent_at)",
    "CREATE INDEX job_pid ON job (pid, try)",
    "CREATE TABLE site (
        name text PRIMARY KEY,
        launcher text NOT NULL,
        root text NOT NULL,
        slots bigint NOT NULL,
        connect_at bigint NOT NULL DEFAULT 0,
        retry_at bigint,
        failures bigint NOT NULL DEFAULT 0,
        last_error text,
        last_error_at bigint,
        polled_at bigint
    )",
    // Permits that one worker at a time may hold: a session with a site, the watch over its jobs, an upload that others
    // wait for.
    "CREATE TABLE permit (
        name text PRIMARY KEY,
        owner uuid NOT NULL,
        taken_at bigint NOT NULL
    )",
];
