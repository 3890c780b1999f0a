//! How a process is made from its row, and kept small while it waits in memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_common::spec::{Spec, Work};
use baton_common::state::State;
use baton_common::store::Error as StoreError;
use baton_common::store::blob::{Checkpoint, Outcome, spec_from_bytes, spec_to_bytes};
use baton_common::store::writer::{Claimed, How, Verb};
use tracing::warn;

use super::{Execution, Hold, REFUSAL_PAUSE_MAX, REFUSAL_PAUSE_MIN, Run};
use crate::author::live::Live;
use crate::author::process::{Context, Draft};
use crate::author::registry::NotMade;
use crate::execution::decide::state_of;

/// The packed parts of a process that waits in memory. Thousands may wait for hours, and their maps of values and inputs
/// take most of the space.
pub(super) struct Packed {
    spec: Box<[u8]>,
    checkpoint: Box<[u8]>,
}

impl Run {
    /// Makes the process from its row, or returns why that is impossible.
    pub(super) fn restore(
        claimed: Box<Claimed>,
        live: Arc<Live>,
        execution: &Arc<Execution>,
    ) -> (Box<Self>, Result<(), NotMade>) {
        let is_quarantined = claimed.is_quarantined();
        let Claimed { fence, claimed_at, try_number, checkpoint, spec, has_outside, .. } = *claimed;
        let spec = spec.map_err(|error| unread("spec", &error));
        let checkpoint = checkpoint.transpose().map_err(|error| unread("checkpoint", &error));
        let restored = checkpoint.as_ref().ok().cloned().flatten().unwrap_or_default();
        let (spec, read) = match spec {
            Ok(spec) => (spec, Ok(())),
            Err(not_made) => (Spec::new(Work::Run { argv: vec!["false".into()] }), Err(not_made)),
        };
        let context = Context {
            facilities: Arc::clone(&execution.facilities),
            fence,
            try_number: Cell::new(try_number),
            spec: Some(Box::new(spec)),
            live,
            draft: RefCell::new(Draft::of(&restored)),
        };
        let mut run = Box::new(Run {
            execution: Arc::clone(execution),
            context: Rc::new(context),
            process: None,
            checkpoint: restored,
            claimed_at,
            has_outside,
            is_quarantined,
            is_rejected: false,
            span: None,
            left: None,
            outcome: None,
        });
        let made = read.and_then(|()| {
            let spec = run.context.spec();
            let checkpoint = checkpoint?;
            let state = checkpoint.as_ref().and_then(state_of);
            if let Some(on_site) = &spec.on_site
                && execution.sites.get(&on_site.at).is_none()
            {
                return Err(NotMade::OtherBuild(format!("this worker has no site `{}`", on_site.at)));
            }
            if let Some(reason) = spec.on_site.as_ref().and_then(|on_site| execution.sites.sharing.refuses(on_site)) {
                return Err(NotMade::NotHere(format!("{}: {reason}", execution.facilities.identity.name)));
            }
            execution.registry.make(spec, run.context.input(), state)
        });
        let made = made.map(|process| run.process = Some(process));
        (run, made)
    }

    /// Parks the process unchanged for another worker. The pauses grow with the time since the first refusal, since
    /// nothing says when a suitable worker starts; each costs two commits and a message.
    pub(super) async fn refuse(&mut self, reason: String, refused_at: Option<i64>, most: Duration) {
        let pause = refusal_pause(self.claimed_at, refused_at).min(most);
        if refused_at.is_none() {
            warn!(pid = %self.context.pid(), reason, "this worker cannot run the process; another worker may");
        }
        loop {
            let verb = Verb::Refuse { wake_in: pause, reason: reason.clone() };
            if self.write(verb, None, None).await == Hold::Gone {
                self.execution.timer.due_in(pause);
                return;
            }
            // The process was woken or killed meanwhile.
            if self.obey().await == Hold::Gone {
                return;
            }
        }
    }

    /// Restores the process from its checkpoint after an advance that was not committed.
    pub(super) async fn begin_again(&mut self, hold: Hold) -> Hold {
        if hold == Hold::Gone || self.context.live.orders().abandon {
            return Hold::Gone;
        }
        let state = state_of(&self.checkpoint);
        match self.execution.registry.make(self.context.spec(), self.context.input(), state) {
            Ok(process) => {
                self.process = Some(process);
                Hold::Held
            }
            Err(not_made) => {
                let reason = format!("its own checkpoint cannot be read: {not_made:?}");
                self.end(State::Excepted, Outcome::because(reason), How::Error).await;
                Hold::Gone
            }
        }
    }

    pub(super) fn pack(&mut self) -> Packed {
        let context = Rc::get_mut(&mut self.context).expect("only a running advance shares it");
        let spec = context.spec.take().expect("a process is packed only once");
        Packed {
            spec: spec_to_bytes(&spec).into_boxed_slice(),
            checkpoint: std::mem::take(&mut self.checkpoint).to_bytes().into_boxed_slice(),
        }
    }

    pub(super) fn unpack(&mut self, packed: &Packed) {
        let spec = spec_from_bytes(&packed.spec).expect("this program wrote it");
        let context = Rc::get_mut(&mut self.context).expect("only a running advance shares it");
        context.spec = Some(Box::new(spec));
        self.checkpoint = Checkpoint::from_bytes(&packed.checkpoint).expect("this program wrote it");
    }
}

/// Returns why a process cannot be made from an unreadable blob. A newer build may read a newer version; a malformed blob
/// stays unreadable.
fn unread(what: &str, error: &StoreError) -> NotMade {
    let reason = format!("its {what}: {error}");
    if matches!(error, StoreError::Newer { .. }) { NotMade::OtherBuild(reason) } else { NotMade::Failed(reason) }
}

/// The pause of a process that no worker has been able to run since `refused_at`. Both times are in microseconds.
fn refusal_pause(now: i64, refused_at: Option<i64>) -> Duration {
    let since = refused_at.map_or(0, |refused_at| now - refused_at);
    Duration::from_micros(since.max(0).cast_unsigned()).clamp(REFUSAL_PAUSE_MIN, REFUSAL_PAUSE_MAX)
}
