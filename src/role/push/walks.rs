//! Telling the readers of logs that there is more.
//!
//! A log that has moved waits in a queue, once, until its readers were told. The walkers take turns
//! among the logs, a part of the readers at a time; of one log alone, each walker has a part of its
//! own. What is published to a log meanwhile is taken with it, in the same write to a socket: with
//! many logs that are busy, as with one. The sockets that were told write before the walker takes
//! its next part, so that the queue of the runtime stays short, and a publish does not wait behind
//! thousands of writes.

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

/// Some readers of a round, for one walker.
struct Part {
    tail: Arc<Tail>,
    readers: Arc<Vec<Weak<SessionHandle>>>,
    from: usize,
}

impl Part {
    fn tell(&self) {
        for reader in self.readers.iter().skip(self.from).take(PART) {
            match reader.upgrade() {
                Some(handle) => handle.look_at_logs(),
                None => drop(self.tail.gone.fetch_add(1, Ordering::Relaxed)),
            }
        }
    }
}

/// A tail whose readers are being told.
struct Walk {
    tail: Arc<Tail>,
    /// Those of them that are told in this round.
    readers: Arc<Vec<Weak<SessionHandle>>>,
    /// How many of the round's readers walkers have taken.
    taken: usize,
}

impl Walk {
    /// Takes the next part of the readers; `None` if the tail has not moved since the round began.
    /// A round may begin while parts of the one before are told: a reader that is told twice at
    /// once takes what there is in one of them.
    fn part(&mut self) -> Option<Part> {
        if self.taken >= self.readers.len() && !self.begins_again() {
            return None;
        }
        let from = self.taken;
        self.taken += PART;
        Some(Part { tail: Arc::clone(&self.tail), readers: Arc::clone(&self.readers), from })
    }

    /// Begins a round, if the tail has moved since the last one began. Otherwise whoever moves it
    /// next queues it again.
    fn begins_again(&mut self) -> bool {
        let Self { tail, readers, .. } = self;
        {
            // Not of this walk, which may be a new one without readers yet.
            let mut all = tail.readers.lock();
            if tail.gone.load(Ordering::Relaxed) * 4 > all.len() {
                tail.gone.store(0, Ordering::Relaxed);
                all.retain(|reader| reader.strong_count() > 0);
            }
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
        *readers = Arc::new(tail.readers.lock().clone());
        self.taken = 0;
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
            let walk = Walk { tail: Arc::clone(tail), readers: Arc::default(), taken: 0 };
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
    /// was given out; the first readers of another log are told meanwhile. Before the pause of a
    /// walk is known, each walker may have taken a part of it.
    pub(super) async fn run(&self) {
        loop {
            let mut walk = self.next().await;
            if let Some(part) = walk.part() {
                // Another walker takes the next part meanwhile.
                self.put_back(walk);
                part.tell();
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

    /// A tail that has moved, and so many readers.
    fn moved(name: &str, readers: usize) -> (Arc<Tail>, Vec<Arc<SessionHandle>>) {
        let log = LogId::Topic(TopicName::parse(name).unwrap());
        let tail = Arc::new(Tail::new(log, 1, Seq::at(9), Arc::new(TailMemory::new(1_000))));
        let user = UserId::parse(name).unwrap();
        let reader = |_| {
            let (device, from) = (DeviceId::default(), Arrival::default());
            let handle = SessionHandle::new(user.clone(), device, None, 0, from, Millis(0));
            std::mem::forget(tail.join(&handle));
            handle
        };
        let readers = (0..readers).map(reader).collect();
        tail.moved.store(true, Ordering::SeqCst);
        (tail, readers)
    }

    fn is_told(handle: &Arc<SessionHandle>) -> bool {
        !handle.mailbox.is_empty()
    }

    /// What a walker does before it tells a part.
    fn next_part(walks: &Walks) -> Option<Part> {
        let mut walk = walks.waiting.lock().take().ok()?;
        let part = walk.part()?;
        walks.put_back(walk);
        Some(part)
    }

    #[tokio::test]
    async fn several_walkers_tell_the_readers_of_one_log_and_none_is_left_out() {
        let walks = Walks::new(0);
        let (tail, readers) = moved("busy", 2 * PART + 1);
        walks.tell(&tail);
        let take = || next_part(&walks);
        let parts: Vec<Part> = std::iter::from_fn(take).collect();
        assert_eq!(parts.len(), 3, "nobody waits until a part was told");
        assert!(!tail.walking.load(Ordering::SeqCst), "nothing is left to take");
        parts[1].tell();
        let told: Vec<usize> = (0..readers.len()).filter(|n| is_told(&readers[*n])).collect();
        assert_eq!(told, (PART..2 * PART).collect::<Vec<_>>());
        // It moves while the other parts are told: all are told again.
        tail.moved.store(true, Ordering::SeqCst);
        walks.tell(&tail);
        let again = take().expect("a round of its own");
        parts.iter().for_each(Part::tell);
        assert!(readers.iter().all(is_told));
        readers.iter().for_each(|reader| drop(reader.mailbox.take()));
        std::iter::from_fn(take).chain([again]).for_each(|part| part.tell());
        assert!(readers.iter().all(is_told));
    }

    /// The tail moves again and again, just when a walk ends: in the end nobody waits to be told.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn walkers_on_several_threads_leave_nobody_untold() {
        for (readers, times) in [(5 * PART + 3, 200), (1, 50_000)] {
            leave_nobody_untold(readers, times).await;
        }
    }

    async fn leave_nobody_untold(readers: usize, times: usize) {
        let walks = Arc::new(Walks::new(0));
        let (tail, readers) = moved("busy", readers);
        let walkers: Vec<_> = (0..2).map(|_| Arc::clone(&walks)).collect();
        let walkers: Vec<_> =
            walkers.into_iter().map(|walks| tokio::spawn(async move { walks.run().await })).collect();
        for _ in 0..times {
            readers.iter().for_each(|reader| drop(reader.mailbox.take()));
            tail.moved.store(true, Ordering::SeqCst);
            walks.tell(&tail);
            let told = async {
                while !readers.iter().all(is_told) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), told).await.expect("all are told in time");
        }
        walkers.iter().for_each(tokio::task::JoinHandle::abort);
    }

    #[tokio::test]
    async fn readers_that_have_gone_are_taken_out_when_they_are_many() {
        let walks = Walks::new(0);
        let (tail, mut readers) = moved("busy", 10);
        readers.truncate(7);
        for _ in 0..2 {
            tail.moved.store(true, Ordering::SeqCst);
            walks.tell(&tail);
            let parts: Vec<Part> = std::iter::from_fn(|| next_part(&walks)).collect();
            parts.iter().for_each(Part::tell);
        }
        assert_eq!(tail.readers.lock().len(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_was_quiet_is_told_at_once_while_another_pauses() {
        let walks = Arc::new(Walks::new(1_000));
        let running = Arc::clone(&walks);
        let walker = tokio::spawn(async move { running.run().await });
        let ((busy, one), (quiet, other)) = (moved("busy", 1), moved("quiet", 1));
        // Ten seconds of what may be given out.
        walks.given(10_000);
        walks.tell(&busy);
        tokio::task::yield_now().await;
        assert!(is_told(&one[0]), "the first part of a walk");
        assert!(busy.walking.load(Ordering::SeqCst), "it pauses");
        walks.tell(&quiet);
        tokio::task::yield_now().await;
        assert!(is_told(&other[0]), "not behind the pause of another");
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
