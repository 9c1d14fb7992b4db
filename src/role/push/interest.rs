//! This node says which logs it reads, so that routers send it the messages of these alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::tails::Tails;
use crate::interest::{Interest, Reader};

/// The least time between two changes that are published.
const EVERY: Duration = Duration::from_millis(250);
/// The same, after the registry could not be reached.
const RETRY: Duration = Duration::from_secs(1);
/// How often what has not changed is published again: well within its lease.
const RENEW: Duration = Duration::from_secs(3);
/// A bit that is published later than this after its log was begun may be seen by a router only
/// after the tail has looked for the second time ([`LOOK_AGAIN`](super::tails::LOOK_AGAIN)).
const LATE: Duration = Duration::from_millis(500);

/// Publishes the interest of this node.
pub(super) struct InterestWriter {
    interest: Arc<dyn Interest>,
    reader: Reader,
    tails: Arc<Tails>,
    /// Routers may have lost what was published, or have never seen it.
    is_behind: AtomicBool,
}

impl InterestWriter {
    pub(super) fn new(interest: Arc<dyn Interest>, reader: Reader, tails: Arc<Tails>) -> Self {
        Self { interest, reader, tails, is_behind: AtomicBool::new(false) }
    }

    /// What was published may be lost: it is published again, and all tails look twice.
    pub(super) fn write_again(&self) {
        self.is_behind.store(true, Ordering::SeqCst);
        self.tails.reads_changed.notify_one();
    }

    /// Publishes each change, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut published = None;
        loop {
            let (buckets, changed_at) = self.tails.buckets();
            let buckets = Arc::new(buckets);
            let was_behind = self.is_behind.swap(false, Ordering::SeqCst);
            let written = self.interest.publish(&self.reader, Arc::clone(&buckets)).await;
            self.tails.are_known(written.is_ok());
            match &written {
                Err(error) => {
                    tracing::debug!(%error, "which logs are read here could not be published yet");
                    self.is_behind.store(true, Ordering::SeqCst);
                }
                Ok(has_changed) => {
                    // The registry has fallen back to what it had before.
                    let was_lost = *has_changed && published.as_ref() == Some(&buckets);
                    if was_behind || was_lost || changed_at.is_some_and(|at| at.elapsed() > LATE) {
                        self.tails.look_twice();
                    }
                    published = Some(buckets);
                }
            }
            tokio::time::sleep(if written.is_ok() { EVERY } else { RETRY }).await;
            if !self.is_behind.load(Ordering::SeqCst) {
                let _ = tokio::time::timeout(RENEW, self.tails.reads_changed.notified()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tails::LOOK_AGAIN;
    use super::*;
    use crate::interest::STALE_AFTER;
    use crate::interest::redis::seen_after;
    use crate::membership::keeper::Times;

    #[test]
    fn a_tail_looks_again_when_every_router_knows_of_it() {
        for known in [seen_after(Times::default().poll), STALE_AFTER] {
            assert!(LATE + known < LOOK_AGAIN, "{known:?}");
        }
    }
}
