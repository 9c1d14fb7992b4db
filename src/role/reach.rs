//! Whether a push node answers at its peer port: asked before a client is sent there, and not more than once a second.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tower::ServiceExt;

use super::PeerDirectory;
use crate::message::NodeId;
use crate::wire::peer::PushRequest;

/// How long an answer, or the lack of one, is believed.
const BELIEVED: Duration = Duration::from_secs(1);
/// How long a node may take to answer: a client waits meanwhile.
const DIAL_DEADLINE: Duration = Duration::from_millis(800);

/// See the room's comment. Cloned, it remembers the same.
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
    /// When it was asked last, and whether it answered.
    last: Option<(Instant, bool)>,
    /// Held while it is asked: of a crowd that wants to know, one asks.
    asking: Arc<tokio::sync::Mutex<()>>,
}

impl Known {
    fn fresh(&self) -> Option<bool> {
        self.last.filter(|(at, _)| at.elapsed() < BELIEVED).map(|(_, answered)| answered)
    }
}

impl PeerProbe {
    /// Asks the nodes that `directory` finds.
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
        // A name that nobody asked for lately takes no room.
        all.retain(|name, known| name == node || known.fresh().is_some());
        all.entry(node.clone()).or_default().last = Some((Instant::now(), answered));
        answered
    }

    /// What is known without asking.
    #[must_use]
    pub fn known(&self, node: &NodeId) -> Option<bool> {
        self.inner.known.lock().get(node).and_then(Known::fresh)
    }
}
