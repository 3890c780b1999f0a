//! The kinds of processes that a worker knows, by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_common::spec::Spec;
use futures_util::future::LocalBoxFuture;
use serde_json::Value;

use crate::author::process::{Advance, Context, Error, Interrupt, Process};

/// The kinds of processes that a program knows, by name.
#[derive(Clone, Default)]
pub struct Registry {
    kinds: BTreeMap<String, Kind>,
}

/// The constructors of a kind.
#[derive(Clone)]
struct Kind {
    start: Start,
    restore: Restore,
}

type Start = Arc<dyn Fn(&Value) -> Made + Send + Sync>;
type Restore = Arc<dyn Fn(&[u8]) -> Made + Send + Sync>;

/// A process, or the reason why there is none.
type Made = Result<Box<dyn AnyProcess>, NotMade>;

/// Why a process cannot be made.
#[derive(Debug)]
pub(crate) enum NotMade {
    /// This build does not know the kind; another may.
    UnknownKind(String),
    /// This build cannot read the checkpoint that another build has written.
    OtherBuild(String),
    /// This worker's machine cannot run it; another one can.
    NotHere(String),
    /// No build can make it.
    Failed(String),
}

impl Registry {
    /// A registry without kinds. Every worker adds Baton's own kinds to it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a kind, or replaces the kind of this name. A spec refers to it by `call: NAME`. The name is stored with each
    /// process, so it must stay the same as long as there are processes of this kind.
    pub fn register<P: Process>(&mut self, name: impl Into<String>) {
        self.register_equipped::<P>(name, |process| process);
    }

    /// Adds a kind that needs more of its worker than a [`Context`]; `equip` adds that to each process.
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
                // A damaged checkpoint looks the same as one of another build. The other build may come, so it is kept.
                let process: P = rmp_serde::from_slice(state).map_err(|error| {
                    NotMade::OtherBuild(format!("its checkpoint does not fit this build's process: {error}"))
                })?;
                Ok(Box::new(equip_restored(process)))
            }),
        };
        self.kinds.insert(name.into(), kind);
    }

    /// Adds all kinds of another registry. They replace those of the same name.
    pub(crate) fn add(&mut self, other: &Registry) {
        self.kinds.extend(other.kinds.iter().map(|(name, kind)| (name.clone(), kind.clone())));
    }

    /// The names of all kinds, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kinds.keys().map(String::as_str)
    }

    /// Restores a process from its checkpoint, or starts a new one when there is none.
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

/// A process of any type. Each call allocates its future once.
pub(crate) trait AnyProcess {
    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>>;
    fn interrupted<'a>(&'a mut self, context: &'a Context, why: Interrupt) -> LocalBoxFuture<'a, ()>;
    fn end_outside<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<(), Error>>;
    fn save(&self) -> Result<Vec<u8>, Error>;
}

impl<P: Process> AnyProcess for P {
    fn advance<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<Advance, Error>> {
        Box::pin(Process::advance(self, context))
    }

    fn interrupted<'a>(&'a mut self, context: &'a Context, why: Interrupt) -> LocalBoxFuture<'a, ()> {
        Box::pin(Process::interrupted(self, context, why))
    }

    fn end_outside<'a>(&'a mut self, context: &'a Context) -> LocalBoxFuture<'a, Result<(), Error>> {
        Box::pin(Process::end_outside(self, context))
    }

    fn save(&self) -> Result<Vec<u8>, Error> {
        rmp_serde::to_vec_named(self).map_err(|error| Error::Failed(format!("its state cannot be written: {error}")))
    }
}
