//! The kinds of processes that a worker knows, by name.

use std::collections::BTreeMap;

use baton_common::spec::Spec;
use futures_util::future::LocalBoxFuture;
use serde_json::Value;

use crate::kinds;
use crate::process::{Advance, Context, Error, Interrupt, Process};

/// Names and what they stand for.
#[derive(Clone)]
pub struct Registry {
    kinds: BTreeMap<String, Kind>,
}

/// How a kind's processes are made.
#[derive(Clone, Copy)]
struct Kind {
    start: fn(&Value) -> Made,
    restore: fn(&[u8]) -> Made,
}

/// A process, or why there is none.
type Made = Result<Box<dyn AnyProcess>, NotMade>;

/// Why a process cannot be made.
#[derive(Debug)]
pub(crate) enum NotMade {
    /// This build does not know its kind; another may.
    UnknownKind(String),
    /// This build cannot read what another has written.
    OtherBuild(String),
    /// This worker's machine cannot do it; another one can.
    NotHere(String),
    /// No build can.
    Failed(String),
}

impl Registry {
    /// Baton's own kinds.
    pub fn new() -> Self {
        let mut registry = Self { kinds: BTreeMap::new() };
        registry.register::<kinds::program::Program>("program");
        registry.register::<kinds::job::Job>("job");
        registry.register::<kinds::aids::Noop>("baton.noop");
        registry.register::<kinds::aids::Sleep>("baton.sleep");
        registry.register::<kinds::aids::Count>("baton.count");
        registry.register::<kinds::aids::Block>("baton.block");
        registry.register::<kinds::aids::Fail>("baton.fail");
        registry
    }

    /// Adds a kind, or replaces the one of this name. A spec calls it by `call: NAME`.
    pub fn register<P: Process>(&mut self, name: impl Into<String>) {
        let kind = Kind {
            start: |input| match P::start(input) {
                Ok(process) => Ok(Box::new(process)),
                Err(error) => Err(NotMade::Failed(error.to_string())),
            },
            restore: |state| {
                // Whether it is damaged or of another build cannot be told; the other build may come, so it is kept.
                let process: P = rmp_serde::from_slice(state).map_err(|error| {
                    NotMade::OtherBuild(format!("its checkpoint does not fit this build's process: {error}"))
                })?;
                Ok(Box::new(process))
            },
        };
        self.kinds.insert(name.into(), kind);
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kinds.keys().map(String::as_str)
    }

    /// A process as its checkpoint left it, or a new one.
    pub(crate) fn make(&self, spec: &Spec, input: &Value, state: Option<&[u8]>) -> Made {
        let kind = self.kinds.get(spec.kind()).ok_or_else(|| {
            let known = self.names().filter(|name| !["program", "job"].contains(name)).collect::<Vec<_>>().join(", ");
            NotMade::UnknownKind(format!("this worker knows no process `{}` (it knows {known})", spec.kind()))
        })?;
        match state {
            Some(state) => (kind.restore)(state),
            None => (kind.start)(input),
        }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

/// A process whose type is forgotten.
pub(crate) trait AnyProcess {
    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>>;
    fn interrupted<'a>(&'a mut self, context: &'a Context, why: Interrupt) -> LocalBoxFuture<'a, ()>;
    fn end_outside<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<(), Error>>;
    fn save(&self) -> Result<Vec<u8>, Error>;
}

impl<P: Process> AnyProcess for P {
    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>> {
        Process::advance(self, context)
    }

    fn interrupted<'a>(&'a mut self, context: &'a Context, why: Interrupt) -> LocalBoxFuture<'a, ()> {
        Process::interrupted(self, context, why)
    }

    fn end_outside<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<(), Error>> {
        Process::end_outside(self, context)
    }

    fn save(&self) -> Result<Vec<u8>, Error> {
        rmp_serde::to_vec_named(self).map_err(|error| Error::Failed(format!("its state cannot be written: {error}")))
    }
}
