//! Estimates pi: throws points at a square and counts those within the circle.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use baton_worker::prelude::*;
use futures_util::future;

/// The pause between two rounds, in which the thread can advance other processes.
const PAUSE: Duration = Duration::from_millis(200);

/// The checkpoint: after a crash the next worker reads it and makes the next round.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pi {
    rounds: u64,
    points: u64,
    #[serde(default)]
    round: u64,
    #[serde(default)]
    within: u64,
}

impl Process for Pi {
    fn start(input: &Value) -> Result<Self, Error> {
        let pi: Pi = read_input(input)?;
        if pi.rounds == 0 || pi.points == 0 {
            return Err(Error::Input("`rounds` and `points` must be at least 1".into()));
        }
        Ok(pi)
    }

    /// Makes one round: two halves at once on the blocking pool, since arithmetic would hold up other processes of the
    /// thread.
    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        // A process stays on its thread, so values that are not `Send` may live across an await.
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
        // A short wait within the advance. For a long one, return `Advance::After`.
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

/// The number of these points that fall within the circle. The same seed throws the same points, so a repeated advance has
/// the same result.
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

#[cfg(test)]
mod tests {
    use baton_worker::testing::{Harness, run_with_crash_after_every_advance, run_with_crash_in_every_advance};

    use super::*;

    fn pi() -> Harness {
        Harness::new::<Pi>(json!({"rounds": 4, "points": 20_000}))
    }

    #[test]
    fn estimate_is_close_and_the_same_after_crashes() {
        let end = run_with_crash_after_every_advance(pi);
        assert_eq!(run_with_crash_in_every_advance(pi), end);
        let estimate = end.values["pi"].as_f64().unwrap();
        assert!((estimate - std::f64::consts::PI).abs() < 0.05, "{estimate}");
    }
}
