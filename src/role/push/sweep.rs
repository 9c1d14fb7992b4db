//! How sessions read the inbox: in batches when they attach, in pages when they are behind, and all
//! of them once per period to find what every hint has missed. The sweep is what makes P4 true.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Node;
use super::registry::SessionHandle;
use crate::backoff::{Backoff, around};
use crate::inbox::{Change, Inbox, InboxError, InboxPage, PageLimit, PositionQuery, StartAt, UserPosition};
use crate::message::{DeviceId, Message, Seq, UserId};
use crate::session::{Item, Page};
use crate::telemetry::WAY;
use crate::wire::close::CloseCode;
use crate::wire::frame::message_frame;

/// Positions in one batch (docs/design.md, section 5: 16 ms for 1000 on MongoDB).
pub const BATCH: usize = 1_000;
/// Batches in flight at the same time. One that takes long, as when a position must be confirmed by
/// the whole replica set, does not delay the others.
const LOTS_AT_ONCE: usize = 4;
const LOT_PATIENCE: Duration = Duration::from_millis(50);
/// Shortest time between the beginnings of two batches. A batch costs a command or a sync, for one
/// position as for many.
const LOT_EVERY: Duration = Duration::from_millis(2);
/// Attaching sessions that wait for their batch: two seconds of the default accept rate. Further
/// sessions are refused.
pub const ASKS_WAITING: usize = 8_000;
/// Concurrent page reads of one node.
pub const READS_IN_FLIGHT: usize = 64;
/// Size of a page: at most 256 frames with 150 bytes beside their payload, 38 KiB, and 64 KiB of
/// payload or one message. Together with the high-water mark of a session's queue it stays within
/// the outbound limit.
pub const PAGE: PageLimit = PageLimit { messages: 256, bytes: 64 * 1024 };
/// Delay between two tries of a read that the inbox did not answer, at first and at most.
const READ_RETRY_FIRST: Duration = Duration::from_millis(100);
const READ_RETRY_MAX: Duration = Duration::from_secs(5);
/// Every session is swept once in this time, ± [`SWEEP_JITTER`].
pub const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// The same on a node that was cut off.
pub const SWEEP_CUT_OFF: Duration = Duration::from_secs(3);
/// Part of the period by which a sweep may be early or late.
pub const SWEEP_JITTER: f64 = 0.2;
/// Shortest time between two forced sweeps.
pub const FORCED_SWEEP_REST: Duration = Duration::from_secs(10);
/// Time between two writes of cursors.
pub const CURSOR_EVERY: Duration = Duration::from_millis(200);

/// The question of one attaching session.
pub(super) struct AskRequest {
    ask: PositionQuery,
    answer: oneshot::Sender<Result<UserPosition, InboxError>>,
}

/// Where attaching sessions ask: the inbox itself, or a queue whose batches form while the last one
/// is in flight.
#[derive(Clone)]
pub(super) struct Asks {
    inbox: Arc<dyn Inbox>,
    queue: mpsc::Sender<AskRequest>,
}

impl Asks {
    pub(super) fn new(inbox: Arc<dyn Inbox>) -> (Self, mpsc::Receiver<AskRequest>) {
        let (queue, requests) = mpsc::channel(ASKS_WAITING);
        (Self { inbox, queue }, requests)
    }

    /// Looks up a position. An error if the inbox does not respond or too many sessions wait.
    pub(super) async fn ask(&self, user: UserId, from: StartAt) -> Result<UserPosition, InboxError> {
        if self.inbox.answers_alone() {
            let answers = self.inbox.positions(vec![PositionQuery { user, from }]).await?;
            return answers.into_iter().next().ok_or_else(|| InboxError::Corrupt("no answer".to_owned()));
        }
        let (answer, answered) = oneshot::channel();
        let request = AskRequest { ask: PositionQuery { user, from }, answer };
        let busy = || InboxError::Unavailable("too many sessions attach at once".to_owned());
        self.queue.try_send(request).map_err(|_| busy())?;
        answered.await.unwrap_or_else(|_| Err(busy()))
    }
}

/// Looks up positions for attaching sessions, batch by batch: the next batch forms while the last one is in flight
/// or has just begun.
pub(super) async fn answer_asks(inbox: Arc<dyn Inbox>, mut requests: mpsc::Receiver<AskRequest>) {
    let mut under_way = JoinSet::new();
    let mut next_begins = Instant::now();
    loop {
        let mut batch = Vec::new();
        if requests.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        tokio::time::sleep_until(next_begins).await;
        while batch.len() < BATCH
            && let Ok(request) = requests.try_recv()
        {
            batch.push(request);
        }
        next_begins = Instant::now() + LOT_EVERY;
        under_way.spawn(answer_batch(Arc::clone(&inbox), batch));
        let _ = tokio::time::timeout(LOT_PATIENCE, ended(&mut under_way, 1)).await;
        ended(&mut under_way, LOTS_AT_ONCE).await;
    }
}

/// Waits until fewer than `count` are in flight. Raises the panic of one that panicked.
async fn ended(under_way: &mut JoinSet<()>, count: usize) {
    while under_way.len() >= count {
        if let Some(Err(fault)) = under_way.join_next().await
            && fault.is_panic()
        {
            std::panic::resume_unwind(fault.into_panic());
        }
    }
}

async fn answer_batch(inbox: Arc<dyn Inbox>, batch: Vec<AskRequest>) {
    let (asks, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|r| (r.ask, r.answer)).unzip();
    match inbox.positions(asks).await {
        Ok(standings) => answers.into_iter().zip(standings).for_each(|(to, standing)| {
            // A client that has left meanwhile needs no answer.
            let _ = to.send(Ok(standing));
        }),
        Err(error) => answers.into_iter().for_each(|to| {
            let _ = to.send(Err(error.clone()));
        }),
    }
}

/// Where sessions that are behind request pages. Each session has at most one request, so the queue
/// is bounded by the number of sessions.
#[derive(Default)]
pub(super) struct Reads {
    waiting: Mutex<VecDeque<(Weak<SessionHandle>, Seq)>>,
    asked: Notify,
}

impl Reads {
    /// Requests the page after `after`; it arrives in the session's mailbox.
    pub(super) fn request(&self, handle: &Arc<SessionHandle>, after: Seq) {
        self.waiting.lock().push_back((Arc::downgrade(handle), after));
        self.asked.notify_one();
    }

    async fn next(&self) -> (Weak<SessionHandle>, Seq) {
        loop {
            let asked = self.asked.notified();
            if let Some(next) = self.waiting.lock().pop_front() {
                return next;
            }
            asked.await;
        }
    }
}

/// Performs the reads, at most [`READS_IN_FLIGHT`] at a time.
pub(super) async fn perform_reads(node: Arc<Node>) {
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            (handle, after) = node.reads.next(), if under_way.len() < READS_IN_FLIGHT => {
                under_way.spawn(read(Arc::clone(&node), handle, after));
            }
            Some(_) = under_way.join_next() => {}
        }
    }
}

/// Reads one page for a session that still exists. While the inbox does not respond, it tries again
/// with growing delays.
async fn read(node: Arc<Node>, handle: Weak<SessionHandle>, after: Seq) {
    let mut backoff = Backoff::new(READ_RETRY_FIRST, READ_RETRY_MAX);
    while let Some(user) = handle.upgrade().map(|handle| handle.user.clone()) {
        match node.inbox.page(user, after, PAGE).await {
            Ok(page) => {
                node.metrics.pages.inc();
                if let Some(handle) = handle.upgrade() {
                    tell_unreadable(&node, &handle.user, &page.unreadable);
                    let items = page.messages.iter().map(item).collect();
                    let InboxPage { unreadable, upto, more, .. } = page;
                    handle.mailbox.page(Page { after, items, unreadable, upto, more });
                }
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "a page could not be read; the session waits");
                let rest = backoff.next(&mut rand::rng());
                tokio::time::sleep(rest).await;
            }
        }
    }
}

/// Reports messages that cannot be read to the operator; their user gets a gap.
fn tell_unreadable(node: &Node, user: &UserId, unreadable: &[Seq]) {
    for seq in unreadable {
        node.metrics.unreadable.inc();
        tracing::warn!(%user, %seq, "a message in the store cannot be read, and is passed over");
    }
}

/// A message in the form of the session, with its frame encoded once.
pub(super) fn item(message: &Message) -> Item<Bytes> {
    Item { seq: message.seq, expires_at: message.expires_at, frame: message_frame(message) }
}

/// Sweeps every session once per period, a shard at a time, and at once when told to.
pub(super) async fn sweep(node: Arc<Node>) {
    let shards = node.registry.shard_count();
    let mut shard = 0;
    let mut last_forced: Option<Instant> = None;
    loop {
        let every = match *node.barred.borrow() {
            None => node.config.limits.sweep_every,
            // Other nodes own these users now, and messages may pass this node by.
            Some(_) => SWEEP_CUT_OFF.min(node.config.limits.sweep_every),
        };
        let pause = around(every, SWEEP_JITTER, &mut rand::rng()) / shards as u32;
        let not_before = last_forced.map_or_else(Instant::now, |at| at + FORCED_SWEEP_REST);
        tokio::select! {
            () = tokio::time::sleep(pause) => {
                sweep_seats(&node, &node.registry.of_shard(shard)).await;
                shard = (shard + 1) % shards;
            }
            () = forced(&node.sweep_now, not_before) => {
                last_forced = Some(Instant::now());
                node.metrics.forced_sweeps.inc();
                for n in 0..shards {
                    sweep_seats(&node, &node.registry.of_shard(n)).await;
                }
            }
        }
    }
}

async fn forced(asked: &Notify, not_before: Instant) {
    tokio::time::sleep_until(not_before).await;
    asked.notified().await;
}

/// Asks for each of these sessions whether there is more, in batches, and tells those for which
/// there is.
pub(super) async fn sweep_seats(node: &Node, handles: &[Arc<SessionHandle>]) {
    let begun: Vec<&Arc<SessionHandle>> = handles.iter().filter(|handle| handle.has_begun()).collect();
    for batch in begun.chunks(BATCH) {
        if let Err(error) =
            look_after(node, batch, |handle, position| handle.mailbox.more_after(position)).await
        {
            tracing::debug!(%error, "the sweep could not ask; it will come round again");
        }
    }
}

/// The same for sessions that have surely missed something: if the inbox does not respond now, each
/// reads as soon as it does.
pub(super) async fn catch_up(node: &Node, handles: &[Arc<SessionHandle>]) {
    let (begun, attaching): (Vec<&Arc<SessionHandle>>, Vec<_>) =
        handles.iter().partition(|handle| handle.has_begun());
    // The position of these is not known yet.
    attaching.iter().for_each(|handle| handle.mailbox.lost());
    for batch in begun.chunks(BATCH) {
        // Messages that passed by were stored before this query. A page in flight may show what is
        // there, and not them.
        if let Err(error) = look_after(node, batch, |handle, _| handle.mailbox.lost()).await {
            tracing::debug!(%error, "what was missed could not be asked for in one lot");
            batch.iter().for_each(|handle| handle.mailbox.lost());
        }
    }
}

async fn look_after(
    node: &Node,
    batch: &[&Arc<SessionHandle>],
    tell_of_more: impl Fn(&SessionHandle, Seq),
) -> Result<(), InboxError> {
    let positions: Vec<Seq> = batch.iter().map(|handle| handle.position()).collect();
    let asks = batch
        .iter()
        .zip(&positions)
        .map(|(handle, position)| PositionQuery {
            user: handle.user.clone(),
            from: StartAt::After(*position),
        })
        .collect();
    let answers = node.inbox.positions(asks).await?;
    for ((handle, position), answer) in batch.iter().zip(positions).zip(answers) {
        node.metrics.swept.inc();
        if answer.more {
            tell_of_more(handle, position);
        } else if answer.head < position {
            reset(node, handle, position, answer.head).await?;
        }
        close_if_revoked(handle, answer.not_before_s);
    }
    Ok(())
}

/// The store was restored to a state below what a session was sent. The session goes on from there;
/// what is accepted from now on is above everything that was sent.
async fn reset(node: &Node, handle: &SessionHandle, position: Seq, head: Seq) -> Result<(), InboxError> {
    node.inbox.update(vec![Change::Shown { user: handle.user.clone(), upto: position }]).await?;
    tracing::warn!(user = %handle.user, %position, %head, "a client was shown more than stands in the store: it is told");
    handle.mailbox.reset(position, head);
    Ok(())
}

/// Ends a session whose token was issued before `not_before_s`.
pub(super) fn close_if_revoked(handle: &SessionHandle, not_before_s: u64) {
    if handle.token_iat_s() < not_before_s {
        handle.mailbox.close(CloseCode::Unauthorized, "the token was revoked");
    }
}

/// The cursors that moved since they were last written: one entry per device, however many acks.
#[derive(Default)]
pub(super) struct Cursors {
    moved: Mutex<HashMap<(UserId, DeviceId), Seq>>,
}

impl Cursors {
    /// A device has acked everything up to `acked`.
    pub(super) fn note(&self, handle: &SessionHandle, acked: Seq) {
        tracing::debug!(target: WAY, step = 8, user = %handle.user, device = %handle.device, seq = %acked, "acked");
        let mut moved = self.moved.lock();
        let cursor = moved.entry((handle.user.clone(), handle.device.clone())).or_default();
        // Two sessions of one device may ack in turn.
        *cursor = acked.max(*cursor);
    }

    /// The cursor of a device that is not written yet.
    pub(super) fn pending(&self, user: &UserId, device: &DeviceId) -> Option<Seq> {
        self.moved.lock().get(&(user.clone(), device.clone())).copied()
    }

    /// Writes the cursors that moved. What cannot be written is kept for the next time, unless it
    /// moved again meanwhile.
    pub(super) async fn flush(&self, inbox: &dyn Inbox) {
        let moved = std::mem::take(&mut *self.moved.lock());
        if moved.is_empty() {
            return;
        }
        let moved: Vec<((UserId, DeviceId), Seq)> = moved.into_iter().collect();
        for batch in moved.chunks(BATCH) {
            let change = |((user, device), acked): &((UserId, DeviceId), Seq)| Change::Cursor {
                user: user.clone(),
                device: device.clone(),
                acked: *acked,
            };
            if let Err(error) = inbox.update(batch.iter().map(change).collect()).await {
                tracing::debug!(%error, "cursors could not be written; they are kept");
                let mut kept = self.moved.lock();
                for (device, acked) in batch {
                    kept.entry(device.clone()).or_insert(*acked);
                }
            }
        }
    }
}

/// Writes cursors periodically.
pub(super) async fn write_cursors(node: Arc<Node>) {
    loop {
        tokio::time::sleep(CURSOR_EVERY).await;
        node.cursors.flush(&*node.inbox).await;
    }
}
