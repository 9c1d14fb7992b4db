//! How long things take: histograms of seconds.

use std::time::Duration;

use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;

use super::Metrics;

/// Upper bounds of the buckets, in seconds (docs/protocol.md, Ops).
const BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// A histogram of durations. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Timing(Histogram);

impl Default for Timing {
    fn default() -> Self {
        Self(Histogram::new(BUCKETS))
    }
}

impl Timing {
    /// A histogram of this name, registered.
    #[must_use]
    pub fn register(metrics: &Metrics, name: &str, help: &str) -> Self {
        let this = Self::default();
        metrics.register(|r| r.register(name, help, this.0.clone()));
        this
    }

    /// Counts one duration.
    pub fn observe(&self, took: Duration) {
        self.0.observe(took.as_secs_f64());
    }

    /// Counts one duration in milliseconds.
    pub fn observe_ms(&self, took: u64) {
        self.0.observe(took as f64 / 1000.0);
    }
}

/// Makes the histograms of a family.
#[derive(Clone)]
struct Buckets;

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

/// A histogram for each of the values of one label, all shown from the start.
#[derive(Clone, Debug)]
pub struct TimingBy<const N: usize>([Timing; N]);

impl<const N: usize> Default for TimingBy<N> {
    /// Histograms that nobody sees.
    fn default() -> Self {
        Self(std::array::from_fn(|_| Timing::default()))
    }
}

impl<const N: usize> TimingBy<N> {
    /// Histograms of this name, one for each value of `label`, registered.
    #[must_use]
    pub fn register(
        metrics: &Metrics,
        (name, help): (&str, &str),
        label: &'static str,
        values: [&'static str; N],
    ) -> Self {
        let family: Family<[(&'static str, &'static str); 1], Histogram, Buckets> =
            Family::new_with_constructor(Buckets);
        let this = Self(values.map(|value| Timing(family.get_or_create(&[(label, value)]).clone())));
        metrics.register(|r| r.register(name, help, family));
        this
    }

    /// The histogram of the value at this place.
    #[must_use]
    pub fn at(&self, value: usize) -> &Timing {
        &self.0[value]
    }
}

/// How a request ended, in metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Accepted,
    /// It was refused for good.
    Refused,
    /// It could not be done now.
    Unavailable,
}

impl Outcome {
    /// The names in metrics, in the order of the variants.
    pub const NAMES: [&'static str; 3] = ["accepted", "refused", "unavailable"];

    /// The outcome that a status of HTTP stands for.
    #[must_use]
    pub const fn of_status(status: u16) -> Self {
        match status {
            0..=399 => Self::Accepted,
            500.. => Self::Unavailable,
            _ => Self::Refused,
        }
    }

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// On which way a message came to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// By dispatch to the node of the ring.
    Live,
    /// By dispatch to a node that has the user for other reasons.
    Displaced,
    /// It was read later, because the client was slow or out of credit.
    Behind,
    /// It was read later, because its hint was lost.
    Swept,
}

impl Path {
    /// The names in metrics, in the order of the variants.
    pub const NAMES: [&'static str; 4] = ["live", "displaced", "behind", "swept"];
}
