//! The garbage collection roots: the objects that rows refer to, page by page.

use sea_orm::{ConnectionTrait, FromQueryResult};
use uuid::Uuid;

use super::blob::{self, Outcome};
use super::dialect::Batch;
use super::error::Error;
use super::handle::Store;
use super::row::read;
use super::select::{Order, Walk};
use crate::digest::Digest;
use crate::select::Select;
use crate::spec::on_site::Scope;
use crate::spec::{JOB, Spec};

/// Rows in one page: each spec may have a mebibyte.
const PAGE_ROWS: u32 = 200;

/// A walk through the roots. Roots that are committed during the walk may be missing.
pub struct Walking {
    store: Store,
    walk: Walk,
}

/// The roots in a page, unsorted, possibly with duplicates.
#[derive(Debug, Default)]
pub struct Needed {
    /// Manifests, which refer to further objects.
    pub manifests: Vec<Digest>,
    /// Single objects.
    pub objects: Vec<Digest>,
}

/// A row of [`ROWS`].
#[derive(FromQueryResult)]
struct Row {
    id: Uuid,
    body: Vec<u8>,
    outcome: Option<Vec<u8>>,
}

impl Store {
    /// Begins a walk through the objects that processes refer to: inputs that were sent for them, and results. Only
    /// processes at sites have any.
    pub fn needed(&self) -> Walking {
        let select = Select { kind: Some(JOB.to_owned()), ..Select::default() };
        Walking { store: self.clone(), walk: Walk::new(&select, Order::OldestFirst, None) }
    }
}

impl Walking {
    /// Returns the next page; `None` at the end.
    ///
    /// # Errors
    /// The database does not answer; or [`Error::Newer`] or [`Error::Unreadable`], if the roots of a row cannot be
    /// determined.
    pub async fn next(&mut self) -> Result<Option<Needed>, Error> {
        let (db, dialect) = (&self.store.db, self.store.dialect);
        let Some(ids) = self.walk.next_ids(db, dialect, PAGE_ROWS).await? else { return Ok(None) };
        let mut needed = Needed::default();
        let rows = db.query_all_raw(dialect.batch(ROWS, vec![], Batch::ids(ids))).await?;
        for Row { id, body, outcome } in read(&rows)? {
            let of_row = |error: Error| {
                if let Error::Unreadable(reason) = error {
                    Error::Unreadable(format!("process {id}: {reason}"))
                } else {
                    error
                }
            };
            needed.spec(&blob::spec_from_bytes(&body).map_err(of_row)?);
            if let Some(outcome) = outcome {
                needed.manifests.extend(Outcome::from_bytes(&outcome).map_err(of_row)?.results);
            }
        }
        Ok(Some(needed))
    }
}

impl Needed {
    fn spec(&mut self, spec: &Spec) {
        let Some(on_site) = &spec.on_site else { return };
        self.manifests.extend(on_site.staged);
        let of_store = on_site.inputs.iter().filter(|input| input.from.scope == Scope::Store);
        self.objects.extend(of_store.filter_map(|input| input.from.path.parse::<Digest>().ok()));
    }
}

const ROWS: &str = "
    WITH {rows} SELECT s.id, s.body, p.outcome FROM spec s JOIN process p ON p.id = s.id
    WHERE s.id IN (SELECT b_id FROM b)";
