//! Incarnations of workers.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "worker")]
pub(in crate::store) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub(in crate::store) id: uuid::Uuid,
    pub(in crate::store) name: String,
    pub(in crate::store) host: String,
    pub(in crate::store) os_pid: i64,
    pub(in crate::store) beat: i64,
    pub(in crate::store) gone_at: Option<i64>,
    pub(in crate::store) sites: Option<String>,
    pub(in crate::store) objects: Option<String>,
}

#[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
pub(in crate::store) enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
