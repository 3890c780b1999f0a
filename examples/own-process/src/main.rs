//! A worker with processes of its own: `own.pi` throws points at a square and counts those within the circle; `own.words`
//! counts the words of a text at a site.
//!
//!     cargo run -- --name own --queue own --root worker-own     # BATON_BROKER_URL and BATON_DATABASE_URL are set
//!     baton submit own-pi.yaml --wait                           # in another terminal

use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use baton_worker::process::{Advance, Context, Error, Process};
use baton_worker::registry::Registry;
use futures_util::future;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The pause between two rounds, which the worker may spend on other processes.
const PAUSE: Duration = Duration::from_millis(200);

/// What is written here is the checkpoint. After a crash the next worker reads it and makes the next round.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pi {
    rounds: u64,
    points: u64,
    #[serde(default)]
    round: u64,
    #[serde(default)]
    within: u64,
}

impl Process for Pi {
    fn start(input: &Value) -> Result<Self, Error> {
        let pi: Pi = serde_json::from_value(input.clone()).map_err(|error| Error::Input(format!("`with`: {error}")))?;
        if pi.rounds == 0 || pi.points == 0 {
            return Err(Error::Input("`rounds` and `points` must be at least 1".into()));
        }
        Ok(pi)
    }

    /// One round: two halves on the blocking pool at a time, since arithmetic would hold up the thread's other processes.
    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        // A process stays on its thread, so what is not `Send` may live across an await.
        let counts = Rc::new(RefCell::new(Vec::new()));
        let half = |number: u64| {
            let counts = Rc::clone(&counts);
            let (points, seed) = (self.points, 2 * self.round + number + 1);
            async move {
                let within = context.blocking(move || throw(points, seed)).await?;
                counts.borrow_mut().push(within);
                Ok::<(), Error>(())
            }
        };
        future::try_join(half(0), half(1)).await?;
        // A timer within the advance. To wait for long, return `Advance::After`.
        context.sleep(Duration::from_millis(50)).await;

        self.within += counts.borrow().iter().sum::<u64>();
        self.round += 1;
        let pi = 4.0 * self.within as f64 / (2 * self.points * self.round) as f64;
        context.log(format!("round {} of {}: pi is about {pi:.4}", self.round, self.rounds));
        context.set_value("pi", pi);
        context.set_progress(self.round, Some(self.rounds));
        Ok(if self.round == self.rounds { Advance::Finished { exit: 0 } } else { Advance::After(PAUSE) })
    }
}

/// How many of these points fall within the circle. The same seed throws the same points, so an advance that is repeated
/// comes to the same result.
fn throw(points: u64, seed: u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    (0..points).map(|_| (random(), random())).filter(|(x, y)| x * x + y * y <= 1.0).count() as u64
}

/// A text, and the site that counts its words.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    site: String,
    text: String,
}

impl Process for Words {
    fn start(input: &Value) -> Result<Self, Error> {
        serde_json::from_value(input.clone()).map_err(|error| Error::Input(format!("`with`: {error}")))
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        // First of all: when no session is to be had, this ends here, and begins again when there is one.
        let site = context.site(&self.site).await?;
        let local = std::env::temp_dir().join(format!("own-words-{}", context.pid()));
        std::fs::write(&local, &self.text)?;
        site.put(&local, "text").await?;
        let counted = site.exec("wc -w < text > count", b"", Duration::from_secs(60)).await?;
        counted.ok().map_err(Error::failed)?;
        site.get("count", &local).await?;
        context.set_value("words", std::fs::read_to_string(&local)?.trim());
        std::fs::remove_file(&local)?;
        Ok(Advance::Finished { exit: 0 })
    }
}

fn main() -> ExitCode {
    let mut registry = Registry::new();
    registry.register::<Pi>("own.pi");
    registry.register::<Words>("own.words");
    baton_worker::main(registry)
}
