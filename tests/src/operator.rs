//! An operator who sends requests as the CLI does: to the row first, then to its holder.

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

/// The time in which a holder must answer; a frozen one never does.
const LIMIT: Duration = Duration::from_secs(1);

/// Connections of the operator's store.
const CONNECTIONS: usize = 4;

/// An operator with separate connections.
pub struct Operator {
    name: String,
    store: Store,
    communicator: Communicator,
    /// Concurrent requests wait here for a connection; on a busy machine they wait longer than the store allows.
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

    /// The operator's connection to the database.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The operator's connection to the broker.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// Sends a request to one process; `None` if it has ended or is being killed.
    ///
    /// # Panics
    /// If the database fails.
    pub async fn ask(&self, pid: &str, verb: Desired) -> Option<Answered> {
        let pid: Pid = pid.parse().expect("a pid");
        let request = Request::new(verb, &*self.name);
        let turn = self.turns.acquire().await.expect("it is never closed");
        let Answer::Recorded(row) = self.store.control(pid, &request).await.expect("the database accepts it") else {
            return None;
        };
        drop(turn);
        if let Some((queue, told)) = row.announced {
            let task = Task::Continue { pid, announced_at: Some(told.announced_at) };
            // The head rule announces what is not published here.
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
