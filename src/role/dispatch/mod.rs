//! Dispatch, the stateless router: from user to push node by arithmetic, in one hop, without a
//! look-up per user.
//!
//! A message goes to its owners in the views of the last 30 s, and to the nodes whose fallback set
//! has the user. Disagreement costs a second copy, never a miss. Each node has one bounded queue;
//! batches form while the last one is in flight. A full queue drops the hint and marks the queue,
//! so that the node looks into the inboxes itself. A batch for a node of the same process bypasses
//! an empty queue.

mod metrics;
mod peer_queue;
mod recent;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, join_all};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tower::{Service, ServiceExt};

pub use recent::{RECENT_VIEW_LIFE, RECENT_VIEWS};

use super::backlog::Backlog;
use super::{PeerDirectory, PushService};
use crate::fallback::Fallback;
use crate::interest::Interest;
use crate::membership::{Membership, View};
use crate::message::{LogId, NodeId, UserId};
use crate::ring;
use crate::role::shown;
use crate::tasks::raised;
use crate::telemetry::{Metrics, WAY};
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, LiveMessage, LogHint, PeerError, Presence, PushRequest, PushResponse,
    Revocation, ViewVersion,
};

use metrics::DispatchMetrics;
use peer_queue::{Lane, PeerQueue, call, request_of, run_queue, settle, silent};
use recent::Recent;

/// Deadline of one call to a node.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
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
    interest: Arc<dyn Interest>,
    directory: Arc<dyn PeerDirectory>,
    queues: Mutex<HashMap<NodeId, PeerQueue<LiveMessage>>>,
    /// The queues of hints about logs. Inboxes never wait for them.
    hint_queues: Mutex<HashMap<NodeId, PeerQueue<LogHint>>>,
    /// Messages whose users may be displaced. They are looked up beside the main path, which never
    /// waits for that.
    lookups: Backlog<LiveMessage>,
    /// Messages that a node took that has a newer view than this router.
    again: Backlog<LiveMessage>,
    /// Hints about logs that a node took that has a newer view than this router: of the nodes that
    /// are new in it none has them.
    hints_again: Backlog<LogHint>,
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

    /// The same of hints about logs.
    fn heard_of_by_hint(&self, news: ViewVersion, hints: Vec<LogHint>) {
        *self.news.lock() = news;
        self.membership.refresh();
        self.hints_again.put(hints);
    }
}

impl Dispatch {
    /// Routes by the views of `membership` to the nodes that `directory` finds. The tasks run in
    /// `tasks`.
    #[must_use]
    pub fn start(
        membership: Arc<dyn Membership>,
        fallback: Arc<dyn Fallback>,
        interest: Arc<dyn Interest>,
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
            interest,
            directory,
            queues: Mutex::default(),
            hint_queues: Mutex::default(),
            lookups: Backlog::default(),
            again: Backlog::default(),
            hints_again: Backlog::default(),
            news: Mutex::default(),
            metrics: DispatchMetrics::register(metrics),
        });
        let this = Self { inner };
        tasks.spawn(this.clone().look_up_displaced());
        tasks.spawn(this.clone().route_again());
        tasks.spawn(this.clone().hint_again());
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
    fn deliver_here(
        &self,
        node: &NodeId,
        service: PushService,
        queue: &Backlog<LiveMessage>,
        batch: Vec<LiveMessage>,
    ) {
        let stamp = self.inner.recent.lock().current.stamp();
        let (request, batch) = request_of(batch, false, &stamp);
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
                    tracing::debug!(target: WAY, step = 6, user = %live.user, %id, %seq, %node, traceparent = shown(&live.message), "routed to where its user is displaced");
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

    /// Gives hints again that were given by a view that is older than another process's, once its
    /// own is as new. If that takes too long they are dropped, and sweeps find what they told.
    async fn hint_again(self) {
        loop {
            let (batch, missed) = self.inner.hints_again.take().await;
            let mut views = self.inner.membership.views();
            let told = self.inner.news.lock().clone();
            let newer = views.wait_for(|view| !told.is_news_to(&view.stamp()));
            let is_here = tokio::time::timeout(NEWER_VIEW_WAIT, newer).await.is_ok();
            // Each node that took them has told of the view.
            let mut known = HashSet::new();
            let is_new = |hint: &LogHint| match hint {
                LogHint::Message { log, message } => known.insert((log.clone(), message.seq)),
                LogHint::Memberships(_) | LogHint::Look(_) => true,
            };
            let batch: Vec<LogHint> = batch.into_iter().filter(is_new).collect();
            if is_here {
                self.inner.metrics.rerouted.inc_by(batch.len() as u64);
                self.hint(&batch, missed);
            } else {
                self.inner.metrics.dropped.inc_by(batch.len() as u64);
            }
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

    /// Tells the nodes of the recent views: of messages those that may read their log, of all else
    /// all, since any of them may hold the user.
    fn hint(&self, hints: &[LogHint], missed: bool) {
        let (readers, held) = {
            let mut recent = self.inner.recent.lock();
            self.refresh(&mut recent);
            (recent.readers(), recent.current.held)
        };
        for reader in readers {
            let is_for = |hint: &&LogHint| match hint {
                // A view that is held may name a process that is gone. Of a message that has ended
                // before its time, blocks may be kept where nobody reads the log any more.
                LogHint::Message { log, message } => {
                    held || message.expires_at.0 == 0 || self.inner.interest.may_read(&reader, log)
                }
                LogHint::Memberships(_) | LogHint::Look(_) => true,
            };
            let node = &reader.node;
            let own: Vec<LogHint> = hints.iter().filter(is_for).cloned().collect();
            self.inner.metrics.hints.inc_by(own.len() as u64);
            self.inner.metrics.hints_spared.inc_by((hints.len() - own.len()) as u64);
            for hint in &own {
                if let LogHint::Message { log, message } = hint {
                    let (id, seq) = (&message.id, message.seq);
                    tracing::debug!(target: WAY, step = 6, %log, %id, %seq, %node, traceparent = shown(message), "routed to a node that may read the log");
                }
            }
            if own.is_empty() && !missed {
                continue;
            }
            let queue = self.queue_in(&self.inner.hint_queues, node);
            self.inner.metrics.dropped.inc_by(queue.put(own) as u64);
            if missed {
                queue.mark_missed();
            }
        }
    }

    fn queue(&self, node: &NodeId) -> Arc<Backlog<LiveMessage>> {
        self.queue_in(&self.inner.queues, node)
    }

    fn queue_in<T: Lane>(
        &self,
        queues: &Mutex<HashMap<NodeId, PeerQueue<T>>>,
        node: &NodeId,
    ) -> Arc<Backlog<T>> {
        let mut queues = queues.lock();
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
        let mut tasks = take_ended(&self.inner.queues);
        tasks.extend(take_ended(&self.inner.hint_queues));
        tasks
    }

    /// Ends the queues of nodes that are in no recent view.
    fn close_old_queues(&self, recent: &Recent) {
        self.inner.queues.lock().retain(|node, _| recent.has(node));
        self.inner.hint_queues.lock().retain(|node, _| recent.has(node));
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

    /// Counts the sockets that read a log, on all nodes that answer.
    async fn readers(&self, log: LogId) -> u64 {
        let nodes = {
            let mut recent = self.inner.recent.lock();
            self.refresh(&mut recent);
            recent.nodes()
        };
        let asked = nodes.iter().map(|node| self.ask(node, PushRequest::Readers(log.clone())));
        let count = |answer| if let Ok(PushResponse::Readers(count)) = answer { count } else { 0 };
        join_all(asked).await.into_iter().map(count).sum()
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

/// Takes the tasks of queues that have ended out of one lane.
fn take_ended<T>(queues: &Mutex<HashMap<NodeId, PeerQueue<T>>>) -> Vec<AbortOnDropHandle<()>> {
    let mut queues = queues.lock();
    queues.extract_if(|_, queue| queue.task.is_finished()).map(|(_, queue)| queue.task).collect()
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
                DispatchRequest::Hint { hints, missed, stamp } => {
                    this.hint(&hints, missed);
                    let is_news = stamp.is_news_to(&this.inner.recent.lock().current.stamp());
                    if is_news {
                        this.inner.heard_of_by_hint(stamp, hints);
                    }
                    Ok(DispatchResponse::Done)
                }
                DispatchRequest::Lookup(user) => Ok(this.lookup(user).await),
                DispatchRequest::Readers(log) => Ok(DispatchResponse::Readers(this.readers(log).await)),
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
mod tests;
