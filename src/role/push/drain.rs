//! Emptying a node: when it leaves, and when it has lost its place among the members.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::time::Instant;

use super::displaced::DisplacedSet;
use super::moves::{DRAIN_GRACE, MOVE_JITTER, MOVE_TICK, MoveOrders, moves_per_s};
use super::ownership::Ownership;
use super::registry::{Registry, SessionHandle};
use crate::membership::{NodeState, View};
use crate::message::NodeId;
use crate::wire::close::CloseCode;
use crate::wire::frame::MoveReason;

/// Time over which sessions are closed that have nowhere to go.
const CLOSE_SPREAD: Duration = Duration::from_secs(5);
/// Most sessions closed per second if they have nowhere to go: a small node need not take the whole
/// spread.
const CLOSES_PER_S: u32 = 2_000;

/// How a node empties itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// Move the sessions to other nodes within this time.
    Move(Duration),
    /// There are no other nodes: close the sessions over at most 5 s.
    Close,
}

/// Sends the sessions of a node away.
pub(super) struct Drainer {
    registry: Arc<Registry>,
    ownership: Arc<Ownership>,
    displaced: Arc<DisplacedSet>,
    orders: Arc<MoveOrders>,
    /// How long it takes when the node has lost its place.
    window: Duration,
}

impl Drainer {
    /// Empties `registry`; within `window` when the node has lost its place.
    pub(super) fn new(
        registry: Arc<Registry>,
        ownership: Arc<Ownership>,
        displaced: Arc<DisplacedSet>,
        orders: Arc<MoveOrders>,
        window: Duration,
    ) -> Self {
        Self { registry, ownership, displaced, orders, window }
    }

    /// Sends every session away. Returns when all have gone or the time is over.
    pub(super) async fn drain(&self, how: Drain) {
        match how {
            Drain::Move(window) => self.move_all(window).await,
            Drain::Close => {
                self.close_all().await;
                // Sessions that registered meanwhile.
                self.close_all().await;
            }
        }
    }

    /// This node has lost its place: sends every session to the node that owns its user otherwise.
    pub(super) async fn evacuate(self: Arc<Self>) {
        self.move_all(self.window).await;
    }

    /// Closes every session over the drain window: another process has this node's name.
    pub(super) async fn close_over_window(self: Arc<Self>) {
        close_spread(&self.registry.all(), self.window).await;
        close_spread(&self.registry.all(), Duration::ZERO).await;
    }

    fn shuffled(&self) -> Vec<Arc<SessionHandle>> {
        let mut handles = self.registry.all();
        handles.shuffle(&mut rand::rng());
        handles
    }

    async fn close_all(&self) {
        let handles = self.shuffled();
        let spread = Duration::from_secs(1) * handles.len() as u32 / CLOSES_PER_S;
        close_spread(&handles, CLOSE_SPREAD.min(spread)).await;
    }

    /// Tells every session where to go, at the pace that the window needs. A session that was sent
    /// to a node that then drains too is told again.
    async fn move_all(&self, window: Duration) {
        let began = Instant::now();
        let handles = self.shuffled();
        self.displaced.mark_dirty(handles.iter().map(|handle| handle.user.clone()).collect());
        // The last session told still has its jitter and grace, and must be closed by the end of
        // the window.
        let telling =
            window.saturating_sub(MOVE_JITTER + DRAIN_GRACE + Duration::from_secs(1)).max(window / 4);
        let mut waiting: VecDeque<Arc<SessionHandle>> = handles.into();
        let mut told = HashMap::new();
        let mut source = self.ownership.view();
        let mut view = self.without_own(&source);
        while began.elapsed() < window && (!waiting.is_empty() || self.registry.len() > 0) {
            let newest = self.ownership.view();
            if !Arc::ptr_eq(&newest, &source) {
                source = newest;
                view = self.without_own(&source);
                waiting = self.registry.all().into();
            }
            let paced: f64 = view.members.iter().map(|member| moves_per_s(&view, member)).sum();
            let left = telling.saturating_sub(began.elapsed()).as_secs_f64().max(0.1);
            let per_s = paced.max(waiting.len() as f64 / left);
            let batch = (per_s * MOVE_TICK.as_secs_f64()).ceil().max(1.0) as usize;
            for handle in waiting.drain(..batch.min(waiting.len())) {
                self.tell_to_leave(&view, &handle, &mut told);
            }
            tokio::time::sleep(MOVE_TICK).await;
        }
        self.registry.all().iter().for_each(|handle| close(handle));
    }

    /// The view as other nodes will see it: without this node.
    fn without_own(&self, view: &Arc<View>) -> Arc<View> {
        let own = self.ownership.node();
        match view.member(own) {
            Some(member) if member.state == NodeState::Active => {
                Arc::new(view.without(std::slice::from_ref(own)))
            }
            _ => Arc::clone(view),
        }
    }

    /// Tells each session once per owner, whatever it was told before the drain.
    fn tell_to_leave(
        &self,
        view: &View,
        handle: &SessionHandle,
        told: &mut HashMap<ulid::Ulid, (NodeId, u64)>,
    ) {
        let owner = view.owner(&handle.user).filter(|owner| owner.info.node != *self.ownership.node());
        let Some(owner) = owner else { return close(handle) };
        let target = (owner.info.node.clone(), owner.incarnation);
        if told.insert(handle.id, target.clone()) == Some(target) {
            return;
        }
        if !self.orders.send(view, handle, owner, MoveReason::Drain) {
            close(handle);
        }
    }
}

fn close(handle: &SessionHandle) {
    handle.mailbox.close(CloseCode::Draining, "the node is leaving");
}

async fn close_spread(handles: &[Arc<SessionHandle>], spread: Duration) {
    let began = Instant::now();
    for (n, handle) in handles.iter().enumerate() {
        let due = began + spread.mul_f64(n as f64 / handles.len() as f64);
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        close(handle);
    }
}
