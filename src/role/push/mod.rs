//! Push holds the sockets. It delivers, takes acks, replays, and sends a client to the node that
//! owns
//! its user.
//!
//! - [`registry`]: the sessions of this node, by user.
//! - [`mailbox`]: how the node reaches one session's task.
//! - [`connection`]: that task, from the upgrade to the last frame.
//! - [`sweep`]: how sessions read the inbox, and the sweep that finds what every hint has missed.
//! - [`rebalance`]: fallback entries, moves, and the drain.
//! - [`standing`]: what happens when this node has lost its place among the members.
//!
//! # Attach order
//!
//! Register, enter the fallback set if displaced, ask the inbox from the cursor, go live. What is
//! stored
//! after the question comes as a live message or is reported as missing; what was stored before it
//! is
//! in the response. Nothing falls in between.

mod admission;
mod connection;
mod mailbox;
pub mod rebalance;
mod registry;
mod standing;
pub mod sweep;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{Ready, ready};
use futures_util::{Sink, Stream};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use admission::{Admission, AdmissionError, Origins, SocketRequest};
pub use rebalance::Drain;

use super::VerifyService;
use super::connect::PublicUrls;
use super::reach::PeerProbe;
use crate::clock::Clock;
use crate::fallback::{Fallback, Holder, Which};
use crate::inbox::{Inbox, StartAt};
use crate::membership::{Counts, Departure, Membership, MembershipError, NodeInfo, Reached, View};
use crate::message::{NodeId, UserId};
use crate::telemetry::{Health, Metrics, Refusals, WAY};
use crate::ticket::{TicketKey, UsedNonces};
use crate::wire::frame::ReconnectHint;
use crate::wire::peer::{
    LiveMessage, PeerError, Presence, PushRequest, PushResponse, Revocation, ViewVersion,
};
use crate::wire::socket::{Incoming, Outgoing, SocketError};

use admission::AcceptBudgets;
use registry::{Registry, SessionHandle};

/// Batches up to this size are written to the sockets on the caller's thread (some hundreds of µs).
/// Larger ones go through the mailboxes, so that all workers share the work.
const INLINE_BATCH_MAX: usize = 64;

/// The thread yields after this many inline sends (about 0.1 ms), so that clients on this machine,
/// the writer thread and a sync are not starved.
const SENT_IN_A_ROW: usize = 8;

/// How a push node behaves.
#[derive(Debug, Clone)]
pub struct PushConfig {
    /// What the node says of itself to other nodes.
    pub info: NodeInfo,
    /// How long it takes to empty itself when it has lost its place.
    pub drain_window: Duration,
    /// The origins whose pages may open sockets.
    pub origins: Origins,
    /// Whether a token may stand in the URL.
    pub token_in_url: bool,
    /// Times and sizes.
    pub limits: PushLimits,
}

/// The limits of sessions (docs/design.md, section 11).
#[derive(Debug, Clone, Copy)]
pub struct PushLimits {
    /// Deadline for the first frame to bring a token.
    pub auth_deadline: Duration,
    /// Time between two pings.
    pub ping_every: Duration,
    /// Most sessions of one user on this node.
    pub sessions_per_user: usize,
    /// Time between two sweeps of the same session.
    pub sweep_every: Duration,
    /// Shortest window in which clients are told to reconnect, in ms.
    pub reconnect_jitter_ms: u64,
    /// Most frames of one client per second. An ack for each message of a fast catch-up stays well
    /// below.
    pub client_frames_per_s: u32,
}

impl Default for PushLimits {
    fn default() -> Self {
        Self {
            auth_deadline: Duration::from_secs(5),
            ping_every: Duration::from_secs(25),
            sessions_per_user: 16,
            sweep_every: sweep::SWEEP_EVERY,
            reconnect_jitter_ms: 5_000,
            client_frames_per_s: 20_000,
        }
    }
}

/// What a push node needs from other modules.
pub struct PushParts {
    /// The inbox.
    pub inbox: Arc<dyn Inbox>,
    /// The service that verifies tokens.
    pub verify: VerifyService,
    /// Membership.
    pub membership: Arc<dyn Membership>,
    /// The fallback.
    pub fallback: Arc<dyn Fallback>,
    /// Probes other nodes.
    pub reach: PeerProbe,
    /// Shows whether this node has lost its place.
    pub health: Health,
    /// Public URLs of the nodes.
    pub urls: PublicUrls,
    /// Signs and verifies tickets.
    pub ticket_key: TicketKey,
    /// Time of day.
    pub clock: Clock,
    /// Metrics of push.
    pub metrics: PushMetrics,
    /// Counts refused credentials.
    pub refusals: Refusals,
}

/// Metrics of push, shared by the push nodes of one process.
#[derive(Clone, Default)]
pub struct PushMetrics {
    /// Registered sessions.
    pub sessions: Gauge,
    /// Connection tasks, attached or not.
    pub connections: Gauge,
    /// Sockets that got their `welcome`.
    pub welcomed: Counter,
    /// `message` frames put into a session's queue.
    pub delivered: Counter,
    /// Pages read from the inbox for sessions that were behind.
    pub pages: Counter,
    /// Unreadable messages, counted each time one was to be sent.
    pub unreadable: Counter,
    /// Sessions asked about by a sweep.
    pub swept: Counter,
    /// Sweeps that were forced because hints were dropped.
    pub forced_sweeps: Counter,
    /// `move` frames sent.
    pub moves: Counter,
    /// Sessions that fell behind because their socket was full.
    pub demoted: Counter,
    /// Sockets refused before the upgrade, for any reason.
    pub refused: Counter,
}

impl PushMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.register(|r| {
            r.register("sessions", "Sessions registered now", own.sessions.clone());
            r.register("connections", "Connection tasks running now", own.connections.clone());
            r.register("welcomed", "Sockets that got their welcome", own.welcomed.clone());
            r.register("delivered", "Message frames handed to sockets", own.delivered.clone());
            r.register("inbox_pages", "Pages read for sessions that were behind", own.pages.clone());
            r.register(
                "unreadable",
                "Messages passed over since they cannot be read",
                own.unreadable.clone(),
            );
            r.register("swept", "Sessions looked at by the sweep", own.swept.clone());
            r.register("forced_sweeps", "Sweeps out of turn", own.forced_sweeps.clone());
            r.register("moves", "Move frames sent", own.moves.clone());
            r.register("demoted", "Sessions that fell behind on a full socket", own.demoted.clone());
            r.register("refused", "Sockets refused before the upgrade", own.refused.clone());
        });
        own
    }
}

/// The role push on one node. Cheap to clone.
#[derive(Clone)]
pub struct Push {
    node: Arc<Node>,
}

/// State that all parts of a push node share.
pub(crate) struct Node {
    config: PushConfig,
    /// This node and its incarnation.
    holder: Holder,
    registry: Arc<Registry>,
    inbox: Arc<dyn Inbox>,
    verify: VerifyService,
    membership: Arc<dyn Membership>,
    views: watch::Receiver<Arc<View>>,
    fallback: Arc<dyn Fallback>,
    reach: PeerProbe,
    health: Health,
    urls: PublicUrls,
    ticket_key: TicketKey,
    used_tickets: Mutex<UsedNonces>,
    accepts: AcceptBudgets,
    clock: Clock,
    asks: sweep::Asks,
    reads: sweep::Reads,
    cursors: sweep::Cursors,
    sweep_now: tokio::sync::Notify,
    displaced: Arc<rebalance::Displaced>,
    moves: rebalance::Moves,
    metrics: PushMetrics,
    refusals: Refusals,
    /// Cancelled once, when the node begins to leave.
    draining: CancellationToken,
    /// Why the node takes no sockets although it does not leave.
    barred: watch::Sender<Option<standing::Bar>>,
    /// When a router last said that its view no longer has this node.
    told_gone: Mutex<Option<tokio::time::Instant>>,
    gone: tokio::sync::Notify,
    /// Whether another node has reached this one.
    reached: Reached,
    /// The state of this node's lease.
    standing: watch::Receiver<crate::membership::LeaseState>,
    connections: TaskTracker,
}

impl Node {
    fn name(&self) -> &NodeId {
        &self.holder.node
    }

    /// Neither draining nor barred.
    fn takes_sockets(&self) -> bool {
        !self.draining.is_cancelled() && self.barred.borrow().is_none()
    }

    /// A draining node owns nobody, even if its own view does not show that yet.
    fn owns(&self, view: &View, user: &UserId) -> bool {
        !self.draining.is_cancelled() && view.owner(user).is_none_or(|owner| owner.info.node == *self.name())
    }

    fn hint(&self) -> ReconnectHint {
        let (sessions, limits) = (self.registry.len(), &self.config.limits);
        let max_ms = rebalance::reconnect_window_ms(
            sessions,
            self.config.info.accept_per_s,
            limits.reconnect_jitter_ms,
        );
        ReconnectHint { min_ms: 0, max_ms }
    }

    fn counts(&self) -> Counts {
        Counts {
            sessions: self.registry.len() as u64,
            displaced: self.displaced.len() as u64,
            // Shared by the push nodes of one process; only development has several.
            delivered: self.metrics.delivered.get(),
            moves: self.metrics.moves.get(),
        }
    }

    fn deliver(&self, batch: &[LiveMessage], sweep: bool) {
        let few = batch.len() <= INLINE_BATCH_MAX;
        for (n, live) in batch.iter().enumerate() {
            if few && n % SENT_IN_A_ROW == SENT_IN_A_ROW - 1 {
                std::thread::yield_now();
            }
            let handles = self.registry.of_user(&live.user);
            let Some((last, others)) = handles.split_last() else { continue };
            // Consecutive messages of one user leave together.
            let at_once = few && batch.get(n + 1).is_none_or(|next| next.user != live.user);
            let feed = |handle: &SessionHandle, item| {
                let (id, seq) = (&live.message.id, live.message.seq);
                tracing::debug!(target: WAY, step = 7, user = %live.user, %id, %seq, device = %handle.device, "fed to a session");
                if at_once { handle.send_inline(item) } else { handle.mailbox.try_live(item) }
            };
            let item = sweep::item(&live.message);
            others.iter().for_each(|handle| feed(handle, item.clone()));
            feed(last, item);
        }
        if sweep {
            self.sweep_now.notify_one();
        }
    }

    /// Returns this node's version of the view, and looks for a newer view if the sender has one.
    fn compare(&self, theirs: &ViewVersion) -> PushResponse {
        let ours = self.views.borrow().stamp();
        if theirs.is_news_to(&ours) {
            self.membership.refresh();
        }
        PushResponse::Done(ours)
    }

    fn presence(&self, user: &UserId) -> Vec<Presence> {
        let mut found = Vec::new();
        self.registry.for_user(user, |handle| {
            found.push(Presence {
                device: handle.device.clone(),
                node: self.name().clone(),
                connected_at: handle.connected_at,
                acked: handle.acked(),
            });
        });
        found
    }

    fn disconnect(&self, revocation: &Revocation) {
        self.registry
            .for_user(&revocation.user, |handle| sweep::close_if_revoked(handle, revocation.not_before_s));
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
        let (asks, requests) = sweep::Asks::new(Arc::clone(&parts.inbox));
        let node = Arc::new(Node {
            holder,
            registry: Arc::new(Registry::new(config.limits.sessions_per_user)),
            inbox: parts.inbox,
            verify: parts.verify,
            views: parts.membership.views(),
            membership: parts.membership,
            fallback: parts.fallback,
            reach: parts.reach,
            health: parts.health,
            urls: parts.urls,
            ticket_key: parts.ticket_key,
            used_tickets: Mutex::default(),
            accepts: AcceptBudgets::new(config.info.accept_per_s),
            clock: parts.clock,
            asks,
            reads: sweep::Reads::default(),
            cursors: sweep::Cursors::default(),
            sweep_now: tokio::sync::Notify::new(),
            displaced: Arc::default(),
            moves: rebalance::Moves::default(),
            metrics: parts.metrics,
            refusals: parts.refusals,
            draining: CancellationToken::new(),
            barred: watch::Sender::new(None),
            told_gone: Mutex::new(None),
            gone: tokio::sync::Notify::new(),
            reached: registration.proof,
            standing: registration.standing,
            connections: TaskTracker::new(),
            config,
        });
        tasks.spawn(sweep::answer_asks(Arc::clone(&node.inbox), requests));
        tasks.spawn(sweep::perform_reads(Arc::clone(&node)));
        tasks.spawn(sweep::sweep(Arc::clone(&node)));
        tasks.spawn(sweep::write_cursors(Arc::clone(&node)));
        tasks.spawn(rebalance::keep_fallback(Arc::clone(&node)));
        tasks.spawn(rebalance::renew_fallback(Arc::clone(&node)));
        tasks.spawn(standing::watch(Arc::clone(&node)));
        tasks.spawn(rebalance::pace_moves(Arc::clone(&node)));
        tasks.spawn(report_counts(Arc::clone(&node)));
        Ok(Self { node })
    }

    /// Name of this node.
    #[must_use]
    pub fn name(&self) -> &NodeId {
        self.node.name()
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
        self.node.takes_sockets()
    }

    /// What the node holds now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.node.counts()
    }

    /// The hint for a client that cannot stay.
    #[must_use]
    pub fn reconnect_hint(&self) -> ReconnectHint {
        self.node.hint()
    }

    /// The origins whose pages may connect.
    #[must_use]
    pub fn origins(&self) -> &Origins {
        &self.node.config.origins
    }

    /// Decides about a request for a socket before the upgrade.
    ///
    /// # Errors
    ///
    /// [`AdmissionError`]: the response instead.
    pub async fn admit(&self, request: SocketRequest<'_>) -> Result<Admission, AdmissionError> {
        let decided = admission::admit(&self.node, request).await;
        if decided.is_err() {
            self.node.metrics.refused.inc();
        }
        decided
    }

    /// Whether a token of this user that was issued at this time was revoked. If the inbox does not
    /// respond, the answer is no, and the attach of the socket will find out.
    pub async fn has_revoked(&self, user: &UserId, token_iat_s: u64) -> bool {
        let answer = self.node.asks.ask(user.clone(), StartAt::Latest).await;
        answer.is_ok_and(|answer| token_iat_s < answer.not_before_s)
    }

    /// Serves an admitted client to its end, once its socket is there. The future is small, because
    /// it lives as long as the connection.
    pub fn serve<S, F>(&self, admission: Admission, socket: F) -> impl Future<Output = ()> + Send + use<S, F>
    where
        F: Future<Output = Option<S>> + Send,
        S: Stream<Item = Result<Incoming, SocketError>> + Sink<Outgoing, Error = SocketError>,
        S: Unpin + Send + 'static,
    {
        let running = connection::run(Arc::clone(&self.node), admission, socket);
        self.node.connections.track_future(running)
    }

    /// Leaves: out of the ring at once, no new sockets, every session sent away, cursors written.
    pub async fn drain(&self, how: Drain) {
        let node = &self.node;
        node.draining.cancel();
        let own = &node.holder;
        if let Err(error) = node.membership.depart(&own.node, own.incarnation, Departure::Draining).await {
            tracing::warn!(%error, "the others were not told that this node leaves");
        }
        rebalance::drain(node, how).await;
        node.connections.close();
        // A client that does not answer the close is given up by its own task; this bounds the
        // wait.
        let _ = tokio::time::timeout(connection::FAREWELL * 2, node.connections.wait()).await;
        node.cursors.flush(&*node.inbox).await;
        node.displaced.forget();
        if let Err(error) = node.fallback.remove(own, Which::All).await {
            tracing::warn!(%error, "the fallback entries stay until their lease ends");
        }
        if let Err(error) = node.membership.depart(&own.node, own.incarnation, Departure::Left).await {
            tracing::warn!(%error, "the node stays a member until its lease ends");
        }
    }
}

/// How often a node reports its counts.
const COUNTS_EVERY: Duration = Duration::from_millis(500);

async fn report_counts(node: Arc<Node>) {
    loop {
        node.membership.counts(Some((node.name().clone(), node.counts())));
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
            PushRequest::Gone(stamp) => {
                standing::gone(&self.node);
                self.node.compare(&stamp)
            }
            PushRequest::Ping => PushResponse::Done(self.node.views.borrow().stamp()),
            PushRequest::Lookup(user) => PushResponse::Sessions(self.node.presence(&user)),
            PushRequest::Disconnect(revocation) => {
                self.node.disconnect(&revocation);
                PushResponse::Done(self.node.views.borrow().stamp())
            }
        }))
    }
}

#[cfg(test)]
mod tests;
