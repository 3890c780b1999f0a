//! What the author of a process sees: the trait, the context of an advance, and the registry of kinds. It knows neither sites
//! nor local programs.

pub(crate) mod facilities;
pub(crate) mod live;
pub mod process;
pub mod registry;
