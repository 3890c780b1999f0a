//! The author's view of a process: the trait, the context of an advance, and the registry of kinds. This room knows neither
//! sites nor local programs.

pub(crate) mod clock;
pub(crate) mod facilities;
pub(crate) mod live;
pub mod process;
pub mod registry;
