//! Whether the fleet takes work at all.

use sea_orm::{FromQueryResult, Value};
use serde::Serialize;
use uuid::Uuid;

use super::error::Error;
use super::handle::Store;
use super::request::Request;
use crate::id::RequestId;
use crate::state::Desired;

/// The fleet takes no work: what is held goes on, and nothing new is claimed until somebody plays it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, FromQueryResult)]
pub struct FleetPause {
    /// Since when, in microseconds since 1970 by the database's clock.
    #[sea_orm(from_alias = "paused_at")]
    pub at: i64,
    /// Who asked, as they say themselves.
    #[sea_orm(from_alias = "by_whom")]
    pub by: String,
    /// Whom the database or the broker knows it from.
    pub login: String,
    /// Why.
    pub reason: Option<String>,
}

impl Store {
    /// Stops or restarts the taking of work, once under this id; workers learn it by a broadcast or at their next beat.
    /// `false` when the same request has been written before.
    ///
    /// # Errors
    /// Nothing is changed, or the same call again is safe.
    pub async fn control_fleet(&self, id: RequestId, request: &Request) -> Result<bool, Error> {
        let what = format!("{} fleet", request.verb.verb());
        if self.record_request(id, &what, None, request).await?.is_none() {
            return Ok(false);
        }
        let sql = "INSERT INTO fleet (id, paused_at, by_whom, login, reason)
                   VALUES (1, CASE WHEN $1 THEN {now} ELSE NULL END, $2, COALESCE($3, {login}), $4)
                   ON CONFLICT (id) DO UPDATE SET paused_at = excluded.paused_at, by_whom = excluded.by_whom,
                                                  login = excluded.login, reason = excluded.reason";
        let values: Vec<Value> = vec![
            (request.verb == Desired::Pause).into(),
            request.by.clone().into(),
            request.login.clone().into(),
            request.reason.clone().into(),
        ];
        self.execute(sql, values).await?;
        let sql = "UPDATE event SET outcome = 'applied', settled_at = {clock} WHERE id = $1";
        self.execute(sql, vec![Uuid::from(id).into()]).await?;
        Ok(true)
    }

    /// Who has paused the fleet; `None` while it takes work.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn fleet_pause(&self) -> Result<Option<FleetPause>, Error> {
        let sql = "SELECT paused_at, by_whom, login, reason FROM fleet WHERE paused_at IS NOT NULL";
        self.first(sql, vec![]).await
    }
}
