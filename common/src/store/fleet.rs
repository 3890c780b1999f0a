//! The pause of the whole fleet.

use sea_orm::{FromQueryResult, Value};
use serde::Serialize;
use uuid::Uuid;

use super::error::Error;
use super::handle::Store;
use super::request::Request;
use crate::id::RequestId;
use crate::state::Desired;

/// A pause of the fleet: held processes continue, and workers claim nothing until `play`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, FromQueryResult)]
pub struct FleetPause {
    /// The time of the pause, in microseconds since 1970 by the database's clock.
    #[sea_orm(from_alias = "paused_at")]
    pub at: i64,
    /// The requester's name, as given.
    #[sea_orm(from_alias = "by_whom")]
    pub by: String,
    /// The login that the database or the broker verified.
    pub login: String,
    /// The reason.
    pub reason: Option<String>,
}

impl Store {
    /// Pauses or resumes claiming, once per id. Workers learn it by a broadcast or at their next beat. Returns `false`
    /// if the request was recorded before.
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

    /// Returns the pause of the fleet; `None` if it takes work.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn fleet_pause(&self) -> Result<Option<FleetPause>, Error> {
        let sql = "SELECT paused_at, by_whom, login, reason FROM fleet WHERE paused_at IS NOT NULL";
        self.first(sql, vec![]).await
    }
}
