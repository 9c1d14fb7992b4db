//! Probes whether a push node answers at its peer port. Asked before a client is sent there, at
//! most once a second per node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tower::ServiceExt;

use super::PeerDirectory;
use crate::message::NodeId;
use crate::wire::peer::PushRequest;

/// How long a result is reused.
const BELIEVED: Duration = Duration::from_secs(1);
/// Deadline of a probe. A client waits for it.
const DIAL_DEADLINE: Duration = Duration::from_millis(800);

/// Probes push nodes. Cloned, it shares the results.
#[derive(Clone)]
pub struct PeerProbe {
    inner: Arc<Inner>,
}

struct Inner {
    directory: Arc<dyn PeerDirectory>,
    known: Mutex<HashMap<NodeId, Known>>,
}

#[derive(Clone, Default)]
struct Known {
    /// The time and the result of the last probe.
    last: Option<(Instant, bool)>,
    /// Held during a probe: of many callers, one probes.
    asking: Arc<tokio::sync::Mutex<()>>,
}

impl Known {
    fn fresh(&self) -> Option<bool> {
        self.last.filter(|(at, _)| at.elapsed() < BELIEVED).map(|(_, answered)| answered)
    }
}

impl PeerProbe {
    /// Probes the nodes that `directory` finds.
    #[must_use]
    pub fn new(directory: Arc<dyn PeerDirectory>) -> Self {
        Self { inner: Arc::new(Inner { directory, known: Mutex::default() }) }
    }

    /// Whether `node` answers now.
    pub async fn answers(&self, node: &NodeId) -> bool {
        let known = self.inner.known.lock().entry(node.clone()).or_default().clone();
        if let Some(answered) = known.fresh() {
            return answered;
        }
        let _asking = known.asking.lock().await;
        if let Some(answered) = self.known(node) {
            return answered;
        }
        let answered = match self.inner.directory.find(node) {
            None => false,
            Some(service) => {
                let asked = tokio::time::timeout(DIAL_DEADLINE, service.oneshot(PushRequest::Ping)).await;
                matches!(asked, Ok(Ok(_)))
            }
        };
        let mut all = self.inner.known.lock();
        // Results that have expired are dropped.
        all.retain(|name, known| name == node || known.fresh().is_some());
        all.entry(node.clone()).or_default().last = Some((Instant::now(), answered));
        answered
    }

    /// The result of the last probe, if it is still fresh.
    #[must_use]
    pub fn known(&self, node: &NodeId) -> Option<bool> {
        self.inner.known.lock().get(node).and_then(Known::fresh)
    }
}
