//! Chooses the next of several queues: high, normal and low share 16:4:1.

/// The weight of each class. Quorum queues have no priorities before RabbitMQ 4, and strict priorities would starve
/// `low`.
const WEIGHT_HIGH: u32 = 16;
const WEIGHT_NORMAL: u32 = 4;
const WEIGHT_LOW: u32 = 1;

/// The remaining credit of each queue in this round.
#[derive(Debug, Default)]
pub(super) struct WeightedRoundRobin {
    left: Vec<Share>,
    last_idx: usize,
}

#[derive(Debug)]
struct Share {
    weight: u32,
    credit: u32,
}

impl WeightedRoundRobin {
    /// Starts a round with these queues. `pick` returns an index into them.
    pub(super) fn new<'a>(queues: impl IntoIterator<Item = &'a str>) -> Self {
        let left = queues.into_iter().map(|queue| Share { weight: weight(queue), credit: weight(queue) }).collect();
        WeightedRoundRobin { left, last_idx: 0 }
    }

    /// Picks the next queue among the ready ones: the one with the largest weight, queues of equal weight in turn. An
    /// empty queue keeps its credit and does not block others.
    pub(super) fn pick(&mut self, is_ready: impl Fn(usize) -> bool) -> Option<usize> {
        let n_queues = self.left.len();
        let ready: Vec<usize> = (0..n_queues).filter(|&idx| is_ready(idx)).collect();
        if ready.is_empty() {
            return None;
        }
        if ready.iter().all(|&idx| self.left[idx].credit == 0) {
            for share in &mut self.left {
                share.credit = share.weight;
            }
        }
        let turn = |idx: usize| (idx + n_queues - self.last_idx - 1) % n_queues;
        let idx = ready
            .into_iter()
            .filter(|&idx| self.left[idx].credit > 0)
            .min_by_key(|&idx| (u32::MAX - self.left[idx].weight, turn(idx)))?;
        self.left[idx].credit -= 1;
        self.last_idx = idx;
        Some(idx)
    }
}

/// The prefetch of a queue, given the prefetch of a queue of normal priority.
///
/// If tasks are so short that the broker cannot refill the prefetch in time, the prefetches determine the shares
/// instead of the credits. So they have the same ratio.
pub(super) fn prefetch_of(queue: &str, normal: u16) -> u16 {
    let share = u32::from(normal) * weight(queue) / WEIGHT_NORMAL;
    u16::try_from(share).unwrap_or(u16::MAX).max(1)
}

fn weight(queue: &str) -> u32 {
    if queue.ends_with(".high") {
        WEIGHT_HIGH
    } else if queue.ends_with(".low") {
        WEIGHT_LOW
    } else {
        WEIGHT_NORMAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_queues_share_16_to_4_to_1() {
        let mut credits = WeightedRoundRobin::new(["q.high", "q", "q.low"]);
        let mut counts = [0; 3];
        for _ in 0..210 {
            counts[credits.pick(|_| true).unwrap()] += 1;
        }
        assert_eq!(counts, [160, 40, 10]);
    }

    #[test]
    fn an_empty_class_never_blocks_another() {
        let mut credits = WeightedRoundRobin::new(["q.high", "q", "q.low"]);
        for _ in 0..100 {
            assert_eq!(credits.pick(|idx| idx == 2), Some(2));
        }
        assert_eq!(credits.pick(|_| false), None);
    }

    #[test]
    fn queues_of_one_class_take_turns() {
        let mut credits = WeightedRoundRobin::new(["a", "b", "c"]);
        let picks: Vec<usize> = (0..6).map(|_| credits.pick(|_| true).unwrap()).collect();
        assert_eq!(picks, [1, 2, 0, 1, 2, 0]);
    }
}
