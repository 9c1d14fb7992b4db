//! Finds the other roles, in this process or at their peer ports: push nodes for dispatch, routers
//! for collect.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::Instant;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::clock::Clock;
use crate::colleagues::Colleague;
use crate::membership::{Member, Reached, Router, View};
use crate::message::NodeId;
use crate::peer_proof::{Call, Calls, Signer};
use crate::role::witness::Ping;
use crate::role::{DispatchService, PeerDirectory, PushService, WriterDirectory, WriterService};
use crate::secret::SharedKeys;
use crate::telemetry::{Credential, Refusals};
use crate::transport::peer::{Dial, RemoteCollect, RemoteDispatch, RemotePush, Sign, Verify};
use crate::transport::tls::ClientTls;
use crate::wire::peer::{DispatchRequest, DispatchResponse, PeerError, PushRequest};

/// How long a node that has left the view is still known: longer than dispatch sends to it.
const KEPT: Duration = Duration::from_secs(60);
/// Routers that are tried for one request.
const TRIES: usize = 3;

/// Makes and takes the proofs of calls between roles.
pub(super) struct Proofs {
    keys: SharedKeys,
    clock: Clock,
    calls: Mutex<Calls>,
    /// The nodes of this process: the incarnation of each name, and whether it was reached.
    here: RwLock<HashMap<NodeId, (u64, Reached)>>,
    refusals: Refusals,
    /// Signs the calls of nodes that were not reached. Each has one link, because the called
    /// process remembers every link.
    pings: Mutex<HashMap<(NodeId, u64), Dial>>,
    /// Set with `peer.tls`.
    tls: Option<ClientTls>,
}

/// Most such links that are kept, and most links to collects: as many as a registry has nodes.
const PINGS_MAX: usize = 1_000;

impl Proofs {
    pub(super) fn new(
        keys: SharedKeys,
        clock: Clock,
        refusals: Refusals,
        tls: Option<ClientTls>,
    ) -> Arc<Self> {
        let calls = Mutex::new(Calls::new(keys.clone()));
        Arc::new(Self { keys, clock, calls, here: RwLock::default(), refusals, pings: Mutex::default(), tls })
    }

    /// From now on calls for this node are accepted.
    pub(super) fn is_here(&self, node: NodeId, incarnation: u64, reached: Reached) {
        self.here.write().insert(node, (incarnation, reached));
    }

    /// The incarnation of a node of this process.
    pub(super) fn incarnation_here(&self, node: &NodeId) -> Option<u64> {
        self.here.read().get(node).map(|(incarnation, _)| *incarnation)
    }

    /// Dials one process of a node, and signs the calls of the link.
    fn dial(&self, node: &NodeId, incarnation: u64) -> Dial {
        let (signer, clock) = (Signer::new(self.keys.clone(), rand::random()), self.clock.clone());
        let node = node.clone();
        let sign: Sign = Arc::new(move |method| {
            signer.sign(Call { node: node.as_str(), incarnation, method }, clock.now())
        });
        Dial { sign, tls: self.tls.clone() }
    }

    /// Takes the proofs of calls that arrive here.
    pub(super) fn verify(self: Arc<Self>) -> Verify {
        Arc::new(move |proof, method| {
            let here = self.here.read();
            let is_here = |node: &str, incarnation| {
                here.iter().any(|(name, (own, _))| name.as_str() == node && *own == incarnation)
            };
            let taken = self.calls.lock().take(proof, method, self.clock.now(), is_here);
            match taken {
                Ok(node) => {
                    if let Some((_, reached)) = here.get(&node) {
                        reached.note();
                    }
                    Ok(())
                }
                Err(error) => {
                    let why = error.to_string();
                    self.refusals.note(Credential::PeerProof, &why);
                    Err(why)
                }
            }
        })
    }

    fn ping_dial(&self, node: &NodeId, incarnation: u64) -> Dial {
        let mut pings = self.pings.lock();
        if pings.len() >= PINGS_MAX {
            pings.clear();
        }
        let new = || self.dial(node, incarnation);
        pings.entry((node.clone(), incarnation)).or_insert_with(new).clone()
    }

    /// Calls a node that was not reached yet.
    pub(super) fn ping(self: Arc<Self>) -> Ping {
        Arc::new(move |member| {
            let info = &member.info;
            let dial = self.ping_dial(&info.node, member.incarnation);
            if info.push {
                let remote = RemotePush::new(&info.peer, info.node.as_str(), dial);
                async move { remote?.service().oneshot(PushRequest::Ping).await.map(drop) }.boxed()
            } else {
                let remote = RemoteDispatch::new(&info.peer, dial);
                async move { remote?.call(DispatchRequest::Ping).await.map(drop) }.boxed()
            }
        })
    }
}

/// The push nodes.
pub(super) struct PushNodes {
    pub(super) here: RwLock<HashMap<NodeId, PushService>>,
    views: watch::Receiver<Arc<View>>,
    proofs: Arc<Proofs>,
    elsewhere: Mutex<HashMap<NodeId, Elsewhere>>,
}

struct Elsewhere {
    address: Arc<str>,
    incarnation: u64,
    service: PushService,
    /// When a view last had it.
    seen: Instant,
}

impl PushNodes {
    pub(super) fn new(views: watch::Receiver<Arc<View>>, proofs: Arc<Proofs>) -> Self {
        Self { here: RwLock::default(), views, proofs, elsewhere: Mutex::default() }
    }
}

impl PeerDirectory for PushNodes {
    fn here(&self, node: &NodeId) -> Option<PushService> {
        self.here.read().get(node).cloned()
    }

    fn find(&self, node: &NodeId) -> Option<PushService> {
        if let Some(here) = self.here(node) {
            return Some(here);
        }
        let shown = |member: &Member| (Arc::clone(&member.info.peer), member.incarnation);
        let shown = self.views.borrow().member(node).map(shown);
        let mut elsewhere = self.elsewhere.lock();
        let Some((address, incarnation)) = shown.filter(|(address, _)| !address.is_empty()) else {
            return elsewhere.get(node).map(|known| known.service.clone());
        };
        match elsewhere.get_mut(node) {
            Some(known) if known.address == address && known.incarnation == incarnation => {
                known.seen = Instant::now();
                Some(known.service.clone())
            }
            _ => {
                elsewhere.retain(|_, known| known.seen.elapsed() < KEPT);
                let remote = RemotePush::new(&address, node.as_str(), self.proofs.dial(node, incarnation));
                let service =
                    remote.inspect_err(|fault| tracing::warn!(%node, %fault, "the connections to other processes cannot be set up")).ok()?.service();
                let seen = Instant::now();
                let made = Elsewhere { address, incarnation, service: service.clone(), seen };
                elsewhere.insert(node.clone(), made);
                Some(service)
            }
        }
    }
}

/// Collects in other processes.
pub(super) struct Collects {
    proofs: Arc<Proofs>,
    clients: Mutex<HashMap<NodeId, (Colleague, WriterService)>>,
}

impl Collects {
    pub(super) fn new(proofs: Arc<Proofs>) -> Self {
        Self { proofs, clients: Mutex::default() }
    }
}

impl WriterDirectory for Collects {
    fn find(&self, colleague: &Colleague) -> Option<WriterService> {
        let mut clients = self.clients.lock();
        if let Some((known, service)) = clients.get(&colleague.node)
            && known == colleague
        {
            return Some(service.clone());
        }
        if clients.len() >= PINGS_MAX {
            clients.clear();
        }
        let dial = self.proofs.dial(&colleague.node, colleague.incarnation);
        let service = RemoteCollect::new(&colleague.peer, dial).ok()?.service();
        clients.insert(colleague.node.clone(), (colleague.clone(), service.clone()));
        Some(service)
    }
}

/// Dispatch in other processes: any of them, and the same one as long as it responds.
struct Routers {
    views: watch::Receiver<Arc<View>>,
    proofs: Arc<Proofs>,
    clients: Mutex<HashMap<NodeId, (Router, RemoteDispatch)>>,
    preferred: AtomicUsize,
}

/// Dispatch as collect sees it if none runs in this process.
pub(super) fn routers(views: watch::Receiver<Arc<View>>, proofs: Arc<Proofs>) -> DispatchService {
    let preferred = AtomicUsize::new(rand::random_range(0..1024));
    let routers = Arc::new(Routers { views, proofs, clients: Mutex::default(), preferred });
    BoxCloneSyncService::new(tower::service_fn(move |request| {
        let routers = Arc::clone(&routers);
        async move { routers.ask(request).await }
    }))
}

impl Routers {
    async fn ask(&self, request: DispatchRequest) -> Result<DispatchResponse, PeerError> {
        let routers = self.views.borrow().routers.clone();
        let mut fault = PeerError::Unavailable("no dispatch is known (redis.url, node.roles)".to_owned());
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

    fn client(&self, router: &Router, routers: &[Router]) -> Result<RemoteDispatch, PeerError> {
        let mut clients = self.clients.lock();
        if let Some((known, client)) = clients.get(&router.node)
            && known == router
        {
            return Ok(client.clone());
        }
        clients.retain(|node, _| routers.iter().any(|router| router.node == *node));
        let dial = self.proofs.dial(&router.node, router.incarnation);
        let client = RemoteDispatch::new(&router.peer, dial)?;
        clients.insert(router.node.clone(), (router.clone(), client.clone()));
        Ok(client)
    }
}
