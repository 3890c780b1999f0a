//! The kinds of processes that a worker knows, by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_common::spec::Spec;
use futures_util::future::LocalBoxFuture;
use serde_json::Value;

use crate::author::process::{Advance, Context, Error, Interrupt, Process};

/// Names and what they stand for.
#[derive(Clone, Default)]
pub struct Registry {
    kinds: BTreeMap<String, Kind>,
}

/// How a kind's processes are made.
#[derive(Clone)]
struct Kind {
    start: Start,
    restore: Restore,
}

type Start = Arc<dyn Fn(&Value) -> Made + Send + Sync>;
type Restore = Arc<dyn Fn(&[u8]) -> Made + Send + Sync>;

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
    /// No kinds but Baton's own, which every worker adds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a kind, or replaces the one of this name. A spec calls it by `call: NAME`.
    pub fn register<P: Process>(&mut self, name: impl Into<String>) {
        self.register_equipped::<P>(name, |process| process);
    }

    /// The same for a kind that needs something of its worker beside its context: `equip` gives it to each process.
    pub(crate) fn register_equipped<P: Process>(
        &mut self,
        name: impl Into<String>,
        equip: impl Fn(P) -> P + Clone + Send + Sync + 'static,
    ) {
        let equip_restored = equip.clone();
        let kind = Kind {
            start: Arc::new(move |input| match P::start(input) {
                Ok(process) => Ok(Box::new(equip(process))),
                Err(error) => Err(NotMade::Failed(error.to_string())),
            }),
            restore: Arc::new(move |state| {
                // Whether it is damaged or of another build cannot be told; the other build may come, so it is kept.
                let process: P = rmp_serde::from_slice(state).map_err(|error| {
                    NotMade::OtherBuild(format!("its checkpoint does not fit this build's process: {error}"))
                })?;
                Ok(Box::new(equip_restored(process)))
            }),
        };
        self.kinds.insert(name.into(), kind);
    }

    /// Adds all kinds of another registry; of two with one name the other's stays.
    pub(crate) fn add(&mut self, other: &Registry) {
        self.kinds.extend(other.kinds.iter().map(|(name, kind)| (name.clone(), kind.clone())));
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
