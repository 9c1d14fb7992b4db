//! A bounded queue of live messages, or of hints about logs, between two tasks. What has no room is
//! dropped, and the drop is remembered. If nothing waits and nothing is in flight, a batch may
//! bypass the queue.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::wire::peer::{LiveMessage, LogHint};

/// What waits in a queue, and how much of it may.
pub(super) trait Queued: Clone + Send + Sync + 'static {
    /// Most items in a queue.
    const ITEMS: usize;
    /// Most bytes of payload in a queue.
    const BYTES: usize;
    /// Most items taken at once.
    const BATCH: usize;

    /// Bytes of its payload.
    fn bytes(&self) -> usize;

    /// Whether others must be told if it is dropped.
    fn is_missed(&self) -> bool {
        true
    }
}

impl Queued for LiveMessage {
    /// Ten full batches, a fifth of a second at 50,000/s.
    const ITEMS: usize = 10_000;
    /// 500 of the largest messages, or 10,000 of 3 KiB.
    const BYTES: usize = 32 * 1024 * 1024;
    const BATCH: usize = 1_000;

    fn bytes(&self) -> usize {
        self.message.payload.len()
    }
}

impl Queued for LogHint {
    /// A message in a log is for many users, and few are published (docs/topics.md).
    const ITEMS: usize = 2_000;
    const BYTES: usize = 8 * 1024 * 1024;
    const BATCH: usize = 200;

    fn bytes(&self) -> usize {
        match self {
            Self::Message { message, .. } => message.payload.len(),
            Self::Memberships(users) => users.iter().map(|user| user.as_str().len()).sum(),
            Self::Look(_) => 0,
        }
    }

    /// Changes of memberships are found by the sweep of sessions.
    fn is_missed(&self) -> bool {
        !matches!(self, Self::Memberships(_))
    }
}

/// The queue.
pub(super) struct Backlog<T> {
    queue: Mutex<Queue<T>>,
    filled: Notify,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { queue: Mutex::default(), filled: Notify::new() }
    }
}

struct Queue<T> {
    waiting: VecDeque<T>,
    bytes: usize,
    /// Something was dropped; whoever gets the next batch must be told.
    missed: bool,
    /// The batch that was taken last is in flight.
    busy: bool,
    /// A batch that bypassed the queue is in flight.
    ahead: bool,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, missed: false, busy: false, ahead: false }
    }
}

impl<T: Queued> Backlog<T> {
    /// Enqueues `batch`. What has no room is dropped and marked. Returns how many messages were
    /// dropped.
    pub(super) fn put(&self, batch: Vec<T>) -> usize {
        let mut queue = self.queue.lock();
        let mut dropped = 0;
        for item in batch {
            let bytes = queue.bytes + item.bytes();
            if queue.waiting.len() < T::ITEMS && bytes <= T::BYTES {
                queue.bytes = bytes;
                queue.waiting.push_back(item);
            } else {
                dropped += 1;
                queue.missed |= item.is_missed();
            }
        }
        drop(queue);
        self.filled.notify_one();
        dropped
    }

    /// Something did not arrive; whoever gets the next batch must be told.
    pub(super) fn mark_missed(&self) {
        self.queue.lock().missed = true;
        self.filled.notify_one();
    }

    /// Lets a batch bypass the queue if nothing waits and nothing is in flight. Messages that are
    /// enqueued meanwhile stay until the returned guard is dropped, which says that the batch has
    /// arrived or was given up.
    pub(super) fn go_ahead(&self) -> Option<Ahead<'_, T>> {
        let mut queue = self.queue.lock();
        if !queue.is_idle() || queue.missed {
            return None;
        }
        queue.ahead = true;
        Some(Ahead(self))
    }

    /// Waits for a batch. Also returns whether something before it was dropped. Calling this again
    /// says that the previous batch has arrived or was given up. For one task only.
    pub(super) async fn take(&self) -> (Vec<T>, bool) {
        self.queue.lock().busy = false;
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            self.filled.notified().await;
        }
    }

    /// Whether nothing waits and nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.lock().is_idle()
    }

    fn try_take(&self) -> Option<(Vec<T>, bool)> {
        let mut queue = self.queue.lock();
        if queue.ahead || (queue.waiting.is_empty() && !queue.missed) {
            return None;
        }
        let count = queue.waiting.len().min(T::BATCH);
        let batch: Vec<T> = queue.waiting.drain(..count).collect();
        queue.bytes -= batch.iter().map(Queued::bytes).sum::<usize>();
        if queue.waiting.is_empty() {
            queue.waiting.shrink_to(T::BATCH);
        }
        queue.busy = true;
        Some((batch, std::mem::take(&mut queue.missed)))
    }
}

/// A batch that bypasses the queue, as long as it is in flight.
pub(super) struct Ahead<'a, T>(&'a Backlog<T>);

impl<T> Drop for Ahead<'_, T> {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.ahead = false;
        let next = !queue.waiting.is_empty() || queue.missed;
        drop(queue);
        if next {
            self.0.filled.notify_one();
        }
    }
}

impl<T> Queue<T> {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.busy && !self.ahead
    }
}
