//! Push holds the sockets. It delivers, takes acks, replays, and sends a client to the node that
//! owns its user.
//!
//! A node is a list of components. Each has the two to eight things that it needs, and none knows
//! the node. In the order in which they use one another:
//!
//! - `config`, `assemble`: what a node is made with, and how its components are put together.
//! - `registry`, `mailbox`: the sessions by user, and how the node reaches one session's task.
//! - `availability`, `ownership`, `reconnect`, `tokens`: whether the node takes sockets, which
//!   users it owns, the reconnect hint, and the check of tokens.
//! - `page_reads`, `cursors`, `sweep`: what is asked of the inbox, besides single positions.
//! - `tail`, `tails`, `log_readers`, `log_attach`, `log_positions`, `outbound`, `interest`: the
//!   logs of topics, which are read once for all sockets.
//! - `displaced`, `moves`, `drain`, `lease`: where users belong, and what happens when that
//!   changes.
//! - `admission`, `connection`, `attach`, `serving`, `refresh`, `welcome`, `end`: a connection,
//!   from the request to the last frame.

mod admission;
mod assemble;
mod attach;
mod availability;
mod config;
mod connection;
mod cursors;
mod displaced;
mod drain;
mod end;
mod interest;
mod lease;
mod log_attach;
mod log_positions;
mod log_readers;
mod mailbox;
mod moves;
mod outbound;
mod ownership;
mod page_reads;
mod reconnect;
mod refresh;
mod registry;
mod serving;
mod sweep;
mod tail;
mod tails;
mod tokens;
mod walks;
mod welcome;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::time::Instant;

use futures_util::future::{Ready, ready};
use futures_util::{Sink, Stream};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

pub use admission::{Admission, AdmissionError, Origins, SocketRequest};
pub use config::{LiveLimits, PushConfig, PushLimits, PushMetrics, PushParts};
pub use drain::Drain;
pub use tails::LogReadingLimits;

use crate::fallback::Holder;
use crate::inbox::history::{self, HistoryRange};
use crate::inbox::logs::{EVERYONES_LIFE, is_for};
use crate::inbox::{InboxError, PositionQuery, StartAt};
use crate::membership::Delays;
use crate::membership::{Counts, Departure, Membership, MembershipError, Reached};
use crate::message::{LogId, Message, NodeId, Seq, UserId};
use crate::role::shown;
use crate::telemetry::WAY;
use crate::topic::Delivery;
use crate::watching::WatchRights;
use crate::wire::frame::ReconnectHint;
use crate::wire::peer::{
    LiveMessage, LogHint, PeerError, Presence, PushRequest, PushResponse, Revocation, ViewVersion,
};
use crate::wire::socket::{Incoming, Outgoing, SocketError};

use admission::{AcceptBudgets, AdmissionRules, Admitter, Tickets};
use assemble::{Base, Placement, Reading};
use connection::Connector;
use registry::SessionHandle;
use tokens::TokenCheck;

/// Batches up to this size are written to the sockets on the caller's thread (some hundreds of µs).
/// Larger ones go through the mailboxes, so that all workers share the work.
const INLINE_BATCH_MAX: usize = 64;

/// The thread yields after this many inline sends (about 0.1 ms), so that clients on this machine,
/// the writer thread and a sync are not starved.
const INLINE_SENDS_PER_YIELD: usize = 8;

/// Most messages in one page of a user's own history.
pub const OWN_HISTORY_PAGE: usize = 100;

/// How often a node reports its counts.
const COUNTS_EVERY: Duration = Duration::from_millis(500);

/// The role push on one node. Cheap to clone.
#[derive(Clone)]
pub struct Push {
    node: Arc<Node>,
}

/// The components of a push node.
struct Node {
    holder: Holder,
    /// Whether another node has reached this one.
    reached: Reached,
    membership: Arc<dyn Membership>,
    base: Base,
    reading: Reading,
    placement: Placement,
    admitter: Arc<Admitter>,
    connector: Arc<Connector>,
    connections: TaskTracker,
}

impl Node {
    fn counts(&self) -> Counts {
        let delays = self.base.metrics.recent.quantiles(Instant::now(), [0.5, 0.99]);
        Counts {
            sessions: self.base.registry.len() as u64,
            displaced: self.placement.displaced.len() as u64,
            // Shared by the push nodes of one process; only development has several.
            delivered: self.base.metrics.delivered.get(),
            moves: self.base.metrics.moves.get(),
            delays: delays.map(|[p50_ms, p99_ms]| Delays { p50_ms, p99_ms }),
        }
    }

    fn deliver(&self, batch: &[LiveMessage], sweep: bool) {
        let few = batch.len() <= INLINE_BATCH_MAX;
        for (n, live) in batch.iter().enumerate() {
            if few && n % INLINE_SENDS_PER_YIELD == INLINE_SENDS_PER_YIELD - 1 {
                std::thread::yield_now();
            }
            let handles = self.base.registry.of_user(&live.user);
            let Some((last, others)) = handles.split_last() else { continue };
            // Of consecutive messages of one user, the earlier ones wait in the mailbox and the
            // last one wakes the task.
            let inline = few && batch.get(n + 1).is_none_or(|next| next.user != live.user);
            let feed = |handle: &SessionHandle, item| {
                let (id, seq) = (&live.message.id, live.message.seq);
                tracing::debug!(target: WAY, step = 7, user = %live.user, %id, %seq, device = %handle.device, traceparent = shown(&live.message), "fed to a session");
                if inline { handle.send_inline(item) } else { handle.mailbox.try_live(item) }
            };
            let item = mailbox::encoded(&live.message);
            others.iter().for_each(|handle| feed(handle, item.clone()));
            feed(last, item);
        }
        if sweep {
            self.reading.sweeper.force();
        }
    }

    /// Takes news about logs.
    fn take_hints(&self, hints: &[LogHint], missed: bool) {
        for hint in hints {
            self.reading.tails.take(hint);
            if let LogHint::Memberships(users) = hint {
                users.iter().for_each(|user| self.reading.memberships.note(user));
            }
        }
        if missed {
            self.reading.tails.force();
        }
    }

    /// Returns this node's version of the view, and looks for a newer view if the sender has one.
    fn compare(&self, theirs: &ViewVersion) -> PushResponse {
        let ours = self.base.ownership.view().stamp();
        if theirs.is_news_to(&ours) {
            self.membership.refresh();
        }
        PushResponse::Done(ours)
    }

    fn presence(&self, user: &UserId) -> Vec<Presence> {
        let mut found = Vec::new();
        self.base.registry.for_user(user, |handle| {
            found.push(Presence {
                device: handle.device.clone(),
                node: self.holder.node.clone(),
                connected_at: handle.connected_at,
                acked: handle.acked(),
                client: handle.client.as_deref().cloned(),
                sent: handle.has_begun().then(|| handle.position()),
            });
        });
        found
    }

    fn disconnect(&self, revocation: &Revocation) {
        let close = |handle: &Arc<SessionHandle>| sweep::close_if_revoked(handle, revocation.not_before_s);
        self.base.registry.for_user(&revocation.user, close);
    }
}

impl Push {
    /// Registers the node and starts its tasks in `tasks`.
    ///
    /// # Errors
    ///
    /// Membership's, if the node cannot be registered.
    pub async fn start(
        config: PushConfig,
        parts: PushParts,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, MembershipError> {
        let registration = parts.membership.join(config.info.clone()).await?;
        let holder = Holder { node: config.info.node.clone(), incarnation: registration.incarnation };
        let base = Base::new(&config, &parts, holder.clone());
        let tokens = Arc::new(TokenCheck::new(parts.verify, parts.refusals));
        let urls = Arc::new(parts.urls);
        let reading = Reading::start(&base, (parts.stores, parts.interest), parts.clock.clone(), tasks);
        let placement = Placement::start(&base, &reading, parts.fallback, parts.reach, &urls, tasks);
        tasks.spawn(placement.watch(&base, &reading, registration.standing).run());
        let admitter = Arc::new(Admitter {
            rules: AdmissionRules { origins: config.origins, token_in_url: config.token_in_url },
            availability: Arc::clone(&base.availability),
            budgets: AcceptBudgets::new(config.info.accept_per_s),
            tickets: Tickets::new(parts.ticket_key, holder.clone(), parts.clock.clone()),
            tokens,
            ownership: Arc::clone(&base.ownership),
            urls,
            metrics: base.metrics.clone(),
        });
        let connector = base.connector(&reading, &placement, &admitter, parts.clock.clone());
        let node = Arc::new(Node {
            holder,
            reached: registration.proof,
            membership: parts.membership,
            base,
            reading,
            placement,
            admitter,
            connector,
            connections: TaskTracker::new(),
        });
        tasks.spawn(report_counts(Arc::clone(&node)));
        Ok(Self { node })
    }

    /// Name of this node.
    #[must_use]
    pub fn name(&self) -> &NodeId {
        &self.node.holder.node
    }

    /// Incarnation of this node.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.node.holder.incarnation
    }

    /// To be marked when another node has reached this one.
    #[must_use]
    pub fn reached(&self) -> &Reached {
        &self.node.reached
    }

    /// Whether the node takes sockets: it neither drains nor has lost its place.
    #[must_use]
    pub fn takes_sockets(&self) -> bool {
        self.node.base.availability.takes_sockets()
    }

    /// What the node holds now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.node.counts()
    }

    /// The hint for a client that cannot stay.
    #[must_use]
    pub fn reconnect_hint(&self) -> ReconnectHint {
        self.node.base.window.hint()
    }

    /// The origins whose pages may connect.
    #[must_use]
    pub fn origins(&self) -> Arc<Origins> {
        self.node.admitter.rules.origins.get()
    }

    /// Decides about a request for a socket before the upgrade.
    ///
    /// # Errors
    ///
    /// [`AdmissionError`]: the response instead.
    pub async fn admit(&self, request: SocketRequest<'_>) -> Result<Admission, AdmissionError> {
        self.node.admitter.admit(request).await
    }

    /// Whether a token of this user that was issued at this time was revoked. If the inbox does not
    /// respond, the answer is no, and the attach of the socket will find out.
    pub async fn has_revoked(&self, user: &UserId, token_iat_s: u64) -> bool {
        let query = PositionQuery { user: user.clone(), from: StartAt::Latest };
        let answer = self.node.reading.lookups.positions.ask(query).await;
        answer.is_ok_and(|answer| token_iat_s < answer.not_before_s)
    }

    /// Reads a page of a user's own history, and where the following page begins.
    ///
    /// # Errors
    ///
    /// The inbox's.
    pub async fn history(
        &self,
        user: &UserId,
        range: HistoryRange,
        limit: usize,
    ) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
        history::read(&self.node.reading.inbox, user, range, limit.min(OWN_HISTORY_PAGE)).await
    }

    /// Reads a page of the log of a topic for a member, or for one whose token has the right to
    /// watch it, and where the following page begins; `None` for others.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn log_history(
        &self,
        user: &UserId,
        log: &LogId,
        range: HistoryRange,
        limit: usize,
        rights: Option<&WatchRights>,
    ) -> Result<Option<(Vec<Message>, Option<Seq>)>, InboxError> {
        let stores = &self.node.reading.stores;
        let (life, from) = match log {
            LogId::Everyone => (EVERYONES_LIFE, Seq::BEGINNING),
            LogId::Topic(topic) if rights.is_some_and(|rights| rights.allows(topic)) => {
                match stores.topics.topic(topic.clone()).await? {
                    Some(known) if known.delivery == Delivery::Log => (known.version.life, Seq::BEGINNING),
                    _ => return Ok(None),
                }
            }
            LogId::Topic(topic) => {
                let memberships = stores.topics.log_memberships(vec![user.clone()]).await?;
                let of = memberships.iter().flat_map(|found| &found.logs).find(|one| one.topic == *topic);
                let Some(membership) = of else { return Ok(None) };
                (membership.life, membership.from)
            }
        };
        let range = match range {
            HistoryRange::After(after) => HistoryRange::After(after.max(from)),
            before => before,
        };
        let limit = limit.min(OWN_HISTORY_PAGE);
        let (mut messages, next) = stores.logs.history(log, life, range, limit).await?;
        messages.retain(|message| message.seq > from && is_for(message.log_entry(), user));
        // What stands further below is not for this member.
        let next = next.filter(|next| matches!(range, HistoryRange::After(_)) || *next > from);
        Ok(Some((messages, next)))
    }

    /// Serves an admitted client to its end, once its socket is there. The future is small, because
    /// it lives as long as the connection.
    pub fn serve<S, F>(&self, admission: Admission, socket: F) -> impl Future<Output = ()> + Send + use<S, F>
    where
        F: Future<Output = Option<S>> + Send,
        S: Stream<Item = Result<Incoming, SocketError>> + Sink<Outgoing, Error = SocketError>,
        S: Unpin + Send + 'static,
    {
        let running = connection::run(Arc::clone(&self.node.connector), admission, socket);
        self.node.connections.track_future(running)
    }

    /// Leaves: out of the ring at once, no new sockets, every session sent away, cursors written.
    pub async fn drain(&self, how: Drain) {
        let node = &self.node;
        node.base.availability.begin_drain();
        let own = &node.holder;
        if let Err(error) = node.membership.depart(&own.node, own.incarnation, Departure::Draining).await {
            tracing::warn!(%error, "announcing the drain failed");
        }
        node.placement.drainer.drain(how).await;
        node.connections.close();
        // A client that does not answer the close is given up by its own task; this bounds the
        // wait.
        let _ = tokio::time::timeout(end::FAREWELL * 2, node.connections.wait()).await;
        node.reading.cursors.flush().await;
        node.reading.log_positions.flush().await;
        if let Err(error) = node.placement.displaced.clear().await {
            tracing::warn!(%error, "the fallback entries could not be removed; they end with their lease");
        }
        if let Err(error) = node.membership.depart(&own.node, own.incarnation, Departure::Left).await {
            tracing::warn!(%error, "leaving the registry failed; the node stays a member until its lease ends");
        }
    }
}

async fn report_counts(node: Arc<Node>) {
    loop {
        node.membership.counts(Some((node.holder.node.clone(), node.counts())));
        tokio::time::sleep(COUNTS_EVERY).await;
    }
}

impl tower::Service<PushRequest> for Push {
    type Response = PushResponse;
    type Error = PeerError;
    type Future = Ready<Result<PushResponse, PeerError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerError>> {
        Poll::Ready(Ok(()))
    }

    /// Writes to sockets that have room and puts into mailboxes; neither waits.
    fn call(&mut self, request: PushRequest) -> Self::Future {
        ready(Ok(match request {
            PushRequest::Deliver { batch, sweep, stamp } => {
                self.node.deliver(&batch, sweep);
                self.node.compare(&stamp)
            }
            PushRequest::Hint { hints, missed, stamp } => {
                self.node.take_hints(&hints, missed);
                self.node.compare(&stamp)
            }
            PushRequest::Readers(log) => PushResponse::Readers(self.node.reading.tails.readers(&log)),
            PushRequest::Gone(stamp) => {
                self.node.placement.notice.note();
                self.node.compare(&stamp)
            }
            PushRequest::Ping => PushResponse::Done(self.node.base.ownership.view().stamp()),
            PushRequest::Lookup(user) => PushResponse::Sessions(self.node.presence(&user)),
            PushRequest::Disconnect(revocation) => {
                self.node.disconnect(&revocation);
                PushResponse::Done(self.node.base.ownership.view().stamp())
            }
        }))
    }
}

#[cfg(test)]
mod tests;
