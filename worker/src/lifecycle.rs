//! From the command line to the end of a worker: its incarnations and what they run all the time. Only here are all the
//! other rooms known.

pub mod cli;
mod heartbeat;
mod incarnation;
mod peers;
mod probing;
mod sweeps;
pub mod worker;
