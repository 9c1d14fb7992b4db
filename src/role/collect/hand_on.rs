//! Stored messages on their way to dispatch, and the metrics of collect.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::sync::watch;
use tower::ServiceExt;

use super::super::DispatchService;
use super::super::backlog::{Backlog, Queued};
use crate::inbox::WriteObserver;
use crate::inbox::logs::log_of;
use crate::membership::View;
use crate::message::{Message, UserId};
use crate::role::shown;
use crate::telemetry::{Metrics, Timing, WAY};
use crate::wire::peer::{DispatchRequest, LiveMessage, LogHint, ViewVersion};

/// Delay after no dispatch could be reached.
const HAND_ON_REST: Duration = Duration::from_millis(200);

/// Metrics of collect.
pub(super) struct CollectMetrics {
    /// A message was stored for one recipient.
    pub(super) stored: Counter,
    /// A repeat was answered with the first position.
    pub(super) duplicates: Counter,
    /// A recipient was refused, for any reason.
    pub(super) refused: Counter,
    /// A publish to a topic was written by another collect.
    pub(super) handed_over: Counter,
    /// A stored message was not handed to dispatch. The user's node finds it by its sweep.
    hints_dropped: Counter,
    /// Appends per write.
    batch: Histogram,
    /// Appends to logs per write.
    log_batch: Histogram,
    /// From the handing over of an append until it is durable.
    store: Timing,
}

impl CollectMetrics {
    fn register(metrics: &Metrics) -> Self {
        let own = Self {
            stored: Counter::default(),
            duplicates: Counter::default(),
            refused: Counter::default(),
            handed_over: Counter::default(),
            hints_dropped: Counter::default(),
            batch: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
            log_batch: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
            store: Timing::register(
                metrics,
                "store_seconds",
                "From handing a message to the store until it is durable",
            ),
        };
        metrics.register(|r| {
            r.register("stored", "Messages stored, one per recipient", own.stored.clone());
            r.register("duplicates", "Repeats answered from what was stored", own.duplicates.clone());
            r.register("publish_refused", "Recipients refused", own.refused.clone());
            let help = "Publishes to topics that another collect has written";
            r.register("handed_over", help, own.handed_over.clone());
            r.register("hints_dropped", "Stored messages that no dispatch took", own.hints_dropped.clone());
            r.register("append_batch", "Appends per write", own.batch.clone());
            r.register("log_append_batch", "Appends to logs of topics per write", own.log_batch.clone());
        });
        own
    }
}

/// Stored messages on their way to dispatch, and the metrics.
pub(super) struct HandingOn {
    pub(super) backlog: Backlog<LiveMessage>,
    /// What concerns logs goes a way of its own: inboxes never wait for it.
    pub(super) hints: Backlog<LogHint>,
    pub(super) metrics: CollectMetrics,
}

impl HandingOn {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let metrics = CollectMetrics::register(metrics);
        Self { backlog: Backlog::default(), hints: Backlog::default(), metrics }
    }

    /// Tells the nodes, if there is room.
    pub(super) fn hint(&self, hints: Vec<LogHint>) {
        let dropped = self.hints.put(hints);
        self.metrics.hints_dropped.inc_by(dropped as u64);
    }
}

/// Is told of what was stored in logs.
pub(super) struct StoredInLogs(pub(super) Arc<HandingOn>);

impl WriteObserver for StoredInLogs {
    fn writing(&self, count: usize) {
        self.0.metrics.log_batch.observe(count as f64);
    }

    fn took(&self, took: Duration) {
        self.0.metrics.store.observe(took);
    }

    fn stored(&self, messages: Vec<(UserId, Arc<Message>)>) {
        let hint = |(key, message): (UserId, Arc<Message>)| {
            let log = log_of(&key)?;
            let (id, seq) = (&message.id, message.seq);
            tracing::debug!(target: WAY, step = 5, %log, %id, %seq, traceparent = shown(&message), "stored in a log, and on the way to dispatch");
            Some(LogHint::Message { log, message })
        };
        self.0.hint(messages.into_iter().filter_map(hint).collect());
    }
}

impl WriteObserver for HandingOn {
    fn writing(&self, count: usize) {
        self.metrics.batch.observe(count as f64);
    }

    fn took(&self, took: Duration) {
        self.metrics.store.observe(took);
    }

    fn stored(&self, messages: Vec<(UserId, Arc<Message>)>) {
        let live = |(user, message): (UserId, Arc<Message>)| {
            let (id, seq) = (&message.id, message.seq);
            tracing::debug!(target: WAY, step = 5, %user, %id, %seq, traceparent = shown(&message), "stored, and on the way to dispatch");
            LiveMessage { user, message }
        };
        let dropped = self.backlog.put(messages.into_iter().map(live).collect());
        self.metrics.hints_dropped.inc_by(dropped as u64);
    }
}

/// What is handed to dispatch in a queue of its own.
pub(super) trait HandedOn: Queued {
    fn backlog(handing_on: &HandingOn) -> &Backlog<Self>;
    fn request(batch: Vec<Self>, missed: bool, stamp: ViewVersion) -> DispatchRequest;
}

impl HandedOn for LiveMessage {
    fn backlog(handing_on: &HandingOn) -> &Backlog<Self> {
        &handing_on.backlog
    }
    fn request(batch: Vec<Self>, missed: bool, stamp: ViewVersion) -> DispatchRequest {
        DispatchRequest::Deliver { batch, missed, stamp }
    }
}

impl HandedOn for LogHint {
    fn backlog(handing_on: &HandingOn) -> &Backlog<Self> {
        &handing_on.hints
    }
    fn request(hints: Vec<Self>, missed: bool, stamp: ViewVersion) -> DispatchRequest {
        DispatchRequest::Hint { hints, missed, stamp }
    }
}

/// Hands what was stored to dispatch, batch after batch. If no dispatch takes one, the sweeps find
/// it; they are requested as soon as there is a dispatch again.
pub(super) async fn hand_on<T: HandedOn>(
    handing_on: Arc<HandingOn>,
    dispatch: DispatchService,
    views: watch::Receiver<Arc<View>>,
) {
    loop {
        let (batch, missed) = T::backlog(&handing_on).take().await;
        let count = batch.len();
        let stamp = views.borrow().stamp();
        let request = T::request(batch, missed, stamp);
        if let Err(fault) = dispatch.clone().oneshot(request).await {
            tracing::debug!(%fault, "no dispatch took a batch; the sweeps will find it");
            handing_on.metrics.hints_dropped.inc_by(count as u64);
            tokio::time::sleep(HAND_ON_REST).await;
            T::backlog(&handing_on).mark_missed();
        }
    }
}
