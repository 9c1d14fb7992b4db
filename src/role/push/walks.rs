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
use super::tails::sleep_until;

/// Readers that are told in one piece of a walk: about a millisecond, with small messages.
const PART: usize = 64;
/// A pause that is shorter is not made.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// How fast bytes of logs are given to sockets. What sockets take by themselves counts, and walks
/// pause for it.
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
            tail.moved.swap(false, Ordering::SeqCst);
        }
        *readers = tail.readers.lock().clone();
        (self.told, self.gone) = (0, 0);
        true
    }
}

/// The walks that wait for a walker.
#[derive(Default)]
struct Queue {
    ready: VecDeque<Walk>,
    /// Walks that pause, until when. What is given out is paid for at a moment that never falls, so
    /// the first is due first.
    paused: VecDeque<(Instant, Walk)>,
}

impl Queue {
    /// Takes the next walk, or says when one is due, if one pauses.
    fn take(&mut self) -> Result<Walk, Option<Instant>> {
        let due = self.paused.front().map(|(due, _)| *due);
        if due.is_some_and(|due| due <= Instant::now())
            && let Some((_, walk)) = self.paused.pop_front()
        {
            return Ok(walk);
        }
        self.ready.pop_front().ok_or(due)
    }
}

/// The tails whose readers are to be told.
pub(super) struct Walks {
    waiting: Mutex<Queue>,
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
            let walk = Walk { tail: Arc::clone(tail), readers: Vec::new(), told: 0, gone: 0 };
            self.waiting.lock().ready.push_back(walk);
            self.queued.notify_one();
        }
    }

    /// Sockets were given so many bytes of logs.
    pub(super) fn given(&self, bytes: usize) {
        self.pace.give(bytes);
    }

    async fn next(&self) -> Walk {
        loop {
            let queued = self.queued.notified();
            let due = match self.waiting.lock().take() {
                Ok(walk) => return walk,
                Err(due) => due,
            };
            tokio::select! {
                () = queued => {}
                () = sleep_until(due) => {}
            }
        }
    }

    /// Tells what is queued, for ever. As many may run as there are threads. A walk pauses for what
    /// was given out; the first readers of another log are told meanwhile.
    pub(super) async fn run(&self) {
        loop {
            let mut walk = self.next().await;
            if walk.go_on() {
                self.put_back(walk);
                tokio::task::yield_now().await;
            }
        }
    }

    fn put_back(&self, walk: Walk) {
        let pause = self.pace.debt();
        let mut waiting = self.waiting.lock();
        if pause > SHORTEST_PAUSE {
            waiting.paused.push_back((Instant::now() + pause, walk));
        } else {
            waiting.ready.push_back(walk);
        }
        drop(waiting);
        self.queued.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DeviceId, LogId, Millis, Seq, TopicName, UserId};
    use crate::role::push::registry::Arrival;
    use crate::role::push::tail::TailMemory;

    /// A tail that has moved, and its one reader.
    fn moved(name: &str) -> (Arc<Tail>, Arc<SessionHandle>) {
        let log = LogId::Topic(TopicName::parse(name).unwrap());
        let tail = Arc::new(Tail::new(log, 1, Seq::at(9), Arc::new(TailMemory::new(1_000))));
        let user = UserId::parse(name).unwrap();
        let handle = SessionHandle::new(user, DeviceId::default(), None, 0, Arrival::default(), Millis(0));
        std::mem::forget(tail.join(&handle));
        tail.moved.store(true, Ordering::SeqCst);
        (tail, handle)
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_was_quiet_is_told_at_once_while_another_pauses() {
        let walks = Arc::new(Walks::new(1_000));
        let running = Arc::clone(&walks);
        let walker = tokio::spawn(async move { running.run().await });
        let ((busy, one), (quiet, other)) = (moved("busy"), moved("quiet"));
        // Ten seconds of what may be given out.
        walks.given(10_000);
        let is_told = |handle: &Arc<SessionHandle>| !handle.mailbox.is_empty();
        walks.tell(&busy);
        tokio::task::yield_now().await;
        assert!(is_told(&one), "the first part of a walk");
        assert!(busy.walking.load(Ordering::SeqCst), "it pauses");
        walks.tell(&quiet);
        tokio::task::yield_now().await;
        assert!(is_told(&other), "not behind the pause of another");
        let is_over = |tail: &Tail| !tail.walking.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert!(!is_over(&busy) && !is_over(&quiet));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(is_over(&busy) && is_over(&quiet));
        // It is queued again, and told with the next round.
        busy.moved.store(true, Ordering::SeqCst);
        walks.tell(&busy);
        assert!(!is_over(&busy));
        walker.abort();
    }
}
