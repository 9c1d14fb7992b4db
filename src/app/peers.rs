//! Where the other roles are: push nodes for dispatch, routers for collect; in this process or at their peer ports.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::Instant;
use tower::util::BoxCloneSyncService;

use crate::clock::Clock;
use crate::membership::{Router, View};
use crate::message::NodeId;
use crate::role::{Directory, DispatchService, PushService};
use crate::ticket::PeerKey;
use crate::transport::peer::{RemoteDispatch, RemotePush, Sign, Verify};
use crate::wire::peer::{DispatchRequest, DispatchResponse, PeerFault};

/// How long a node that left the view is still known: longer than dispatch sends to it.
const KEPT: Duration = Duration::from_secs(60);
/// Routers that are tried for one request.
const TRIES: usize = 3;

/// Makes and checks proofs with the shared secret.
pub(super) fn proofs(secret: &str, clock: &Clock) -> (Sign, Verify) {
    let (signing, verifying) = (PeerKey::derive(secret), PeerKey::derive(secret));
    let (now, then) = (clock.clone(), clock.clone());
    (Arc::new(move || signing.sign(now.now())), Arc::new(move |proof| verifying.verify(proof, then.now())))
}

/// The push nodes.
pub(super) struct PushNodes {
    pub(super) here: RwLock<HashMap<NodeId, PushService>>,
    views: watch::Receiver<Arc<View>>,
    sign: Sign,
    elsewhere: Mutex<HashMap<NodeId, Elsewhere>>,
}

struct Elsewhere {
    address: Arc<str>,
    service: PushService,
    /// When a view had it last.
    seen: Instant,
}

impl PushNodes {
    pub(super) fn new(views: watch::Receiver<Arc<View>>, sign: Sign) -> Self {
        Self { here: RwLock::default(), views, sign, elsewhere: Mutex::default() }
    }
}

impl Directory for PushNodes {
    fn here(&self, node: &NodeId) -> Option<PushService> {
        self.here.read().get(node).cloned()
    }

    fn find(&self, node: &NodeId) -> Option<PushService> {
        if let Some(here) = self.here(node) {
            return Some(here);
        }
        let address = self.views.borrow().member(node).map(|member| Arc::clone(&member.info.peer));
        let mut elsewhere = self.elsewhere.lock();
        let Some(address) = address.filter(|address| !address.is_empty()) else {
            return elsewhere.get(node).map(|known| known.service.clone());
        };
        match elsewhere.get_mut(node) {
            Some(known) if known.address == address => {
                known.seen = Instant::now();
                Some(known.service.clone())
            }
            _ => {
                elsewhere.retain(|_, known| known.seen.elapsed() < KEPT);
                let remote = RemotePush::new(&address, node.as_str(), Arc::clone(&self.sign));
                let service =
                    remote.inspect_err(|fault| tracing::warn!(%node, %fault, "no peer")).ok()?.service();
                let made = Elsewhere { address, service: service.clone(), seen: Instant::now() };
                elsewhere.insert(node.clone(), made);
                Some(service)
            }
        }
    }
}

/// Dispatch in other processes: any of them, the same one as long as it answers.
struct Routers {
    views: watch::Receiver<Arc<View>>,
    sign: Sign,
    clients: Mutex<HashMap<NodeId, (Arc<str>, RemoteDispatch)>>,
    preferred: AtomicUsize,
}

/// Dispatch as collect sees it where none runs in this process.
pub(super) fn routers(views: watch::Receiver<Arc<View>>, sign: Sign) -> DispatchService {
    let preferred = AtomicUsize::new(rand::random_range(0..1024));
    let routers = Arc::new(Routers { views, sign, clients: Mutex::default(), preferred });
    BoxCloneSyncService::new(tower::service_fn(move |request| {
        let routers = Arc::clone(&routers);
        async move { routers.ask(request).await }
    }))
}

impl Routers {
    async fn ask(&self, request: DispatchRequest) -> Result<DispatchResponse, PeerFault> {
        let routers = self.views.borrow().routers.clone();
        let mut fault = PeerFault::Unavailable("no dispatch is known (redis.url, node.roles)".to_owned());
        let first = self.preferred.load(Ordering::Relaxed);
        for n in first..first + routers.len().min(TRIES) {
            let router = &routers[n % routers.len()];
            match self.client(router, &routers)?.call(request.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => {
                    tracing::debug!(node = %router.node, fault = %failed, "a dispatch did not answer; another is asked");
                    self.preferred.store((n + 1) % routers.len(), Ordering::Relaxed);
                    fault = failed;
                }
            }
        }
        Err(fault)
    }

    fn client(&self, router: &Router, routers: &[Router]) -> Result<RemoteDispatch, PeerFault> {
        let mut clients = self.clients.lock();
        if let Some((address, client)) = clients.get(&router.node)
            && *address == router.peer
        {
            return Ok(client.clone());
        }
        clients.retain(|node, _| routers.iter().any(|router| router.node == *node));
        let client = RemoteDispatch::new(&router.peer, Arc::clone(&self.sign))?;
        clients.insert(router.node.clone(), (Arc::clone(&router.peer), client.clone()));
        Ok(client)
    }
}
