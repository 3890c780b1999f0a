//! Vocabulary and wires of Baton: ids, states, specs, messages, the store and the communicator.

mod by_name;
pub mod communicator;
pub mod config;
pub mod digest;
pub mod duration;
pub mod exit;
pub mod failpoint;
#[cfg(test)]
mod fuzz;
pub mod id;
pub mod lack;
pub mod message;
mod message_pack;
pub mod nearest;
pub mod objects;
pub mod relative;
pub mod secrets;
pub mod select;
pub mod sharing;
pub mod spec;
pub mod state;
pub mod store;
pub mod telemetry;
pub mod unique_keys;
