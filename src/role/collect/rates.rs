//! How much may be published to logs: a message in a log is for many users.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::CollectLimits;
use crate::live::Live;
use crate::message::LogId;

/// Logs whose budgets are kept. Above that, those that are full again are dropped.
const KEPT: usize = 10_000;

/// The limits of publishes to logs.
#[derive(Debug, Clone, Copy)]
pub struct LogLimits {
    /// Largest payload of a message to a topic, in bytes.
    pub topic_bytes: usize,
    /// Largest payload of a message to everyone, in bytes.
    pub everyone_bytes: usize,
    /// Publishes to one topic per second, with as many at once.
    pub topic_per_s: u32,
    /// Publishes to everyone per second, with as many at once.
    pub everyone_per_s: u32,
}

impl LogLimits {
    /// Largest payload in a log, in bytes.
    pub(super) fn bytes_of(&self, log: &LogId) -> usize {
        if log.topic().is_some() { self.topic_bytes } else { self.everyone_bytes }
    }

    fn per_s_of(&self, log: &LogId) -> u32 {
        if log.topic().is_some() { self.topic_per_s } else { self.everyone_per_s }
    }
}

/// What may still be published now.
pub(super) struct Rates {
    limits: Live<CollectLimits>,
    budgets: Mutex<HashMap<LogId, Budget>>,
}

#[derive(Clone, Copy)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    /// What is left at `now`, where `per_s` come back each second.
    fn left_at(&self, now: Instant, per_s: f64) -> f64 {
        (self.left + now.saturating_duration_since(self.at).as_secs_f64() * per_s).min(per_s)
    }
}

impl Rates {
    pub(super) fn new(limits: Live<CollectLimits>) -> Self {
        Self { limits, budgets: Mutex::default() }
    }

    /// Takes one publish to this log out of its budget. Returns whether there was one left.
    pub(super) fn try_take(&self, log: &LogId, now: Instant) -> bool {
        let limits = self.limits.get().logs;
        let per_s = f64::from(limits.per_s_of(log));
        let mut budgets = self.budgets.lock();
        if budgets.len() >= KEPT && !budgets.contains_key(log) {
            let full = |log: &LogId, budget: &Budget| {
                let per_s = f64::from(limits.per_s_of(log));
                budget.left_at(now, per_s) >= per_s
            };
            budgets.retain(|log, budget| !full(log, budget));
        }
        let budget = budgets.entry(log.clone()).or_insert(Budget { left: per_s, at: now });
        let left = budget.left_at(now, per_s);
        let taken = left >= 1.0;
        *budget = Budget { left: if taken { left - 1.0 } else { left }, at: now };
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::TopicName;
    use std::time::Duration;

    #[test]
    fn each_log_has_a_second_s_worth_at_once_and_then_its_rate() {
        let limits = LogLimits { topic_bytes: 1, everyone_bytes: 1, topic_per_s: 100, everyone_per_s: 10 };
        let limits =
            CollectLimits { ttl_s: 1, member_lists_bytes: 0, logs: limits, open: Default::default() };
        let (rates, start) = (Rates::new(Live::new(limits)), Instant::now());
        let topic = |n: usize| LogId::Topic(TopicName::parse(&format!("t{n}")).unwrap());
        let count = |log: &LogId, now| (0..1_000).filter(|_| rates.try_take(log, now)).count();
        assert_eq!((count(&LogId::Everyone, start), count(&topic(0), start)), (10, 100));
        assert_eq!(count(&topic(1), start), 100, "each topic has its own");
        let later = start + Duration::from_millis(500);
        assert_eq!((count(&LogId::Everyone, later), count(&topic(0), later)), (5, 50));
        // Those that are full again are dropped, and only those.
        let hour = start + Duration::from_secs(3_600);
        assert_eq!(count(&topic(2), hour), 100);
        assert!((3..KEPT + 10).all(|n| rates.try_take(&topic(n), hour)));
        assert_eq!(count(&topic(2), hour), 0);
    }
}
