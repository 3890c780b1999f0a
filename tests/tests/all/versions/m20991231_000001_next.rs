//! A migration of the next version, unknown to programs of this version. It exists only in builds with the feature
//! `next-version`, for the tests of two versions.

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

const STATEMENTS: [&str; 4] = [
    "ALTER TABLE process ADD COLUMN next_note text NOT NULL DEFAULT 'next'",
    "ALTER TABLE worker ADD COLUMN next_kinds text",
    "CREATE TABLE next_thing (id bigint PRIMARY KEY)",
    "CREATE INDEX spec_next ON spec (created_by, id) WHERE created_by <> ''",
];
