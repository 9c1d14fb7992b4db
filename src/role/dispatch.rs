//! Dispatch, the stateless router: from user to push node by arithmetic, in one hop, without a
//! look-up per user.
//!
//! A message goes to its owners in the views of the last 30 s, and to the nodes whose fallback set
//! has the user. Disagreement costs a second copy, never a miss. Each node has one bounded queue;
//! batches form while the last one is in flight. A full queue drops the hint and marks the queue,
//! so that the node looks into the inboxes itself. A batch for a node of the same process bypasses
//! an empty queue.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, join_all};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tower::{Service, ServiceExt};

use super::backlog::Backlog;
use super::{PeerDirectory, PushService, raised};
use crate::fallback::Fallback;
use crate::membership::{Membership, View};
use crate::message::{NodeId, UserId};
use crate::ring;
use crate::telemetry::{Metrics, WAY};
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, LiveMessage, PeerError, Presence, PushRequest, PushResponse,
    Revocation, ViewVersion,
};

/// How long the owners of an earlier view still get messages: three leases (docs/design.md, section
/// 7).
pub const RECENT_VIEW_LIFE: Duration = Duration::from_secs(30);
/// Most views that are remembered, including the one in use.
pub const RECENT_VIEWS: usize = 8;
/// Deadline of one call to a node.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Delay after a failed call, so that a dead node costs nothing.
const FAILURE_REST: Duration = Duration::from_millis(100);
/// How long a batch waits for the newer view that a node has. A router that is cut off from the
/// registry for a moment does not know the new owner before. The batch was sent to the known owners
/// nevertheless.
const NEWER_VIEW_WAIT: Duration = Duration::from_secs(15);
/// Delay between two tries to tell a node that it has left the view.
const GONE_RETRY: Duration = Duration::from_secs(2);

/// The role dispatch. Cheap to clone. Its queues end with the last clone and its tasks.
#[derive(Clone)]
pub struct Dispatch {
    inner: Arc<Inner>,
}

struct Inner {
    recent: Mutex<Recent>,
    membership: Arc<dyn Membership>,
    fallback: Arc<dyn Fallback>,
    directory: Arc<dyn PeerDirectory>,
    queues: Mutex<HashMap<NodeId, PeerQueue>>,
    /// Messages whose users may be displaced. They are looked up beside the main path, which never
    /// waits for that.
    lookups: Backlog,
    /// Messages that a node took that has a newer view than this router.
    again: Backlog,
    /// The newest version of such a view.
    news: Mutex<ViewVersion>,
    metrics: Arc<DispatchMetrics>,
}

impl Inner {
    /// A node has a newer view: look for it, and route this batch again when it is here.
    fn heard_of(&self, news: ViewVersion, batch: Vec<LiveMessage>) {
        *self.news.lock() = news;
        self.membership.refresh();
        self.again.put(batch);
    }
}

/// Metrics of dispatch.
#[derive(Default)]
struct DispatchMetrics {
    /// A message was put into a queue.
    routed: Counter,
    /// A message was dropped, because the queue was full or the node did not answer.
    dropped: Counter,
    /// There was no node for a message.
    unowned: Counter,
    /// The fallback entries were looked up for a batch.
    fallback_lookups: Counter,
    /// A batch was routed again, because a node has a newer view.
    rerouted: Counter,
}

impl DispatchMetrics {
    fn register(metrics: &Metrics) -> Arc<Self> {
        let own = Self::default();
        metrics.register(|r| {
            r.register("dispatch_routed", "Messages put into a queue of a node", own.routed.clone());
            r.register("dispatch_dropped", "Hints dropped: queue full or node silent", own.dropped.clone());
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

/// The views of the last 30 s, the one in use first.
struct Recent {
    source: watch::Receiver<Arc<View>>,
    current: Arc<View>,
    /// Superseded views, youngest first, with the time when they were superseded.
    earlier: VecDeque<(Arc<View>, Instant)>,
}

impl Recent {
    /// Takes over a new view. Returns whether there was one.
    fn refresh(&mut self) -> bool {
        let known = self.earlier.len();
        let mut changed = false;
        if self.source.has_changed().unwrap_or(false) {
            let next = Arc::clone(&self.source.borrow_and_update());
            let superseded = std::mem::replace(&mut self.current, next);
            // A view that differs only in its routers has the same owners.
            if !superseded.ring.is_empty() && superseded.digest != self.current.digest {
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

    /// Calls `each` with the nodes that own this key now or did in the last 30 s, the current owner
    /// first.
    fn owners(&self, key: u64, mut each: impl FnMut(&NodeId)) {
        let owner = self.current.owner_at(key).map(|member| &member.info.node);
        if let Some(owner) = owner {
            each(owner);
        }
        self.earlier_owners(key, owner, each);
    }

    /// Calls `each` with the other nodes that owned this key in the last 30 s.
    fn earlier_owners(&self, key: u64, owner: Option<&NodeId>, mut each: impl FnMut(&NodeId)) {
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

    /// Groups a batch by the nodes that it goes to. Also returns how many messages go nowhere.
    fn sort(&self, batch: Vec<LiveMessage>) -> (Vec<(NodeId, Vec<LiveMessage>)>, u64) {
        let members = &self.current.members;
        let mut of_owners: Vec<Vec<LiveMessage>> = members.iter().map(|_| Vec::new()).collect();
        let mut of_others: HashMap<NodeId, Vec<LiveMessage>> = HashMap::new();
        let mut unowned = 0;
        for live in batch {
            let key = ring::key(live.user.as_str());
            let position = self.current.owner_position(key);
            let owner = position.map(|at| &members[at].info.node);
            let mut is_sent = owner.is_some();
            self.earlier_owners(key, owner, |node| {
                is_sent = true;
                note_routed(&live, node);
                of_others.entry(node.clone()).or_default().push(live.clone());
            });
            unowned += u64::from(!is_sent);
            if let (Some(at), Some(node)) = (position, owner) {
                note_routed(&live, node);
                of_owners[at].push(live);
            }
        }
        let named = members.iter().map(|member| member.info.node.clone()).zip(of_owners);
        (named.filter(|(_, batch)| !batch.is_empty()).chain(of_others).collect(), unowned)
    }
}

fn note_routed(live: &LiveMessage, node: &NodeId) {
    tracing::debug!(target: WAY, step = 6, user = %live.user, id = %live.message.id, seq = %live.message.seq, %node, "routed");
}

/// One node's queue and the task that empties it.
struct PeerQueue {
    backlog: Arc<Backlog>,
    task: AbortOnDropHandle<()>,
}

impl Dispatch {
    /// Routes by the views of `membership` to the nodes that `directory` finds. The tasks run in
    /// `tasks`.
    #[must_use]
    pub fn start(
        membership: Arc<dyn Membership>,
        fallback: Arc<dyn Fallback>,
        directory: Arc<dyn PeerDirectory>,
        metrics: &Metrics,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let mut views = membership.views();
        let current = Arc::clone(&views.borrow_and_update());
        let (watched, before) = (views.clone(), Arc::clone(&current));
        let recent = Recent { source: views, current, earlier: VecDeque::new() };
        let inner = Arc::new(Inner {
            recent: Mutex::new(recent),
            membership,
            fallback,
            directory,
            queues: Mutex::default(),
            lookups: Backlog::default(),
            again: Backlog::default(),
            news: Mutex::default(),
            metrics: DispatchMetrics::register(metrics),
        });
        let this = Self { inner };
        tasks.spawn(this.clone().look_up_displaced());
        tasks.spawn(this.clone().route_again());
        tasks.spawn(this.clone().watch_members(watched, before));
        this
    }

    /// Takes over a new view, if there is one.
    fn refresh(&self, recent: &mut Recent) {
        if recent.refresh() {
            self.close_old_queues(recent);
        }
    }

    fn deliver(&self, batch: Vec<LiveMessage>, missed: bool, stamp: &ViewVersion) {
        let (view, batches, displaced, news) = {
            let mut recent = self.inner.recent.lock();
            self.refresh(&mut recent);
            let view = Arc::clone(&recent.current);
            // The batch is routed again if users may be displaced, or if the sender has a newer
            // view.
            let displaced = (!self.inner.fallback.hints().empty).then(|| batch.clone());
            let news = stamp.is_news_to(&view.stamp()).then(|| batch.clone());
            let (batches, unowned) = recent.sort(batch);
            self.inner.metrics.unowned.inc_by(unowned);
            (view, batches, displaced, news)
        };
        self.put_all(batches);
        if missed {
            view.members.iter().for_each(|member| self.queue(&member.info.node).mark_missed());
        }
        if let Some(batch) = displaced {
            self.inner.lookups.put(batch);
        }
        if let Some(batch) = news {
            self.inner.heard_of(stamp.clone(), batch);
        }
    }

    fn put_all(&self, batches: impl IntoIterator<Item = (NodeId, Vec<LiveMessage>)>) {
        for (node, batch) in batches {
            self.inner.metrics.routed.inc_by(batch.len() as u64);
            let queue = self.queue(&node);
            if let Some(service) = self.inner.directory.here(&node)
                && let Some(_ahead) = queue.go_ahead()
            {
                self.deliver_here(&node, service, &queue, batch);
            } else {
                self.inner.metrics.dropped.inc_by(queue.put(batch) as u64);
            }
        }
    }

    /// Delivers to a node of this process, on the caller's thread, bypassing the queue.
    fn deliver_here(&self, node: &NodeId, service: PushService, queue: &Backlog, batch: Vec<LiveMessage>) {
        let stamp = self.inner.recent.lock().current.stamp();
        let (request, batch) = deliver_request(batch, false, &stamp);
        let answer = service.oneshot(request).now_or_never().unwrap_or_else(|| Err(silent(node)));
        if !settle(&self.inner, node, &stamp, &batch, answer) {
            queue.mark_missed();
        }
    }

    /// Sends the messages of displaced users also to where these are.
    async fn look_up_displaced(self) {
        loop {
            let (batch, dropped) = self.inner.lookups.take().await;
            let users = batch.iter().map(|live| live.user.clone()).collect();
            self.inner.metrics.fallback_lookups.inc();
            let found = self.inner.fallback.nodes_of(users).await;
            if dropped || found.is_err() {
                // Nobody knows who has missed something: all nodes must sweep.
                self.tell_all_of_a_miss();
            }
            let Ok(found) = found else { continue };
            let mut by_node: HashMap<NodeId, Vec<LiveMessage>> = HashMap::new();
            for (live, mut nodes) in batch.into_iter().zip(found) {
                if nodes.is_empty() {
                    continue;
                }
                let key = ring::key(live.user.as_str());
                // These nodes have it already.
                self.inner.recent.lock().owners(key, |owner| nodes.retain(|node| node != owner));
                for node in nodes {
                    let (id, seq) = (&live.message.id, live.message.seq);
                    tracing::debug!(target: WAY, step = 6, user = %live.user, %id, %seq, %node, "routed to where its user is displaced");
                    by_node.entry(node).or_default().push(live.clone());
                }
            }
            self.put_all(by_node);
        }
    }

    fn tell_all_of_a_miss(&self) {
        let view = Arc::clone(&self.inner.recent.lock().current);
        view.members.iter().for_each(|member| self.queue(&member.info.node).mark_missed());
    }

    /// Routes again what was routed by a view that is older than another process's.
    async fn route_again(self) {
        loop {
            let (batch, dropped) = self.inner.again.take().await;
            let mut views = self.inner.membership.views();
            let told = self.inner.news.lock().clone();
            let newer = views.wait_for(|view| !told.is_news_to(&view.stamp()));
            let _ = tokio::time::timeout(NEWER_VIEW_WAIT, newer).await;
            self.inner.metrics.rerouted.inc_by(batch.len() as u64);
            if dropped {
                self.tell_all_of_a_miss();
            }
            let view = {
                let mut recent = self.inner.recent.lock();
                self.refresh(&mut recent);
                Arc::clone(&recent.current)
            };
            let mut by_node: HashMap<NodeId, Vec<LiveMessage>> = HashMap::new();
            for live in batch {
                if let Some(owner) = view.owner(&live.user) {
                    by_node.entry(owner.info.node.clone()).or_default().push(live);
                }
            }
            self.put_all(by_node);
        }
    }

    /// Takes over each view as it comes, also while nothing is routed. Tells nodes that have left
    /// the view so: a node that alone is cut off from the registry has no other way to know.
    async fn watch_members(self, mut views: watch::Receiver<Arc<View>>, mut before: Arc<View>) {
        let mut telling = JoinSet::new();
        loop {
            tokio::select! {
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let view = Arc::clone(&views.borrow_and_update());
                    self.refresh(&mut self.inner.recent.lock());
                    for member in &before.members {
                        if view.member(&member.info.node).is_none() {
                            telling.spawn(self.clone().tell_gone(member.info.node.clone(), view.stamp()));
                        }
                    }
                    before = view;
                }
                // Earlier views are dropped and queues closed, also when nothing is routed.
                () = tokio::time::sleep(RECENT_VIEW_LIFE / 10) => {
                    self.refresh(&mut self.inner.recent.lock());
                    // A node must be known before it leaves the view, also if nothing was ever sent
                    // to it: nobody else tells its address then.
                    before.members.iter().for_each(|member| drop(self.inner.directory.find(&member.info.node)));
                    for ended in self.take_ended_queues() {
                        raised(ended.await);
                    }
                }
                Some(ended) = telling.join_next() => raised(ended),
            }
        }
    }

    async fn tell_gone(self, node: NodeId, stamp: ViewVersion) {
        let until = Instant::now() + RECENT_VIEW_LIFE;
        while Instant::now() < until && self.inner.recent.lock().current.member(&node).is_none() {
            if self.ask(&node, PushRequest::Gone(stamp.clone())).await.is_ok() {
                return;
            }
            tokio::time::sleep(GONE_RETRY).await;
        }
    }

    fn queue(&self, node: &NodeId) -> Arc<Backlog> {
        let mut queues = self.inner.queues.lock();
        let queue = queues.entry(node.clone()).or_insert_with(|| {
            let backlog = Arc::new(Backlog::default());
            // The queue's task must not keep alive what keeps the queue.
            let inner = Arc::downgrade(&self.inner);
            let task = tokio::spawn(run_queue(node.clone(), Arc::clone(&backlog), inner));
            PeerQueue { backlog, task: AbortOnDropHandle::new(task) }
        });
        Arc::clone(&queue.backlog)
    }

    /// Removes queues whose task has ended, and returns the tasks. A task ends with its queue, so
    /// one that ends earlier has panicked.
    fn take_ended_queues(&self) -> Vec<AbortOnDropHandle<()>> {
        let mut queues = self.inner.queues.lock();
        let ended = queues.extract_if(|_, queue| queue.task.is_finished());
        ended.map(|(_, queue)| queue.task).collect()
    }

    /// Ends the queues of nodes that are in no recent view.
    fn close_old_queues(&self, recent: &Recent) {
        self.inner.queues.lock().retain(|node, _| {
            recent.current.member(node).is_some()
                || recent.earlier.iter().any(|(view, _)| view.member(node).is_some())
        });
    }

    async fn lookup(&self, user: UserId) -> DispatchResponse {
        let mut targets = Vec::new();
        let owner = {
            let mut recent = self.inner.recent.lock();
            self.refresh(&mut recent);
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

    /// Tells every push node, because a session may be anywhere.
    async fn disconnect(&self, revocation: Revocation) -> Result<(), PeerError> {
        let view = {
            let mut recent = self.inner.recent.lock();
            self.refresh(&mut recent);
            Arc::clone(&recent.current)
        };
        let asked = view
            .members
            .iter()
            .map(|member| self.ask(&member.info.node, PushRequest::Disconnect(revocation.clone())));
        join_all(asked).await.into_iter().try_for_each(|answer| answer.map(drop))
    }

    async fn ask(&self, node: &NodeId, request: PushRequest) -> Result<PushResponse, PeerError> {
        call(self.inner.directory.find(node), node, request).await
    }
}

async fn call(
    service: Option<PushService>,
    node: &NodeId,
    request: PushRequest,
) -> Result<PushResponse, PeerError> {
    let service = service.ok_or_else(|| PeerError::Unavailable(format!("{node} is not known here")))?;
    tokio::time::timeout(CALL_DEADLINE, service.oneshot(request)).await.unwrap_or_else(|_| Err(silent(node)))
}

fn silent(node: &NodeId) -> PeerError {
    PeerError::Unavailable(format!("{node} did not answer in time"))
}

fn deliver_request(
    batch: Vec<LiveMessage>,
    sweep: bool,
    stamp: &ViewVersion,
) -> (PushRequest, Arc<[LiveMessage]>) {
    let batch: Arc<[LiveMessage]> = batch.into();
    (PushRequest::Deliver { batch: Arc::clone(&batch), sweep, stamp: stamp.clone() }, batch)
}

/// Acts on a node's response to a batch. Returns whether the node took it.
fn settle(
    dispatch: &Inner,
    node: &NodeId,
    stamp: &ViewVersion,
    batch: &[LiveMessage],
    answer: Result<PushResponse, PeerError>,
) -> bool {
    match answer {
        Ok(PushResponse::Done(theirs)) if theirs.is_news_to(stamp) => {
            dispatch.heard_of(theirs, batch.to_vec());
            true
        }
        Ok(_) => true,
        Err(fault) => {
            tracing::debug!(%node, %fault, "a batch was not taken; the node will look into the inboxes");
            dispatch.metrics.dropped.inc_by(batch.len() as u64);
            false
        }
    }
}

async fn run_queue(node: NodeId, backlog: Arc<Backlog>, dispatch: Weak<Inner>) {
    loop {
        let (batch, sweep) = backlog.take().await;
        let Some(inner) = dispatch.upgrade() else { return };
        let stamp = inner.recent.lock().current.stamp();
        let service = inner.directory.find(&node);
        drop(inner);
        let (request, batch) = deliver_request(batch, sweep, &stamp);
        let answer = call(service, &node, request).await;
        let Some(inner) = dispatch.upgrade() else { return };
        if !settle(&inner, &node, &stamp, &batch, answer) {
            drop(inner);
            tokio::time::sleep(FAILURE_REST).await;
            backlog.mark_missed();
        }
    }
}

impl Service<DispatchRequest> for Dispatch {
    type Response = DispatchResponse;
    type Error = PeerError;
    type Future = BoxFuture<'static, Result<DispatchResponse, PeerError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: DispatchRequest) -> Self::Future {
        let this = self.clone();
        async move {
            match request {
                DispatchRequest::Deliver { batch, missed, stamp } => {
                    this.deliver(batch, missed, &stamp);
                    Ok(DispatchResponse::Done)
                }
                DispatchRequest::Lookup(user) => Ok(this.lookup(user).await),
                DispatchRequest::Disconnect(revocation) => {
                    this.disconnect(revocation).await.map(|()| DispatchResponse::Done)
                }
                DispatchRequest::Ping => Ok(DispatchResponse::Done),
            }
        }
        .boxed()
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
