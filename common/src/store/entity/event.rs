//! Requests of operators.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "event")]
pub(in crate::store) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub(in crate::store) id: uuid::Uuid,
    pub(in crate::store) pid: Option<uuid::Uuid>,
    pub(in crate::store) request: Option<uuid::Uuid>,
    pub(in crate::store) at: i64,
    pub(in crate::store) what: String,
    pub(in crate::store) by_whom: String,
    pub(in crate::store) login: String,
    pub(in crate::store) reason: Option<String>,
    pub(in crate::store) outcome: Option<String>,
    pub(in crate::store) settled_at: Option<i64>,
}

#[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
pub(in crate::store) enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
