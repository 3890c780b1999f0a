//! Vocabulary and wires of Baton: ids, states, specs, messages, the store and the communicator.

pub mod communicator;
pub mod config;
pub mod duration;
#[cfg(test)]
mod fuzz;
pub mod id;
pub mod message;
mod message_pack;
pub mod select;
pub mod spec;
pub mod state;
pub mod store;
pub mod telemetry;
