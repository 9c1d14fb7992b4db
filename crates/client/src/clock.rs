//! The time of day, by which a client finds that its machine slept.

use std::time::{Duration, SystemTime};

use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often the clock is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// By how much it must have moved meanwhile: the machine slept, and the line may be dead.
const JUMP: Duration = Duration::from_secs(10);

/// Tells that the clock has jumped.
pub(crate) struct Clock {
    looks: Interval,
    seen: SystemTime,
}

impl Clock {
    /// A clock that was seen just now.
    pub(crate) fn new() -> Self {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { looks, seen: time_of_day() }
    }

    /// Resolves when the clock has jumped, forwards or back, since it was seen last.
    pub(crate) async fn jumps(&mut self) {
        loop {
            self.looks.tick().await;
            let now = time_of_day();
            let moved = now.duration_since(self.seen).unwrap_or_else(|back| back.duration());
            self.seen = now;
            if moved > JUMP {
                return;
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place of the client that asks for it")]
fn time_of_day() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_forwards_or_back_has_jumped_once() {
        let mut clock = Clock::new();
        for seen in [time_of_day() - JUMP * 2, time_of_day() + JUMP * 2] {
            clock.seen = seen;
            clock.jumps().await;
            let again = tokio::time::timeout(LOOK_EVERY * 10, clock.jumps()).await;
            assert!(again.is_err(), "it was seen");
        }
    }
}
