//! Collect takes messages from publishers, has the inbox append them, answers, and hands them to
//! dispatch. A stored message is handed on whether or not its sender still waits.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt;

use super::DispatchService;
use super::backlog::Backlog;
use crate::backoff::around;
use crate::clock::Clock;
use crate::inbox::group_commit::PendingReceipt;
use crate::inbox::{
    Append, Appender, Change, Inbox, InboxError, Janitor, PageLimit, Profile, Receipt, WriteObserver,
};
use crate::membership::View;
use crate::message::{Message, MessageId, NodeId, Recipients, Seq, UserId};
use crate::telemetry::{Metrics, WAY};
use crate::wire::http::{Publish, PublishError, Published, Stored};
use crate::wire::peer::{DispatchRequest, DispatchResponse, LiveMessage, Presence, Revocation};

/// Deadline of a publish, after which it is answered 503. The message may be stored nevertheless; a
/// repeat is safe.
pub const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);
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
    appender: Appender,
    dispatch: DispatchService,
    handing_on: Arc<HandingOn>,
    clock: Clock,
}

/// Stored messages on their way to dispatch, and the metrics.
struct HandingOn {
    backlog: Backlog,
    metrics: CollectMetrics,
}

impl WriteObserver for HandingOn {
    fn writing(&self, count: usize) {
        self.metrics.batch.observe(count as f64);
    }

    fn stored(&self, messages: Vec<(UserId, Arc<Message>)>) {
        let live = |(user, message): (UserId, Arc<Message>)| {
            let (id, seq) = (&message.id, message.seq);
            tracing::debug!(target: WAY, step = 5, %user, %id, %seq, "stored, and on the way to dispatch");
            LiveMessage { user, message }
        };
        let dropped = self.backlog.put(messages.into_iter().map(live).collect());
        self.metrics.hints_dropped.inc_by(dropped as u64);
    }
}

type Outcome = Result<Stored, PublishError>;

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
        let handing_on =
            Arc::new(HandingOn { backlog: Backlog::default(), metrics: CollectMetrics::register(metrics) });
        let appender = Arc::clone(&inbox).appender(Arc::clone(&handing_on) as _, tasks);
        tasks.spawn(hand_on(Arc::clone(&handing_on), dispatch.clone(), views));
        Self { inner: Arc::new(Inner { inbox, appender, dispatch, handing_on, clock }) }
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
        let waiting: Vec<(UserId, Result<PendingReceipt, PublishError>)> = publish
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
                    event: publish.event.clone(),
                    payload,
                };
                let bytes = if last { bytes } else { 0 };
                let submitted = self
                    .inner
                    .appender
                    .submit(append, bytes)
                    .map_err(|busy| refusal(503, format!("{busy}; repeat after a moment")));
                (user.clone(), submitted)
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

    fn count(&self, outcome: &Outcome) {
        let metrics = &self.inner.handing_on.metrics;
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
        while !self.inner.handing_on.backlog.is_idle() {
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

async fn wait_until(deadline: Instant, receipt: PendingReceipt) -> Outcome {
    match tokio::time::timeout_at(deadline, receipt).await {
        Ok(Ok(Ok(Receipt::Stored(seq)))) => Ok(Stored { seq, duplicate: false }),
        Ok(Ok(Ok(Receipt::Duplicate(seq)))) => Ok(Stored { seq, duplicate: true }),
        Ok(Ok(Ok(Receipt::Conflict))) => {
            Err(refusal(409, "this id was used for another payload or event to this user"))
        }
        Ok(Ok(Err(error))) => {
            tracing::warn!(%error, "a message could not be stored");
            Err(refusal(503, "the message could not be stored; a repeat is safe under an id of your own"))
        }
        Ok(Err(_)) => Err(refusal(503, "the server is stopping; a repeat is safe under an id of your own")),
        Err(_) => {
            Err(refusal(503, "the store did not answer in time; a repeat is safe under an id of your own"))
        }
    }
}

/// Hands stored messages to dispatch, batch after batch. If no dispatch takes one, the sweeps find
/// it; they are requested as soon as there is a dispatch again.
async fn hand_on(handing_on: Arc<HandingOn>, dispatch: DispatchService, views: watch::Receiver<Arc<View>>) {
    loop {
        let (batch, missed) = handing_on.backlog.take().await;
        let count = batch.len();
        let stamp = views.borrow().stamp();
        let request = DispatchRequest::Deliver { batch, missed, stamp };
        if let Err(fault) = dispatch.clone().oneshot(request).await {
            tracing::debug!(%fault, "no dispatch took a batch; the sweeps will find it");
            handing_on.metrics.hints_dropped.inc_by(count as u64);
            tokio::time::sleep(HAND_ON_REST).await;
            handing_on.backlog.mark_missed();
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
