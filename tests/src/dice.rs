//! Random numbers that are the same for the same seed.

/// Marsaglia's xorshift64.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Creates dice from a seed.
    pub fn seeded(seed: u64) -> Self {
        // Zero would stay zero, and nearby seeds begin alike.
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.next(2);
        }
        dice
    }

    /// Returns a new seed.
    pub fn seed() -> u64 {
        uuid::Uuid::new_v4().as_u64_pair().0 >> 32
    }

    /// Returns dice for one of many users. The throws of one user do not depend on those of the others.
    #[must_use]
    pub fn of(&self, idx: usize) -> Self {
        Self::seeded(self.0 ^ (idx as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Returns a number below `end`.
    pub fn next(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Returns one of the elements.
    ///
    /// # Panics
    /// If there are none.
    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> &'a T {
        let idx = usize::try_from(self.next(among.len() as u64)).expect("below a length");
        &among[idx]
    }

    /// Returns a time of at least `from_ms` and less than `to_ms` milliseconds.
    pub fn time(&mut self, from_ms: u64, to_ms: u64) -> std::time::Duration {
        std::time::Duration::from_millis(from_ms + self.next(to_ms - from_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_falls_alike_and_another_does_not() {
        let throw =
            |seed| (0..20).map(|_| ()).scan(Dice::seeded(seed), |dice, ()| Some(dice.next(6))).collect::<Vec<_>>();
        assert_eq!(throw(1), throw(1));
        assert_ne!(throw(1), throw(2));
        assert!(throw(0).iter().any(|number| *number != throw(0)[0]), "they are not stuck");
    }
}
