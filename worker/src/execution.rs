//! How held processes are advanced: on threads of their own, in one loop each, under leases.

pub(crate) mod gate;
pub(crate) mod lease;
pub(crate) mod lease_table;
pub(crate) mod limits;
pub(crate) mod run;
pub(crate) mod thread;
pub(crate) mod timer;
