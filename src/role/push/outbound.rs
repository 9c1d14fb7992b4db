//! The bytes that wait for all sockets of a node together, and how many of them logs may add to.
//!
//! What a message to everyone puts before sockets that read slowly must not fill the memory of a
//! node. Beyond the limit logs give nothing; inboxes go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::telemetry::Gauge;

/// A socket's bytes are counted in steps of this size: a socket that keeps up touches no memory
/// that it shares with others.
const STEP_BYTES: usize = 4 * 1024;
/// Logs that were held back go on once this part of the limit is free, in eighths.
const ROOM_EIGHTHS: usize = 1;

/// Little waits: less than the limit divided by this.
const EASE_PART: usize = 16;

/// What waits for the sockets of a node.
#[derive(Debug)]
pub(super) struct Outbound {
    limit: usize,
    /// The same of all nodes of the process, as it is shown.
    shown: Gauge,
    held: AtomicUsize,
    /// Whether a socket was given nothing since there was room last.
    held_back: AtomicBool,
    /// There is room again for those that were held back.
    room: Notify,
}

impl Outbound {
    /// With room for this many bytes. They are shown by the gauge.
    pub(super) fn new(limit: usize, shown: Gauge) -> Arc<Self> {
        let (held, held_back) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { limit, shown, held, held_back, room: Notify::new() })
    }

    /// Bytes that wait, but for less than 4 KiB of each socket.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether so little waits that each socket may be given several frames at once.
    pub(super) fn is_at_ease(&self) -> bool {
        self.held() < self.limit / EASE_PART
    }

    /// Whether logs may give something. If not, [`Outbound::has_room_again`] resolves later.
    pub(super) fn has_room(&self) -> bool {
        let held = self.held();
        // Whoever was held back comes first: the others wait with it until there is room for all.
        if held < self.enough() || held < self.limit && !self.held_back.load(Ordering::SeqCst) {
            return true;
        }
        self.held_back.store(true, Ordering::SeqCst);
        // Between the two, room may have come back, for which nobody was to be told.
        self.tell_of_room();
        false
    }

    /// Resolves when logs that were held back may go on.
    pub(super) async fn has_room_again(&self) {
        self.room.notified().await;
    }

    /// Below this many bytes there is room again.
    fn enough(&self) -> usize {
        self.limit - self.limit * ROOM_EIGHTHS / 8
    }

    fn tell_of_room(&self) {
        if self.held.load(Ordering::SeqCst) < self.enough() && self.held_back.swap(false, Ordering::SeqCst) {
            self.room.notify_one();
        }
    }

    fn change(&self, before: usize, now: usize) {
        if now >= before {
            self.held.fetch_add(now - before, Ordering::SeqCst);
            self.shown.inc_by((now - before) as i64);
        } else {
            self.held.fetch_sub(before - now, Ordering::SeqCst);
            self.shown.dec_by((before - now) as i64);
            self.tell_of_room();
        }
    }
}

/// The bytes of one socket. They are returned when this is dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    of: Arc<Outbound>,
    counted: usize,
}

impl Waiting {
    /// None, of a new socket.
    pub(super) fn new(of: &Arc<Outbound>) -> Self {
        Self { of: Arc::clone(of), counted: 0 }
    }

    /// So many bytes wait now.
    pub(super) fn set(&mut self, bytes: usize) {
        let counted = bytes - bytes % STEP_BYTES;
        if counted != self.counted {
            self.of.change(self.counted, counted);
            self.counted = counted;
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn logs_are_held_back_beyond_the_limit_and_told_of_room() {
        let outbound = Outbound::new(64 * 1024, Gauge::default());
        let (mut one, mut two) = (Waiting::new(&outbound), Waiting::new(&outbound));
        one.set(4 * 1024 - 1);
        assert_eq!((outbound.held(), outbound.has_room()), (0, true), "it keeps up");
        one.set(40 * 1024 + 1);
        two.set(20 * 1024);
        assert_eq!((outbound.held(), outbound.has_room()), (60 * 1024, true), "below the limit");
        two.set(24 * 1024);
        assert!(!outbound.has_room());
        two.set(20 * 1024);
        assert_eq!(outbound.has_room_again().now_or_never(), None, "an eighth must be free");
        assert!(!outbound.has_room(), "nor is there room for others meanwhile");
        drop(two);
        assert_eq!(outbound.has_room_again().now_or_never(), Some(()));
        assert!(outbound.has_room());
        drop(one);
        assert_eq!((outbound.held(), outbound.has_room_again().now_or_never()), (0, None), "nobody waits");
    }

    /// Room that comes back between the look and the note that somebody waits is not missed.
    #[test]
    fn whoever_is_held_back_is_always_told() {
        let outbound = Outbound::new(STEP_BYTES, Gauge::default());
        for _ in 0..2_000 {
            let mut socket = Waiting::new(&outbound);
            socket.set(STEP_BYTES);
            let other = Arc::clone(&outbound);
            let looks = std::thread::spawn(move || other.has_room());
            drop(socket);
            let is_held_back = !looks.join().unwrap();
            let told = outbound.has_room_again().now_or_never().is_some();
            assert!(told || !is_held_back, "held back, and never told");
        }
    }
}
