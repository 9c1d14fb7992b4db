//! What happened in the last minute: quantiles of durations, for those who have no Prometheus at
//! hand.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Over which time quantiles are taken.
const WINDOW: Duration = Duration::from_secs(60);
/// Shortest time between two marks: the window is longer by at most as much.
const MARK_EVERY: Duration = Duration::from_secs(2);
/// Up to this many milliseconds each has a bucket of its own.
const EXACT: u64 = 16;
/// Buckets of each doubling above: a quantile is right within an eighth.
const PER_DOUBLING: u64 = 8;
/// Doublings of [`EXACT`] that are told apart, the last up to 17 minutes.
const DOUBLINGS: u64 = 16;
const BUCKETS: usize = (EXACT + DOUBLINGS * PER_DOUBLING) as usize;

type Counts = [u64; BUCKETS];

/// Counts durations. Cheap to clone.
#[derive(Clone)]
pub struct Recent(Arc<Inner>);

struct Inner {
    counts: [AtomicU64; BUCKETS],
    /// What was counted at earlier times, the oldest first. Boxed, as there are up to thirty.
    marks: Mutex<VecDeque<(Instant, Box<Counts>)>>,
}

impl Default for Recent {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Self(Arc::new(Inner { counts, marks: Mutex::default() }))
    }
}

impl Recent {
    /// Counts a duration, in milliseconds.
    pub fn observe_ms(&self, took: u64) {
        self.0.counts[bucket_of(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// These quantiles, from 0.0 to 1.0, of what was counted in the minute before `now`, in
    /// milliseconds; `None` if nothing was. The first minute begins with the first call.
    #[must_use]
    pub fn quantiles<const N: usize>(&self, now: Instant, asked: [f64; N]) -> Option<[u64; N]> {
        let counted: Box<Counts> =
            Box::new(std::array::from_fn(|n| self.0.counts[n].load(Ordering::Relaxed)));
        let mut marks = self.0.marks.lock();
        let age = |at: Instant| now.saturating_duration_since(at);
        while marks.get(1).is_some_and(|(at, _)| age(*at) >= WINDOW) {
            marks.pop_front();
        }
        let since: Counts = match marks.front() {
            Some((_, before)) => std::array::from_fn(|n| counted[n].saturating_sub(before[n])),
            None => *counted,
        };
        if marks.back().is_none_or(|(at, _)| age(*at) >= MARK_EVERY) {
            if marks.is_empty() {
                // Whatever was counted before the first call is of the first minute.
                marks.push_back((now, Box::new([0; BUCKETS])));
            } else {
                marks.push_back((now, counted));
            }
        }
        drop(marks);
        let total: u64 = since.iter().sum();
        (total > 0).then(|| asked.map(|quantile| quantile_of(&since, total, quantile)))
    }
}

/// The value of the bucket in which the quantile lies.
fn quantile_of(counts: &Counts, total: u64, quantile: f64) -> u64 {
    let rank = ((quantile * total as f64).ceil() as u64).clamp(1, total);
    let mut below = 0;
    for (n, count) in counts.iter().enumerate() {
        below += count;
        if below >= rank {
            return value_of(n as u64);
        }
    }
    value_of(BUCKETS as u64 - 1)
}

fn bucket_of(took: u64) -> usize {
    if took < EXACT {
        return took as usize;
    }
    // The highest bit says which doubling it is, the next three which part of it.
    let doubling = u64::from(took.ilog2() - EXACT.ilog2());
    let part = (took >> (took.ilog2() - 3)) & (PER_DOUBLING - 1);
    ((EXACT + doubling * PER_DOUBLING + part) as usize).min(BUCKETS - 1)
}

/// The middle of a bucket.
fn value_of(bucket: u64) -> u64 {
    if bucket < EXACT {
        return bucket;
    }
    let (doubling, part) = ((bucket - EXACT) / PER_DOUBLING, (bucket - EXACT) % PER_DOUBLING);
    let width = (EXACT << doubling) / PER_DOUBLING;
    (EXACT << doubling) + part * width + width / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_minute_later_what_was_is_forgotten() {
        let (recent, start) = (Recent::default(), Instant::now());
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(recent.quantiles(start, [0.5, 0.99]), None);
        (1..=100).for_each(|took| recent.observe_ms(took / 10));
        recent.observe_ms(5_000);
        assert_eq!(recent.quantiles(at(1), [0.5]), Some([5]));
        let [worst] = recent.quantiles(at(30), [1.0]).unwrap();
        assert!((4_375..=5_625).contains(&worst), "{worst}");
        recent.observe_ms(3);
        // What came before the mark of 30 s is over at 90 s and a little.
        assert_eq!(recent.quantiles(at(92), [0.5, 1.0]), Some([3, 3]));
        assert_eq!(recent.quantiles(at(300), [0.5]), None);
    }

    proptest! {
        #[test]
        fn a_value_is_right_within_an_eighth(took in 0u64..1_000_000) {
            let value = value_of(bucket_of(took) as u64);
            prop_assert!(value.abs_diff(took) * 8 <= took.max(8), "{took} {value}");
        }

        #[test]
        fn none_is_too_large(took: u64) {
            prop_assert!(bucket_of(took) < BUCKETS);
        }
    }
}
