//! The database: PostgreSQL or SQLite, from the same statements.
//!
//! The database decides, and the broker only delivers announcements. Every rule of the protocol (claim only queued
//! processes, fence every write, clear `woken`, apply the desired state when a row leaves its holder) is in the SQL of one
//! file here.
//!
//! # Layers
//!
//! A file imports only from the layers below it and from files before it in its own layer; a test finds no cycle. Files
//! below `store/` import from the file that declares an item. The re-exports here and in the public modules are the paths
//! for the rest of the program.
//!
//! | layer | files |
//! |---|---|
//! | ground | `error`, `blob`, `dialect`, `entity`, `lease`, `row`, `migration`, `connection`, `dedicated_connection`, `handle` |
//! | shared | `request` (requests and their history), `select` (selections), `submit` (inserts) |
//! | operations | `fenced` (claims and fenced writes), `control`, `sweep`, `job`, `site`, `worker`, `fleet`, `objects`, `prune`, `gc_roots` |
//! | roof | `writer` (the group commit), `query`, `explain`, `measure`, `statements` (for benchmarks) |
//!
//! # SQL and entities
//!
//! A statement is an SQL template (see `dialect`) if it applies a rule of the protocol, locks rows, takes the database's
//! time or login, goes over a batch of rows, or joins tables for a list. Its text is the rule, and its plan is tested. The
//! query builder has no `unnest`, no data-modifying `WITH`, and no way to keep a planner to the primary key.
//!
//! A plain statement uses the entities in `entity`: it reads or writes rows of one table by key or by one comparison, and
//! its meaning does not depend on concurrent changes (the mark of the object store, sites and workers as they describe
//! themselves, attempts and requests of one process). Tables with a single such statement, which is shorter as SQL, have no
//! entity: `fleet`, `identity`, `output`, `permit`, `pruned`, `spec`.
//!
//! Rows of both kinds are decoded by derived structs; ids, codes and states in one place, `row`.

pub mod blob;
mod connection;
pub mod control;
mod dedicated_connection;
mod dialect;
mod entity;
mod error;
pub mod explain;
mod fenced;
pub mod fleet;
pub mod gc_roots;
mod handle;
mod job;
mod lease;
pub mod measure;
mod migration;
mod objects;
pub mod prune;
pub mod query;
mod request;
mod row;
mod select;
pub mod site;
pub mod statements;
pub mod submit;
pub mod sweep;
pub mod worker;
pub mod writer;

pub use connection::{Access, Location, WORKER_CONNECTIONS};
pub use error::Error;
pub use handle::Store;
