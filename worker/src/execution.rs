//! The advances of held processes: on threads of their own, in one loop each, under leases.

pub(crate) mod decide;
pub(crate) mod gate;
pub(crate) mod lease;
pub(crate) mod lease_table;
pub(crate) mod limits;
pub(crate) mod run;
pub(crate) mod thread;
pub(crate) mod timer;
