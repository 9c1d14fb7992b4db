//! Collect takes messages from publishers, appends them to the inboxes, answers, and hands them to
//! dispatch.
//!
//! Appends are written in groups: what waits while a write is in flight, or comes right after it
//! began, is the next write. A thread of its own gathers them. If the inbox blocks, that thread
//! also writes and answers: the answers of a write leave when it ends, and the next write begins at
//! once, whatever else the runtime has to do. A stored message is handed on whether or not its
//! sender still waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt;

use super::DispatchService;
use super::backlog::Backlog;
use crate::backoff::around;
use crate::clock::Clock;
use crate::inbox::{Append, Appended, Change, GroupCommit, Inbox, InboxError, Janitor, PageLimit, Profile};
use crate::membership::View;
use crate::message::{Message, MessageId, NodeId, Recipients, Seq, UserId};
use crate::telemetry::{Metrics, WAY};
use crate::thread::Awaited;
use crate::wire::http::{Publish, PublishError, Published, Stored};
use crate::wire::peer::{DispatchRequest, DispatchResponse, LiveMessage, Presence, Revocation};

/// Most appends that wait in one process (docs/design.md, section 11).
pub const WAITING_APPENDS: usize = 10_000;
/// Most bytes of their payloads.
pub const WAITING_BYTES: usize = 32 * 1024 * 1024;
/// Most appends in one write.
const BATCH: usize = 1_000;
/// Deadline of a publish, after which it is answered 503. The message may be stored nevertheless; a
/// repeat is safe.
pub const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);
/// A write of a few messages takes less than this on most disks.
const SYNC: Duration = Duration::from_micros(500);
/// Delay after no dispatch could be reached.
const HAND_ON_REST: Duration = Duration::from_millis(200);
/// Largest page of history.
pub const HISTORY_PAGE: PageLimit = PageLimit { messages: 1_000, bytes: 8 * 1024 * 1024 };

/// Metrics of collect.
struct CollectMetrics {
    /// A message was stored for one recipient.
    stored: Counter,
    /// A repeat was answered with the first position.
    duplicates: Counter,
    /// A recipient was refused, for any reason.
    refused: Counter,
    /// A stored message was not handed to dispatch. The user's node finds it by its sweep.
    hints_dropped: Counter,
    /// Appends per write.
    batch: Histogram,
}

impl CollectMetrics {
    fn register(metrics: &Metrics) -> Self {
        let own = Self {
            stored: Counter::default(),
            duplicates: Counter::default(),
            refused: Counter::default(),
            hints_dropped: Counter::default(),
            batch: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
        };
        metrics.register(|r| {
            r.register("stored", "Messages stored, one per recipient", own.stored.clone());
            r.register("duplicates", "Repeats answered from what was stored", own.duplicates.clone());
            r.register("publish_refused", "Recipients refused", own.refused.clone());
            r.register("hints_dropped", "Stored messages that no dispatch took", own.hints_dropped.clone());
            r.register("append_batch", "Appends per write", own.batch.clone());
        });
        own
    }
}

/// The role collect. Cheap to clone.
#[derive(Clone)]
pub struct Collect {
    inner: Arc<Inner>,
}

struct Inner {
    inbox: Arc<dyn Inbox>,
    dispatch: DispatchService,
    views: watch::Receiver<Arc<View>>,
    /// Messages that are stored and wait for dispatch.
    handing_on: Backlog,
    clock: Clock,
    waiting: Mutex<Waiting>,
    gathering: GroupCommit,
    /// The writer waits for appends, or for enough of them.
    filled: Condvar,
    metrics: CollectMetrics,
    /// The thread that writes.
    writer: Awaited,
}

#[derive(Default)]
struct Waiting {
    appends: VecDeque<Queued>,
    bytes: usize,
    /// The writer waits for the next append without a deadline.
    resting: bool,
    /// The role has ended, so the writer ends.
    over: bool,
}

struct Queued {
    append: Append,
    answer: Answer,
    /// The bytes that it accounts for. The recipients of a publish share its payload; the last one
    /// accounts for it.
    bytes: usize,
}

type Outcome = Result<Stored, PublishError>;
type Answer = oneshot::Sender<Outcome>;

/// What is known about a user, from the inbox and from the nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserReport {
    /// The owner in the view in use.
    pub owner: Option<NodeId>,
    /// Cursors, revocation and head.
    pub profile: Profile,
    /// Sessions on all nodes that were asked.
    pub sessions: Vec<Presence>,
}

impl Collect {
    /// Starts the role. Its writer and its tasks end with `tasks`.
    pub fn start(
        inbox: Arc<dyn Inbox>,
        dispatch: DispatchService,
        views: watch::Receiver<Arc<View>>,
        clock: Clock,
        metrics: &Metrics,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let inner = Arc::new(Inner {
            gathering: inbox.gathering(),
            inbox,
            dispatch,
            views,
            handing_on: Backlog::default(),
            clock,
            waiting: Mutex::default(),
            filled: Condvar::new(),
            metrics: CollectMetrics::register(metrics),
            writer: Awaited::default(),
        });
        let (writer, runtime) = (Arc::clone(&inner), Handle::current());
        tasks.spawn_blocking(move || write(&writer, &runtime));
        tasks.spawn(hand_on(EndsWriter(Arc::clone(&inner))));
        Self { inner }
    }

    /// Stores a publish for each of its recipients. Returns the outcome of each.
    pub async fn publish(&self, publish: Publish) -> Published {
        let now = self.inner.clock.now();
        // Only an id that may be repeated is deduplicated: the sender's own, or one under which the
        // rest of a publish to several users is repeated.
        let deduplicated = publish.id.is_some() || matches!(publish.to, Recipients::Users(_));
        let id = publish.id.unwrap_or_else(new_id);
        let count = publish.to.users().len();
        // The last recipient takes the payload itself; sharing it would cost an allocation.
        let mut payload = publish.payload;
        let bytes = payload.len();
        let waiting: Vec<(UserId, Result<oneshot::Receiver<Outcome>, PublishError>)> = publish
            .to
            .users()
            .iter()
            .enumerate()
            .map(|(n, user)| {
                let last = n + 1 == count;
                let payload = if last { std::mem::take(&mut payload) } else { payload.clone() };
                let append = Append {
                    user: user.clone(),
                    id: id.clone(),
                    deduplicated,
                    accepted_at: now,
                    expires_at: now.plus_seconds(publish.ttl_s),
                    payload,
                };
                (user.clone(), self.enqueue(append, if last { bytes } else { 0 }))
            })
            .collect();
        let deadline = Instant::now() + PUBLISH_DEADLINE;
        let mut accepted = Vec::with_capacity(waiting.len());
        for (user, waiter) in waiting {
            let outcome = match waiter {
                Ok(waiter) => wait_until(deadline, waiter).await,
                Err(refusal) => Err(refusal),
            };
            self.count(&outcome);
            accepted.push((user, outcome));
        }
        Published { id, repeatable: deduplicated, accepted }
    }

    fn enqueue(&self, append: Append, bytes: usize) -> Result<oneshot::Receiver<Outcome>, PublishError> {
        let mut waiting = self.inner.waiting.lock();
        if waiting.appends.len() >= WAITING_APPENDS || waiting.bytes + bytes > WAITING_BYTES {
            return Err(refusal(503, "too many messages wait to be stored; repeat after a moment"));
        }
        let (answer, waiter) = oneshot::channel();
        waiting.bytes += bytes;
        waiting.appends.push_back(Queued { append, answer, bytes });
        let count = waiting.appends.len();
        let resting = std::mem::take(&mut waiting.resting);
        drop(waiting);
        // A writer that waits with a deadline looks by itself; waking it would be in vain.
        if resting || count == self.inner.gathering.enough {
            self.inner.writer.expect_in(Duration::ZERO);
            self.inner.filled.notify_one();
        } else {
            self.inner.writer.fetch_if_late();
        }
        Ok(waiter)
    }

    fn count(&self, outcome: &Outcome) {
        let metrics = &self.inner.metrics;
        match outcome {
            Ok(stored) if stored.duplicate => metrics.duplicates.inc(),
            Ok(_) => metrics.stored.inc(),
            Err(_) => metrics.refused.inc(),
        };
    }

    /// The unexpired messages of a user after a position, and where the next page begins.
    ///
    /// # Errors
    ///
    /// The inbox's.
    pub async fn history(
        &self,
        user: UserId,
        after: Seq,
        limit: usize,
    ) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
        let limit = PageLimit { messages: limit.min(HISTORY_PAGE.messages), ..HISTORY_PAGE };
        let page = self.inner.inbox.page(user, after, limit).await?;
        Ok((page.messages, page.more.then_some(page.upto)))
    }

    /// What is known about a user. An unknown user has an empty report.
    ///
    /// # Errors
    ///
    /// The inbox's.
    pub async fn user(&self, user: UserId) -> Result<UserReport, InboxError> {
        let profile = self.inner.inbox.profile(user.clone()).await?;
        let found = self.inner.dispatch.clone().oneshot(DispatchRequest::Lookup(user)).await;
        let (owner, sessions) = match found {
            Ok(DispatchResponse::Found { owner, sessions }) => (owner, sessions),
            _ => return Err(InboxError::Unavailable("dispatch cannot be asked".to_owned())),
        };
        Ok(UserReport { owner, profile, sessions })
    }

    /// Resolves when everything that was stored so far was handed to dispatch, or given up.
    pub async fn handed_on(&self) {
        while !self.inner.handing_on.is_idle() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Closes all sockets of a user and refuses every token issued until now.
    ///
    /// Tokens count whole seconds. So the revocation is dated at the beginning of the next second
    /// and this returns only then: a token that is issued after the return is good.
    ///
    /// # Errors
    ///
    /// The inbox's; nothing is revoked then. Nodes that cannot be reached find out by their sweep.
    pub async fn disconnect(&self, user: UserId) -> Result<(), InboxError> {
        let now = self.inner.clock.now();
        let not_before_s = now.seconds() + 1;
        self.inner
            .inbox
            .update(vec![Change::NotBefore { user: user.clone(), seconds: not_before_s }])
            .await?;
        let revocation = Revocation { user, not_before_s };
        if let Err(fault) = self.inner.dispatch.clone().oneshot(DispatchRequest::Disconnect(revocation)).await
        {
            tracing::warn!(%fault, "a node was not told of a disconnect; its sweep will find it");
        }
        tokio::time::sleep(Duration::from_millis(1000 - now.0 % 1000)).await;
        Ok(())
    }
}

fn new_id() -> MessageId {
    // A ULID has 26 printable characters, which is always a valid id.
    let mut characters = [0; ulid::ULID_LEN];
    let text = ulid::Ulid::generate().array_to_str(&mut characters);
    MessageId::parse(text).unwrap_or_else(|_| unreachable!("a ULID is an id"))
}

fn refusal(status: u16, detail: impl Into<String>) -> PublishError {
    PublishError { status, detail: detail.into() }
}

async fn wait_until(deadline: Instant, waiter: oneshot::Receiver<Outcome>) -> Outcome {
    match tokio::time::timeout_at(deadline, waiter).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(refusal(503, "the server is stopping; a repeat is safe under an id of your own")),
        Err(_) => {
            Err(refusal(503, "the store did not answer in time; a repeat is safe under an id of your own"))
        }
    }
}

/// Writes what waits, batch after batch, and answers. Blocks its thread. If the inbox does not
/// block, the runtime writes, because every response of a database driver would otherwise wake this
/// thread by way of another.
fn write(inner: &Arc<Inner>, runtime: &Handle) {
    let mut last_began = None;
    inner.writer.is_this_thread();
    while let Some(batch) = inner.next_batch(last_began) {
        last_began = Some(Instant::now());
        inner.metrics.batch.observe(batch.len() as f64);
        let writing = write_batch(Arc::clone(inner), batch);
        if inner.inbox.blocks() {
            inner.writer.expect_in(SYNC);
            runtime.block_on(writing);
        } else {
            inner.writer.expect_nothing();
            if let Err(error) = runtime.block_on(runtime.spawn(writing))
                && let Ok(panic) = error.try_into_panic()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

async fn write_batch(inner: Arc<Inner>, batch: Vec<Queued>) {
    let with_user = |Queued { append, answer, .. }| {
        let user = append.user.clone();
        (append, (user, answer))
    };
    let (appends, to): (Vec<Append>, Vec<_>) = batch.into_iter().map(with_user).unzip();
    let outcomes = inner.inbox.append(appends).await;
    if inner.inbox.blocks() {
        inner.writer.expect_in(Duration::ZERO);
    }
    answer(&inner, to, outcomes);
}

impl Inner {
    /// Waits for the next batch; `None` when there will be none. A write right after another one
    /// waits a moment for more: it costs the same for one message as for many.
    fn next_batch(&self, last_began: Option<Instant>) -> Option<Vec<Queued>> {
        let GroupCommit { every, enough } = self.gathering;
        let mut waiting = self.waiting.lock();
        while !waiting.over {
            let left = last_began.map_or(Duration::ZERO, |began| every.saturating_sub(began.elapsed()));
            if waiting.appends.len() < enough && !left.is_zero() {
                self.writer.expect_in(left);
                self.filled.wait_for(&mut waiting, left);
            } else if waiting.appends.is_empty() {
                waiting.resting = true;
                self.writer.expect_nothing();
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
}

impl Waiting {
    fn take(&mut self) -> Vec<Queued> {
        let count = self.appends.len().min(BATCH);
        let mut batch: Vec<Queued> = self.appends.drain(..count).collect();
        self.bytes -= batch.iter().map(|queued| queued.bytes).sum::<usize>();
        // A sender that was told 503, or has gone, was promised nothing. Storing its message now
        // would make its repeat a second message.
        batch.retain(|queued| !queued.answer.is_closed());
        batch
    }
}

/// Ends the writer when it is dropped.
struct EndsWriter(Arc<Inner>);

impl Drop for EndsWriter {
    fn drop(&mut self) {
        self.0.waiting.lock().over = true;
        self.0.filled.notify_one();
    }
}

/// Tells the senders the outcomes, and hands what was stored to dispatch.
fn answer(inner: &Inner, to: Vec<(UserId, Answer)>, outcomes: Vec<Result<Appended, InboxError>>) {
    let mut live = Vec::with_capacity(to.len());
    for ((user, to), outcome) in to.into_iter().zip(outcomes) {
        let outcome = match outcome {
            Ok(Appended::Stored(message)) => {
                let seq = message.seq;
                tracing::debug!(target: WAY, step = 5, %user, id = %message.id, %seq, "stored, and on the way to dispatch");
                live.push(LiveMessage { user, message });
                Ok(Stored { seq, duplicate: false })
            }
            Ok(Appended::Duplicate(seq)) => Ok(Stored { seq, duplicate: true }),
            Ok(Appended::Conflict) => Err(refusal(409, "this id was used for another payload to this user")),
            Err(error) => {
                tracing::warn!(%error, "a message could not be stored");
                Err(refusal(503, "the message could not be stored; a repeat is safe under an id of your own"))
            }
        };
        // A sender that has gone needs no answer.
        let _ = to.send(outcome);
    }
    if !live.is_empty() {
        inner.metrics.hints_dropped.inc_by(inner.handing_on.put(live) as u64);
    }
}

/// Hands stored messages to dispatch, batch after batch. If no dispatch takes one, the sweeps find
/// it; they are requested as soon as there is a dispatch again.
async fn hand_on(writer: EndsWriter) {
    let inner = &writer.0;
    loop {
        let (batch, missed) = inner.handing_on.take().await;
        let count = batch.len();
        let stamp = inner.views.borrow().stamp();
        let request = DispatchRequest::Deliver { batch, missed, stamp };
        if let Err(fault) = inner.dispatch.clone().oneshot(request).await {
            tracing::debug!(%fault, "no dispatch took a batch; the sweeps will find it");
            inner.metrics.hints_dropped.inc_by(count as u64);
            tokio::time::sleep(HAND_ON_REST).await;
            inner.handing_on.mark_missed();
        }
    }
}

/// Runs the janitor periodically, and watches the store meanwhile.
pub async fn run_upkeep(upkeep: Arc<dyn Janitor>, every: Duration) {
    tokio::join!(upkeep.watch(), clean(&*upkeep, every));
}

async fn clean(upkeep: &dyn Janitor, every: Duration) {
    loop {
        let rest = around(every, 0.2, &mut rand::rng());
        tokio::time::sleep(rest).await;
        match upkeep.run_once().await {
            Ok(removed) if removed > 0 => tracing::debug!(removed, "expired messages were removed"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "expired messages could not be removed"),
        }
    }
}
