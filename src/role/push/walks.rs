//! Telling the readers of logs that there is more.
//!
//! A log that has moved waits in a queue, once, until its readers were told. The walkers take turns
//! among the logs, a part of the readers at a time. What is published to a log meanwhile is taken
//! with it, in the same write to a socket: with many logs that are busy, as with one. The sockets
//! that were told write before the next part is, so that the queue of the runtime stays short, and
//! a publish does not wait behind thousands of writes.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::registry::SessionHandle;
use super::tail::Tail;

/// Sockets that are told in one piece of a walk: about a millisecond.
const PART: usize = 64;
/// A rest that is shorter is not taken.
const SHORTEST_REST: Duration = Duration::from_millis(1);

/// How fast bytes of logs are given to sockets. What sockets take by themselves counts, and walks
/// rest for it.
struct Pace {
    per_s: u64,
    /// When what was given out so far is paid for.
    paid: Mutex<Instant>,
}

impl Pace {
    /// Notes that so many bytes were given out.
    fn give(&self, bytes: usize) {
        if self.per_s > 0 && bytes > 0 {
            let mut paid = self.paid.lock();
            let cost = Duration::from_secs_f64(bytes as f64 / self.per_s as f64);
            *paid = (*paid).max(Instant::now()) + cost;
        }
    }

    /// How long it takes until what was given out is paid for.
    fn debt(&self) -> Duration {
        if self.per_s == 0 {
            return Duration::ZERO;
        }
        self.paid.lock().saturating_duration_since(Instant::now())
    }
}

/// A tail whose readers are being told.
struct Walk {
    tail: Arc<Tail>,
    /// Those of them that are told in this round.
    readers: Vec<Weak<SessionHandle>>,
    /// How many of them were told, and how many have gone.
    told: usize,
    gone: usize,
}

impl Walk {
    /// Tells the next part of the readers. Returns whether there are more, or news for all.
    fn go_on(&mut self) -> bool {
        if self.told == self.readers.len() && !self.begins_again() {
            return false;
        }
        let part = self.readers.iter().skip(self.told).take(PART);
        self.told += part.len();
        for reader in part {
            match reader.upgrade() {
                Some(handle) => handle.look_at_logs(),
                None => self.gone += 1,
            }
        }
        true
    }

    /// Begins a round, if the tail has moved since the last one began. Otherwise whoever moves it
    /// next queues it again.
    fn begins_again(&mut self) -> bool {
        let Self { tail, readers, gone, .. } = self;
        if *gone * 4 > readers.len() {
            tail.readers.lock().retain(|reader| reader.strong_count() > 0);
        }
        if !tail.moved.swap(false, Ordering::SeqCst) {
            // In one order with those who say that it has moved: it may have done so before the
            // mark was taken back.
            tail.walking.store(false, Ordering::SeqCst);
            if !tail.moved.load(Ordering::SeqCst) || tail.walking.swap(true, Ordering::SeqCst) {
                return false;
            }
            tail.moved.store(false, Ordering::SeqCst);
        }
        *readers = tail.readers.lock().clone();
        (self.told, self.gone) = (0, 0);
        true
    }
}

/// The tails whose readers are to be told.
pub(super) struct Walks {
    waiting: Mutex<VecDeque<Walk>>,
    queued: Notify,
    pace: Pace,
}

impl Walks {
    /// No walks yet. `bytes_per_s` is what all of them give to sockets at the most; 0: any number.
    pub(super) fn new(bytes_per_s: u64) -> Self {
        let pace = Pace { per_s: bytes_per_s, paid: Mutex::new(Instant::now()) };
        Self { waiting: Mutex::default(), queued: Notify::new(), pace }
    }

    /// Has the readers of a tail told, unless they are being told.
    pub(super) fn tell(&self, tail: &Arc<Tail>) {
        if !tail.walking.swap(true, Ordering::SeqCst) {
            self.queue(Walk { tail: Arc::clone(tail), readers: Vec::new(), told: 0, gone: 0 });
        }
    }

    /// Sockets were given so many bytes of logs.
    pub(super) fn given(&self, bytes: usize) {
        self.pace.give(bytes);
    }

    fn queue(&self, walk: Walk) {
        self.waiting.lock().push_back(walk);
        self.queued.notify_one();
    }

    async fn next(&self) -> Walk {
        loop {
            let queued = self.queued.notified();
            if let Some(walk) = self.waiting.lock().pop_front() {
                return walk;
            }
            queued.await;
        }
    }

    /// Tells what is queued, for ever. As many may run as there are threads.
    pub(super) async fn run(&self) {
        loop {
            let mut walk = self.next().await;
            if walk.go_on() {
                self.queue(walk);
                let rest = self.pace.debt();
                if rest > SHORTEST_REST {
                    tokio::time::sleep(rest).await;
                } else {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}
