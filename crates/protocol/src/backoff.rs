//! Delays with jitter. The random source is an argument, so that every delay can be tested.

use std::time::Duration;

use rand::Rng;

/// Exponential back-off with full jitter: the n-th delay is uniform in `0..=min(max, first * 2^n)`.
/// Full jitter spreads a crowd better than jitter around the exponential.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    attempt: u32,
}

impl Backoff {
    /// Starts with delays of up to `first`, which double up to `max`.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, attempt: 0 }
    }

    /// The next delay, drawn from `random`.
    pub fn next(&mut self, random: &mut impl Rng) -> Duration {
        let ceiling = self.first.saturating_mul(1u32 << self.attempt.min(20)).min(self.max);
        self.attempt = self.attempt.saturating_add(1);
        between(Duration::ZERO, ceiling, random)
    }

    /// Starts over, after the other side has responded.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// A delay drawn uniformly from `low..=high`.
pub fn between(low: Duration, high: Duration, random: &mut impl Rng) -> Duration {
    if high <= low { low } else { random.random_range(low..=high) }
}

/// `mean`, moved by up to `part` of it (0.0 to 1.0) in either direction.
pub fn around(mean: Duration, part: f64, random: &mut impl Rng) -> Duration {
    between(mean.mul_f64(1.0 - part), mean.mul_f64(1.0 + part), random)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    proptest! {
        #[test]
        fn delays_stay_under_their_ceiling(seed: u64, first in 1u64..500, max in 1u64..60_000, steps in 1usize..80) {
            let mut random = StdRng::seed_from_u64(seed);
            let mut backoff = Backoff::new(Duration::from_millis(first), Duration::from_millis(max));
            for n in 0..steps {
                let ceiling = (first << n.min(20)).min(max);
                prop_assert!(backoff.next(&mut random) <= Duration::from_millis(ceiling));
            }
        }

        #[test]
        fn around_stays_around(seed: u64, mean in 1u64..100_000) {
            let mut random = StdRng::seed_from_u64(seed);
            let mean = Duration::from_millis(mean);
            let drawn = around(mean, 0.2, &mut random);
            prop_assert!(drawn >= mean.mul_f64(0.8) && drawn <= mean.mul_f64(1.2));
        }
    }
}
