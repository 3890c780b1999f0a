//! An operator who asks as the CLI does: the row first, then its holder.

use std::time::Duration;

use baton_common::communicator::{Broker, Communicator, Options, TaskMessage};
use baton_common::id::Pid;
use baton_common::message::{Control, Effect, Task};
use baton_common::select::Select;
use baton_common::state::Desired;
use baton_common::store::control::{Answer, Request};
use baton_common::store::{Location, Store};
use tokio::sync::Semaphore;

use crate::history::Answered;
use crate::scene::Scene;

/// How long a holder may take to answer; a frozen one never does.
const LIMIT: Duration = Duration::from_secs(1);

/// Connections of a store that is opened by itself.
const CONNECTIONS: usize = 4;

/// One operator with connections of their own.
pub struct Operator {
    name: String,
    store: Store,
    communicator: Communicator,
    /// Those who ask at once wait here for a connection, and on a busy machine for longer than the store lets them.
    turns: Semaphore,
}

impl Operator {
    /// Connects to the scene's services.
    ///
    /// # Panics
    /// If they do not answer.
    pub async fn new(scene: &Scene, name: &str) -> Self {
        let location = Location::parse(&scene.database_url()).expect("a database's URL");
        let store = Store::open(location).await.expect("the database answers");
        let (communicator, _) = Communicator::start(Options {
            broker: Broker::Amqp(scene.broker_urls()),
            name: format!("operator {name}"),
            control_queue: None,
            heartbeat: None,
            database: None,
        });
        communicator.wait_connected(Duration::from_secs(10)).await.expect("the broker answers");
        Self { name: name.to_owned(), store, communicator, turns: Semaphore::new(CONNECTIONS) }
    }

    /// The database, as operators see it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The broker, as operators see it.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// Asks one process for something; `None` when the answer is that it has ended or is dying.
    ///
    /// # Panics
    /// If the database does not take it.
    pub async fn ask(&self, pid: &str, verb: Desired) -> Option<Answered> {
        let pid: Pid = pid.parse().expect("a pid");
        let request = Request::new(verb, &*self.name);
        let turn = self.turns.acquire().await.expect("it is never closed");
        let Answer::Recorded(row) = self.store.control(pid, &request).await.expect("the database takes it") else {
            return None;
        };
        drop(turn);
        if let Some((queue, told)) = row.announced {
            let task = Task::Continue { pid, announced_at: Some(told.announced_at) };
            // What is not told, the head rule tells.
            let _ = self.communicator.publish(&queue, vec![TaskMessage { task, traceparent: None }]).await;
        }
        let mut effect = row.effect;
        let mut queue = None;
        if let Some(owner) = row.owner {
            let _turn = self.turns.acquire().await;
            queue = self.store.control_queue_of(owner).await.ok().flatten();
        }
        if let Some(queue) = queue {
            let control = Control::Obey { verb, select: Select::one(pid), reason: None };
            if let Ok(reply) = self.communicator.request(&queue, control, LIMIT).await {
                effect = reply.outcome.unwrap_or(effect);
            }
        }
        let applied = match verb {
            Desired::Run => true,
            Desired::Pause | Desired::Kill => effect == Effect::applied(verb) || effect == Effect::AlreadyPaused,
        };
        Some(Answered { event: row.event.to_string(), pid: pid.to_string(), what: verb.verb().to_owned(), applied })
    }
}
