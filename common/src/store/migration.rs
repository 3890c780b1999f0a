//! The history of the schema. Forward only: a published migration is never edited.
//!
//! Programs that do not know a migration keep using the schema that it leaves. So a migration only adds: tables,
//! indexes, and columns that an `INSERT` may omit. A migration after which older programs must not use the schema has
//! [`BREAKING`] in its name.

use sea_orm_migration::prelude::*;

mod m20261121_000001_processes;
mod m20261121_000002_selections;
mod m20261121_000003_refusals;
mod m20261121_000004_sites;
mod m20261129_000001_by_key;
mod m20261129_000002_identity;
mod m20261130_000001_lacks;
mod m20261130_000002_objects;
mod m20261130_000003_served_sites;
// Only for the tests of two versions, where the file is.
#[cfg(feature = "next-version")]
#[path = "../../../tests/tests/all/versions/m20991231_000001_next.rs"]
mod m20991231_000001_next;

/// Part of the name of a migration after which older programs must not use the database.
pub(super) const BREAKING: &str = "_breaking_";

/// All migrations, oldest first.
pub(crate) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261121_000001_processes::Migration),
            Box::new(m20261121_000002_selections::Migration),
            Box::new(m20261121_000003_refusals::Migration),
            Box::new(m20261121_000004_sites::Migration),
            Box::new(m20261129_000001_by_key::Migration),
            Box::new(m20261129_000002_identity::Migration),
            Box::new(m20261130_000001_lacks::Migration),
            Box::new(m20261130_000002_objects::Migration),
            Box::new(m20261130_000003_served_sites::Migration),
            #[cfg(feature = "next-version")]
            Box::new(m20991231_000001_next::Migration),
        ]
    }
}

#[cfg(test)]
mod tests {
    use sea_orm_migration::sea_orm::{ConnectionTrait, Database, DatabaseConnection, TransactionTrait};

    use super::*;
    use crate::select::Select;
    use crate::store::query::Filter;
    use crate::store::{Location, Store};

    /// Migrates rows of the first version, and selects them by the added columns.
    async fn migrates_rows(url: &str, connect: &str) {
        let db = Database::connect(connect).await.unwrap();
        let transaction = db.begin().await.unwrap();
        Migrator::up(&transaction, Some(1)).await.unwrap();
        transaction.commit().await.unwrap();
        fill(&db).await;
        let store = Store::open(Location::parse(url).unwrap()).await.unwrap();
        let label = |key: &str, value: &str| Select {
            labels: Some([(key.to_owned(), value.to_owned())].into()),
            ..Select::default()
        };
        let selects = [
            (label("a", "b"), 1),
            (label("it's", "\"c\""), 1),
            (label("a", "c"), 0),
            (Select { queue: Some("gpu".into()), ..Select::default() }, 1),
            (Select { queue: Some("default".into()), ..Select::default() }, 0),
            (Select { states: Some(vec!["finished".into()]), ..Select::default() }, 1),
        ];
        for (select, count) in selects {
            let rows = store.list(&Filter { select: select.clone(), after: None, limit: 9 }).await.unwrap();
            assert_eq!(rows.len(), count, "{select:?}");
        }
        let workers: Vec<String> = db
            .query_all_raw(store.dialect.statement("SELECT worker_name FROM attempt", vec![]))
            .await
            .unwrap()
            .iter()
            .map(|row| row.try_get("", "worker_name").unwrap())
            .collect();
        assert_eq!(workers, ["w1"]);
    }

    async fn fill(db: &DatabaseConnection) {
        let (pid, worker) = ("01940000-0000-7000-8000-000000000000", "01940000-0000-7000-8000-000000000001");
        let statements = [
            "INSERT INTO process (id, place, state, before, epoch, seq, desired, urgent, control, woken, queue, told_at,
                                  try, deaths, changed_at, ended_at)
             VALUES (PID, 3, 4, 0, 1, 1, 0, false, 0, false, 'gpu', 1, 1, 0, 1, 1)",
            "INSERT INTO spec (id, name, kind, body, digest, labels, created_by, created_at)
             VALUES (PID, 'n', 'k', BYTES, BYTES, '{\"a\":\"b\",\"it''s\":\"\\\"c\\\"\"}', 'ann', 1)",
            "INSERT INTO worker (id, name, host, os_pid, version, queues, slots, load, drain, beat, beat_at, started_at)
             VALUES (WORKER, 'w1', 'h', 1, '0', 'gpu', 1, 0, false, 1, 1, 1)",
            "INSERT INTO attempt (pid, epoch, worker, try, started_at, ended_at, how) VALUES (PID, 1, WORKER, 1, 1, 1, 'ok')",
        ];
        let is_postgres = db.get_database_backend() == sea_orm_migration::sea_orm::DatabaseBackend::Postgres;
        let id = |id: &str| if is_postgres { format!("'{id}'") } else { format!("x'{}'", id.replace('-', "")) };
        let bytes = if is_postgres { "''::bytea" } else { "x''" };
        for statement in statements {
            let sql = statement.replace("PID", &id(pid)).replace("WORKER", &id(worker)).replace("BYTES", bytes);
            db.execute_unprepared(&sql).await.unwrap();
        }
    }

    /// A newer program has migrated the database: additions are harmless, and a breaking migration is reported.
    #[tokio::test]
    async fn a_newer_schema_is_used_unless_it_breaks_older_programs() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("baton.db"));
        let store = Store::open(location.clone()).await.unwrap();
        let migrate = async |name: &str| {
            let sql = "INSERT INTO seaql_migrations (version, applied_at) VALUES ($1, 0)";
            store.execute(sql, vec![name.to_owned().into()]).await.unwrap();
        };
        migrate("m21000101_000001_more").await;
        Store::open(location.clone()).await.unwrap();
        migrate("m21000101_000002_breaking_places").await;
        let error = Store::open(location).await.err().unwrap().to_string();
        assert!(error.contains("m21000101_000002_breaking_places") && error.contains("update"), "{error}");
    }

    #[tokio::test]
    async fn rows_of_the_first_version_are_migrated_on_sqlite() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("baton.db");
        migrates_rows(&format!("sqlite:{}", path.display()), &format!("sqlite://{}?mode=rwc", path.display())).await;
    }

    #[tokio::test]
    #[ignore = "needs services: run tests/run"]
    async fn rows_of_the_first_version_are_migrated_on_postgresql() {
        let url = std::env::var("BATON_TEST_DATABASE").expect("tests/run names a database");
        let schema = format!("t{}", uuid::Uuid::now_v7().simple());
        Database::connect(&url).await.unwrap().execute_unprepared(&format!("CREATE SCHEMA {schema}")).await.unwrap();
        let url = format!("{url}?options=-csearch_path%3D{schema}");
        migrates_rows(&url, &url).await;
    }
}
