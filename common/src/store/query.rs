//! Read-only queries for people. Nothing here changes a row.

mod list;
mod show;
mod workers;

pub use list::{COUNT_MAX, Filter, Listing, Paused, Refusal, Summary};
pub use show::{AttemptRow, Details, EventRow};
pub use workers::{WorkerRow, WorkerState, queue_name};

pub use super::row::Cursor;
