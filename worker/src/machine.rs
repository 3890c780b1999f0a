//! What the machine gives a worker, and what it takes to be a good guest there: open files, a clock, what is lacking, and the
//! passwords that nobody else shall see. It knows nothing of processes.

pub(crate) mod causes;
pub(crate) mod clock;
pub(crate) mod handover;
pub(crate) mod open_files;
pub(crate) mod random;
pub(crate) mod shortage;

/// The running executable as one to start, also when its file was replaced or deleted by an upgrade.
pub(crate) const SELF: &str = "/proc/self/exe";
