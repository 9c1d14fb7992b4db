//! A bounded queue of live messages between two tasks. A message that has no room is dropped, and
//! the drop is remembered. If nothing waits and nothing is in flight, a batch may bypass the queue.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::wire::peer::LiveMessage;

/// Most messages in a queue: ten full batches, a fifth of a second at 50,000/s.
pub(super) const BACKLOG_MESSAGES: usize = 10_000;
/// Most bytes of payload in a queue: 500 of the largest messages, or 10,000 of 3 KiB.
pub(super) const BACKLOG_BYTES: usize = 32 * 1024 * 1024;
/// Most messages taken at once.
pub(super) const BATCH: usize = 1_000;

/// The queue.
#[derive(Default)]
pub(super) struct Backlog {
    queue: Mutex<Queue>,
    filled: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<LiveMessage>,
    bytes: usize,
    /// Something was dropped; whoever gets the next batch must be told.
    missed: bool,
    /// The batch that was taken last is in flight.
    busy: bool,
    /// A batch that bypassed the queue is in flight.
    ahead: bool,
}

impl Backlog {
    /// Enqueues `batch`. What has no room is dropped and marked. Returns how many messages were
    /// dropped.
    pub(super) fn put(&self, batch: Vec<LiveMessage>) -> usize {
        let mut queue = self.queue.lock();
        let mut dropped = 0;
        for live in batch {
            let bytes = queue.bytes + live.message.payload.len();
            if queue.waiting.len() < BACKLOG_MESSAGES && bytes <= BACKLOG_BYTES {
                queue.bytes = bytes;
                queue.waiting.push_back(live);
            } else {
                dropped += 1;
            }
        }
        queue.missed |= dropped > 0;
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
    pub(super) fn go_ahead(&self) -> Option<Ahead<'_>> {
        let mut queue = self.queue.lock();
        if !queue.is_idle() || queue.missed {
            return None;
        }
        queue.ahead = true;
        Some(Ahead(self))
    }

    /// Waits for a batch. Also returns whether something before it was dropped. Calling this again
    /// says that the previous batch has arrived or was given up. For one task only.
    pub(super) async fn take(&self) -> (Vec<LiveMessage>, bool) {
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

    fn try_take(&self) -> Option<(Vec<LiveMessage>, bool)> {
        let mut queue = self.queue.lock();
        if queue.ahead || (queue.waiting.is_empty() && !queue.missed) {
            return None;
        }
        let count = queue.waiting.len().min(BATCH);
        let batch: Vec<LiveMessage> = queue.waiting.drain(..count).collect();
        queue.bytes -= batch.iter().map(|live| live.message.payload.len()).sum::<usize>();
        if queue.waiting.is_empty() {
            queue.waiting.shrink_to(BATCH);
        }
        queue.busy = true;
        Some((batch, std::mem::take(&mut queue.missed)))
    }
}

/// A batch that bypasses the queue, as long as it is in flight.
pub(super) struct Ahead<'a>(&'a Backlog);

impl Drop for Ahead<'_> {
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

impl Queue {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.busy && !self.ahead
    }
}
