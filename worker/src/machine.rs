//! The machine of a worker: its limit of open files, its clock, its shortages, and the passwords to hide from its other
//! users. This room knows nothing of processes.

pub(crate) mod causes;
pub(crate) mod clock;
pub(crate) mod handover;
pub(crate) mod open_files;
pub(crate) mod random;
pub(crate) mod shortage;

/// The path of the running executable. It works also after an upgrade has replaced or deleted the file.
pub(crate) const SELF: &str = "/proc/self/exe";
