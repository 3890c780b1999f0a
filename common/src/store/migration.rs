//! The schema's history. Forward only: a migration that has been published is never edited.

use sea_orm_migration::prelude::*;

mod m20261121_000001_processes;
mod m20261121_000002_selections;

/// Every migration, oldest first.
pub(crate) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(m20261121_000001_processes::Migration), Box::new(m20261121_000002_selections::Migration)]
    }
}
