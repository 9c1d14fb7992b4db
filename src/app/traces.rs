//! The traces that senders name for what they publish (W3C Trace Context).

use std::sync::Arc;

use http::HeaderMap;

use crate::telemetry::{Counter, Metrics};
use crate::trace::TraceParent;

/// The name of the header, and of the gRPC metadata.
pub(super) const TRACEPARENT: &str = "traceparent";

/// Reads what senders name, and counts what is no trace. It is ignored: a publish is worth more
/// than its trace.
pub(super) struct Traces {
    ignored: Counter,
}

impl Traces {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let ignored = Counter::default();
        let shown = ignored.clone();
        let help = "Publishes whose traceparent breaks the rules of W3C Trace Context, and was ignored";
        metrics.register(|r| r.register("traceparents_ignored", help, shown));
        Self { ignored }
    }

    /// The trace of a request.
    pub(super) fn of_headers(&self, headers: &HeaderMap) -> Option<Arc<TraceParent>> {
        let mut given = headers.get_all(TRACEPARENT).iter();
        match (given.next(), given.next()) {
            (None, _) => None,
            (Some(one), None) => self.of_text(one.to_str().unwrap_or_default()),
            // Which of several is meant nobody knows.
            (Some(_), Some(_)) => self.of_text(""),
        }
    }

    /// The trace that this text names.
    pub(super) fn of_text(&self, text: &str) -> Option<Arc<TraceParent>> {
        let trace = TraceParent::parse(text);
        if trace.is_none() {
            self.ignored.inc();
        }
        trace.map(Arc::new)
    }
}
