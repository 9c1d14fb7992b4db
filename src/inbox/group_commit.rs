//! Group commit: appends that arrive while a write is in flight are written together by the next
//! write.
//!
//! An adapter starts one writer for its store and says how it writes: on a thread of its own, or on
//! the runtime. A blocking store is written by the thread itself, which also answers: the answers
//! of a write leave when it ends, and the next write begins at once, whatever else the runtime has
//! to do.
//!
//! What is published to topics waits in a queue of its own, and few of it join each write. So a
//! message to a user waits for at most 200 of them (`TOPIC_PART`), however many members a topic
//! has.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::{Append, Appended, Inbox, InboxError};
use crate::message::{Message, Seq, UserId};
use crate::tasks::raised;

/// Most appends that wait in one process (docs/design.md, section 11), and as many of topics.
pub const WAITING_APPENDS: usize = 10_000;
/// Most bytes of their payloads.
pub const WAITING_BYTES: usize = 32 * 1024 * 1024;
/// Most appends in one write.
const BATCH: usize = 1_000;
/// Most appends of topics in one write.
const TOPIC_PART: usize = 200;

/// How appends are gathered into writes. After a pause, the first append never waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupCommit {
    /// Shortest time between the beginnings of two writes.
    pub every: Duration,
    /// This many appends do not wait for `every`.
    pub enough: usize,
}

/// The outcome of an append for its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// The message is on stable storage at this position.
    Stored(Seq),
    /// A message with this id and payload was stored before, at this position.
    Duplicate(Seq),
    /// A message with this id and another payload was stored before.
    Conflict,
}

/// Resolves when the append was written, or could not be. If it is dropped before the write begins,
/// nothing is written. It fails when the writer ends.
pub type PendingReceipt = oneshot::Receiver<Result<Receipt, InboxError>>;

/// Too many appends wait for the writer ([`WAITING_APPENDS`], [`WAITING_BYTES`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many messages wait to be stored")]
pub struct TooManyWaiting;

/// Is told of every write, by whoever writes.
pub trait WriteObserver: Send + Sync + 'static {
    /// A write of so many appends begins.
    fn writing(&self, count: usize);
    /// An append was answered so long after it was handed over.
    fn took(&self, _: Duration) {}
    /// These messages were stored, in this order. Their senders were answered, or have gone.
    fn stored(&self, messages: Vec<(UserId, Arc<Message>)>);
}

/// Hands appends to the writer of a store. Cheap to clone.
#[derive(Clone)]
pub struct Appender {
    writer: Arc<Writer>,
}

impl Appender {
    /// Starts a writer on a thread of its own, for an inbox whose [`Inbox::append`] blocks the
    /// thread that polls it. The writer ends with `tasks`.
    pub(super) fn on_thread(
        inbox: Arc<dyn Inbox>,
        gathering: GroupCommit,
        observer: Arc<dyn WriteObserver>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        Self::start(inbox, gathering, observer, tasks, true)
    }

    /// Starts a writer whose writes run on the runtime: every response of a database driver would
    /// otherwise wake the writer's thread by way of another. The writer ends with `tasks`.
    pub(super) fn on_runtime(
        inbox: Arc<dyn Inbox>,
        gathering: GroupCommit,
        observer: Arc<dyn WriteObserver>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        Self::start(inbox, gathering, observer, tasks, false)
    }

    fn start(
        inbox: Arc<dyn Inbox>,
        gathering: GroupCommit,
        observer: Arc<dyn WriteObserver>,
        tasks: &mut JoinSet<()>,
        blocks: bool,
    ) -> Self {
        let writer = Arc::new(Writer {
            inbox,
            gathering,
            observer,
            blocks,
            waiting: Mutex::default(),
            filled: Condvar::new(),
        });
        let (running, runtime) = (Arc::clone(&writer), Handle::current());
        tasks.spawn_blocking(move || running.run(&runtime));
        // A thread cannot be aborted. This task can, and ends the thread.
        let ends = EndsWriter(Arc::clone(&writer));
        tasks.spawn(async move {
            let _ends = ends;
            std::future::pending::<()>().await;
        });
        Self { writer }
    }

    /// Hands over one append. `bytes` is what it accounts for: the recipients of a publish share
    /// its payload, and one of them accounts for it.
    ///
    /// # Errors
    ///
    /// [`TooManyWaiting`]; nothing is stored then.
    pub fn submit(&self, append: Append, bytes: usize) -> Result<PendingReceipt, TooManyWaiting> {
        let mut waiting = self.writer.waiting.lock();
        let (answer, receipt) = oneshot::channel();
        if waiting.over {
            return Ok(receipt);
        }
        // In a store of logs, nothing is divided.
        let by_topic = append.via.as_deref().is_some_and(|via| via.inbox().is_some());
        let lane = if by_topic { &mut waiting.topics } else { &mut waiting.users };
        if lane.appends.len() >= WAITING_APPENDS || lane.bytes + bytes > WAITING_BYTES {
            return Err(TooManyWaiting);
        }
        lane.bytes += bytes;
        lane.appends.push_back(Queued { append, answer, bytes, at: Instant::now() });
        let count = waiting.count();
        let resting = std::mem::take(&mut waiting.resting);
        drop(waiting);
        // A writer that waits with a deadline looks by itself; waking it would be in vain.
        if resting || count == self.writer.gathering.enough {
            self.writer.filled.notify_one();
        }
        Ok(receipt)
    }
}

struct Writer {
    inbox: Arc<dyn Inbox>,
    gathering: GroupCommit,
    observer: Arc<dyn WriteObserver>,
    /// The inbox blocks the thread that polls it.
    blocks: bool,
    waiting: Mutex<Waiting>,
    /// The writer waits for appends, or for enough of them.
    filled: Condvar,
}

#[derive(Default)]
struct Waiting {
    users: Lane,
    topics: Lane,
    /// The writer waits for the next append without a deadline.
    resting: bool,
    /// The writer ends.
    over: bool,
}

/// Appends that wait in their order, and the bytes that they account for.
#[derive(Default)]
struct Lane {
    appends: VecDeque<Queued>,
    bytes: usize,
}

struct Queued {
    append: Append,
    answer: Answer,
    bytes: usize,
    /// When it was handed over.
    at: Instant,
}

type Answer = oneshot::Sender<Result<Receipt, InboxError>>;

impl Writer {
    /// Writes what waits, batch after batch, and answers. Blocks its thread.
    fn run(self: Arc<Self>, runtime: &Handle) {
        // Also if it panics: whoever waits is told.
        let _ends = EndsWriter(Arc::clone(&self));
        let mut last_began = None;
        while let Some(batch) = self.next_batch(last_began) {
            last_began = Some(Instant::now());
            self.observer.writing(batch.len());
            let writing = Arc::clone(&self).write(batch);
            if self.blocks {
                runtime.block_on(writing);
            } else {
                raised(runtime.block_on(runtime.spawn(writing)));
            }
        }
    }

    /// Waits for the next batch; `None` when there will be none. A write right after another one
    /// waits a moment for more: it costs the same for one message as for many.
    fn next_batch(&self, last_began: Option<Instant>) -> Option<Vec<Queued>> {
        let GroupCommit { every, enough } = self.gathering;
        let mut waiting = self.waiting.lock();
        while !waiting.over {
            let left = last_began.map_or(Duration::ZERO, |began| every.saturating_sub(began.elapsed()));
            if waiting.count() < enough && !left.is_zero() {
                self.filled.wait_for(&mut waiting, left);
            } else if waiting.count() == 0 {
                waiting.resting = true;
                self.filled.wait(&mut waiting);
            } else {
                let batch = waiting.take();
                if !batch.is_empty() {
                    return Some(batch);
                }
            }
        }
        None
    }

    async fn write(self: Arc<Self>, batch: Vec<Queued>) {
        let with_user = |Queued { append, answer, at, .. }| {
            let user = append.user.clone();
            (append, (user, answer, at))
        };
        let (appends, to): (Vec<Append>, Vec<_>) = batch.into_iter().map(with_user).unzip();
        let outcomes = self.inbox.append(appends).await;
        self.answer(to, outcomes);
    }

    fn answer(&self, to: Vec<(UserId, Answer, Instant)>, outcomes: Vec<Result<Appended, InboxError>>) {
        let mut stored = Vec::with_capacity(to.len());
        let now = Instant::now();
        for ((user, to, at), outcome) in to.into_iter().zip(outcomes) {
            if outcome.is_ok() {
                self.observer.took(now.saturating_duration_since(at));
            }
            let receipt = outcome.map(|appended| match appended {
                Appended::Stored(message) => {
                    let seq = message.seq;
                    stored.push((user, message));
                    Receipt::Stored(seq)
                }
                Appended::Duplicate(seq) => Receipt::Duplicate(seq),
                Appended::Conflict => Receipt::Conflict,
            });
            // A sender that has gone needs no answer.
            let _ = to.send(receipt);
        }
        if !stored.is_empty() {
            self.observer.stored(stored);
        }
    }
}

impl Lane {
    fn take(&mut self, most: usize) -> impl Iterator<Item = Queued> {
        let count = self.appends.len().min(most);
        self.bytes -= self.appends.iter().take(count).map(|queued| queued.bytes).sum::<usize>();
        self.appends.drain(..count)
    }
}

impl Waiting {
    fn count(&self) -> usize {
        self.users.appends.len() + self.topics.appends.len()
    }

    fn take(&mut self) -> Vec<Queued> {
        let mut batch: Vec<Queued> = self.users.take(BATCH).collect();
        batch.extend(self.topics.take(TOPIC_PART));
        // A sender that was told 503, or has gone, was promised nothing. Storing its message now
        // would make its repeat a second message.
        batch.retain(|queued| !queued.answer.is_closed());
        batch
    }
}

/// Ends the writer when it is dropped.
struct EndsWriter(Arc<Writer>);

impl Drop for EndsWriter {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting.lock();
        waiting.over = true;
        // Their receipts fail.
        let left = (std::mem::take(&mut waiting.users), std::mem::take(&mut waiting.topics));
        drop(waiting);
        drop(left);
        self.0.filled.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::inbox::memory::MemoryInbox;
    use crate::message::MessageId;
    use bytes::Bytes;

    #[derive(Default)]
    struct Seen {
        writes: Mutex<Vec<usize>>,
        stored: Mutex<Vec<Seq>>,
    }

    impl WriteObserver for Seen {
        fn writing(&self, count: usize) {
            self.writes.lock().push(count);
        }
        fn stored(&self, messages: Vec<(UserId, Arc<Message>)>) {
            self.stored.lock().extend(messages.iter().map(|(_, message)| message.seq));
        }
    }

    fn append(id: &str, payload: &'static str) -> Append {
        let now = Clock::system().now();
        Append {
            trace: None,
            append_id: None,
            user: UserId::parse("alice").unwrap(),
            id: MessageId::parse(id).unwrap(),
            deduplicated: true,
            accepted_at: now,
            expires_at: now.plus_seconds(60),
            event: None,
            via: None,
            payload: Bytes::from_static(payload.as_bytes()),
        }
    }

    fn started(every: Duration, enough: usize, blocks: bool) -> (Appender, Arc<Seen>, JoinSet<()>) {
        let (seen, mut tasks) = (Arc::new(Seen::default()), JoinSet::new());
        let inbox = Arc::new(MemoryInbox::new(Clock::system()));
        let gathering = GroupCommit { every, enough };
        let appender = Appender::start(inbox, gathering, Arc::clone(&seen) as _, &mut tasks, blocks);
        (appender, seen, tasks)
    }

    #[tokio::test]
    async fn what_waits_is_written_together_and_each_sender_has_its_own_outcome() {
        for blocks in [true, false] {
            let (appender, seen, mut tasks) = started(Duration::from_secs(3600), 3, blocks);
            let first = appender.submit(append("1", "1"), 1).unwrap().await.unwrap().unwrap();
            let Receipt::Stored(first) = first else { panic!("{first:?}") };
            // The next write would begin in an hour, but three are enough.
            let waiting = [("1", "1"), ("1", "2"), ("2", "2")]
                .map(|(id, payload)| appender.submit(append(id, payload), 1).unwrap());
            let [repeat, conflict, second] = waiting;
            assert_eq!(repeat.await.unwrap(), Ok(Receipt::Duplicate(first)));
            assert_eq!(conflict.await.unwrap(), Ok(Receipt::Conflict));
            let next = Seq::at(first.get() + 1);
            assert_eq!(second.await.unwrap(), Ok(Receipt::Stored(next)));
            tasks.shutdown().await;
            assert_eq!(*seen.writes.lock(), [1, 3]);
            assert_eq!(*seen.stored.lock(), [first, next], "only what was stored is told");
        }
    }

    #[tokio::test]
    async fn a_message_to_a_user_waits_for_a_part_of_what_waits_for_topics() {
        let (appender, seen, mut tasks) = started(Duration::from_secs(3600), 1_000, true);
        appender.submit(append("first", "1"), 1).unwrap().await.unwrap().unwrap();
        let by_topic = |n: usize| {
            let topic = crate::message::TopicName::parse("news").unwrap();
            let via = Some(Arc::new(crate::message::Via::Inbox(topic)));
            Append { via, ..append(&n.to_string(), "1") }
        };
        let topics: Vec<_> = (0..999).map(|n| appender.submit(by_topic(n), 1).unwrap()).collect();
        // With it, they are enough to begin.
        appender.submit(append("user", "1"), 1).unwrap().await.unwrap().unwrap();
        assert_eq!(*seen.writes.lock(), [1, 1 + TOPIC_PART]);
        // The rest waits for an hour, or for others: each queue has its own bound.
        appender.submit(by_topic(999), WAITING_BYTES).unwrap_err();
        drop(topics);
        appender.submit(append("large", "1"), WAITING_BYTES).unwrap();
        tasks.shutdown().await;
    }

    #[tokio::test]
    async fn a_sender_that_has_gone_stores_nothing_and_the_queue_is_bounded() {
        let (appender, seen, mut tasks) = started(Duration::from_secs(3600), 2, true);
        appender.submit(append("1", "1"), 1).unwrap().await.unwrap().unwrap();
        drop(appender.submit(append("gone", "1"), WAITING_BYTES).unwrap());
        assert_eq!(appender.submit(append("more", "1"), 1).unwrap_err(), TooManyWaiting);
        appender.submit(append("2", "1"), 0).unwrap().await.unwrap().unwrap();
        assert_eq!(*seen.writes.lock(), [1, 1], "the one that has gone is not written");
        appender.submit(append("3", "1"), WAITING_BYTES).unwrap();
        tasks.shutdown().await;
    }

    #[tokio::test]
    async fn the_writer_ends_with_its_tasks_and_says_so_to_whoever_waits() {
        let (appender, _, mut tasks) = started(Duration::from_secs(3600), 9, true);
        appender.submit(append("1", "1"), 1).unwrap().await.unwrap().unwrap();
        let waiting = appender.submit(append("2", "2"), 1).unwrap();
        tasks.shutdown().await;
        waiting.await.unwrap_err();
        appender.submit(append("3", "3"), 1).unwrap().await.unwrap_err();
    }
}
