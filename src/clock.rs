//! The only access to the time of day. Whatever needs the time is given a [`Clock`]; tests pass one
//! that stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::message::Millis;

/// Tells the time. Cheap to clone.
#[derive(Clone, Default)]
pub struct Clock {
    /// The time of a standing clock; `None` for the machine's clock.
    by_hand: Option<Arc<AtomicU64>>,
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub const fn system() -> Self {
        Self { by_hand: None }
    }

    /// A clock that shows `start` until it is advanced.
    #[must_use]
    pub fn standing(start: Millis) -> Self {
        Self { by_hand: Some(Arc::new(AtomicU64::new(start.0))) }
    }

    /// The current time. A machine whose clock is before 1970 counts as 1970.
    #[must_use]
    pub fn now(&self) -> Millis {
        match &self.by_hand {
            Some(at) => Millis(at.load(Ordering::Relaxed)),
            None => system_now(),
        }
    }

    /// Time since an arbitrary point in the past. It counts on while the machine is suspended, and
    /// nobody can set it.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        match &self.by_hand {
            Some(at) => Duration::from_millis(at.load(Ordering::Relaxed)),
            None => {
                let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
                Duration::new(boot.tv_sec.unsigned_abs(), u32::try_from(boot.tv_nsec).unwrap_or(0))
            }
        }
    }

    /// Advances a standing clock by `ms`. Does nothing to the machine's clock.
    pub fn advance(&self, ms: u64) {
        if let Some(at) = &self.by_hand {
            at.fetch_add(ms, Ordering::Relaxed);
        }
    }
}

#[allow(clippy::disallowed_methods)]
fn system_now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
