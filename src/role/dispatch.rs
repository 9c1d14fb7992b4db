//! Dispatch: the stateless router. User to push node by arithmetic, one hop, no look-up per user.
//!
//! A message goes to its owners in the views of the last 30 s, and to the nodes whose fallback set has the user.
//! Disagreement costs a second copy, never a miss. Each node has one bounded lane; batches form while the last one is in
//! flight. A full lane drops the hint and marks the lane, so that the node looks into the inboxes itself.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, join_all};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower::{Service, ServiceExt};

use super::PushService;
use crate::fallback::Fallback;
use crate::membership::View;
use crate::message::{NodeId, UserId};
use crate::ring;
use crate::telemetry::Metrics;
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, Live, PeerFault, Presence, PushRequest, PushResponse, Revocation,
};

/// How long the owners of an earlier view are still sent to: three leases (DESIGN.md section 8).
pub const RECENT_VIEW_LIFE: Duration = Duration::from_secs(30);
/// Most views remembered, the one in use included.
pub const RECENT_VIEWS: usize = 8;
/// Messages waiting for one node: ten full batches, a fifth of a second at 50,000/s.
pub const LANE_MESSAGES: usize = 10_000;
/// Messages in one call to a node.
pub const LANE_BATCH: usize = 1_000;
/// How long one call to a node may take.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Rest after a call that failed, so that a dead node costs nothing.
const FAILURE_REST: Duration = Duration::from_millis(100);

/// Finds the service of a push node. In one process that is the role itself.
pub trait Directory: Send + Sync + 'static {
    /// The service of `node`, if it is known.
    fn find(&self, node: &NodeId) -> Option<PushService>;
}

/// The role. Cheap to clone; its lanes end with the last clone.
#[derive(Clone)]
pub struct Dispatch {
    inner: Arc<Inner>,
}

struct Inner {
    recent: Mutex<Recent>,
    fallback: Arc<dyn Fallback>,
    directory: Arc<dyn Directory>,
    lanes: Mutex<HashMap<NodeId, Lane>>,
    metrics: Arc<DispatchMetrics>,
}

/// What dispatch counts.
#[derive(Default)]
struct DispatchMetrics {
    /// A message was put into a lane.
    routed: Counter,
    /// A message was dropped since its lane was full, or its node did not answer.
    dropped: Counter,
    /// A message had no node to go to.
    unowned: Counter,
    /// The fallback entries were asked for a batch.
    fallback_lookups: Counter,
}

impl DispatchMetrics {
    fn register(metrics: &Metrics) -> Arc<Self> {
        let own = Self::default();
        metrics.register(|r| {
            r.register("dispatch_routed", "Messages put into a node's lane", own.routed.clone());
            r.register("dispatch_dropped", "Hints dropped: lane full or node silent", own.dropped.clone());
            r.register("dispatch_unowned", "Messages without a node to go to", own.unowned.clone());
            r.register(
                "dispatch_fallback_lookups",
                "Batches that asked the fallback",
                own.fallback_lookups.clone(),
            );
        });
        Arc::new(own)
    }
}

/// The views of the last 30 s, the one in use first.
struct Recent {
    source: watch::Receiver<Arc<View>>,
    current: Arc<View>,
    /// Superseded ones, youngest first, each with the moment it was.
    earlier: VecDeque<(Arc<View>, Instant)>,
}

impl Recent {
    /// Takes up what has changed; answers whether anything has.
    fn refresh(&mut self) -> bool {
        let known = self.earlier.len();
        let mut changed = false;
        if self.source.has_changed().unwrap_or(false) {
            let next = Arc::clone(&self.source.borrow_and_update());
            let superseded = std::mem::replace(&mut self.current, next);
            if !superseded.ring.is_empty() {
                self.earlier.push_front((superseded, Instant::now()));
                self.earlier.truncate(RECENT_VIEWS - 1);
            }
            changed = true;
        }
        while self.earlier.back().is_some_and(|(_, since)| since.elapsed() > RECENT_VIEW_LIFE) {
            self.earlier.pop_back();
        }
        changed || known != self.earlier.len()
    }

    /// The nodes that own this place now or did a moment ago, the owner first.
    fn owners(&self, key: u64, mut each: impl FnMut(&NodeId)) {
        let owner = self.current.owner_at(key).map(|member| &member.info.node);
        if let Some(owner) = owner {
            each(owner);
        }
        let mut seen: Vec<&NodeId> = Vec::new();
        for (view, _) in &self.earlier {
            if let Some(earlier) = view.owner_at(key).map(|member| &member.info.node)
                && Some(earlier) != owner
                && !seen.contains(&earlier)
            {
                seen.push(earlier);
                each(earlier);
            }
        }
    }
}

/// One node's queue and the task that empties it.
struct Lane {
    shared: Arc<LaneShared>,
    task: JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct LaneShared {
    queue: Mutex<LaneQueue>,
    filled: Notify,
}

#[derive(Default)]
struct LaneQueue {
    waiting: VecDeque<Live>,
    /// Something was dropped: the next call must say so.
    missed: bool,
}

impl LaneShared {
    /// Puts `batch` into the queue; what has no room is dropped and marked. Answers how many were dropped.
    fn put(&self, batch: Vec<Live>) -> usize {
        let mut queue = self.queue.lock();
        let room = LANE_MESSAGES.saturating_sub(queue.waiting.len());
        let dropped = batch.len().saturating_sub(room);
        queue.waiting.extend(batch.into_iter().take(room));
        queue.missed |= dropped > 0;
        drop(queue);
        self.filled.notify_one();
        dropped
    }

    fn take(&self) -> Option<(Vec<Live>, bool)> {
        let mut queue = self.queue.lock();
        if queue.waiting.is_empty() && !queue.missed {
            return None;
        }
        let count = queue.waiting.len().min(LANE_BATCH);
        let batch = queue.waiting.drain(..count).collect();
        if queue.waiting.is_empty() {
            queue.waiting.shrink_to(LANE_BATCH);
        }
        Some((batch, std::mem::take(&mut queue.missed)))
    }

    /// A call failed: its messages are gone, and the node must be told when it is back.
    fn mark_missed(&self) {
        self.queue.lock().missed = true;
    }
}

impl Dispatch {
    /// Routes by `views` to what `directory` finds.
    #[must_use]
    pub fn new(
        mut views: watch::Receiver<Arc<View>>,
        fallback: Arc<dyn Fallback>,
        directory: Arc<dyn Directory>,
        metrics: &Metrics,
    ) -> Self {
        let current = Arc::clone(&views.borrow_and_update());
        let recent = Recent { source: views, current, earlier: VecDeque::new() };
        let inner = Inner {
            recent: Mutex::new(recent),
            fallback,
            directory,
            lanes: Mutex::default(),
            metrics: DispatchMetrics::register(metrics),
        };
        Self { inner: Arc::new(inner) }
    }

    async fn deliver(&self, batch: Vec<Live>) {
        let displaced = self.displaced(&batch).await;
        let mut by_node: HashMap<NodeId, Vec<Live>> = HashMap::new();
        {
            let mut recent = self.inner.recent.lock();
            if recent.refresh() {
                self.close_old_lanes(&recent);
            }
            for (n, live) in batch.into_iter().enumerate() {
                let mut targets = 0;
                let mut send = |node: &NodeId| {
                    targets += 1;
                    match by_node.get_mut(node) {
                        Some(lot) => lot.push(live.clone()),
                        None => drop(by_node.insert(node.clone(), vec![live.clone()])),
                    }
                };
                let mut owners: Vec<NodeId> = Vec::new();
                recent.owners(ring::key(live.user.as_str()), |node| {
                    send(node);
                    if !displaced.is_empty() {
                        owners.push(node.clone());
                    }
                });
                let elsewhere = displaced.get(n).map(Vec::as_slice).unwrap_or_default();
                elsewhere.iter().filter(|node| !owners.contains(node)).for_each(&mut send);
                if targets == 0 {
                    self.inner.metrics.unowned.inc();
                }
            }
        }
        for (node, lot) in by_node {
            self.inner.metrics.routed.inc_by(lot.len() as u64);
            let dropped = self.lane(&node).put(lot);
            self.inner.metrics.dropped.inc_by(dropped as u64);
        }
    }

    /// For each message the nodes beside the owner; empty where nobody is displaced at all.
    async fn displaced(&self, batch: &[Live]) -> Vec<Vec<NodeId>> {
        if self.inner.fallback.is_empty() {
            return Vec::new();
        }
        self.inner.metrics.fallback_lookups.inc();
        let users = batch.iter().map(|live| live.user.clone()).collect();
        // A miss here is found by the sweep of the node that has the user.
        self.inner.fallback.nodes_of(users).await.unwrap_or_default()
    }

    fn lane(&self, node: &NodeId) -> Arc<LaneShared> {
        let mut lanes = self.inner.lanes.lock();
        let lane = lanes.entry(node.clone()).or_insert_with(|| {
            let shared = Arc::new(LaneShared::default());
            let directory = Arc::clone(&self.inner.directory);
            let metrics = Arc::clone(&self.inner.metrics);
            let task = tokio::spawn(run_lane(node.clone(), Arc::clone(&shared), directory, metrics));
            Lane { shared, task }
        });
        Arc::clone(&lane.shared)
    }

    /// Ends the lanes of nodes that no recent view has.
    fn close_old_lanes(&self, recent: &Recent) {
        self.inner.lanes.lock().retain(|node, _| {
            recent.current.member(node).is_some()
                || recent.earlier.iter().any(|(view, _)| view.member(node).is_some())
        });
    }

    async fn lookup(&self, user: UserId) -> DispatchResponse {
        let mut targets = Vec::new();
        let owner = {
            let mut recent = self.inner.recent.lock();
            recent.refresh();
            recent.owners(ring::key(user.as_str()), |node| targets.push(node.clone()));
            recent.current.owner(&user).map(|member| member.info.node.clone())
        };
        let displaced = self.inner.fallback.nodes_of(vec![user.clone()]).await.unwrap_or_default();
        targets.extend(displaced.into_iter().flatten());
        targets.sort();
        targets.dedup();
        let asked = targets.iter().map(|node| self.ask(node, PushRequest::Lookup(user.clone())));
        let sessions: Vec<Presence> = join_all(asked)
            .await
            .into_iter()
            .flat_map(|answer| match answer {
                Ok(PushResponse::Sessions(sessions)) => sessions,
                _ => Vec::new(),
            })
            .collect();
        DispatchResponse::Found { owner, sessions }
    }

    /// Tells every push node: a session may be anywhere.
    async fn disconnect(&self, revocation: Revocation) -> Result<(), PeerFault> {
        let view = {
            let mut recent = self.inner.recent.lock();
            recent.refresh();
            Arc::clone(&recent.current)
        };
        let asked = view
            .members
            .iter()
            .map(|member| self.ask(&member.info.node, PushRequest::Disconnect(revocation.clone())));
        join_all(asked).await.into_iter().try_for_each(|answer| answer.map(drop))
    }

    async fn ask(&self, node: &NodeId, request: PushRequest) -> Result<PushResponse, PeerFault> {
        call(self.inner.directory.find(node), node, request).await
    }
}

async fn call(
    service: Option<PushService>,
    node: &NodeId,
    request: PushRequest,
) -> Result<PushResponse, PeerFault> {
    let service = service.ok_or_else(|| PeerFault::Unavailable(format!("{node} is not known here")))?;
    match tokio::time::timeout(CALL_DEADLINE, service.oneshot(request)).await {
        Ok(answer) => answer,
        Err(_) => Err(PeerFault::Unavailable(format!("{node} did not answer in time"))),
    }
}

async fn run_lane(
    node: NodeId,
    shared: Arc<LaneShared>,
    directory: Arc<dyn Directory>,
    metrics: Arc<DispatchMetrics>,
) {
    loop {
        let Some((batch, sweep)) = shared.take() else {
            shared.filled.notified().await;
            continue;
        };
        let count = batch.len() as u64;
        if let Err(fault) = call(directory.find(&node), &node, PushRequest::Deliver { batch, sweep }).await {
            tracing::debug!(%node, %fault, "a batch was not taken; the node will look into the inboxes");
            metrics.dropped.inc_by(count);
            shared.mark_missed();
            tokio::time::sleep(FAILURE_REST).await;
        }
    }
}

impl Service<DispatchRequest> for Dispatch {
    type Response = DispatchResponse;
    type Error = PeerFault;
    type Future = BoxFuture<'static, Result<DispatchResponse, PeerFault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerFault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: DispatchRequest) -> Self::Future {
        let this = self.clone();
        async move {
            match request {
                DispatchRequest::Deliver(batch) => {
                    this.deliver(batch).await;
                    Ok(DispatchResponse::Done)
                }
                DispatchRequest::Lookup(user) => Ok(this.lookup(user).await),
                DispatchRequest::Disconnect(revocation) => {
                    this.disconnect(revocation).await.map(|()| DispatchResponse::Done)
                }
            }
        }
        .boxed()
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
