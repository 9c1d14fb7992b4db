//! What a push node is made with: configuration, the services of other modules, metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::admission::{AdmissionError, Origins};
use super::sweep::SWEEP_EVERY;
use super::tails::LogReadingLimits;
use crate::clock::Clock;
use crate::fallback::Fallback;
use crate::inbox::Stores;
use crate::interest::Interest;
use crate::live::Live;
use crate::membership::{Membership, NodeInfo};
use crate::role::VerifyService;
use crate::role::connect::PublicUrls;
use crate::role::reach::PeerProbe;
use crate::telemetry::Recent;
use crate::telemetry::{Health, Metrics, Path, Refusals, Timing, TimingBy};
use crate::ticket::TicketKey;

/// How a push node behaves.
#[derive(Debug, Clone)]
pub struct PushConfig {
    /// What the node says of itself to other nodes.
    pub info: NodeInfo,
    /// How long it takes to empty itself when it has lost its place.
    pub drain_window: Duration,
    /// The origins whose pages may open sockets.
    pub origins: Live<Origins>,
    /// Whether a token may stand in the URL.
    pub token_in_url: bool,
    /// Times and sizes.
    pub limits: PushLimits,
    /// Those of them that may change while the node runs.
    pub live: Arc<LiveLimits>,
}

/// The limits of sessions that may change while the node runs. New sockets and frames are held to
/// them.
#[derive(Debug, Default)]
pub struct LiveLimits {
    auth_deadline_ms: AtomicU64,
    per_user: AtomicUsize,
    per_device: AtomicUsize,
    client_frames_per_s: AtomicU32,
}

impl LiveLimits {
    /// Those of `limits`.
    #[must_use]
    pub fn of(limits: &PushLimits) -> Self {
        let this = Self::default();
        this.take(limits);
        this
    }

    /// Replaces them by those of `limits`.
    pub fn take(&self, limits: &PushLimits) {
        let deadline = u64::try_from(limits.auth_deadline.as_millis()).unwrap_or(u64::MAX);
        self.auth_deadline_ms.store(deadline, Ordering::Relaxed);
        self.per_user.store(limits.sessions_per_user, Ordering::Relaxed);
        self.per_device.store(limits.sessions_per_device, Ordering::Relaxed);
        self.client_frames_per_s.store(limits.client_frames_per_s, Ordering::Relaxed);
    }

    pub(super) fn auth_deadline(&self) -> Duration {
        Duration::from_millis(self.auth_deadline_ms.load(Ordering::Relaxed))
    }

    /// Most sessions of one user on this node.
    pub(super) fn per_user(&self) -> usize {
        self.per_user.load(Ordering::Relaxed)
    }

    /// Most sessions of one device of a user on this node.
    pub(super) fn per_device(&self) -> usize {
        self.per_device.load(Ordering::Relaxed)
    }

    pub(super) fn client_frames_per_s(&self) -> u32 {
        self.client_frames_per_s.load(Ordering::Relaxed)
    }
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
    /// Most sessions of one device of a user on this node.
    pub sessions_per_device: usize,
    /// Time between two sweeps of the same session.
    pub sweep_every: Duration,
    /// Shortest window in which clients are told to reconnect, in ms.
    pub reconnect_jitter_ms: u64,
    /// Most frames of one client per second. An ack for each message of a fast catch-up stays well
    /// below.
    pub client_frames_per_s: u32,
    /// Reading logs.
    pub logs: LogReadingLimits,
}

impl Default for PushLimits {
    fn default() -> Self {
        Self {
            auth_deadline: Duration::from_secs(5),
            ping_every: Duration::from_secs(25),
            sessions_per_user: 64,
            sessions_per_device: 16,
            sweep_every: SWEEP_EVERY,
            reconnect_jitter_ms: 5_000,
            client_frames_per_s: 20_000,
            logs: LogReadingLimits::default(),
        }
    }
}

/// What a push node needs from other modules.
pub struct PushParts {
    /// The store.
    pub stores: Stores,
    /// The service that verifies tokens.
    pub verify: VerifyService,
    /// Membership.
    pub membership: Arc<dyn Membership>,
    /// The fallback.
    pub fallback: Arc<dyn Fallback>,
    /// Which logs the nodes read.
    pub interest: Arc<dyn Interest>,
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
    /// Bytes that wait for sockets.
    pub outbound: Gauge,
    /// Sockets whose client does not know of logs, though its user is a member of topics with one.
    pub topic_unaware: Counter,
    /// Sockets refused before the upgrade, for any reason.
    pub refused: Counter,
    /// Sockets refused before the upgrade or before their `welcome`, by reason.
    pub sockets_refused: Family<[(&'static str, &'static str); 1], Counter>,
    /// From the acceptance of a message to its way into the socket, by [`Path`].
    pub delivery: TimingBy<4>,
    /// The same for the paths that the objective counts, in the last minute.
    pub recent: Recent,
    /// From there to its ack, of one message per socket at a time.
    pub ack: Timing,
    /// From the acceptance of a socket to its `welcome`.
    pub attach: Timing,
    /// From a `move` frame to the end of the session here.
    pub move_away: Timing,
}

impl PushMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let delivery = "From the acceptance of a message to its way into the socket";
        let own = Self {
            recent: Recent::default(),
            delivery: TimingBy::register(metrics, ("delivery_seconds", delivery), "path", Path::NAMES),
            ack: Timing::register(metrics, "ack_seconds", "From the socket to the ack, sampled"),
            attach: Timing::register(
                metrics,
                "attach_seconds",
                "From the acceptance of a socket to its welcome",
            ),
            move_away: Timing::register(
                metrics,
                "move_seconds",
                "From a move to the end of the session here",
            ),
            ..Self::default()
        };
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
            r.register(
                "outbound_bytes",
                "Bytes that wait for sockets, but for 4 KiB of each",
                own.outbound.clone(),
            );
            r.register("demoted", "Sessions that fell behind on a full socket", own.demoted.clone());
            r.register(
                "topic_unaware",
                "Sockets of members of topics with a log whose client knows of none",
                own.topic_unaware.clone(),
            );
            r.register("refused", "Sockets refused before the upgrade", own.refused.clone());
            r.register(
                "sockets_refused",
                "Sockets refused, before the upgrade or before their welcome, by reason",
                own.sockets_refused.clone(),
            );
        });
        for reason in AdmissionError::NAMES {
            let _ = own.sockets_refused.get_or_create(&[("reason", reason)]);
        }
        own
    }
}
