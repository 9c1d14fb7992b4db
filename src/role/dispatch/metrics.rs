//! The metrics of dispatch.

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;

use crate::telemetry::Metrics;

/// Metrics of dispatch.
#[derive(Default)]
pub(super) struct DispatchMetrics {
    /// A message was put into a queue.
    pub(super) routed: Counter,
    /// A message was dropped, because the queue was full or the node did not answer.
    pub(super) dropped: Counter,
    /// A hint about logs was put into a queue.
    pub(super) hints: Counter,
    /// A node was not sent a message, since it reads no such log.
    pub(super) hints_spared: Counter,
    /// There was no node for a message.
    pub(super) unowned: Counter,
    /// The fallback entries were looked up for a batch.
    pub(super) fallback_lookups: Counter,
    /// A batch was routed again, because a node has a newer view.
    pub(super) rerouted: Counter,
}

impl DispatchMetrics {
    pub(super) fn register(metrics: &Metrics) -> Arc<Self> {
        let own = Self::default();
        metrics.register(|r| {
            r.register("dispatch_routed", "Messages put into a queue of a node", own.routed.clone());
            r.register("dispatch_dropped", "Hints dropped: queue full or node silent", own.dropped.clone());
            r.register("dispatch_hints", "Hints about logs put into a queue of a node", own.hints.clone());
            r.register(
                "dispatch_hints_spared",
                "Messages of logs that a node was not sent, since it does not read the log",
                own.hints_spared.clone(),
            );
            r.register("dispatch_unowned", "Messages without a node to go to", own.unowned.clone());
            r.register(
                "dispatch_fallback_lookups",
                "Batches that asked the fallback",
                own.fallback_lookups.clone(),
            );
            r.register("dispatch_rerouted", "Messages routed again by a newer view", own.rerouted.clone());
        });
        Arc::new(own)
    }
}
