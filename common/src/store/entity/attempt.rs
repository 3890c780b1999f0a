//! Attempts that have ended.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "attempt")]
pub(in crate::store) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub(in crate::store) pid: uuid::Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    pub(in crate::store) epoch: i64,
    pub(in crate::store) worker: uuid::Uuid,
    pub(in crate::store) worker_name: Option<String>,
    #[sea_orm(column_name = "try")]
    pub(in crate::store) try_number: i64,
    pub(in crate::store) started_at: i64,
    pub(in crate::store) ended_at: i64,
    pub(in crate::store) how: String,
    pub(in crate::store) reason: Option<String>,
}

#[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
pub(in crate::store) enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
