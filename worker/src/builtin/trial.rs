//! Small processes for trying out a fleet: `baton.noop`, `baton.sleep`, `baton.count`, `baton.block`, `baton.fail`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use baton_common::duration;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::author::process::{Advance, Context, Error, Process, read_input};

/// Succeeds at once, to measure the cost of a launch.
#[derive(Serialize, Deserialize)]
pub(crate) struct Noop;

impl Process for Noop {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Noop)
    }

    async fn advance(&mut self, _context: &Context) -> Result<Advance, Error> {
        Ok(Advance::Finished { exit: 0 })
    }
}

/// Is parked for a time: `with: {for: 10m}`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Sleep {
    #[serde(rename = "for", with = "duration::text")]
    pause: Duration,
    #[serde(default)]
    slept: bool,
}

impl Process for Sleep {
    fn start(input: &Value) -> Result<Self, Error> {
        read_input(input)
    }

    async fn advance(&mut self, _context: &Context) -> Result<Advance, Error> {
        if self.slept {
            return Ok(Advance::Finished { exit: 0 });
        }
        self.slept = true;
        Ok(Advance::After(self.pause))
    }
}

/// Makes durable advances: `with: {advances: 50, every: 100ms, witness: PATH}`. Each appends a line
/// `pid advance epoch worker` to the witness, if there is one. With `stay: true` it keeps its slot between two advances,
/// for any `every`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Count {
    advances: u64,
    #[serde(default, with = "duration::text")]
    every: Duration,
    #[serde(default)]
    stay: bool,
    #[serde(default)]
    witness: Option<PathBuf>,
    #[serde(default)]
    done: u64,
}

impl Process for Count {
    fn start(input: &Value) -> Result<Self, Error> {
        let count: Count = read_input(input)?;
        if count.advances == 0 {
            return Err(Error::Input("`advances` must be at least 1".into()));
        }
        Ok(count)
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        if let Some(witness) = &self.witness {
            let line =
                format!("{} {} {} {}\n", context.pid(), context.advance_number(), context.epoch(), context.worker());
            // One small write with O_APPEND: lines of several workers do not mix.
            std::fs::OpenOptions::new().append(true).create(true).open(witness)?.write_all(line.as_bytes())?;
        }
        self.done += 1;
        context.set_progress(self.done, Some(self.advances));
        context.set_value("advances", self.done);
        Ok(if self.done >= self.advances {
            Advance::Finished { exit: 0 }
        } else if self.every.is_zero() {
            Advance::Again
        } else if self.stay {
            Advance::Linger(self.every)
        } else {
            Advance::After(self.every)
        })
    }
}

/// Blocks its thread, as no process should: `with: {for: 60s}`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Block {
    #[serde(rename = "for", with = "duration::text")]
    pause: Duration,
}

impl Process for Block {
    fn start(input: &Value) -> Result<Self, Error> {
        read_input(input)
    }

    #[expect(clippy::disallowed_methods, reason = "this test aid blocks its thread on purpose")]
    async fn advance(&mut self, _context: &Context) -> Result<Advance, Error> {
        std::thread::sleep(self.pause);
        Ok(Advance::Finished { exit: 0 })
    }
}

/// Fails: `with: {how: error}`, or `panic`, `loop` (advances for ever without progress), `abort` (aborts the worker).
#[derive(Serialize, Deserialize)]
pub(crate) struct Fail {
    #[serde(default)]
    how: How,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum How {
    #[default]
    Error,
    Panic,
    Loop,
    Abort,
}

impl Process for Fail {
    fn start(input: &Value) -> Result<Self, Error> {
        read_input(input)
    }

    async fn advance(&mut self, _context: &Context) -> Result<Advance, Error> {
        match self.how {
            How::Error => Err(Error::Failed("it was asked to fail".into())),
            How::Panic => panic!("it was asked to panic"),
            How::Loop => Ok(Advance::Again),
            How::Abort => std::process::abort(),
        }
    }
}
